from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa.errors import InputError
from msa.text.splitting import split_text


def words(text: str) -> int:
    return len(text.split())


def bytes_of(text: str) -> int:
    return len(text.encode())


def squeezed(text: str) -> str:
    return "".join(text.split())


@settings(deadline=None, max_examples=60)
@given(
    text=st.text(alphabet=st.sampled_from("ab .\n#-é👩\u200d\t"), max_size=400),
    max_tokens=st.integers(4, 60),
    markdown=st.booleans(),
)
def test_parts_cover_the_text_in_order_and_none_is_empty_or_too_long(text, max_tokens, markdown):
    parts = split_text(text, max_tokens, bytes_of, markdown=markdown)
    assert squeezed("".join(parts)) == squeezed(text)
    assert all(part.strip() and bytes_of(part) <= max_tokens for part in parts)


def test_a_short_text_stays_whole_and_a_blank_one_has_no_parts():
    assert split_text("  Ada was born in 1815.\n", 10, words) == ["Ada was born in 1815."]
    assert split_text(" \n\t ", 10, words) == []


def test_cuts_fall_between_sentences_before_words():
    text = "One two three four. Five six seven eight. Nine ten eleven twelve."
    assert split_text(text, 5, words) == [
        "One two three four.",
        "Five six seven eight.",
        "Nine ten eleven twelve.",
    ]


def test_markdown_is_cut_at_its_headings():
    text = "# A\n\none two three\n\n# B\n\nfour five six\n"
    parts = split_text(text, 6, words, markdown=True)
    assert [part.splitlines()[0] for part in parts] == ["# A", "# B"]


def test_a_word_longer_than_a_part_is_cut_hard():
    parts = split_text("x" * 1000, 7, bytes_of)
    assert "".join(parts) == "x" * 1000
    assert max(map(len, parts)) <= 7


def test_a_count_that_grows_when_text_is_cut_is_still_obeyed():
    # A whole text that is one known token, and letters that are one token each otherwise.
    def count(text: str) -> int:
        return 1 if text == "abcdefgh" else len(text)

    parts = split_text("abcdefgh ijklmnop abcdefgh", 3, count)
    assert all(count(part) <= 3 for part in parts)
    assert squeezed("".join(parts)) == "abcdefghijklmnopabcdefgh"


@pytest.mark.parametrize(
    "unit",
    ["abcdefghij", "1234567890", "北京上海", "e\u0301", "👩\u200d", "a\n", "# a\n", "x  ", "。"],
)
def test_what_is_counted_is_a_small_multiple_of_any_text(unit):
    text = (unit * 300_000)[:300_000]
    calls = characters = 0

    def count(piece: str) -> int:
        nonlocal calls, characters
        calls, characters = calls + 1, characters + len(piece)
        return bytes_of(piece)

    parts = split_text(text, 500, count)
    assert squeezed("".join(parts)) == squeezed(text)
    assert characters < 8 * len(text)
    assert calls < 8 * len(parts)
    filled = sum(map(bytes_of, parts)) / len(parts)
    assert filled > 0.4 * 500


def test_one_letter_with_endless_marks_is_cut_all_the_same():
    text = "e" + "\u0301" * 50_000
    parts = split_text(text, 100, bytes_of)
    assert "".join(parts) == text


def test_a_letter_keeps_its_marks():
    parts = split_text("e\u0301\u0323" * 100, 23, bytes_of)
    assert all(part.startswith("e") for part in parts)


def test_a_heading_stays_with_its_text_and_the_highest_one_is_cut_at():
    text = "# A\n\n## one\n\na b c d\n\n## two\n\ne f g h\n\n# B\n\ni j k l\n\n## three\n\nm n o p"
    assert split_text(text, 9, words) == [
        "# A\n\n## one\n\na b c d",
        "## two\n\ne f g h",
        "# B\n\ni j k l",
        "## three\n\nm n o p",
    ]
    underlined = "One\n===\n\na b c d\n\nTwo\n---\n\ne f g h"
    assert split_text(underlined, 7, words) == ["One\n===\n\na b c d", "Two\n---\n\ne f g h"]


def test_what_looks_like_a_heading_in_code_is_none():
    text = "one two\n\n```\n# a comment\nx = 1\n```\n\nthree four five"
    parts = split_text(text, 11, words)
    assert parts == ["one two\n\n```\n# a comment\nx = 1\n```", "three four five"]


def test_short_paragraphs_come_together():
    text = "\n\n".join(f"p{i} a b" for i in range(9))
    assert [words(part) for part in split_text(text, 10, words)] == [9, 9, 9]


@pytest.mark.parametrize(
    ("text", "max_tokens", "message"),
    [("abc", 0, "max_tokens is 0"), ("👩 👩", 3, "alone needs 4 tokens")],
)
def test_a_bound_that_cannot_be_met_is_named(text, max_tokens, message):
    with pytest.raises(InputError, match=message):
        split_text(text, max_tokens, bytes_of)
