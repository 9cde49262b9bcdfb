"""Long texts to parts of bounded length, cut where meaning changes rather than where space ends."""

from __future__ import annotations

from collections.abc import Callable

from semantic_text_splitter import MarkdownSplitter, TextSplitter

from msa.errors import InputError


def split_text(
    text: str,
    max_tokens: int,
    count_tokens: Callable[[str], int],
    *,
    markdown: bool = False,
) -> list[str]:
    """Parts of a text, in order, each of at most `max_tokens` tokens.

    Cuts fall at the largest unit that fits: paragraphs (Markdown: headings, lists, code blocks),
    then sentences, words and characters. White space around a part is dropped; every other
    character of the text stands in exactly one part.

    Args:
        text: any text.
        max_tokens: upper bound for `count_tokens(part)`; at least 1.
        count_tokens: number of tokens of a piece of text, without anything added.
        markdown: the text is Markdown.

    Returns:
        The parts, none of them empty; no parts for a text of nothing but white space.

    Raises:
        InputError: `max_tokens` is below 1, or below what a single character needs.

    Source: ours; the paper's documents are short. The splitting is semantic-text-splitter's.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}; a part needs room for at least 1 token")
    text = text.strip()
    if not text:
        return []
    if count_tokens(text) <= max_tokens:
        return [text]
    splitter = MarkdownSplitter if markdown else TextSplitter
    parts: list[str] = []
    for part in splitter.from_callback(count_tokens, max_tokens).chunks(text):
        # The splitter assumes that a shorter text has fewer tokens, and cuts no grapheme in two;
        # neither holds for every tokenizer and text, so each part is counted once more.
        for piece in _cut(part, max_tokens, count_tokens):
            if piece.strip():
                parts.append(piece)
    return parts


def _cut(text: str, max_tokens: int, count_tokens: Callable[[str], int]) -> list[str]:
    """Cut between characters until every piece fits."""
    pieces: list[str] = []
    todo = [text]
    while todo:
        piece = todo.pop()
        if count_tokens(piece) <= max_tokens:
            pieces.append(piece)
        elif len(piece) == 1:
            raise InputError(
                f"the character {piece!r} alone needs {count_tokens(piece)} tokens, more than "
                f"max_tokens={max_tokens}; raise max_tokens"
            )
        else:
            middle = len(piece) // 2
            todo += [piece[middle:], piece[:middle]]
    return pieces
