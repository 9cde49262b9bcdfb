from __future__ import annotations

import gzip

import pytest

from evaluation_tools import DOCUMENTS, QUESTIONS, write_question_set, write_rows
from msa.errors import InputError
from msa.evaluation.question_sets import Question, read_question_set
from msa.types import Document


@pytest.fixture
def folder(tmp_path):
    return write_question_set(tmp_path / "set")


def test_a_set_is_its_documents_and_questions_in_the_order_of_the_files(folder):
    found = read_question_set(folder)
    assert (found.name, found.split) == ("set", "dev")
    assert found.documents[0] == Document("rome", "It lies on the Tiber.", title="Rome")
    assert [d.title for d in found.documents[1:]] == [None] * 4
    assert found.questions[2] == Question("How much sugar?", ("x", "y"), ("cake", "ada"), "q3")
    assert found.gold_rows() == [[1], [0], [2, 3], []]


def test_files_need_not_be_packed(folder):
    packed = read_question_set(folder)
    for path in folder.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert read_question_set(folder) == packed  # the hash of the data included


def test_the_hash_follows_the_data(folder):
    before = read_question_set(folder).data_hash
    write_rows(folder / "questions.dev.jsonl.gz", QUESTIONS[:-1])
    assert read_question_set(folder).data_hash != before


def test_so_many_questions_are_drawn_by_the_seed(folder):
    draws = [read_question_set(folder, count=3, seed=seed).questions for seed in (0, 0, 5)]
    assert len(draws[0]) == 3
    assert draws[0] == draws[1] != draws[2]
    assert len(read_question_set(folder, count=99).questions) == 4


def test_the_split_is_dev_or_else_test(folder):
    write_rows(folder / "questions.test.jsonl.gz", QUESTIONS[:1])
    assert read_question_set(folder).split == "dev"
    assert len(read_question_set(folder, "test").questions) == 1
    (folder / "questions.dev.jsonl.gz").unlink()
    assert read_question_set(folder).split == "test"


def test_title_hints_stand_in_front_when_asked_for(folder):
    assert read_question_set(folder).questions[3].text == "Who is it?"
    hinted = read_question_set(folder, title_hints=True).questions
    assert [q.text for q in hinted[2:]] == ["How much sugar?", "Ada: Who is it?"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, "line 1: id is ''; expected a text"),
        ({"question": None}, "line 1: question is None; expected a text"),
        ({"answers": "Oslo"}, "line 1: answers is 'Oslo'; expected a list of texts"),
        ({"gold": [3]}, r"line 1: gold is \[3\]; expected a list of texts"),
        ({"gold": ["paris"]}, "line 1: gold document 'paris' is not in the corpus"),
        ({"gold": []}, "line 1: has answers and no gold"),
        ({"id": "q2"}, "id 'q2' is given twice"),
    ],
)
def test_a_question_that_is_not_valid_is_one_clear_line(folder, change, message):
    write_rows(folder / "questions.dev.jsonl.gz", [QUESTIONS[0] | change, *QUESTIONS[1:]])
    with pytest.raises(InputError, match=message) as caught:
        read_question_set(folder)
    assert "questions.dev.jsonl.gz" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a", "text": " "}], "line 1: text is ' '; expected a text"),
        ([{"id": "a", "text": "b", "title": 1}], "line 1: title is 1; expected a text or null"),
        ([DOCUMENTS[0], DOCUMENTS[0]], "id 'rome' is given twice"),
        ([["a"]], "line 1: expected a JSON object"),
        ([], "holds no documents"),
    ],
)
def test_a_document_that_is_not_valid_is_one_clear_line(folder, rows, message):
    write_rows(folder / "corpus.jsonl.gz", rows)
    with pytest.raises(InputError, match=message):
        read_question_set(folder)


def test_a_missing_or_damaged_file_is_named(folder, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_question_set(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no questions.train.jsonl.gz; .* corpus.jsonl.gz, quest"):
        read_question_set(folder, "train")
    questions = folder / "questions.dev.jsonl.gz"
    whole = questions.read_bytes()
    questions.write_bytes(whole[:-12])
    with pytest.raises(InputError, match=r"questions.dev.jsonl.gz: cannot be read"):
        read_question_set(folder)
    questions.write_bytes(gzip.compress(gzip.decompress(whole) + b"{"))
    with pytest.raises(InputError, match=r"questions.dev.jsonl.gz, line 5: no JSON"):
        read_question_set(folder)
    questions.unlink()
    with pytest.raises(InputError, match="no questions of"):
        read_question_set(folder)
    write_rows(questions, [])
    with pytest.raises(InputError, match="holds no questions"):
        read_question_set(folder)
