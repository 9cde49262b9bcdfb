"""The commands from end to end, with a tiny random model: bank on disk, questions, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from msa import Document
from msa.cli import main
from msa.demo import material
from msa.memory.bank import MemoryBank
from msa.model.loading import load

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model_folder(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys):
    """Runs a command line in this process; gives exit code, stdout, stderr, and JSON lines."""

    def run(*words: object) -> SimpleNamespace:
        with pytest.raises(SystemExit) as stop:
            main.main([str(word) for word in words])
        out, err = capsys.readouterr()
        code = stop.value.code
        parsed = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        return SimpleNamespace(code=code, out=out, err=err, json=parsed)

    return run


def one_error(result: SimpleNamespace, *parts: str) -> None:
    """The command failed with one line on stderr that says all of this."""
    assert result.code == 1, result
    assert result.err.startswith("Error: ")
    assert result.err.count("\n") == 1, result.err
    for part in parts:
        assert part in result.err


@pytest.fixture
def files(tmp_path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "ada.txt").write_text("Ada was born in London in 1815.")
    (folder / "bob.md").write_text("# Bob\n\nBob lives in Paris.")
    rows = [{"id": f"r{i}", "text": f"Row {i} is about number {i}."} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def bank(run, files, model_folder, tmp_path) -> Path:
    path = tmp_path / "bank"
    assert run("index", files, "--bank", path, "--model", model_folder).code == 0
    return path


def ids(run, bank: Path) -> set[str]:
    return {row["document"]["id"] for row in run("bank", "list", bank, "--limit", 0, "--json").json}


def test_index_again_after_changes_encodes_only_what_changed(run, files, bank, model_folder):
    (files / "ada.txt").write_text("Ada was born in London in 1816.")
    (files / "new.txt").write_text("Something new.")
    result = run("index", files, "--bank", bank, "--model", model_folder, "--json")
    counts = {k: result.json[0][k] for k in ("added", "unchanged", "updated", "failed")}
    assert counts == {"added": 1, "unchanged": 21, "updated": 1, "failed": 0}
    assert result.json[0]["tokens"] < 400
    assert len(ids(run, bank)) == 23


def test_index_reports_bad_files_and_stores_the_others(run, files, bank, model_folder):
    (files / "latin.txt").write_bytes(b"caf\xe9")
    (files / "photo.jpg").write_bytes(b"\xff\xd8\0")
    (files / "rows.jsonl").open("a").write('{"id": "broken"\n{"id": "r1", "text": "again"}\n')
    words = ("index", files, "--bank", bank, "--model", model_folder)
    result = run(*words, "--json")
    assert result.code == 0
    reasons = {Path(f["source"]).name: f["reason"] for f in result.json[0]["failures"]}
    assert reasons["latin.txt"].startswith("not valid UTF-8")
    assert reasons["rows.jsonl:21"].startswith("malformed JSON")
    assert reasons["rows.jsonl:22"].startswith("duplicate id 'r1'")
    assert result.json[0]["ignored"] == 1
    assert run(*words, "--strict").code == 1
    assert len(ids(run, bank)) == 22


def test_files_of_one_name_in_two_folders_stay_apart_and_gone_ones_are_pruned(
    run, files, bank, model_folder, tmp_path
):
    two = tmp_path / "two"
    two.mkdir()
    (two / "ada.txt").write_text("Another Ada.")
    words = ("--bank", bank, "--model", model_folder)
    assert run("index", two, *words, "--json").json[0]["added"] == 1
    assert {"ada.txt", "../two/ada.txt"} <= ids(run, bank)
    result = run("index", tmp_path, *words, "--json").json[0]
    assert (result["added"], result["updated"], result["gone"]) == (0, 0, 0)
    (two / "ada.txt").unlink()
    (files / "bob.md").unlink()
    assert run("index", two, *words, "--json").json[0]["gone"] == 1
    assert run("index", files, *words, "--json").json[0]["gone"] == 1
    result = run("index", tmp_path, *words, "--prune", "--json").json[0]
    assert (result["gone"], result["pruned"]) == (2, 2)
    assert not {"bob.md", "../two/ada.txt"} & ids(run, bank)


def test_a_file_that_was_refused_is_not_where_the_document_of_its_id_came_from(
    run, model_folder, tmp_path
):
    folder, bank = tmp_path / "later", tmp_path / "bank"
    folder.mkdir()
    (folder / "mine.txt").write_text("The file's.")
    words = ("--bank", bank, "--model", model_folder)
    with MemoryBank.create(bank, load(model_folder)) as made:
        made.catalog.origins.remember_root(str(folder))
        made.add([Document("mine.txt", "Somebody else's.")])
    assert run("index", folder, *words, "--skip", "--json").json[0]["failed"] == 1
    (folder / "mine.txt").unlink()
    assert run("index", folder, *words, "--prune", "--json").json[0]["pruned"] == 0
    assert "mine.txt" in ids(run, bank)


def test_a_bank_of_an_earlier_version_keeps_its_ids(run, bank, model_folder, tmp_path):
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "note.txt").write_text("A note.")
    (folder / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    checkpoint = load(model_folder)
    old = tmp_path / "old"
    with MemoryBank.create(old, checkpoint) as made:
        made.add(
            [
                Document("note.txt", "A note."),
                Document("rows.jsonl:1", "one"),
                Document("rows.jsonl:2", "gone"),
            ]
        )
    result = run("index", tmp_path / "more", tmp_path / "files", "--bank", old, "--model",
                 model_folder, "--json").json[0]  # fmt: skip
    assert result["unchanged"] == 2
    assert [gone["id"] for gone in result["gone_documents"]] == ["rows.jsonl:2"]


def test_a_long_document_is_split_and_deleted_as_one(run, files, bank, model_folder):
    book = files / "book.txt"
    book.write_text("\n\n".join(f"Chapter {i}. " + "Words follow words. " * 20 for i in range(12)))
    assert run("index", book, "--bank", bank, "--model", model_folder).code == 0
    parts = {i for i in ids(run, bank) if i.startswith("book.txt#")}
    assert len(parts) > 4
    assert run("bank", "delete", bank, "book.txt", "--json").json[0]["deleted"] == 1
    assert not {i for i in ids(run, bank) if i.startswith("book.txt")}


def test_ask_and_search_answer_from_documents_that_exist(run, bank, model_folder):
    words = ("--bank", bank, "--model", model_folder)
    hits = run("search", "Where was Ada born?", *words, "--top-k", 5, "--json").json
    assert 0 < len(hits) <= 5
    known = ids(run, bank)
    assert {hit["id"] for hit in hits} <= known
    result = run("ask", "Where was Ada born?", *words, "--max-new-tokens", 8, "--json")
    assert result.code == 0
    (answer,) = result.json
    assert answer["question"] == "Where was Ada born?"
    assert {c["id"] for c in answer["citations"]} <= known
    assert answer["rounds"]
    plain = run("ask", "Where was Ada born?", *words, "--max-new-tokens", 8, "--trace")
    assert "round 1 layer 2 routed" in plain.out
    assert "round 1 layer 3 routed" in plain.out
    stream = run("ask", "Where?", *words, "--max-new-tokens", 8, "--stream", "--json").json
    assert [stream[0]["kind"], stream[-1]["kind"]] == ["routing", "answer"]


def test_a_pruned_search_that_is_exact_finds_the_same(run, bank, model_folder):
    words = ("search", "Where was Ada born?", "--bank", bank, "--model", model_folder, "--json")
    assert run(*words, "--slack", 1).json == run(*words).json
    assert run(*words, "--slack", 1.5).code == 2


def test_a_filter_asks_only_documents_with_that_metadata(run, bank, model_folder, tmp_path):
    path = tmp_path / "more.jsonl"
    rows = [{"id": f"m{i}", "text": f"Note {i}.", "user": "eve", "year": 1990} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--bank", bank, "--model", model_folder)
    assert run("index", path, *words).code == 0
    result = run(
        "search", "Note", *words, "--filter", "user=eve", "--filter", "year=1990", "--json"
    )
    assert {hit["id"] for hit in result.json} == {"m0", "m1", "m2"}
    one_error(run("search", "Note", *words, "--filter", "user=nobody"), "filter")
    path = tmp_path / "table.csv"
    path.write_text("id,text,born\nt1,Someone,1910\n")
    assert run("index", path, *words).code == 0
    result = run("search", "Note", *words, "--filter", "born=1910", "--json")
    assert [hit["id"] for hit in result.json] == ["t1"]
    assert run("search", "Note", *words, "--filter", "user").code == 2


def test_bank_add_update_delete_compact_verify_info(run, bank, model_folder):
    words = ("--model", model_folder)
    add = ("bank", "add", bank, "eve")
    one = run(*add, "--text", "Eve sings.", "--metadata", '{"user": "x"}', *words)
    assert (one.code, one.out) == (0, "eve added; the bank holds 23 documents\n")
    one_error(run(*add, "--text", "Eve dances.", *words), "eve")
    assert run(*add, "--text", "Eve dances.", "--update", *words).code == 0
    one_error(run(*add, "--text", "  ", *words), "'eve' is empty")
    one_error(run("bank", "delete", bank, "eve", "nobody"), "nobody")
    assert "eve" in ids(run, bank)
    assert run("bank", "delete", bank, "eve", "r1").code == 0
    assert not {"eve", "r1"} & ids(run, bank)
    info = run("bank", "info", bank, "--json").json[0]
    assert (info["num_ids"], info["num_deleted"] > 0) == (21, True)
    assert "21" in run("bank", "info", bank).out
    assert run("bank", "compact", bank, "--json").json[0]["dropped"] == info["num_deleted"]
    verified = run("bank", "verify", bank)
    assert (verified.code, "sound" in verified.out) == (0, True)


def test_a_damaged_bank_is_reported_and_repaired(run, bank, model_folder):
    segment = next((bank / "segments").glob("*.safetensors"))
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 0xFF
    segment.write_bytes(data)
    result = run("bank", "verify", bank)
    assert result.code == 1
    assert segment.name in result.out
    assert "repair" in result.out
    assert run("bank", "verify", bank, "--json").json[0]["ok"] is False
    assert run("bank", "repair", bank, "--model", model_folder).code == 0
    assert run("bank", "verify", bank).code == 0


def test_the_demo_asks_adds_changes_and_deletes(run, model_folder, tmp_path, monkeypatch):
    folder = tmp_path / "demo" / "real"
    folder.mkdir(parents=True)
    texts = [{"id": f"d{i}", "title": None, "text": f"Town {i} lies north."} for i in range(30)]
    note = {"id": "new", "title": "X", "text": "Town X is new."}
    row = {"question": "X?", "answers": ["new"], "cited": ["new"], "refused": False}
    steps = [
        {**row, "step": "ask", "question": "Where is town 3?", "cited": ["d3"]},
        {**row, "step": "ask", "question": "And its neighbour?", "cited": ["d3", "d4"]},
        {**row, "step": "add", "document": note},
        {**row, "step": "update", "document": {**note, "text": "Town X is old."}},
        {**row, "step": "delete", "deleted": "new", "refused": None},
    ]
    for name, records in (("documents.jsonl", texts), ("questions.jsonl", steps)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(material.resources, "files", lambda _: tmp_path)
    result = run("demo", "--model", model_folder, "--json")
    assert result.code == 0, result.err
    index, *answers = result.json
    assert (index["documents"], index["tokens"] > 300) == (30, True)
    assert [row["step"] for row in answers] == ["ask", "ask", "add", "update", "delete"]
    assert answers[1]["expected"]["cited"] == ["d3", "d4"]
    assert "new" not in json.dumps(answers[4]["rounds"])
    plain = run("demo", "--model", model_folder, "--questions", 1).out
    assert "Where is town 3?\n  round 1  finds d" in plain
    assert "(by " not in plain, "this model finds by meaning alone"
    assert "Town X is old." in plain
    assert "of 4 answers as expected" in plain
    assert not [line for line in plain.splitlines() if len(line) > 100]
    checked = run("demo", "--model", model_folder, "--check")
    assert (checked.code, checked.err.count("\n")) == (1, 1)
    assert "not as expected: 'Where is town 3?': " in checked.err


# Bad input: one line each


def test_a_folder_that_is_no_bank(run, files, tmp_path, model_folder):
    for words in (
        ("bank", "info", files),
        ("bank", "verify", tmp_path / "none"),
        ("ask", "Q?", "--bank", files, "--model", model_folder),
    ):
        one_error(run(*words), "bank")
    result = run("index", files, "--bank", files, "--model", model_folder)
    one_error(result, "files")
    assert not (files / "bank.json").exists()
    one_error(run("bank", "info", files / "ada.txt"), "ada.txt")
    below_a_file = files / "ada.txt" / "bank"
    one_error(run("index", files, "--bank", below_a_file, "--model", model_folder), "ada.txt")


def test_a_model_that_is_not_there_or_damaged(run, files, bank, model_folder, tmp_path):
    words = ("--bank", tmp_path / "new", "--model")
    one_error(run("index", files, *words, tmp_path / "nowhere"), "nowhere")
    assert not (tmp_path / "new").exists()
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model_folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    name = next(iter(weights))
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    one_error(run("index", files, *words, broken), "NaN")
    one_error(run("ask", "Q?", "--bank", bank, "--model", broken))


def test_a_bank_of_another_model(run, files, bank, tiny_tokenizer, tmp_path):
    from conftest import make_tiny_model

    other = tmp_path / "other"
    make_tiny_model(seed=1).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    one_error(run("ask", "Q?", "--bank", bank, "--model", other), "bank")
    one_error(run("index", files, "--bank", bank, "--model", other), "bank")


def test_an_empty_bank_and_a_question_too_long(run, bank, model_folder):
    words = ("--bank", bank, "--model", model_folder)
    one_error(run("ask", "why " * 3000, *words), "question")
    run("bank", "delete", bank, *ids(run, bank))
    one_error(run("ask", "Q?", *words), "document")
    one_error(run("search", "Q?", *words), "document")


def test_a_device_that_is_not_there(run, bank, model_folder):
    words = ("--bank", bank, "--model", model_folder, "--device")
    one_error(run("ask", "Q?", *words, "abacus"), "device 'abacus' cannot be used")
    if not torch.cuda.is_available():
        one_error(run("ask", "Q?", *words, "cuda"), "device 'cuda' cannot be used")


def test_a_second_writer_is_told_and_the_bank_is_unharmed(run, files, bank, model_folder):
    from msa.memory.bank import MemoryBank

    with MemoryBank.open(bank):
        one_error(run("bank", "delete", bank, "r1"), "this very process")
        one_error(run("index", files, "--bank", bank, "--model", model_folder), "this very process")
        assert "r1" in ids(run, bank)
    assert run("bank", "delete", bank, "r1").code == 0


def test_ctrl_c_while_indexing_is_one_line_and_what_was_stored_stays(
    run, files, model_folder, tmp_path
):
    text = "".join(f'{{"text": "Line {i} says something about {i}."}}\n' for i in range(30_000))
    (files / "many.jsonl").write_text(text)
    bank = tmp_path / "bank"
    # a shell that starts tests in the background lets them ignore Ctrl-C, and so their children
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = heed + "from msa.cli.main import main; main()"
    words = ["index", files, "--bank", bank, "--model", model_folder, "--batch-tokens", 2048]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        env=dict(os.environ, PYTHONPATH=str(ROOT / "src"), OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 300  # the machine may be busy
    while not stored(bank):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == ""
    assert err.startswith("Interrupted. The bank holds ")
    assert err.count("\n") == 1
    assert run("bank", "verify", bank).code == 0
    assert len(ids(run, bank)) > 1000


def stored(path: Path) -> int:
    """Documents that a bank holds, while somebody else makes it."""
    from msa.errors import BankError
    from msa.memory.bank import MemoryBank

    try:
        with MemoryBank.open(path, read_only=True) as bank:
            return len(bank)
    except BankError:
        return 0
