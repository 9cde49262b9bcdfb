"""The question set of needles: every answer stands in its documents, and in no other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from msa.training.question_sets import QuestionSet

TOOL = Path(__file__).parents[2] / "tools/make_needles.py"
WORDS = [f"{a}{b}" for a in ("amber", "birch", "cedar") for b in ("dale", "ford", "ridge", "wood")]


def made(texts: Path, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), str(folder), "--texts", str(texts), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(6):
        lines = [
            f"The {a} stands beside the {b} of the old {c}."
            for a, b, c in zip(WORDS[i:], WORDS[i + 1 :], WORDS[i + 2 :], strict=False)
        ]
        (folder / f"{i}.txt").write_text(" ".join(lines), encoding="utf-8")
    return folder


def test_every_value_stands_in_its_gold_document_and_the_same_seed_gives_the_same_bytes(
    texts, tmp_path
):
    for name in ("one", "two"):
        run = made(texts, tmp_path / name, "--questions", "60")
        assert run.returncode == 0, run.stderr
    for file in ("corpus.jsonl.gz", "questions.train.jsonl.gz"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    found = QuestionSet.load(tmp_path / "one")
    assert len(found.questions) == 60
    several = turned = 0
    for question in found.questions:
        values = question.answers[0].split(", ")
        several += len(values) > 1
        assert len(values) == len(question.gold)
        for value, key in zip(values, question.gold, strict=True):
            assert value.lower() in found.documents[key].text.lower()
        asked = re.findall(r"\w+-\w+", question.question)
        texts_read = [found.documents[key].text.lower() for key in question.gold]
        if len(asked) == len(values) > 1:
            turned += any(a not in text for a, text in zip(asked, texts_read, strict=True))
    assert several
    assert turned  # keys are read and answered in another order than asked


def test_another_seed_gives_other_values(texts, tmp_path):
    answers = []
    for seed in ("1", "2"):
        assert made(texts, tmp_path / seed, "--questions", "40", "--seed", seed).returncode == 0
        loaded = QuestionSet.load(tmp_path / seed)
        numbers = [q.answers[0] for q in loaded.questions if re.fullmatch(r"\d{6,}", q.answers[0])]
        assert numbers
        answers.append(set(numbers))
    assert not answers[0] & answers[1]


def test_texts_that_are_not_there_are_named(tmp_path):
    run = made(tmp_path / "nothing", tmp_path / "set")
    assert run.returncode != 0
    assert "nothing" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr
