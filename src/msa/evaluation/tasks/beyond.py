"""What the tasks beyond matching share: their questions in real text, and their scores.

The names in a question are made up and occur nowhere in the haystack. What a question needs, and
what is there to mislead it, are documents of its own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain, count, islice
from typing import TYPE_CHECKING

from msa.evaluation.metrics import exact_match, normalize_answer, token_f1
from msa.evaluation.question_sets import Question, QuestionSet
from msa.evaluation.tasks.base import Request, Task
from msa.evaluation.tasks.haystacks import Item, drawing, question_set, text_haystack
from msa.evaluation.tasks.words import Names

if TYPE_CHECKING:
    from msa.evaluation.systems import Outcome

METRIC = "accuracy"
NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
_NUMBER = re.compile(r"\b(\d[\d,]*|" + "|".join(NUMBER_WORDS) + r")\b", re.IGNORECASE)

Story = Callable[[int, random.Random, Names], Iterable[Item]]
"""Makes the questions of story 0, 1, 2, ...; a story's items may share documents."""
Score = Callable[[Question, "Outcome"], Mapping[str, float]]


def load(name: str, story: Story, request: Request) -> QuestionSet:
    """So many questions of as many stories as they take, in real text."""
    haystack = text_haystack(request)
    rng = drawing(request, name)
    names = Names(rng, (document.text for document in haystack))
    items = chain.from_iterable(story(number, rng, names) for number in count())
    return question_set(name, request, haystack, list(islice(items, request.count)))


def short_answer(question: Question, outcome: Outcome) -> dict[str, float]:
    """1 for an answer whose first line holds an accepted one, as whole words.

    Where the accepted answer is a number, the first number in the answer must be it. An answer
    that also holds an outdated one (`Question.wrong`) is wrong. Where there is no answer, a refusal
    is right.
    """
    if not question.answers:
        right = float(outcome.refused)
        return {"score": right, "em": right, "f1": right}
    said = first_line(outcome.answer)
    if as_number(question.answers[0]) is not None:
        found = _NUMBER.search(said)
        right = found is not None and as_number(found[0]) == as_number(question.answers[0])
    else:
        right = any(place(said, answer) >= 0 for answer in question.answers)
        right = right and not any(place(said, answer) >= 0 for answer in question.wrong)
    return _scores(question, outcome, right)


def first_option(question: Question, outcome: Outcome) -> dict[str, float]:
    """1 if of the options in the question, "...: the A or the B?", the right one is named first.

    An option is known by its first word, a name.
    """
    options = options_of(question.text)
    said = first_line(outcome.answer)
    named = sorted(
        (at, option) for option in options if (at := place(said, option.split()[0])) >= 0
    )
    return _scores(question, outcome, bool(named) and named[0][1] in question.answers)


def in_order(question: Question, outcome: Outcome) -> dict[str, float]:
    """1 if the parts of the accepted answer, "A, B, C", are named in this order.

    A part is known by its first word, a name.
    """
    said = first_line(outcome.answer)
    places = [place(said, part.split()[0]) for part in question.answers[0].split(", ")]
    right = min(places) >= 0 and places == sorted(places)
    return _scores(question, outcome, right)


def options_of(text: str) -> list[str]:
    """Options that a question ends with: "Which is older: the A, the B or the C?"."""
    listed = text.rpartition(": ")[2].rstrip("?")
    return [part.removeprefix("the ") for part in re.split(r", | or ", listed)]


def place(said: str, answer: str) -> int:
    """Where an answer begins, as whole words after normalization; -1 if it does not occur."""
    return f" {normalize_answer(said)} ".find(f" {normalize_answer(answer)} ")


def as_number(text: str) -> int | None:
    """The value of a whole number in digits or as a word up to twelve; None for other texts."""
    plain = text.strip().lower().replace(",", "")
    if plain in NUMBER_WORDS:
        return NUMBER_WORDS.index(plain)
    return int(plain) if plain.isdecimal() else None


def first_line(text: str) -> str:
    """The first line of an answer."""
    return text.strip().partition("\n")[0]


def _scores(question: Question, outcome: Outcome, right: bool) -> dict[str, float]:
    return {
        "score": float(right),
        "em": exact_match(outcome.answer, question.answers),
        "f1": token_f1(outcome.answer, question.answers),
    }


def beyond_task(name: str, title: str, story: Story, score: Score = short_answer) -> Task:
    """A task of this family."""
    name = f"beyond/{name}"
    return Task(name, title, partial(load, name, story), score, METRIC, grows=True)
