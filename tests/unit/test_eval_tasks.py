"""The registry of tasks, tasks that are folders, BEIR's format, and how the suite runs them."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation_tools import write_question_set, write_rows
from msa.errors import InputError, MissingMaterialError
from msa.evaluation.beir import read_beir
from msa.evaluation.metrics import contains, ndcg, uses_wrong
from msa.evaluation.question_sets import Question, QuestionSet
from msa.evaluation.suite import changed_documents, fitting, run_path, size_of, variants
from msa.evaluation.systems import Outcome, ranking
from msa.evaluation.tasks import TASKS, all_tasks, find_tasks
from msa.evaluation.tasks.base import Change, Changed, Request, Task, answer_scores
from msa.types import Document


def request(**more) -> Request:
    return Request(count_tokens=lambda text: len(text.split()), **more)


def outcome(answer="x", refused=False, **more) -> Outcome:
    return Outcome(answer, refused, (), (), 1, "answered", 0.0, 1, 1, **more)


# ---- the registry


def test_tasks_are_found_by_name_family_and_pattern():
    family = [name for name in TASKS if name.startswith("ruler/")]
    assert [task.name for task in find_tasks(["ruler"])] == family
    assert [task.name for task in find_tasks(["ruler/", "ruler/vt"])] == family
    assert [task.name for task in find_tasks(["ruler/niah_s*", "ruler/vt"])] == [
        name for name in family if "niah_s" in name or name.endswith("/vt")
    ]
    assert all(name == task.name for name, task in TASKS.items())


def test_an_unknown_task_is_one_line_with_the_nearest():
    with pytest.raises(InputError, match=r"no task 'ruler/niah_singl_1'; the nearest: ruler/niah_"):
        find_tasks(["ruler", "ruler/niah_singl_1"])
    with pytest.raises(InputError, match="give its folder with --data"):
        find_tasks(["qa/squad"])


def test_tasks_without_their_material_say_so():
    with pytest.raises(MissingMaterialError, match="give --texts FOLDER"):
        request().text_folder()
    with pytest.raises(MissingMaterialError, match="give --data FOLDER"):
        request().data_folder()


# ---- folders of question sets


@pytest.fixture
def data(tmp_path):
    write_question_set(tmp_path / "data" / "tiny")
    return tmp_path / "data"


def test_every_held_out_set_is_a_task(data):
    write_question_set(data / "trained").joinpath("questions.dev.jsonl.gz").rename(
        data / "trained" / "questions.train.jsonl.gz"
    )
    names = [name for name in all_tasks(data) if name not in TASKS]
    assert names == ["qa/tiny", "curve/tiny"]
    assert [n for n in all_tasks(data / "tiny") if n not in TASKS] == names
    with pytest.raises(InputError, match="holds no set with a split test or dev"):
        all_tasks(data / "trained")
    with pytest.raises(InputError, match="no such folder"):
        all_tasks(data / "nowhere")


def test_questions_are_of_test_or_else_of_dev(data):
    (task,) = find_tasks(["qa/tiny"], data)
    assert task.load(request()).split == "dev"
    rows = [{"id": "t1", "question": "Where is Rome?", "answers": ["Tiber"], "gold": ["rome"]}]
    write_rows(data / "tiny" / "questions.test.jsonl.gz", rows)
    found = task.load(request())
    assert found.split == "test"
    assert [q.id for q in found.questions] == ["t1", "t1/hidden"]
    with pytest.raises(InputError, match=r"holds no questions.all"):
        task.load(request(split="all"))


def test_some_questions_are_asked_without_their_documents(data):
    rows = [
        {"id": f"t{i}", "question": "Where?", "answers": ["x"], "gold": ["rome"]} for i in range(12)
    ]
    write_rows(data / "tiny" / "questions.test.jsonl.gz", rows)
    (task,) = find_tasks(["qa/tiny"], data)
    questions = task.load(request(count=10)).questions
    assert [q.kind for q in questions] == ["one document"] * 10 + ["taken out"] * 2
    hidden = questions[-1]
    assert (hidden.answers, hidden.gold, hidden.hidden) == ((), (), ("rome",))
    assert task.score(hidden, outcome(refused=True))["score"] == 1
    assert task.score(hidden, outcome())["score"] == 0
    assert len({q.id for q in questions}) == 12


def test_a_set_with_unanswerable_questions_has_them_asked(data):
    rows = [{"id": "t1", "question": "Where?", "answers": ["x"], "gold": ["cake", "ada"]}]
    write_rows(data / "tiny" / "questions.test.jsonl.gz", rows)
    none = [{"id": "t1", "question": "Who?", "answers": [], "gold": [], "unanswerable": True}]
    write_rows(data / "tiny" / "questions.test_unanswerable.jsonl.gz", none)
    questions = find_tasks(["qa/tiny"], data)[0].load(request()).questions
    assert [(q.id, q.kind) for q in questions] == [
        ("t1", "two documents"),
        ("t1/unanswerable", "no answer"),
    ]


def test_a_curve_begins_with_the_gold_documents_and_grows_to_its_size(data, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("\n\n".join(f"Paragraph {i} " + "word " * 80 for i in range(60)))
    (task,) = find_tasks(["curve/tiny"], data)
    sizes = (1, 40, 1000, 3000)
    sets = [task.load(request(size=size, texts=texts, count=2)) for size in sizes]
    gold = {i for q in sets[0].questions for i in q.gold}
    assert {d.id for d in sets[0].documents} == gold
    for small, large, size in zip(sets, sets[1:], sizes[1:], strict=False):
        assert large.questions == small.questions
        assert large.documents[: len(small.documents)] == small.documents
        tokens = sum(len(d.content.split()) for d in large.documents)
        assert size * 0.5 < tokens <= size
        assert large.data_hash != small.data_hash
    with pytest.raises(MissingMaterialError, match="give --texts"):
        task.load(request(size=1000, count=2))
    with pytest.raises(InputError, match="were asked for; give a folder with more text"):
        task.load(request(size=100_000, count=2, texts=texts))


def test_the_worlds_grow_around_the_same_questions():
    (task,) = find_tasks(["curve/worlds"])
    small, large = (task.load(request(size=size, count=6)) for size in (1000, 30_000))
    assert small.questions == large.questions
    assert {q.kind for q in small.questions} == {"one hop", "two hops"}
    assert large.documents[: len(small.documents)] == small.documents
    assert sum(len(d.content.split()) for d in large.documents) <= 30_000
    assert len(large.documents) > len(small.documents)
    ids = {d.id for d in small.documents}
    assert all(set(q.gold) <= ids for q in small.questions)
    assert task.load(request(size=1000, count=6, seed=1)).questions != small.questions


# ---- BEIR


CORPUS = [
    {"_id": "d1", "title": "Rome", "text": "It lies on the Tiber."},
    {"_id": "d2", "title": "", "text": "The capital of Norway."},
    {"_id": "d3", "text": "Flour and butter."},
]
QUERIES = [
    {"_id": "a", "text": "Tiber"},
    {"_id": "b", "text": "capital"},
    {"_id": "c", "text": "?"},
]
QRELS = "query-id\tcorpus-id\tscore\na\td1\t2\na\td3\t1\nb\td2\t1\nc\td2\t0\n"


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "beir" / "mini"
    (folder / "qrels").mkdir(parents=True)
    write_rows(folder / "corpus.jsonl", CORPUS)
    write_rows(folder / "queries.jsonl", QUERIES)
    (folder / "qrels" / "test.tsv").write_text(QRELS)
    return folder


def test_a_folder_of_beir_is_read_directly(beir):
    found = read_beir(beir)
    assert found.questions.documents[:2] == (
        Document("d1", "It lies on the Tiber.", "Rome"),
        Document("d2", "The capital of Norway."),
    )
    assert [(q.id, q.text, q.gold) for q in found.questions.questions] == [
        ("a", "Tiber", ("d1", "d3")),
        ("b", "capital", ("d2",)),
    ]
    assert found.grades == {"a": {"d1": 2, "d3": 1}, "b": {"d2": 1}}
    for name in ("corpus", "queries"):
        path = beir / f"{name}.jsonl"
        path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert read_beir(beir) == found
    assert len(read_beir(beir, count=1).questions.questions) == 1


def test_beir_is_scored_by_grades(beir):
    (task,) = find_tasks(["beir"], beir.parent)
    assert (task.name, task.metric, task.ranks) == ("beir/mini", "nDCG@10", 100)
    question = task.load(request()).questions[0]
    assert task.score(question, ranking(["d1", "d3"], 0.0))["score"] == 1
    found = task.score(question, ranking(["d3", "d2", "d1"], 0.0))
    assert 0 < found["score"] < 1
    assert (found["recall@1"], found["recall@100"]) == (0.5, 1.0)
    (beir / "qrels" / "test.tsv").rename(beir / "qrels" / "dev.tsv")
    assert task.load(request()).split == "dev"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("corpus.jsonl", "{}\n", r"corpus.jsonl:1: expected an object with a text as _id"),
        ("corpus.jsonl", '{"_id": "a"}\n', r"corpus.jsonl:1: text is None; expected a text"),
        ("corpus.jsonl", "x\n", r"corpus.jsonl:1: not valid JSON"),
        ("queries.jsonl", '{"_id": "a", "text": "x"}\n' * 2, r":2: the _id 'a' was used before"),
        ("qrels/test.tsv", "a d1 1\n", r"test.tsv:1: 'a d1 1'; expected query-id, corpus-id and"),
        ("qrels/test.tsv", "a\td9\t1\n", r"test.tsv:1: there is no document 'd9'"),
        ("qrels/test.tsv", "z\td1\t1\n", r"test.tsv:1: there is no query 'z'"),
        ("qrels/test.tsv", "a\td1\t0\n", r"no query has a relevant document in qrels/test.tsv"),
    ],
)
def test_bad_lines_of_beir_are_named(beir, name, text, message):
    (beir / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_beir(beir)


def test_missing_files_of_beir_are_named(beir):
    with pytest.raises(InputError, match=r"dev.tsv: no such file; the splits there are: test"):
        read_beir(beir, "dev")
    (beir / "queries.jsonl").unlink()
    with pytest.raises(InputError, match=r"holds no queries.jsonl"):
        read_beir(beir)


def test_ndcg_is_that_of_the_best_order():
    grades = {"a": 3.0, "b": 1.0}
    assert ndcg(["a", "b"], grades, 10) == 1
    assert ndcg(["x", "y"], grades, 10) == 0
    assert ndcg(["b"], {"b": 1.0}, 10) == 1
    assert ndcg(["x", "b"], {"b": 1.0}, 10) == pytest.approx(0.6309, abs=1e-4)
    assert ndcg(["x", "b"], {"b": 1.0}, 1) == 0
    assert ndcg(["b", "a"], grades, 10) < 1
    assert ndcg(["a"], {}, 10) == 0


# ---- wrong answers


def test_an_outdated_fact_is_seen_in_an_answer():
    assert uses_wrong("It was Rome, I think.", ["rome"], ["Paris"])
    assert not uses_wrong("Paris", ["Rome"], ["Paris"])
    assert not uses_wrong("Romeo", ["Rome"], ["Paris"])
    assert not uses_wrong("New York City", ["York"], ["New York City", "New York"])
    assert uses_wrong("New York or York", ["York"], ["New York"])
    assert not uses_wrong("anything", ["", "the"], [])


def test_an_answer_stands_in_a_text_as_whole_words():
    assert contains("He said: the Tiber.", "Tiber")
    assert not contains("Tiberius", "Tiber")
    assert not contains("anything", "the")


# ---- the suite


def test_sizes_have_units():
    assert [size_of(s) for s in ("16K", "1M", "0.5m", "300")] == [16_000, 10**6, 500_000, 300]
    for wrong in ("", "x", "0", "-1K", "K"):
        with pytest.raises(InputError, match=rf"size '{wrong}': expected tokens, such as 16K"):
            size_of(wrong)


def test_runs_lie_where_the_report_looks():
    out = Path("out")
    assert run_path(out, "a/b", 16_000, None, "msa") == Path("out/runs/a__b@16000--msa.jsonl")
    changed = run_path(out, "a/b", 0, 0.1, 'msa:layer_weights={"2": 1}')
    assert changed == Path("out/runs/a__b+10%@0--msa-layer_weights-2-1.jsonl")


def changing_task(changes):
    base = QuestionSet(
        "facts",
        "test",
        (Document("a", "old"), Document("b", "kept"), Document("c", "gone")),
        (Question("?", ("old",), ("a",), "q"),),
        "00",
    )

    def change(request, share):
        after = replace(base.questions[0], answers=("new",), wrong=("old",))
        return Changed(changes, (after,)) if share else Changed((), base.questions)

    return Task("x/facts", "", lambda request: base, answer_scores, "F1", change=change)


def test_a_memory_that_changes_is_asked_at_every_share():
    changes = (Change("a", Document("a", "new")), Change("c"), Change("d", Document("d", "more")))
    found = list(variants(changing_task(changes), request()))
    assert [share for share, _, _ in found] == [0.0, 0.1, 0.5]
    _, before, (_, none) = found[0]
    assert [d.text for d in before.documents] == ["old", "kept", "gone"]
    assert none == ()
    for _, after, (base, made) in found[1:]:
        assert [d.text for d in after.documents] == ["new", "kept", "more"]
        assert after.questions[0].wrong == ("old",)
        assert (len(base.documents), made) == (3, changes)
        assert after.data_hash != before.data_hash


def test_what_is_not_there_cannot_be_deleted():
    with pytest.raises(InputError, match="'z' is to be deleted, and is not there"):
        changed_documents([Document("a", "x")], [Change("z")])


def test_only_what_ranks_is_asked_to_rank():
    systems = ["msa", "bm25-1", "bm25-5", "bm25-5+rerank", "full", "gold", "closed", "msa:a=1"]
    ranks = replace(changing_task(()), ranks=10)
    assert fitting(ranks, systems) == ["msa", "bm25-1", "bm25-5+rerank", "msa:a=1"]
    assert fitting(changing_task(()), systems) == systems


def test_rows_of_the_registry_are_json(data):
    for task in all_tasks(data).values():
        assert json.dumps([task.name, task.title, task.metric, task.grows])
        assert "/" in task.name
        assert task.title
