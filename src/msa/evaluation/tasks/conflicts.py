"""Documents that contradict each other, and documents that contradict what the backbone knows.

Contradictions: dated notes give different values; the newest holds, and the older ones are
`Question.wrong`. Edited facts: a dated document changes a well-known fact; it must be followed, and
what the backbone learned is `Question.wrong`. The facts are in `data/edited_facts.txt`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from msa.evaluation.question_sets import Question
from msa.evaluation.tasks.base import Task
from msa.evaluation.tasks.beyond import beyond_task
from msa.evaluation.tasks.haystacks import Item, own
from msa.evaluation.tasks.words import Names, draw_dates, rows, say_date
from msa.synthetic_worlds.tables import words as world_words

SITES = ("archive", "observatory", "lighthouse", "granary", "museum", "boathouse", "orchard")
NOTE = "Note of {day}: the {what} of the {site} is {value}."
MOST_NOTES = 4
_COLORS = [color for color in world_words("needle_colors") if " " not in color]
_DRAW: dict[str, Callable[[random.Random, int], list[str]]] = {
    "access code": lambda rng, n: [str(v) for v in rng.sample(range(1000, 10_000), n)],
    "telephone extension": lambda rng, n: [str(v) for v in rng.sample(range(100, 1000), n)],
    "emblem": lambda rng, n: [f"the {v}" for v in rng.sample(world_words("needle_animals"), n)],
    "gate color": lambda rng, n: rng.sample(_COLORS, n),
    "closing time": lambda rng, n: [f"{v} o'clock" for v in rng.sample(range(1, 13), n)],
}


def attributes() -> tuple[str, ...]:
    """What a site has."""
    return tuple(_DRAW)


def draw_values(rng: random.Random, attribute: str, count: int) -> list[str]:
    """Different values of an attribute."""
    return _DRAW[attribute](rng, count)


def contradictions(number: int, rng: random.Random, names: Names) -> Iterator[Item]:
    """Two to four notes of one thing; newer notes are about another thing, and another site."""
    notes = 2 + number % (MOST_NOTES - 1)
    what, other = rng.sample(attributes(), 2)
    noun = rng.choice(SITES)
    site, elsewhere = f"{names.surname()} {noun}", f"{names.surname()} {noun}"
    days = [say_date(day) for day in draw_dates(rng, notes + 2)]
    values = draw_values(rng, what, notes + 1)
    told = [(day, what, site, value) for day, value in zip(days, values[:-1], strict=False)]
    told += [(days[-2], other, site, draw_values(rng, other, 1)[0])]
    told += [(days[-1], what, elsewhere, values[-1])]
    order = rng.sample(range(len(told)), len(told))
    texts = [NOTE.format(day=d, what=w, site=s, value=v) for d, w, s, v in told]
    documents = own(f"q{number}", (texts[i] for i in order))
    question = Question(
        f"What is the {what} of the {site} now?",
        answers=(values[notes - 1],),
        gold=(documents[order.index(notes - 1)].id,),
        id=f"q{number}",
        kind=f"{notes} notes",
        wrong=tuple(values[: notes - 1]),
    )
    yield Item(question, tuple(documents))


def edited(number: int, rng: random.Random, names: Names) -> Iterator[Item]:
    """One fact that the backbone knows otherwise, and the same of another subject."""
    sections = rows("edited_facts")
    header = list(sections)[number % len(sections)]
    kind, _, asked = header.partition(": ")
    asked, told = asked.split(" | ")
    facts = sections[header]
    subject, truth = rng.choice(facts)
    other, other_truth = rng.choice([fact for fact in facts if fact[0] != subject])
    values = sorted({value for _, value in facts} - {truth, other_truth})
    value, other_value = rng.sample(values, 2)
    day, other_day = rng.sample([say_date(day) for day in draw_dates(rng, 2)], 2)
    texts = [
        told.format(date=day, subject=subject, value=value),
        told.format(date=other_day, subject=other, value=other_value),
    ]
    order = rng.sample(range(2), 2)
    documents = own(f"q{number}", (texts[i] for i in order))
    question = Question(
        asked.format(subject=subject),
        answers=(value,),
        gold=(documents[order.index(0)].id,),
        id=f"q{number}",
        kind=kind,
        wrong=(truth,),
    )
    yield Item(question, tuple(documents))


TASKS: tuple[Task, ...] = (
    beyond_task("contradictions", "Dated notes that contradict each other", contradictions),
    beyond_task("edited_facts", "Facts edited against what the backbone knows", edited),
)
