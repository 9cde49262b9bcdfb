"""The demo: its files, what it expects, what it prints, and when it fails."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import resources
from types import SimpleNamespace

import pytest

from msa.cli import demo, main
from msa.demo import material as files
from msa.demo.material import FOLDERS, KINDS, Step, load_material, step_of_row
from msa.errors import InputError
from msa.evaluation.metrics import normalize_answer
from msa.inference.options import AskOptions
from msa.memory.store.reports import AddProgress, AddReport, StoredDocument
from msa.text.prompts import PromptTemplate
from msa.types import (
    Answer,
    Citation,
    Document,
    RankedDocument,
    Round,
    RoutedDocument,
    Usage,
)

TEMPLATE = PromptTemplate()
REFUSAL = TEMPLATE.refusal
REAL = resources.files("msa") / "demo" / "real"


# The files that ship


def memory_at_each_step(name: str) -> list[tuple[Step, dict[str, Document]]]:
    """Every step with the documents that are there when it asks."""
    material = load_material(name)
    documents = {document.id: document for document in material.documents}
    states = []
    for step in material.steps:
        if step.document is not None:
            documents = {**documents, step.document.id: step.document}
        if step.deleted is not None:
            documents = {i: d for i, d in documents.items() if i != step.deleted}
        states.append((step, documents))
    return states


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_texts_are_unique(name):
    documents = load_material(name).documents
    assert len({document.id for document in documents}) == len(documents) > 100
    assert len({normalize_answer(document.text) for document in documents}) == len(documents)


@pytest.mark.parametrize("name", FOLDERS)
def test_what_must_be_cited_is_there_and_holds_the_answer(name):
    for step, documents in memory_at_each_step(name):
        assert set(step.cited) <= set(documents), step.question
        if step.refused is False:
            texts = [normalize_answer(documents[i].content) for i in step.cited]
            answers = [normalize_answer(answer) for answer in step.answers]
            assert any(answer in text for answer in answers for text in texts), step.question


@pytest.mark.parametrize("name", FOLDERS)
def test_a_fact_that_is_gone_stands_nowhere(name):
    for step, documents in memory_at_each_step(name):
        text = " ".join(normalize_answer(document.content) for document in documents.values())
        assert not [old for old in step.never if f" {normalize_answer(old)} " in f" {text} "]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_document_is_added_changed_and_deleted_last(name):
    steps = load_material(name).steps
    assert [step.kind for step in steps[-3:]] == ["add", "update", "delete"]
    assert {step.kind for step in steps[:-3]} == {"ask"}
    added, changed, deleted = steps[-3:]
    assert added.document.id == changed.document.id == deleted.deleted
    assert added.document.id not in {document.id for document in load_material(name).documents}
    assert set(added.answers) <= set(changed.never) <= set(deleted.never)
    assert set(changed.answers) <= set(deleted.never)
    assert {len(step.cited) for step in steps if step.refused is False} == {1, 2}


def test_the_real_memory_is_of_the_size_and_kind_that_it_says():
    material = load_material("real")
    names = ("documents.jsonl", "questions.jsonl", "NOTICE.md")
    assert 250e3 < sum(len((REAL / name).read_bytes()) for name in names) < 400e3
    assert 400 <= len(material.documents) <= 600
    asked = [step for step in material.steps if step.kind == "ask"]
    assert len([step for step in asked if len(step.cited) == 1]) >= 5
    assert len([step for step in asked if len(step.cited) == 2]) >= 1
    assert [step.refused for step in asked].count(True) == 1
    assert material.steps[-1].refused
    articles = {re.sub(r"-\d+$", "", step.cited[0]) for step in asked if len(step.cited) == 1}
    assert len(articles) >= 5, "the questions of one hop are on different topics"


def test_an_unanswered_question_has_its_answer_in_no_document():
    material = load_material("real")
    assert all(not step.answers and not step.cited for step in material.steps if step.refused)


def test_the_notice_names_every_source_and_its_licence():
    notice = (REAL / "NOTICE.md").read_text(encoding="utf-8")
    assert "CC BY-SA 4.0" in notice
    rows = [json.loads(line) for line in (REAL / "documents.jsonl").read_text("utf-8").split("\n")
            if line]  # fmt: skip
    for row in rows:
        assert row["title"]
        assert f"`{row['source']}`" in notice
    rows = [json.loads(line) for line in (REAL / "questions.jsonl").read_text("utf-8").split("\n")
            if line]  # fmt: skip
    for row in rows:
        assert row["step"] != "ask" or row["source"].split(" dev")[0] in notice


# Reading them


def write(folder, documents, steps) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("documents.jsonl", documents), ("questions.jsonl", steps)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")


DOCUMENT = {"id": "a", "title": "A", "text": "A is\u2028b."}
ASK = {"step": "ask", "question": "What is A?", "answers": ["b"], "cited": ["a"], "refused": False}


def test_files_are_read_as_they_are_documented(monkeypatch, tmp_path):
    changes = {"document": DOCUMENT, "never": ["c"]}
    write(tmp_path / "demo" / "x", [DOCUMENT], [ASK, {**ASK, "step": "update", **changes}])
    monkeypatch.setattr(files.resources, "files", lambda _: tmp_path)
    material = load_material("x")
    document = Document("a", "A is\u2028b.", "A")
    assert material.documents == (document,)
    asked = Step("ask", "What is A?", ("b",), ("a",))
    changed = replace(asked, kind="update", document=document, never=("c",))
    assert material.steps == (asked, changed)


def test_missing_or_damaged_files_are_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr(files.resources, "files", lambda _: tmp_path)
    with pytest.raises(InputError, match="the demo's documents cannot be read"):
        load_material("real")
    write(tmp_path / "demo" / "real", [DOCUMENT], [["no", "object"]])
    with pytest.raises(InputError, match="cannot be read"):
        load_material("real")


@pytest.mark.parametrize(
    "change",
    [{"step": "sing"}, {"step": "add"}, {"step": "delete"}, {"answers": []}],
    ids=["kind", "no document", "no id", "no answer"],
)
def test_a_step_that_is_not_complete_is_refused(change):
    assert "sing" not in KINDS
    with pytest.raises(ValueError, match="What is A"):
        step_of_row({**ASK, **change})


# What must come of a step

DETAILS = {"rounds": (), "usage": Usage(90, 8, 0.1, 1.5), "stopped": "answered"}


def answer(text: str, *cited: str, **changes) -> Answer:
    citations = tuple(
        Citation(name, 7 + i, name.title(), f"On {name}. It says {text} here.", round=1 + i)
        for i, name in enumerate(cited)
    )
    return Answer(**{"question": "?", "text": text, "citations": citations, **DETAILS, **changes})


TWO = Step("ask", "Who?", ("Ada", "Ada King"), ("a", "b"))
NONE = Step("ask", "Who?", refused=True)
CHANGED = Step("update", "Who?", ("Bob",), ("n",), document=Document("n", "Bob."), never=("Ada",))


@pytest.mark.parametrize(
    ("step", "given", "difference"),
    [
        (TWO, answer("the Ada.", "b", "x", "a"), None),
        (TWO, answer("ada king", "a", "b"), None),
        (TWO, answer("Bob", "a", "b"), "'Bob' instead of 'Ada'"),
        (TWO, answer("Ada", "a"), "'Ada' is right, but b is not cited"),
        (TWO, answer(REFUSAL), f"'{REFUSAL}' instead of 'Ada'"),
        (NONE, answer(REFUSAL), None),
        (NONE, answer("", stopped="not_found"), None),
        (NONE, answer("Ada", stopped="not_found"), None),
        (NONE, answer("Ada", "a"), "'Ada', where no document answers it"),
        (NONE, answer(REFUSAL, "a"), "refused, but a is cited"),
        (CHANGED, answer("Bob", "n"), None),
        (CHANGED, answer("Bob, not Ada", "n"), "holds 'Ada', which is not true any more"),
        (CHANGED, answer("Adam", "n"), "'Adam' instead of 'Bob'"),
        (replace(NONE, refused=None), answer("anything", "x"), None),
        (replace(NONE, refused=None, never=("Ada",)), answer("Ada", "x"), "not true any more"),
    ],
)
def test_what_differs_is_said_and_nothing_else(step, given, difference):
    found = step.difference(given, TEMPLATE)
    assert (found is None) == (difference is None), found
    assert difference is None or difference in found


# The sentence in which an answer stands

TEXT = "It began. In 1951 the F.S.O. works opened in the town! Then came 1978, and an end."


@pytest.mark.parametrize(
    ("text", "said", "sentence"),
    [
        (TEXT, "1951", "In 1951 the F.S.O. works opened in the town!"),
        (TEXT, "the town", "In 1951 the F.S.O. works opened in the town!"),
        (TEXT, "it began.", "It began."),
        (TEXT, "an end", "Then came 1978, and an end."),
        ("It is by Margaret N. Fall. So.", "Fall", "It is by Margaret N. Fall."),
        ("No\x1b[31m end\nhere at all", "end", "No [31m end here at all"),
    ],
)
def test_the_sentence_around_the_answer_is_found(text, said, sentence):
    citation = Citation("a", 7, None, text, round=1)
    found = demo.find_evidence(answer(said, citations=(citation,)))
    assert found.sentence == sentence
    assert found.sentence[found.start : found.end].lower() == said.rstrip(".").lower()


def test_the_document_read_last_comes_first_and_a_span_before_all():
    spanned = Citation("s", 1, None, "Ada, or Ada.", round=1, span=(8, 11))
    late, early = (Citation(name, 7, None, "By Ada.", round=1) for name in ("late", "early"))
    found = demo.find_evidence(answer("Ada", citations=(early, late)))
    assert found.citation.id == "late"
    found = demo.find_evidence(answer("Ada", citations=(early, spanned, late)))
    assert (found.citation.id, found.start) == ("s", 8)
    assert demo.find_evidence(answer("Bob", citations=(early, late))) is None
    assert demo.find_evidence(answer("", citations=(early, late))) is None


# The command, with a scripted engine

DOCUMENTS = [{"id": f"town-{i}", "title": "Town", "text": f"Town {i} lies here."} for i in range(9)]
NOTE = {"id": "note", "title": "Note", "text": "Ada orders the glass."}
STEPS = [
    {**ASK, "question": "Where is town 3?", "answers": ["here"], "cited": ["town-3"]},
    {**ASK, "question": "And its neighbour?", "answers": ["far"], "cited": ["town-3", "town-4"]},
    {**ASK, "question": "What is red?", "answers": [], "cited": [], "refused": True},
    {**ASK, "question": "Who orders?", "step": "add", "answers": ["Ada"], "cited": ["note"],
     "document": NOTE},
    {**ASK, "question": "Who orders?", "step": "update", "answers": ["Bob"], "cited": ["note"],
     "document": {**NOTE, "text": "Bob orders the glass."}, "never": ["Ada"]},
    {**ASK, "question": "Who orders?", "step": "delete", "answers": [], "cited": [],
     "refused": True, "deleted": "note", "never": ["Ada", "Bob"]},
]  # fmt: skip
SCRIPT = ["here", "far", REFUSAL, "Ada", "Bob", REFUSAL]


class FakeBank(dict):
    """Documents by id."""

    template = TEMPLATE

    @classmethod
    def create(cls, path, checkpoint):
        return cls()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def add(self, documents, *, commit_tokens=0, progress=None):
        documents = list(documents)
        self |= {document.id: document for document in documents}
        count = len(documents)
        if progress is not None:
            progress(AddProgress(count, count, 0, 0, 0, 120 * count, 2.0))
        return AddReport(count, 0, 0, (), count, 120 * count, 2.0)

    def update(self, document):
        self[document.id] = document

    def delete(self, name):
        del self[name]

    def get(self, name):
        return StoredDocument(self[name], 1, 9, 1)

    def info(self):
        return SimpleNamespace(segment_bytes=12_300_000)


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """The demo on small documents; the answers are those of the list that this gives."""
    rows, answers = list(STEPS), list(SCRIPT)

    class FakeEngine:
        def __init__(self, bank) -> None:
            self.bank, self.asked = bank, 0

        def ask(self, question):
            row = rows[self.asked]
            text, self.asked = answers[self.asked], self.asked + 1
            names = [] if text == REFUSAL else row["cited"] or ["town-1"]
            given = answer(text, *names)
            ranked = [
                RankedDocument("town-5", 6, 0.9, 0.8, (2, 6), 0.7),
                RankedDocument("town-3", 4, 0.8, 0.1, (2,), None),
                RankedDocument("town-6", 7, 0.7, 0.1, (), 0.9),
                RankedDocument("town-7", 8, 0.6, 0.0, (6,), None),
            ]
            routed = {2: (RoutedDocument("town-3", 4, 0.9),)}
            rounds = [Round(1, routed, given.citations[:1], tuple(ranked))]
            rounds += [Round(c.round, routed, (c,), ()) for c in given.citations[1:]]
            return replace(given, question=question, rounds=tuple(rounds))

    checkpoint = SimpleNamespace(
        model=None,
        tokenizer=None,
        template=TEMPLATE,
        ask_options=AskOptions(lexical_weight=0.5),
        name="tiny",
    )
    loaded = []

    def load_model(name, device):
        loaded.append(name)
        return checkpoint

    for name in FOLDERS:
        write(tmp_path / "demo" / name, DOCUMENTS, STEPS)
    monkeypatch.setattr(files.resources, "files", lambda _: tmp_path)
    monkeypatch.setattr(demo, "load_model", load_model)
    # the engine first: importing it later would bind the stand-in of the bank for good
    monkeypatch.setattr("msa.inference.engine.MemoryEngine", FakeEngine)
    monkeypatch.setattr("msa.memory.bank.MemoryBank", FakeBank)
    return SimpleNamespace(rows=rows, answers=answers, loaded=loaded)


@pytest.fixture
def run(capsys):
    def run(*words: str) -> SimpleNamespace:
        with pytest.raises(SystemExit) as stop:
            main.main([str(word) for word in words])
        captured = capsys.readouterr()
        return SimpleNamespace(code=stop.value.code, out=captured.out, err=captured.err)

    return run


def test_it_shows_what_is_found_how_what_is_read_and_the_sentence(run, scripted):
    result = run("demo", "--model", "tiny", "--check")
    assert result.code == 0, result.err
    assert result.err == ""
    out = result.out
    for part in (
        "9 passages of Wikipedia",
        "1,080 tokens read in 2.0 s (540 tokens/s)",
        "12.3 MB on disk",
        "Where is town 3?\n  round 1  finds town-5 (by meaning and words), town-3 (by meaning), "
        "town-6 (by words), and",
        "reads [7] town-3\n",
        "  round 2  reads [8] town-4\n",
        "  answer   here  ✓  1.5 s\n",
        "[7] It says here here.",
        f"{REFUSAL}  ✓",
        "+ note",
        "~ note",
        "- note",
        "6 of 6 answers as expected, 1.5 s a question",
        "docs/results",
        "msa index FOLDER --bank bank",
        "msa ask",
    ):
        assert part in out, part
    headings = [line for line in out.splitlines() if line.endswith("──")]
    titles = [heading.strip("─ ").split(":")[0] for heading in headings]
    assert titles[:-1] == [
        "Memory Sparse Attention",
        "One hop",
        "Two hops",
        "No answer",
        "Add a document",
        "Change it",
        "Delete it",
    ]
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("index", "said", "difference"),
    [
        (0, "there", "'Where is town 3?': 'there' instead of 'here'"),
        (2, "blue", "'What is red?': 'blue', where no document answers it"),
        (4, "Ada", "'Who orders?': 'Ada' holds 'Ada', which is not true any more"),
        (5, "Bob", "'Who orders?': 'Bob' holds 'Bob'"),
    ],
)
def test_check_fails_in_one_line_when_an_answer_differs(run, scripted, index, said, difference):
    scripted.answers[index] = said
    result = run("demo", "--model", "tiny", "--check")
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert result.err.startswith("Error: 1 of 6 questions not as expected: ")
    assert difference in result.err
    assert "5 of 6 answers as expected" in result.out
    assert "✗" in result.out
    assert run("demo", "--model", "tiny").code == 0, "without --check it is only shown"


def test_json_is_an_object_per_question_behind_one_of_the_memory(run, scripted):
    scripted.answers[1] = "near"
    result = run("demo", "--model", "tiny", "--json", "--check")
    assert result.code == 1
    first, *rows = [json.loads(line) for line in result.out.splitlines()]
    assert (first["step"], first["documents"], first["model"]) == ("index", 9, "tiny")
    assert [row["step"] for row in rows] == ["ask", "ask", "ask", "add", "update", "delete"]
    assert rows[0]["expected"]["cited"] == ["town-3"]
    differences = [row["difference"] for row in rows]
    assert differences[1] == "'near' instead of 'far'"
    assert differences[:1] + differences[2:] == [None] * 5
    assert rows[0]["citations"][0]["id"] == "town-3"


def test_fewer_questions_leave_the_changes_in(run, scripted):
    del scripted.answers[1:3], scripted.rows[1:3]
    result = run("demo", "--model", "tiny", "--questions", 1, "--json")
    steps = [json.loads(line)["step"] for line in result.out.splitlines()]
    assert steps == ["index", "ask", "add", "update", "delete"]


@pytest.mark.parametrize(
    ("default", "words", "loaded", "worlds", "note"),
    [
        ("smollm2-135m", (), [None], False, False),
        ("smollm2-135m", ("--worlds",), ["worlds"], True, False),
        ("smollm2-135m", ("--worlds", "--model", "x"), ["x"], True, False),
        ("worlds", (), ["worlds"], True, True),
        ("worlds", ("--json",), ["worlds"], True, False),
        ("worlds", ("--model", "x"), ["x"], False, False),
    ],
)
def test_the_small_model_gets_its_worlds_and_any_other_the_real_texts(
    run, scripted, monkeypatch, default, words, loaded, worlds, note
):
    monkeypatch.setenv("MSA_MODEL", default)
    result = run("demo", *words)
    assert result.code == 0
    assert scripted.loaded == loaded
    if "--json" not in words:
        assert ("invented worlds" in result.out) == worlds
        assert ("docs/results" in result.out) != worlds
    assert ("the small one (worlds)" in result.err) == note
    assert result.err.count("\n") == note


def test_marks_are_words_where_the_terminal_lacks_them(scripted, monkeypatch, run):
    monkeypatch.setattr("rich.console.Console.encoding", property(lambda _: "latin-1"))
    out = run("demo", "--model", "tiny").out
    assert "here  right" in out
    assert "✓" not in out


def test_a_deleted_document_that_is_still_found_is_a_fault(run, scripted, monkeypatch):
    monkeypatch.setattr(FakeBank, "delete", lambda self, name: None)
    result = run("demo", "--model", "tiny")
    assert result.code == 1
    assert "the deleted document note was still found" in result.err
