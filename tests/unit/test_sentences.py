"""Where sentences begin and end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa.text.sentences import sentence_spans


def sentences(text: str) -> list[str]:
    return [text[start:end] for start, end in sentence_spans(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n ", []),
        ("One", ["One"]),
        (" It is by Dr. A. Lie, No. 3. So. ", ["It is by Dr. A. Lie, No. 3.", "So."]),
        ('He said "No." Rome (in Italy.) So', ['He said "No."', "Rome (in Italy.)", "So"]),
        ("At 3.5 m. then on", ["At 3.5 m. then on"]),
        ("Title\nIt begins\nand goes\n\n2 end", ["Title", "It begins\nand goes", "2 end"]),
        ("一つ。二つ。", ["一つ。", "二つ。"]),
    ],
)  # fmt: skip
def test_sentences_are_told_apart(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


@given(st.text(alphabet='ab A1.!?"\n。)', max_size=40))
def test_every_character_but_white_space_is_in_one_sentence(text: str) -> None:
    spans = sentence_spans(text)
    covered = [i for start, end in spans for i in range(start, end)]
    assert covered == sorted(set(covered))
    assert all(text[i].isspace() for i in range(len(text)) if i not in set(covered))
    assert all(text[a:b] == text[a:b].strip() != "" for a, b in spans)
