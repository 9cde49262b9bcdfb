"""Words of English that name nothing, and the names in a text."""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_NAME = 12
"""Words of the longest name."""


def set_of(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


WORD = re.compile(r"[^\W_]+(?:['’.&-][^\W_]+)*")
PRONOUNS = set_of(
    "he him his himself she her hers herself they them their theirs themselves it its itself there"
)
QUESTION_WORDS = {"who", "whom", "whose", "what", "which", "when", "where", "why", "how"}
AUXILIARIES = set_of(
    "is are was were am be been do does did has have had can could will would shall should may "
    "might must isn't aren't wasn't weren't don't doesn't didn't hasn't haven't hadn't"
)
PREPOSITIONS = set_of(
    "in on at of for from to with by about during after before since until under over between "
    "against into as near"
)
FUNCTION_WORDS = (
    PRONOUNS
    | QUESTION_WORDS
    | AUXILIARIES
    | PREPOSITIONS
    | set_of(
        "a an the this that these those there then and or but so not no yes i you we me us my your "
        "our any some other another else more most many much ever also only just than too very all "
        "both each if because while s t don didn doesn please tell ok okay thanks thank hi hello "
        "hey"
    )
)
"""Words that name nothing."""
_NO_NAMES = set_of(
    "january february march april june july august september october november december monday "
    "tuesday wednesday thursday friday saturday sunday"
)
_JOINERS = set_of("of the and de la le van von der den du da di del al bin ibn for & 'n'")


def words_of(text: str) -> list[str]:
    """The words of a text, case folded."""
    return [word.casefold() for word in WORD.findall(text)]


def names(text: str, *, first: bool = False) -> Iterator[str]:
    """Names in a text, in the order in which they stand: runs of capitalized words.

    Args:
        text: of any length.
        first: a capitalized word that begins a sentence, with none after it, is a name too.
    """
    run: list[re.Match[str]] = []
    for word in WORD.finditer(text):
        gap = text[run[-1].end() : word.start()] if run else ""
        if run and not (gap in (" ", " & ") or (gap == ". " and len(run[-1].group()) == 1)):
            yield from _name(run, text, first)
            run = []
        if word.group()[0].isupper() or (run and word.group() in _JOINERS):
            run.append(word)
        elif run:
            yield from _name(run, text, first)
            run = []
    yield from _name(run, text, first)


def _name(run: list[re.Match[str]], text: str, first: bool) -> Iterator[str]:
    """The name that a run of words is, if it is one."""
    words = [found.group().casefold() for found in run]
    start, end = 0, len(run)
    while end and words[end - 1] in _JOINERS:
        end -= 1
    while start < end and words[start] in FUNCTION_WORDS - {"the"}:
        start += 1
    words = words[start:end]
    if len(words) > MAX_NAME or set(words) <= FUNCTION_WORDS | _NO_NAMES:
        return
    begin = run[start].start()
    if len(words) == 1 and not first and not start and _begins_sentence(text, begin):
        return
    yield re.sub(r"['’]s?$", "", text[begin : run[end - 1].end()])


def _begins_sentence(text: str, position: int) -> bool:
    before = text[max(0, position - 8) : position].rstrip(" \"'“‘([")
    return not before or before[-1] in ".!?:\n"
