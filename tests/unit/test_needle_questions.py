"""Needles to train on: a sound question set, and nothing of a test's in it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from msa.evaluation.tasks import TASKS
from msa.evaluation.tasks.words import part_of
from msa.training.question_sets import QuestionSet
from task_tools import request

ROOT = Path(__file__).resolve().parents[2]
WORDS = re.compile(r"\b[a-z]+-[a-z]+\b")
UUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b")
VARIABLE = re.compile(r"\b[A-Z]{5}\b")


def tool():
    spec = importlib.util.spec_from_file_location(
        "needle_questions", ROOT / "tools" / "needle_questions.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("needles")
    tool().write(folder, 1500, seed=1)
    return folder


@pytest.mark.parametrize("split", ["train", "dev"])
def test_every_answer_stands_in_its_gold_documents(folder, split):
    found = QuestionSet.load(folder, f"questions.{split}.jsonl.gz")
    assert len(found.questions) == {"train": 1470, "dev": 30}[split]
    for question in found.questions:
        gold = " ".join(found.documents[i].text for i in question.gold)
        if question.unanswerable:
            assert question.answers == question.gold == ()
            continue
        (answer,) = question.answers
        assert all(part in gold for part in answer.split(", "))


def test_what_no_document_answers_is_asked_about_a_key_that_none_has(folder):
    found = QuestionSet.load(folder)
    texts = " ".join(document.text for document in found.documents.values())
    unanswerable = [q for q in found.questions if q.unanswerable]
    assert 30 < len(unanswerable) < 150
    for question in unanswerable:
        keys = [*WORDS.findall(UUID.sub("", question.question)), *UUID.findall(question.question)]
        keys += re.findall(r"\b\d{7}\b", UUID.sub("", question.question))
        assert keys
        assert not any(key in texts for key in keys)


def test_all_kinds_of_keys_values_and_numbers_of_them_occur(folder):
    found = QuestionSet.load(folder)
    assert {len(q.gold) for q in found.questions if q.gold} == {1, 2, 3, 4, 5}
    needles = [
        re.fullmatch(r"One of the special magic (\w+) for (\S+) is: \S+\.", d.text)
        for d in found.documents.values()
    ]
    kinds = {
        (m[1], "uuid" if UUID.match(m[2]) else "number" if m[2].isdigit() else "words")
        for m in needles
        if m
    }
    assert len(kinds) == 9


def test_no_key_of_a_test_is_in_it(folder):
    found = QuestionSet.load(folder)
    trained = " ".join(d.text for d in found.documents.values())
    trained += " ".join(q.question for q in found.questions)
    words = [w for pair in WORDS.findall(UUID.sub("", trained)) for w in pair.split("-")]
    assert len(words) > 500
    assert {part_of(word) for word in words} <= {"training"}
    assert {part_of(name) for name in VARIABLE.findall(trained)} == {"training"}
    assert {part_of(value) for value in re.findall(r"= (\d{5})", trained)} == {"training"}
    held = set(re.findall(r"[\w-]+", trained))
    for name in sorted(n for n in TASKS if n.startswith(("ruler/niah", "ruler/vt"))):
        for seed in range(3):
            for question in TASKS[name].load(request(count=50, seed=seed)).questions:
                keys = [*WORDS.findall(UUID.sub("", question.text)), *UUID.findall(question.text)]
                keys += VARIABLE.findall(" ".join(question.answers))
                keys += re.findall(r"the value (\d{5}) ", question.text)
                assert keys
                assert not held & set(keys)


def test_one_seed_gives_one_set_byte_for_byte(folder, tmp_path):
    tool().write(tmp_path, 1500, seed=1)
    for name in ("corpus", "questions.train", "questions.dev"):
        path = f"{name}.jsonl.gz"
        assert (tmp_path / path).read_bytes() == (folder / path).read_bytes()
    tool().write(tmp_path, 1500, seed=2)
    assert (tmp_path / "corpus.jsonl.gz").read_bytes() != (folder / "corpus.jsonl.gz").read_bytes()
