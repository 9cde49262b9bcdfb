"""Question sets: what is right is read as it stands, what is wrong is named with file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from msa.errors import InputError
from msa.training.question_sets import QuestionSet

DOCUMENTS = [
    {"id": "a", "title": "Halden", "text": "Halden lies in Norway."},
    {"id": "b", "title": None, "text": "Erik Watts was born in Halden."},
]
QUESTION = {"id": "q1", "question": "Where does Halden lie?", "answers": ["Norway"], "gold": ["a"]}


def write(path: Path, rows: Sequence[Any]) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "corpus.jsonl.gz", DOCUMENTS)
    write(tmp_path / "questions.train.jsonl.gz", [QUESTION])
    return tmp_path


def load_with(folder: Path, *rows: Any, **options: Any) -> QuestionSet:
    write(folder / "questions.train.jsonl.gz", [QUESTION, *rows])
    return QuestionSet.load(folder, **options)


def test_documents_and_questions_are_read_as_they_stand(folder):
    row = {"id": "q2", "question": "Where was he born?", "answers": ["Halden", "in Halden"]}
    row |= {"gold": ["b", "a"], "hops": 2, "history": ["Who is Watts?"], "rewrite": "Where was W?"}
    found = load_with(folder, row)
    assert found.name == folder.name
    assert list(found.documents) == ["a", "b"]
    assert found.documents["a"].content == "Halden lies in Norway."
    assert found.documents["b"].title is None
    first, second = found.questions
    assert (first.id, first.hops, first.unanswerable) == ("q1", 1, False)
    assert (second.answers, second.gold, second.hops) == (("Halden", "in Halden"), ("b", "a"), 2)
    assert (second.history, second.rewrite) == (("Who is Watts?",), "Where was W?")


def test_what_a_question_needs_to_be_understood_stands_in_front_of_it(folder):
    told = QUESTION | {"scenario": "I live in Halden.", "question": "Do I live in Norway?"}
    tale = QUESTION | {"story": "Snow man", "question": "Who froze?"}
    questions = load_with(folder, told, tale).questions[1:]
    assert questions[0].question == "I live in Halden. Do I live in Norway?"
    assert questions[1].question == "Snow man: Who froze?"


def test_an_unanswerable_question_has_no_gold_and_no_hops(folder):
    row = {"question": "Who rules?", "answers": [], "gold": [], "hops": None}
    questions = load_with(folder, row | {"unanswerable": True}, row | {"context_doc": ["b"]})
    for question in questions.questions[1:]:
        assert question.unanswerable
        assert (question.gold, question.hops) == ((), 0)
    assert questions.questions[2].context == ("b",)


def test_a_question_without_an_id_is_known_by_its_line(folder):
    row = {k: v for k, v in QUESTION.items() if k != "id"}
    assert load_with(folder, row).questions[1].id.endswith("questions.train.jsonl.gz:2")


def test_a_set_without_documents_teaches_rewriting_only(folder):
    write(folder / "corpus.jsonl.gz", [])
    write(folder / "questions.train.jsonl.gz", [QUESTION | {"gold": [], "rewrite": "Where?"}])
    (question,) = QuestionSet.load(folder).questions
    assert question.gold == ()


def test_any_file_of_questions_can_be_named_and_all_stands_in_for_train(folder):
    (folder / "questions.train.jsonl.gz").rename(folder / "questions.all.jsonl.gz")
    assert len(QuestionSet.load(folder).questions) == 1
    (folder / "mine.jsonl").write_text(json.dumps(QUESTION) + "\n\n", encoding="utf-8")
    assert len(QuestionSet.load(folder, "mine.jsonl").questions) == 1
    with pytest.raises(InputError, match=r"no questions\.dev\.jsonl\.gz; the JSONL files there"):
        QuestionSet.load(folder, "questions.dev.jsonl.gz")
    with pytest.raises(InputError, match="no such folder"):
        QuestionSet.load(folder / "elsewhere")


FAULTY = [
    (QUESTION | {"gold": []}, "gold is empty"),
    (QUESTION | {"gold": ["c"]}, "the document 'c' is not in the corpus"),
    (QUESTION | {"gold": "a"}, "gold is 'a'; expected a list"),
    (QUESTION | {"question": " "}, "question is ' '; expected a text"),
    (QUESTION | {"unanswerable": True}, "unanswerable, but gold names 'a'"),
    (QUESTION | {"unanswerable": "no"}, "expected true or false"),
    (QUESTION | {"hops": "two"}, "hops is 'two'"),
    ({"quesiton": "Who?", "gold": ["a"]}, "unknown key 'quesiton'; did you mean 'question'"),
    (QUESTION | {"senario": "I"}, "unknown key 'senario'; did you mean 'scenario'"),
    ('{"question": "Wh', "not valid JSON"),
    ("[1]", "a JSON list; expected an object"),
]


@pytest.mark.parametrize(("row", "message"), FAULTY)
def test_a_faulty_line_is_named_or_left_out_and_counted(folder, row, message):
    with pytest.raises(InputError) as error:
        load_with(folder, row)
    assert message in str(error.value)
    assert "questions.train.jsonl.gz:2: " in str(error.value)
    assert "\n" not in str(error.value)
    found = load_with(folder, row, QUESTION, on_error="skip")
    assert len(found.questions) == 2
    assert len(found.skipped) == 1
    assert message in found.skipped[0]


def test_a_faulty_document_is_named(folder):
    for row, message in (
        ({"id": "a", "text": "again"}, "the document id 'a' was used before"),
        ({"id": "c", "text": ""}, "text is ''; expected a text"),
        ({"id": "c", "txt": "x"}, "unknown key 'txt'; did you mean 'text'"),
    ):
        write(folder / "corpus.jsonl.gz", [*DOCUMENTS, row])
        with pytest.raises(InputError, match=f"corpus.jsonl.gz:3: {message}"):
            QuestionSet.load(folder)


def test_other_keys_are_left_alone(folder):
    load_with(folder, QUESTION | {"source": "x", "evidences": [["a", "b"]], "kind": "y"})


def test_a_damaged_file_is_named(folder):
    path = folder / "corpus.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(InputError, match=r"corpus\.jsonl\.gz:\d+: cannot be read"):
        QuestionSet.load(folder, on_error="skip")
    path.write_bytes(b"plain text")
    with pytest.raises(InputError, match=r"corpus\.jsonl\.gz:1: cannot be read"):
        QuestionSet.load(folder)


def test_a_set_of_faults_only_is_refused(folder):
    write(folder / "questions.train.jsonl.gz", ["{}"])
    with pytest.raises(InputError, match="holds no usable question"):
        QuestionSet.load(folder, on_error="skip")
    with pytest.raises(InputError, match="expected 'raise' or 'skip'"):
        QuestionSet.load(folder, on_error="ignore")  # type: ignore[arg-type]
