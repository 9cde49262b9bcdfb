"""Where the sentences of a text begin and end."""

from __future__ import annotations

import re

_END = re.compile(
    r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z0-9])|(?<=[。！？])|\n(?![a-z])|\n\s*\n"
)
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|Gen|Col|Capt|Lt|Rev|Sen|Gov|Jr|Sr|vs|etc|cf|approx|No|Vol|Fig|"
    r"Inc|Ltd|Co|Corp|U\.S|U\.K|e\.g|i\.e|a\.m|p\.m)|\b[A-Z])\.$"
)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Character offsets of the sentences of a text, in order, without white space at their ends.

    A line's end ends one, unless the next line goes on in lower case.
    """
    found: list[tuple[int, int]] = []
    start = 0
    for match in [*_END.finditer(text), None]:
        end = match.start() if match else len(text)
        piece = text[start:end]
        if match and match[0].isspace() and "\n" not in match[0] and _ABBREVIATION.search(piece):
            continue
        if match:  # a closing quotation mark belongs to its sentence
            piece += match[0]
        if piece.strip():
            first = start + len(piece) - len(piece.lstrip())
            found.append((first, start + len(piece.rstrip())))
        start = match.end() if match else end
    return found
