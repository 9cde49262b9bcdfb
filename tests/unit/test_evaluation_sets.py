from __future__ import annotations

import gzip

import pytest

from evaluation_tools import QUESTIONS, write_question_set, write_rows
from msa.errors import InputError
from msa.evaluation.question_sets import Question, read_question_set, with_fewer_documents
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
    assert read_question_set(folder).questions[0].text == "Which fjord has boats?"
    hinted = read_question_set(folder, title_hints=True).questions
    assert [q.text for q in hinted[:2]] == ["Oslo: Which fjord has boats?", "Where is Rome?"]


def test_a_smaller_corpus_keeps_the_gold_documents(folder):
    whole = read_question_set(folder, count=2, seed=1)
    gold = {i for q in whole.questions for i in q.gold}
    small = with_fewer_documents(whole, len(gold) + 1)
    assert gold < {d.id for d in small.documents}
    assert len(small.documents) == len(gold) + 1
    assert len(small.gold_rows()) == len(whole.gold_rows())
    assert small.data_hash != whole.data_hash
    assert len(with_fewer_documents(whole, 0).documents) == len(gold)
    assert with_fewer_documents(whole, 99).documents == whole.documents


def test_a_faulty_set_is_one_clear_line(folder, tmp_path):
    write_rows(folder / "questions.dev.jsonl.gz", [QUESTIONS[0], QUESTIONS[0]])
    with pytest.raises(InputError, match="question id 'q1' is given twice"):
        read_question_set(folder)
    write_rows(folder / "questions.dev.jsonl.gz", [QUESTIONS[0] | {"gold": ["paris"]}])
    with pytest.raises(InputError, match=r"questions.dev.jsonl.gz:1: the document 'paris' is not"):
        read_question_set(folder)
    with pytest.raises(InputError, match=r"no questions.train.jsonl.gz; .* there are: corpus"):
        read_question_set(folder, "train")
    with pytest.raises(InputError, match="no such folder"):
        read_question_set(tmp_path / "nowhere")
