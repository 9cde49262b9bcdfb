"""RULER's eleven synthetic tasks (Hsieh et al. 2024), as questions to a memory.

Sentences, counts and metric are those of the benchmark's settings (NVIDIA/RULER, Apache-2.0:
`scripts/synthetic.yaml`); the generators, their draws and the lists of words are ours. What differs
from its flat prompt:

- The haystack is documents of a few hundred tokens, encoded once per length and seen by all
  questions. A needle is a short document that only its question sees, where RULER puts it between
  two sentences of the prompt: what stands around it does not blur it.
- The essays are text of any folder ("RULER-style"). They are not repeated when they run out.
- A question says in one sentence what is wanted. The instruction in front of the text, the
  beginning of the answer and the worked example are left out.
- Where the haystack is needles (multikey_2, multikey_3), each is a document like the question's
  own, and no other has the question's key.
- vt: each assignment is a document. Nothing says in which order they stood; no variable is assigned
  twice, so that the order does not matter.
- cwe, fwe: the list is the question's own, in documents of a few hundred tokens. It has
  `Request.size` tokens, but at most 16K (`LIST_TOKENS`): what is longer than that is filled up
  with noise. Words of cwe are those of our lists.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from msa.evaluation.question_sets import Question, QuestionSet
from msa.evaluation.tasks.base import Request, Task
from msa.evaluation.tasks.haystacks import (
    Item,
    drawing,
    fill,
    noise_haystack,
    own,
    question_set,
    text_haystack,
)
from msa.evaluation.tasks.words import (
    draw_assigned,
    draw_distinct,
    draw_letters,
    draw_number,
    draw_uuid,
    draw_words,
    listed,
    words,
)
from msa.types import Document

if TYPE_CHECKING:
    from msa.evaluation.systems import Outcome

METRIC = "string_match_all"
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NEEDLE_ANSWER_TOKENS = 128
LIST_TOKENS = 16_384
"""Tokens of a list of words, at most."""
CHAIN_HOPS = 4
CHAIN_ANSWER_TOKENS = 30
COMMON_WORDS, COMMON_REPEATS, OTHER_REPEATS = 10, 30, 3
SHORT_COMMON_REPEATS, SHORT_OTHER_REPEATS, SHORT_LIST_TOKENS = 6, 1, 4096
COMMON_ANSWER_TOKENS = 120
ENTRIES_PER_DOCUMENT = 50
CODED_LETTERS, CODED_EXPONENT, TOKENS_PER_CODED_WORD = 6, 2.0, 50
CODED_TOP = 3
CODED_DOTS = "..."
CODED_ANSWER_TOKENS = 50

_DRAW: dict[str, Callable[[random.Random], str]] = {
    "numbers": draw_number,
    "uuids": draw_uuid,
    "words": partial(draw_words, asked=True),
}


@dataclass(frozen=True, slots=True)
class Needles:
    """Settings of a needle task.

    Attributes:
        haystack: "noise", "essay" or "needles".
        keys, values: "words", "numbers" or "uuids".
        key_count: keys in the documents.
        value_count: values of each key.
        asked: keys that the question asks about.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    key_count: int = 1
    value_count: int = 1
    asked: int = 1


NEEDLE_TASKS: Mapping[str, tuple[str, Needles]] = {
    "niah_single_1": ("one needle in noise", Needles("noise")),
    "niah_single_2": ("one needle in text", Needles("essay")),
    "niah_single_3": ("one needle in text, a UUID", Needles("essay", values="uuids")),
    "niah_multikey_1": ("one of four needles in text", Needles("essay", key_count=4)),
    "niah_multikey_2": ("one needle among needles", Needles("needles")),
    "niah_multikey_3": (
        "one needle among needles, all of UUIDs",
        Needles("needles", keys="uuids", values="uuids"),
    ),
    "niah_multivalue": ("four needles of one key in text", Needles("essay", value_count=4)),
    "niah_multiquery": (
        "four needles in text, all asked for",
        Needles("essay", key_count=4, asked=4),
    ),
}


def string_match_all(question: Question, outcome: Outcome) -> dict[str, float]:
    """RULER's metric: the share of the answers that occur in what was said, without case."""
    said = outcome.answer.lower()
    return {METRIC: (share := _share(said, question.answers)), "score": share}


def _share(said: str, answers: Sequence[str]) -> float:
    return sum(answer.lower() in said for answer in answers) / len(answers)


def load_needles(name: str, settings: Needles, request: Request) -> QuestionSet:
    """Questions about needles, each with needles of its own."""
    haystacks: dict[str, Callable[[Request], list[Document]]] = {
        "noise": noise_haystack,
        "essay": text_haystack,
        "needles": partial(needle_haystack, settings),
    }
    rng = drawing(request, f"ruler/{name}")
    used: set[str] = set()
    items = [_needle_item(i, settings, rng, used) for i in range(request.count)]
    return question_set(f"ruler/{name}", request, haystacks[settings.haystack](request), items)


def needle_haystack(settings: Needles, request: Request) -> list[Document]:
    """Needles that no question asks about, `request.size` tokens of them."""
    rng = random.Random(f"needles {settings.keys} {settings.values}")
    draw = _DRAW | {"words": partial(draw_words, asked=False)}

    def texts() -> Iterator[str]:
        while True:
            yield _needle(settings.values, draw[settings.keys](rng), _DRAW[settings.values](rng))

    return fill(texts(), request.size, request.count_tokens)


def _needle_item(number: int, settings: Needles, rng: random.Random, used: set[str]) -> Item:
    keys = draw_distinct(lambda: _DRAW[settings.keys](rng), settings.key_count, used)
    values = [
        draw_distinct(lambda: _DRAW[settings.values](rng), settings.value_count, used) for _ in keys
    ]
    pairs = [(key, value) for key, row in zip(keys, values, strict=True) for value in row]
    rng.shuffle(pairs)
    needles = own(f"q{number}", (_needle(settings.values, key, value) for key, value in pairs))
    asked = rng.sample(keys, settings.asked)
    wanted = [(key, value) for key in asked for value in values[keys.index(key)]]
    one = len(wanted) == 1
    question = Question(
        f"What {'is' if one else 'are all'} the special magic "
        f"{settings.values[:-1] if one else settings.values} for {listed(asked)} mentioned in the "
        "provided text?",
        answers=tuple(value for _, value in wanted),
        gold=tuple(needles[pairs.index(pair)].id for pair in wanted),
        id=f"q{number}",
        max_new_tokens=NEEDLE_ANSWER_TOKENS,
    )
    return Item(question, tuple(needles))


def _needle(kind: str, key: str, value: str) -> str:
    return NEEDLE.format(kind=kind, key=key, value=value)


def load_chains(request: Request) -> QuestionSet:
    """Variable tracking: which variables hold a value that was passed on four times."""
    rng = drawing(request, "ruler/vt")
    used: set[str] = set()
    items = [_chain_item(i, rng, used) for i in range(request.count)]
    return question_set("ruler/vt", request, noise_haystack(request), items)


def _chain_item(number: int, rng: random.Random, used: set[str]) -> Item:
    names = draw_distinct(lambda: draw_letters(rng), CHAIN_HOPS + 1, used)
    (value,) = draw_distinct(lambda: draw_assigned(rng), 1, used)
    steps = [f"VAR {names[0]} = {value}"]
    steps += [f"VAR {name} = VAR {names[i]}" for i, name in enumerate(names[1:])]
    order = rng.sample(range(len(steps)), len(steps))
    documents = own(f"q{number}", (steps[i] for i in order))
    question = Question(
        f"Find all variables that are assigned the value {value} in the text above.",
        answers=tuple(names),
        gold=tuple(documents[order.index(i)].id for i in range(len(steps))),
        id=f"q{number}",
        max_new_tokens=CHAIN_ANSWER_TOKENS,
    )
    return Item(question, tuple(documents))


def load_common_words(request: Request) -> QuestionSet:
    """Common words extraction: the ten words that a list has more often than the others."""
    rng = drawing(request, "ruler/cwe")
    tokens, noise = _list_and_noise(request)
    count, tries = COMMON_WORDS, random.Random(0)
    while count < len(_all_words()):
        longer = _common_list(tries, count + 10, tokens)[0]
        if request.count_tokens(_numbered(longer, 0)) > tokens:
            break
        count = min(count + 10, len(_all_words()))
    items = []
    for number in range(request.count):
        entries, common = _common_list(rng, count, tokens)
        texts = (
            f"Numbered list of words, part {i // ENTRIES_PER_DOCUMENT + 1}. "
            + _numbered(entries[i : i + ENTRIES_PER_DOCUMENT], i)
            for i in range(0, len(entries), ENTRIES_PER_DOCUMENT)
        )
        question = Question(
            "What are the 10 most common words in the numbered list of words?",
            answers=tuple(common),
            gold=(),
            max_new_tokens=COMMON_ANSWER_TOKENS,
        )
        items.append(_list_item(number, question, texts))
    return question_set("ruler/cwe", request, noise, items)


def _all_words() -> tuple[str, ...]:
    return tuple(dict.fromkeys(words("nouns") + words("adjectives") + words("verbs")))


def _common_list(rng: random.Random, count: int, tokens: int) -> tuple[list[str], list[str]]:
    """Entries in a random order, and the common words among them."""
    drawn = rng.sample(_all_words(), count)
    common, others = drawn[:COMMON_WORDS], drawn[COMMON_WORDS:]
    short = tokens < SHORT_LIST_TOKENS
    often = SHORT_COMMON_REPEATS if short else COMMON_REPEATS
    entries = common * often + others * (SHORT_OTHER_REPEATS if short else OTHER_REPEATS)
    rng.shuffle(entries)
    return entries, common


def _numbered(entries: Sequence[str], start: int) -> str:
    return " ".join(f"{start + i}. {entry}" for i, entry in enumerate(entries, 1))


def load_coded_words(request: Request) -> QuestionSet:
    """Frequent words extraction: the three most frequent of words drawn by Zipf's law."""
    rng = drawing(request, "ruler/fwe")
    tokens, noise = _list_and_noise(request)
    items = []
    for number in range(request.count):
        coded, top = _coded_text(rng, tokens, request.count_tokens)
        texts = (
            f"Coded text, part {i // ENTRIES_PER_DOCUMENT + 1}: "
            + " ".join(coded[i : i + ENTRIES_PER_DOCUMENT])
            for i in range(0, len(coded), ENTRIES_PER_DOCUMENT)
        )
        question = Question(
            "Do not provide any explanation. Please ignore the dots '....'. What are the three "
            "most frequently appeared words in the coded text?",
            answers=tuple(top),
            gold=(),
            max_new_tokens=CODED_ANSWER_TOKENS,
        )
        items.append(_list_item(number, question, texts))
    return question_set("ruler/fwe", request, noise, items)


def _coded_text(
    rng: random.Random, tokens: int, count_tokens: Callable[[str], int]
) -> tuple[list[str], list[str]]:
    """Coded words in a random order, of that many tokens, and the three most frequent.

    The word of rank k occurs n k^-2 / zeta(2) times; the first rank is dots.
    """

    def code() -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=CODED_LETTERS))

    vocabulary = [CODED_DOTS]
    vocabulary += draw_distinct(code, max(tokens // TOKENS_PER_CODED_WORD, 2 * CODED_TOP), set())
    zeta = math.pi**2 / 6  # of CODED_EXPONENT

    def drawn(n: int) -> list[str]:
        return [
            word
            for rank, word in enumerate(vocabulary, 1)
            for _ in range(int(n * rank**-CODED_EXPONENT / zeta))
        ]

    low, high = 100, max(200, tokens)  # a word has a token at least
    while high - low > 10:
        middle = (low + high) // 2
        if count_tokens(" ".join(drawn(middle))) <= tokens:
            low = middle
        else:
            high = middle
    coded = drawn(low)
    rng.shuffle(coded)
    return coded, vocabulary[1 : CODED_TOP + 1]


def _list_and_noise(request: Request) -> tuple[int, list[Document]]:
    """Tokens of a question's own list, and the noise that fills up what is longer."""
    tokens = min(request.size, LIST_TOKENS)
    return tokens, noise_haystack(replace(request, size=request.size - tokens))


def _list_item(number: int, question: Question, texts: Iterator[str]) -> Item:
    """All documents of a list are needed."""
    documents = own(f"q{number}", texts)
    gold = tuple(d.id for d in documents)
    return Item(replace(question, id=f"q{number}", gold=gold), tuple(documents))


def _task(name: str, title: str, load: Callable[[Request], QuestionSet]) -> Task:
    return Task(f"ruler/{name}", title, load, string_match_all, METRIC, grows=True)


TASKS: tuple[Task, ...] = (
    *(
        _task(name, f"RULER: {title}", partial(load_needles, name, settings))
        for name, (title, settings) in NEEDLE_TASKS.items()
    ),
    _task("vt", "RULER: variables that hold a value, four hops", load_chains),
    _task("cwe", "RULER: the ten most common words of a list", load_common_words),
    _task("fwe", "RULER: the three most frequent coded words", load_coded_words),
)
