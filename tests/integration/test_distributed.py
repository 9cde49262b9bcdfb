"""One bank over several processes: shards that answer, workers that encode; all of them on Ray."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bank_tools import LAYERS, ids_of, make_document, make_documents, states_of
from conftest import make_tiny_model
from msa import Document, MemoryEngine
from msa.cli import main
from msa.errors import (
    BankCorruptError,
    EmptyBankError,
    InputError,
    ModelError,
    WorkerError,
)
from msa.memory.bank import MemoryBank
from msa.memory.distributed.encoding_pool import FOLDER_PREFIX, EncodingPool
from msa.memory.distributed.sharded_bank import ShardedBank
from msa.memory.loaded.loaded_bank import LoadedBank

ray = pytest.importorskip("ray")
# Files of Ray's own that it leaves to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

WIDTH = 2 * 16  # KV heads, head dim
QUESTIONS = ["Which river?", "Whose lamp is it?", "Who wrote the letter?", "Where is the garden?"]
PATIENCE = 300.0  # seconds to wait for a worker: for a hang, not for a slow machine


@pytest.fixture(scope="module", autouse=True)
def cluster(one_ray):
    """One cluster for all tests; its workers find the tests' modules and the package."""
    paths = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    ray.init(include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()
    gc.collect()  # its files, where that is ignored


def pids(actors) -> list[int]:
    return ray.get([actor.__ray_call__.remote(lambda self: os.getpid()) for actor in actors])


def queries(seed, batch, tokens=5, zero=False):
    """Routing vectors and mask; rows have 0 to `tokens` routing tokens."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(batch, tokens, WIDTH, generator=generator) / WIDTH**0.5
    mask = torch.arange(tokens) < torch.randint(0, tokens + 1, (batch, 1), generator=generator)
    mask[0, 0] = True
    return (vectors * 0 if zero else vectors), mask


def same_answers(view, other, zero=False) -> None:
    """Two views route to the same documents and give the same content."""
    for layer in LAYERS:
        vectors, mask = queries(layer, 4, zero=zero)
        mine, theirs = (v.route(layer, vectors, mask) for v in (view, other))
        # scores that are equal but for rounding may be in another order
        assert mine.documents.sort().values.tolist() == theirs.documents.sort().values.tolist()
        torch.testing.assert_close(mine.scores, theirs.scores, atol=1e-5, rtol=0)
        numbers = [v.rows_to_numbers(mine.documents).tolist() for v in (view, other)]
        assert numbers[0] == numbers[1]
        one, two = (v.content(layer, mine) for v in (view, other))
        assert torch.equal(one.mask, two.mask)
        for a, b in ((one.keys, two.keys), (one.values, two.values)):
            torch.testing.assert_close(a[one.mask], b[two.mask])


def bank_corpus() -> list[Document]:
    """Documents of varied length, some of them equal."""
    documents = make_documents(60)
    twins = {7: "twin-a", 31: "twin-b", 55: "twin-c"}
    for row, name in twins.items():
        documents[row] = Document(name, "The lamp is in the garden.", metadata={"seed": 0})
    return documents


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    model = make_tiny_model(max_position_embeddings=4096)
    digits = [tiny_tokenizer.convert_tokens_to_ids(c) for c in "0123456789"]
    with torch.no_grad():  # the number stands in the encoded text: equal texts leave equal states
        weight = model.get_input_embeddings().weight
        weight[digits] = weight[digits[0]].clone()
    return model


@pytest.fixture
def bank(model, tiny_tokenizer, tmp_path):
    documents = bank_corpus()
    with MemoryBank.create(tmp_path / "bank", model, tiny_tokenizer) as bank:
        for start in range(0, 60, 20):
            bank.add(documents[start : start + 20])
        bank.delete(["doc5", "doc6", "doc44"])
        yield bank


# ---- shards


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_select_and_fetch_what_one_process_does(bank, shards):
    alone = LoadedBank(bank)
    with ShardedBank(bank, shards=shards, timeout=PATIENCE) as memory:
        same_answers(memory.view(), alone.view())
        same_answers(memory.view(top_k=40), alone.view(top_k=40), zero=True)  # all scores equal
        some = {"seed": None}
        assert 0 < len(memory.view(some)) == len(alone.view(some)) < len(memory)
        same_answers(memory.view({"seed": 0}), alone.view({"seed": 0}))
        engine = MemoryEngine(bank, memory=memory, max_new_tokens=8)
        one = MemoryEngine(bank, max_new_tokens=8)
        for mine, theirs in zip(engine.ask(QUESTIONS), one.ask(QUESTIONS), strict=True):
            assert (mine.text, mine.citations) == (theirs.text, theirs.citations)


def test_processes_share_shards_until_the_one_that_writes_closes(bank):
    with (
        ShardedBank(bank, shards=2, timeout=PATIENCE, shared=True) as memory,
        MemoryBank.open(bank.path, bank.model, bank.tokenizer, read_only=True) as reading,
    ):
        actors = list(memory._shards.actors)
        with ShardedBank(reading, shards=2, timeout=PATIENCE, shared=True) as other:
            assert pids(other._shards.actors) == pids(actors)
            before = memory.view()
            old = before.route(2, *queries(1, 3)).documents
            bank.add([make_document("new")])
            assert other.refresh()  # and gives up the state that `before` goes on to ask
            assert len(other) == len(before) + 1
            assert before.route(2, *queries(1, 3)).documents.tolist() == old.tolist()
        assert memory.refresh()
        same_answers(memory.view(), LoadedBank(bank).view())
    with pytest.raises(ray.exceptions.RayActorError):
        pids(actors)


def test_fewer_documents_than_shards_and_none(model, tiny_tokenizer, tmp_path):
    with (
        MemoryBank.create(tmp_path / "few", model, tiny_tokenizer) as bank,
        ShardedBank(bank, shards=3, timeout=PATIENCE) as memory,
    ):
        with pytest.raises(EmptyBankError, match="holds no documents"):
            memory.route(2, *queries(0, 1))
        bank.add(make_documents(2))
        assert memory.refresh()
        same_answers(memory.view(), LoadedBank(bank).view())


def test_what_comes_and_goes_is_seen_at_the_next_refresh(bank):
    with ShardedBank(bank, shards=2, timeout=PATIENCE) as memory:
        before = memory.view()
        old = before.route(2, *queries(1, 3)).documents
        assert not memory.refresh()
        bank.add([make_document(f"new{i}") for i in range(25)])
        bank.delete("doc9")
        assert memory.refresh()
        same_answers(memory.view(), LoadedBank(bank).view())
        assert before.route(2, *queries(1, 3)).documents.tolist() == old.tolist()
        bank.compact()
        assert memory.refresh()
        same_answers(memory.view(), LoadedBank(bank).view())


def test_a_shard_that_is_killed_comes_back_and_the_question_goes_on(bank):
    alone = LoadedBank(bank).view()
    with ShardedBank(bank, shards=2, timeout=PATIENCE) as memory:
        view = memory.view()
        os.kill(pids(memory._shards.actors)[1], signal.SIGKILL)
        same_answers(view, alone)
        os.kill(pids(memory._shards.actors)[0], signal.SIGKILL)
        bank.add([make_document("later")])
        with pytest.raises(WorkerError, match="bank has changed meanwhile; ask again"):
            view.route(2, *queries(0, 1))
        assert memory.refresh()
        same_answers(memory.view(), LoadedBank(bank).view())


def test_a_shard_that_is_lost_or_silent_is_one_clear_error(bank):
    with ShardedBank(bank, shards=2, timeout=PATIENCE) as memory:
        memory._shards._timeout = 1.0
        (process, _) = pids(memory._shards.actors)
        os.kill(process, signal.SIGSTOP)
        try:
            with pytest.raises(
                WorkerError, match=r"^a shard of the bank did not answer within 1 s$"
            ):
                memory.route(2, *queries(0, 1))
        finally:
            os.kill(process, signal.SIGCONT)
        memory._shards._timeout = PATIENCE
        ray.kill(memory._shards.actors[1], no_restart=True)
        with pytest.raises(WorkerError, match="a shard of the bank died"):
            memory.route(2, *queries(0, 1))


def test_a_damaged_segment_is_told_by_the_shard_that_needs_it(bank):
    segment = sorted(bank.segments_folder.iterdir())[-1]
    data = bytearray(segment.read_bytes())
    data[200] ^= 1
    segment.write_bytes(data)
    with pytest.raises(BankCorruptError, match=f"'{segment.name}' .* is damaged"):
        ShardedBank(bank, shards=2, timeout=PATIENCE)


@pytest.mark.parametrize("wrong", [{"shards": 0}, {"timeout": 0}])
def test_numbers_are_checked(bank, wrong):
    with pytest.raises(InputError, match=r"shards=\d+, timeout="):
        ShardedBank(bank, **wrong)


def test_without_ray_the_next_step_is_named(bank, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for make in (ShardedBank, lambda bank: EncodingPool(bank, 2)):
        with pytest.raises(InputError, match=r"pip install 'msa-memory\[distributed\]'"):
            make(bank)


# ---- workers that encode


def worker_documents() -> list[Document]:
    """More than one window, with long ones to be split and bad ones among them."""
    documents = make_documents(80)
    documents[17] = make_document("long", words=2500)
    documents[40] = Document("empty", "  ")
    return documents


def test_workers_make_the_bank_that_one_process_makes(model, tiny_tokenizer, tmp_path):
    documents, seen = worker_documents(), []
    with MemoryBank.create(tmp_path / "one", model, tiny_tokenizer) as one:
        expected = one.add(documents, commit_tokens=500)
        with MemoryBank.create(tmp_path / "many", model, tiny_tokenizer) as many:
            with EncodingPool(many, 3, timeout=PATIENCE) as pool:
                report = many.add(
                    documents,
                    commit_tokens=500,
                    pool=pool,
                    progress=lambda p: seen.append(len(many)),
                )
                again = many.add(documents, pool=pool)
            assert not list(many.segments_folder.glob(f"{FOLDER_PREFIX}*"))
            assert ids_of(many) == ids_of(one)
            mine, theirs = states_of(many), states_of(one)
            assert mine.keys() == theirs.keys()
            for number, layers in theirs.items():
                for layer, tensors in layers.items():
                    for a, b in zip(mine[number][layer], tensors, strict=True):
                        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
            found = many.verify()
            assert found.ok, found.problems
    assert (report.added, report.parts, report.failed) == (
        expected.added,
        expected.parts,
        expected.failed,
    )
    assert again.unchanged == report.added
    assert len(seen) > 3
    assert seen == sorted(seen)


def test_a_worker_that_is_killed_costs_nothing(model, tiny_tokenizer, tmp_path):
    killed = []

    def kill(progress):
        if not killed:
            killed.extend(pids(pool._workers))
            os.kill(killed[0], signal.SIGKILL)

    documents = worker_documents()
    with MemoryBank.create(tmp_path / "bank", model, tiny_tokenizer) as bank:
        with EncodingPool(bank, 2, timeout=PATIENCE) as pool:
            report = bank.add(documents, commit_tokens=300, pool=pool, progress=kill)
        assert report.added == len(documents) - 1
        assert bank.verify().ok
    with MemoryBank.open(tmp_path / "bank", model, tiny_tokenizer) as bank:
        assert not bank.verify().orphans
        assert bank.info().num_ids == len(documents) - 1


def test_what_a_worker_cannot_do_is_one_clear_error(model, tiny_tokenizer, tmp_path):
    broken = make_tiny_model(max_position_embeddings=4096)
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(float("nan"))
    with MemoryBank.create(tmp_path / "bank", broken, tiny_tokenizer) as bank:
        with (
            EncodingPool(bank, 2, timeout=PATIENCE) as pool,
            pytest.raises(ModelError, match="infinite or NaN states"),
        ):
            bank.add(make_documents(5), pool=pool)
        assert not len(bank)
    with pytest.raises(InputError, match="workers=0"):
        EncodingPool(bank, 0)


# ---- commands


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main.main([str(word) for word in words])
    return int(stop.value.code or 0)


def test_commands_over_workers_and_shards(tmp_path, capsys):
    lines = [{"id": f"d{i}", "text": f"Person {i} lives in town {i}."} for i in range(30)]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    bank = str(tmp_path / "bank")
    where = ["--bank", bank, "--model", "worlds", "--json"]
    assert not command("index", path, *where, "--workers", 2)
    assert json.loads(capsys.readouterr().out)["added"] == 30
    assert not command("search", "Who lives in town 7?", *where)
    alone = [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()]
    assert not command("search", "Who lives in town 7?", *where, "--shards", 2)
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == alone
    assert command("search", "Who?", *where, "--shards", 2, "--slack", 0.5) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_indexing_that_is_killed_goes_on_with_the_same_command(tmp_path, capsys):
    lines = [{"id": f"d{i}", "text": f"Person {i} lives in town {i}. " * 10} for i in range(60)]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    bank = tmp_path / "bank"
    words = [sys.executable, "-c", KILLED, str(path), str(bank)]
    run = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout.readline() == "committed\n"
    finally:
        run.kill()
        run.wait(PATIENCE)
        run.stdout.close()
    assert not command("index", path, "--bank", bank, "--model", "worlds", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["unchanged"] > 0
    assert report["added"] + report["unchanged"] == 60
    with MemoryBank.open(bank) as found:
        assert found.verify().ok
        assert not found.verify().orphans


KILLED = """
import sys, time
from msa import MemoryBank, load
from msa.memory.distributed.encoding_pool import EncodingPool
from msa.text.loaders import load_documents
bank = MemoryBank.create(sys.argv[2], load("worlds"))
documents = [found.document for found in load_documents([sys.argv[1]])]
def progress(state):
    print("committed", flush=True)
    time.sleep(60)
with EncodingPool(bank, 2) as pool:
    bank.add(documents, pool=pool, commit_tokens=1000, progress=progress)
"""
