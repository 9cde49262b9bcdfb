"""Where in a text an answer stands."""

from __future__ import annotations

import re

from msa.text.sentences import sentence_spans

# Characters before and after an occurrence that are compared with the question.
NEARBY = 160
_OCCURRENCES = 1000
_WORD = re.compile(r"\w+")


def find_span(text: str, answer: str, question: str) -> tuple[int, int] | None:
    """Character offsets of the answer in a text; None where it does not stand.

    Case does not count, any white space equals any other, and a word is found as a whole word only.
    Of several occurrences it is the one with the most words of the question nearby, long words
    counting more, and the first of those that are equal.

    Args:
        text: searched.
        answer: as the model gave it.
        question: as asked.
    """
    words = answer.strip().strip(".,;:!?\"'").split()
    if not words:
        return None
    pattern = r"\s+".join(re.escape(word) for word in words)
    if has_borders(words[0][0]):
        pattern = r"(?<!\w)" + pattern
    if has_borders(words[-1][-1]):
        pattern += r"(?!\w)"
    wanted = {w.casefold() for w in _WORD.findall(question)} - {w.casefold() for w in words}
    best, best_count = None, -1
    for i, found in enumerate(re.finditer(pattern, text, re.IGNORECASE)):
        if i == _OCCURRENCES:
            break
        around = text[max(0, found.start() - NEARBY) : found.end() + NEARBY]
        near = wanted & {w.casefold() for w in _WORD.findall(around)}
        count = sum(max(0, len(word) - 2) for word in near)
        if count > best_count:
            best, best_count = found.span(), count
    return best


def sentence_around(text: str, start: int, end: int) -> tuple[int, int]:
    """Character offsets of the sentence, or the sentences, that a span of a text stands in."""
    touched = [at for at in sentence_spans(text) if at[0] < end and at[1] > start]
    return min([start, *(first for first, _ in touched)]), max(
        [end, *(last for _, last in touched)]
    )


def has_borders(character: str) -> bool:
    """Whether words of a character's script stand apart: it has case, or is a digit."""
    return character.isdigit() or character.lower() != character.upper()
