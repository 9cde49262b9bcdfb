"""Long texts to parts of bounded length, cut where meaning changes rather than where space ends."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator

from msa.errors import InputError

# How strongly a place asks to be a cut: headings by their depth, then paragraphs, then lines.
_HEADING = 9  # less its depth, 1 to 6
_PARAGRAPH = 2
_LINE = 1

_ATX = re.compile(r" {0,3}(#{1,6})(?:\s|$)")
_UNDERLINE = re.compile(r" {0,3}(=+|-{2,})\s*$")
_FENCE = re.compile(r" {0,3}(```+|~~~+)")
_SENTENCE = re.compile(r"[.!?…][\"'”’»)\]]*\s+|[。！？．][\"”’」』）]*\s*")
_WORD = re.compile(r"\s+|[，、；：]\s*")
_SPACE = re.compile(r"\s*")

_FULL_ENOUGH = 0.9  # of max_tokens: a stretch with so many tokens is not made longer
_TRIES = 4  # to make a stretch longer
_FIRST_GUESS = 4.0  # characters per token
_MARKS_IN_A_ROW = 32  # combining marks after a letter that are kept with it


def split_text(
    text: str,
    max_tokens: int,
    count_tokens: Callable[[str], int],
    *,
    markdown: bool = True,
) -> list[str]:
    """Parts of a text, in order, each of at most `max_tokens` tokens.

    A part ends before the last heading of the highest level that it could reach to; or else where a
    paragraph, a line, a sentence or a word ends, in the second half of what it could hold if there
    is such a place. A heading stays with what follows it. White space around a part is dropped;
    every other character of the text stands in exactly one part. The characters that are handed to
    `count_tokens` are a small multiple of the text's, whatever the text is.

    Args:
        text: any text.
        max_tokens: upper bound for `count_tokens(part)`; at least 1.
        count_tokens: number of tokens of a piece of text, without anything added.
        markdown: take Markdown's headings and code blocks for what they are. They are harmless in
            other texts.

    Returns:
        The parts, none of them empty; no parts for a text of nothing but white space.

    Raises:
        InputError: `max_tokens` is below 1, or below what a single character needs.

    Source: ours; the paper's documents are short.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}; a part needs room for at least 1 token")
    text = text.strip()
    cuts = _Cuts(text, markdown)
    parts: list[str] = []
    start, ratio = 0, _FIRST_GUESS
    while start < len(text):
        counted, tokens = _stretch(text, start, max_tokens, count_tokens, ratio)
        ratio = (counted - start) / max(tokens, 1)
        end = _skip_space(text, counted)
        if end < len(text):
            end = cuts.best(start, end)
        part = text[start:end].strip()
        if tokens <= max_tokens and len(part) == counted - start:
            parts.append(part)
        else:  # fewer characters may be more tokens for some tokenizers: count it as it is
            parts += _halves(part, max_tokens, count_tokens)
        start = _skip_space(text, end)
    return parts


def _stretch(
    text: str, start: int, max_tokens: int, count_tokens: Callable[[str], int], ratio: float
) -> tuple[int, int]:
    """End of a long stretch of text that fits, and its tokens.

    The size is guessed from the characters per token so far, and corrected a few times.
    """
    left = len(text) - start
    size = min(left, max(1, int(max_tokens * ratio)))
    fits = (0, 0)
    tries = 0
    while True:
        tries += 1
        tokens = count_tokens(text[start : start + size])
        if tokens > max_tokens:
            if fits[0]:
                return start + fits[0], fits[1]
            if size == 1:
                return start + 1, tokens  # `_halves` says what is wrong
            smaller = int(size * max_tokens / tokens * 0.97) if tries <= _TRIES else size // 2
            size = max(1, min(smaller, size - 1))
            continue
        if size == left or tokens >= _FULL_ENOUGH * max_tokens or tries > _TRIES:
            return start + size, tokens
        fits = size, tokens
        size = min(left, 4 * size, max(size + 1, int(size * max_tokens / max(tokens, 1) * 0.97)))


def _halves(text: str, max_tokens: int, count_tokens: Callable[[str], int]) -> Iterator[str]:
    """The text, or pieces of it that fit, cut between characters."""
    todo = [text]
    while todo:
        piece = todo.pop().strip()
        if not piece:
            continue
        tokens = count_tokens(piece)
        if tokens <= max_tokens:
            yield piece
        elif len(piece) == 1:
            raise InputError(
                f"the character {piece!r} alone needs {tokens} tokens, more than "
                f"max_tokens={max_tokens}; raise max_tokens"
            )
        else:
            middle = len(piece) // 2
            todo += [piece[middle:], piece[:middle]]


class _Cuts:
    """Where a text may be cut."""

    def __init__(self, text: str, markdown: bool) -> None:
        self._text = text
        self._offsets: list[int] = []
        self._strengths: list[int] = []
        for offset, strength in _line_starts(text, markdown):
            self._offsets.append(offset)
            self._strengths.append(strength)

    def best(self, start: int, end: int) -> int:
        """The best place for a cut after `start`, up to `end`."""
        middle = (start + end) // 2
        first, last = bisect_right(self._offsets, start), bisect_right(self._offsets, end)
        lines = [(self._strengths[i], self._offsets[i]) for i in range(first, last)]
        headings = [line for line in lines if line[0] > _PARAGRAPH]
        if headings:
            return max(headings)[1]
        for low in (middle, start):
            found = max((line for line in lines if line[1] > low), default=None)
            if found is not None:
                return found[1]
            for pattern in (_SENTENCE, _WORD):
                ends = [m.end() for m in pattern.finditer(self._text, low, end) if m.end() > low]
                if ends:
                    return ends[-1]
        return self._between_letters(start, end)

    def _between_letters(self, start: int, end: int) -> int:
        """`end`, or a bit before it, so that no letter loses its marks."""
        for cut in range(end, max(start, end - _MARKS_IN_A_ROW), -1):
            if not (_joins(self._text[cut]) or self._text[cut - 1] == "\u200d"):
                return cut
        return end


def _joins(character: str) -> bool:
    """True for what belongs to the letter before it: combining marks, joiners, skin tones."""
    return (
        unicodedata.category(character).startswith("M")
        or character == "\u200d"
        or "\U0001f3fb" <= character <= "\U0001f3ff"
    )


def _line_starts(text: str, markdown: bool) -> Iterator[tuple[int, int]]:
    """Offsets at which lines begin that a part may begin with, in order, with their strengths."""
    lines = text.splitlines(keepends=True)
    offset, fence = 0, ""
    below_heading, below_blank = True, False  # the text's own beginning is no cut
    for i, line in enumerate(lines):
        strength = _LINE
        if not line.strip():
            below_blank = True
        else:
            was_fenced = bool(fence)
            fence = _follow_fence(line, fence) if markdown else ""
            following = lines[i + 1] if i + 1 < len(lines) else ""
            depth = _depth(line, following) if markdown and not was_fenced else 0
            if depth:
                strength = _HEADING - depth
            elif below_blank and not fence:
                strength = _PARAGRAPH
            if not below_heading:
                yield offset, strength
            underline = below_heading and bool(_UNDERLINE.match(line))
            below_heading, below_blank = bool(depth) or underline, False
        offset += len(line)


def _depth(line: str, following: str) -> int:
    """Level of the heading that a line of Markdown is; 0 if it is none."""
    found = _ATX.match(line)
    if found:
        return len(found[1])
    underline = _UNDERLINE.match(following)
    if underline and not _UNDERLINE.match(line):
        return 1 if underline[1].startswith("=") else 2
    return 0


def _follow_fence(line: str, fence: str) -> str:
    """The fence of the code block that goes on after a line; empty outside of code."""
    found = _FENCE.match(line)
    if not found:
        return fence
    if not fence:
        return found[1]
    return "" if found[1].startswith(fence) else fence


def _skip_space(text: str, offset: int) -> int:
    found = _SPACE.match(text, offset)
    assert found is not None
    return found.end()
