"""Hard negatives: they look right, they are wrong, and they are found again at once."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from msa.errors import InputError, TrainingError
from msa.training import negatives
from msa.training.negatives import HardNegatives, hard_negatives, plain_words
from msa.training.question_sets import QuestionSet, TrainingQuestion
from msa.types import Document

pytest.importorskip("bm25s")

TEXTS = {
    "gold": ("Halden", "The fortress of Halden was built by Erik Watts of Norway."),
    "copy": ("Old Halden", "A copy: the fortress of HALDEN was built by Erik Watts, of Norway!"),
    "answer": ("Builders", "Erik Watts built more than one fortress in Halden."),
    "town": ("Halden", "Halden is a town with a harbor and a railway station."),
    "trade": ("Halden", "Timber was sold in the town for centuries."),
    "fortress": (None, "The fortress of Fredrikstad was built much later."),
    "moon": (None, "Craters of the moon are round."),
}


def make_set(question: TrainingQuestion | None = None) -> QuestionSet:
    documents = {key: Document(key, text, title) for key, (title, text) in TEXTS.items()}
    asked = TrainingQuestion("q", "Who built the fortress of Halden?", ("Erik Watts",), ("gold",))
    return QuestionSet("set", documents, (question or asked,))


def test_lexical_negatives_share_words_and_are_surely_wrong():
    (found,) = hard_negatives(make_set()).lexical
    assert set(found) == {"town", "trade", "fortress"}  # neither the copy nor what holds the answer
    assert "moon" not in found


def test_negatives_of_the_same_article_have_the_title_of_a_gold_document():
    (found,) = hard_negatives(make_set()).same_title
    assert set(found) == {"town", "trade"}


def test_a_vague_answer_rules_no_document_out():
    question = replace(make_set().questions[0], answers=("Erik",))
    assert "answer" in hard_negatives(make_set(question)).lexical[0]


def test_every_document_is_a_negative_of_an_unanswerable_question():
    question = TrainingQuestion("q", "Who built Halden?", (), (), unanswerable=True)
    assert "gold" in hard_negatives(make_set(question)).lexical[0]


def test_both_kinds_come_together_and_one_fills_up_for_the_other():
    lists = HardNegatives((("a", "b", "c", "d"), ("a",), ()), (("x", "b"), ("x", "y", "z"), ()))
    assert lists.of(0, 4) == ("a", "b", "c", "x")
    assert lists.of(1, 3) == ("a", "x", "y")
    assert lists.of(2, 3) == ()
    assert len(set(lists.of(0, 6))) == len(lists.of(0, 6))


def test_what_was_kept_on_disk_is_found_again_until_the_data_changes(tmp_path, monkeypatch):
    first = hard_negatives(make_set(), cache=tmp_path)
    (file,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(negatives, "_lexical", None)  # would fail if it were called
        assert hard_negatives(make_set(), cache=tmp_path) == first
    file.write_text("damaged")
    assert hard_negatives(make_set(), cache=tmp_path) == first
    other = make_set(replace(make_set().questions[0], question="Who?"))
    hard_negatives(other, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_draw_depends_on_the_seed_alone():
    assert hard_negatives(make_set(), seed=3) == hard_negatives(make_set(), seed=3)


def test_words_are_compared_without_case_and_marks():
    assert plain_words("Erik  Watts's\n“Home”, 1984") == " erik watts s home 1984 "


def test_a_set_without_documents_has_no_negatives():
    question = TrainingQuestion("q", "Who?", ("he",), ())
    assert hard_negatives(QuestionSet("set", {}, (question,))).lexical == ((),)


def test_what_is_missing_or_refused_is_said_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        hard_negatives(make_set(), cache=tmp_path / "file")
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(InputError, match=r"pip install 'msa-memory\[train\]'"):
        hard_negatives(make_set())
