"""Where an answer stands in a text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa.inference.spans import NEARBY, find_span, sentence_around

TEXT = "Ada was born in Rome. Rome lies on\n the Tiber, 406 km long; Romeo does not."


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Rome", "Rome"),
        ("rome.", "Rome"),
        (' "ROME" ', "Rome"),
        ("lies on the tiber", "lies on\n the Tiber"),
        ("406 km", "406 km"),
        ("06 km", None),
        ("Tib", None),
        ("meo", None),
        ("Paris", None),
        ("", None),
        (" . ", None),
        ("(", None),
        (".*", None),
    ],
)
def test_case_and_white_space_do_not_count_and_words_are_whole(
    answer: str, found: str | None
) -> None:
    span = find_span(TEXT, answer, "Where?")
    assert (None if span is None else TEXT[slice(*span)]) == found


def test_the_occurrence_with_the_questions_words_nearby_wins() -> None:
    text = "Rome is old." + " ." * NEARBY + "Ada was born in Rome." + " ." * NEARBY + "Rome is big."
    span = find_span(text, "Rome", "Where was Ada born?")
    assert span is not None
    assert text[: span[0]].endswith("born in ")
    first = find_span(text, "Rome", "What lies in Italy?")
    assert first == (0, 4)  # all alike: the first


def test_scripts_without_spaces_are_searched_too() -> None:
    text = "阿达出生在罗马,住在米兰。"
    assert find_span(text, "罗马", "阿达在哪里出生?") == (
        text.index("罗马"),
        text.index("罗马") + 2,
    )


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=8), st.text(max_size=30), st.text(max_size=20))
def test_a_span_is_the_answer_but_for_case_and_white_space(
    before: str, answer: str, behind: str, question: str
) -> None:
    text = f"{before} {answer} {behind}"
    span = find_span(text, answer, question)
    bare = answer.strip().strip(".,;:!?\"'").split()
    if span is not None:
        assert 0 <= span[0] < span[1] <= len(text)
        assert len(text[slice(*span)].split()) == len(bare)
    if bare and answer.isascii() and answer.isalnum():
        assert span is not None


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("Rome.", "Ada was born in Rome."),
        ("J. Doe", 'J. Doe said "No."'),
        ("said", 'J. Doe said "No."'),
        ("Rome lies", "Rome lies there"),
        ('No." Rome', 'J. Doe said "No." Rome lies there'),
    ],
)
def test_a_sentence_around_an_answer(answer, sentence):
    text = 'Ada was born in Rome. J. Doe said "No." Rome lies there'
    start = text.index(answer)
    first, last = sentence_around(text, start, start + len(answer))
    assert text[first:last] == sentence
