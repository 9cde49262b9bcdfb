"""How far an answer that begins in some way is behind the best sentence of what was read."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from msa.inference.evidence import OUTSIDE, UNKNOWN_SHARE, Evidence

TEXTS = [
    ("Ada", "Ada bakes in Oslo. She was born in Rome, in 1910.  The\nictr (Genoa) is far."),
    ("", "Rome is old.\n罗马很老。"),
]


def shares(texts: Sequence[str]) -> list[float]:
    """By words of the question: Ada, born, bakes, old."""
    return [sum(word in text for word in ("Ada", "born", "bakes", "old")) / 4 for text in texts]


@pytest.fixture
def evidence() -> Evidence:
    return Evidence(TEXTS, shares)


@pytest.mark.parametrize(
    ("beginning", "behind"),
    [
        ("Oslo", 0.0),  # Ada and bakes: half of the question
        ("she was born", 0.0),  # Ada, in the title, and born
        ("RO", 0.0),  # of two texts the one where it is the best
        ("r", 0.0),
        ("the  ictr (g", 0.25),
        ("ICTR", 0.25),
        ("Genoa", 0.25),
        ("enoa", OUTSIDE),  # no word begins so
        ("910", OUTSIDE),
        ("Rome, in 1911", 0.0),  # it leaves the text, which is no reason to end before
        ("in 1910. The", 0.0),
        ("Genoa, Rome", 0.25),
        ("Paris, Rome", OUTSIDE),
        ("马", 0.25),  # words are not told apart there
        ("Rome\ufffd", 0.0),  # half a character
        ("", 0.0),
        (" \ufffd", 0.0),
    ],
)
def test_how_far_an_answer_is_behind(evidence: Evidence, beginning: str, behind: float) -> None:
    assert evidence.behind(beginning) == pytest.approx(behind)


def test_what_is_read_is_weighed_whole_and_sentence_by_sentence(evidence: Evidence) -> None:
    text = TEXTS[0][1]
    assert evidence.share == 1
    born, far = text.index("Rome"), text.index("far")
    assert evidence.share_around(0, (born, born + 4)) == 0.5
    assert evidence.share_around(0, (far, far + 3)) == 0.25
    assert evidence.share_around(0, (born, far)) == 0.5  # the best that it touches
    assert evidence.share_around(1, (0, 4)) == 0.25


def test_a_sentence_far_behind_is_no_worse_than_none() -> None:
    evidence = Evidence([("", "Ada. Bob.")], lambda texts: [1.0, 1.0, 0.0])
    assert evidence.behind("Bob") == OUTSIDE


@pytest.mark.parametrize(
    ("texts", "shares"), [([], shares), ([("", " ")], shares), (TEXTS, lambda _: None)]
)
def test_where_nothing_is_known_nothing_is_preferred(texts, shares) -> None:
    evidence = Evidence(texts, shares)
    assert evidence.share == evidence.share_around(0, (0, 3)) == UNKNOWN_SHARE
    assert evidence.behind("Rome") == evidence.behind("x") == 0
