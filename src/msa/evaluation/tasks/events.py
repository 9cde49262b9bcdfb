"""Counting, aggregating, comparing and ordering over documents that each tell one event."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from msa.evaluation.question_sets import Question
from msa.evaluation.tasks.base import Task
from msa.evaluation.tasks.beyond import NUMBER_WORDS, beyond_task, first_option, in_order
from msa.evaluation.tasks.haystacks import Item, own
from msa.evaluation.tasks.words import Names, draw_dates, say_date
from msa.types import Document

ITEMS = (
    *("lamp", "chair", "clock", "kettle", "ladder", "basket", "carpet", "mirror", "saddle"),
    *("violin", "bell", "barrel", "desk", "blanket", "telescope", "wagon", "pillow", "bucket"),
)
PURCHASE = "On {day}, {buyer} bought a {item} from {seller} for {price} crowns."
MOST_PURCHASES = 6
AGGREGATES = ("total", "most expensive", "different sellers")
MEASURES = {
    # kind -> a thing, what is told of it, its least and greatest, whether the greater one is it
    "taller": ("tower", "The {thing} is {value} meters tall.", 20, 300, True),
    "longer": ("tunnel", "The {thing} has a length of {value} meters.", 200, 9000, True),
    "cheaper": ("hotel", "A night at the {thing} costs {value} crowns.", 30, 400, False),
    "older": ("mill", "The {thing} was built in the year {value}.", 1500, 1990, False),
    "deeper": ("lake", "At its deepest point the {thing} measures {value} meters.", 5, 600, True),
}
OPENED = "The {thing} was opened on {day}."
ORDERS = ("first", "last", "order of three")
COMPARED, ORDERED, OTHERS = 2, 3, 2


def counting(number: int, rng: random.Random, names: Names) -> Iterator[Item]:
    """How many things of a kind a person bought; others bought them too, and other things."""
    times = number % MOST_PURCHASES + 1
    item, *other_items = rng.sample(ITEMS, 1 + OTHERS)
    buyer, others = names.person(), [names.person() for _ in range(OTHERS)]
    bought = [(buyer, item)] * times + [(buyer, other) for other in other_items]
    bought += [(other, item) for other in others]
    texts = _purchases(rng, names, bought)
    gold = range(times)
    question = Question(
        f"How many {item}s did {buyer} buy?", (str(times), NUMBER_WORDS[times]), (), kind=str(times)
    )
    yield _item(number, rng, question, texts, gold)


def aggregating(number: int, rng: random.Random, names: Names) -> Iterator[Item]:
    """What a person's purchases come to, which was the dearest, from how many people they were."""
    kind = AGGREGATES[number % len(AGGREGATES)]
    times = rng.randint(2, 4)
    buyer, others = names.person(), [names.person() for _ in range(OTHERS)]
    items = rng.sample(ITEMS, times + OTHERS)
    bought = list(zip([buyer] * times + others, items, strict=True))
    sellers = names.first_names(len(bought))
    if times > 2 and rng.random() < 0.5:
        sellers[1] = sellers[0]
    prices = rng.sample(range(3, 100), len(bought))
    texts = _purchases(rng, names, bought, sellers, prices)
    if kind == "total":
        text = f"How many crowns did {buyer} spend in total?"
        answers: tuple[str, ...] = (str(sum(prices[:times])),)
    elif kind == "most expensive":
        text = f"What was the most expensive thing that {buyer} bought?"
        answers = (items[prices.index(max(prices[:times]))],)
    else:
        different = len(set(sellers[:times]))
        text = f"From how many different people did {buyer} buy something?"
        answers = (str(different), NUMBER_WORDS[different])
    yield _item(number, rng, Question(text, answers, (), kind=kind), texts, range(times))


def comparing(number: int, rng: random.Random, names: Names) -> Iterator[Item]:
    """Which of two things is taller, older, cheaper; each is told of in a document."""
    kind = list(MEASURES)[number % len(MEASURES)]
    noun, told, least, greatest, greater = MEASURES[kind]
    things = [f"{names.surname()} {noun}" for _ in range(COMPARED + OTHERS)]
    values = rng.sample(range(least, greatest), len(things))
    texts = [told.format(thing=t, value=v) for t, v in zip(things, values, strict=True)]
    best = (max if greater else min)(range(COMPARED), key=values.__getitem__)
    question = Question(
        f"Which is {kind}: the {things[0]} or the {things[1]}?", (things[best],), (), kind=kind
    )
    yield _item(number, rng, question, texts, range(COMPARED))


def choosing(number: int, rng: random.Random, names: Names) -> Iterator[Item]:
    """Which of three things was opened first, or last."""
    kind = ("first", "last")[number % 2]
    things, texts, by_date = _openings(rng, names)
    answer = things[by_date[0 if kind == "first" else -1]]
    a, b, c = things[:ORDERED]
    text = f"Which was opened {kind}: the {a}, the {b} or the {c}?"
    yield _item(number, rng, Question(text, (answer,), (), kind=kind), texts, range(ORDERED))


def ordering(number: int, rng: random.Random, names: Names) -> Iterator[Item]:
    """In which order three things were opened."""
    things, texts, by_date = _openings(rng, names)
    a, b, c = things[:ORDERED]
    text = f"In which order were these opened, the oldest first: the {a}, the {b}, the {c}?"
    answer = ", ".join(things[i] for i in by_date)
    yield _item(number, rng, Question(text, (answer,), ()), texts, range(ORDERED))


def _openings(rng: random.Random, names: Names) -> tuple[list[str], list[str], list[int]]:
    """Things, what is told of them, and rows of the first three by their dates."""
    noun = rng.choice(("bridge", "museum", "library", "station", "theater"))
    things = [f"{names.surname()} {noun}" for _ in range(ORDERED + OTHERS)]
    days = draw_dates(rng, len(things))
    rng.shuffle(days)
    texts = [OPENED.format(thing=t, day=say_date(d)) for t, d in zip(things, days, strict=True)]
    return things, texts, sorted(range(ORDERED), key=days.__getitem__)


def _purchases(
    rng: random.Random,
    names: Names,
    bought: Sequence[tuple[str, str]],
    sellers: Sequence[str] | None = None,
    prices: Sequence[int] | None = None,
) -> list[str]:
    days = draw_dates(rng, len(bought))
    sellers = sellers or names.first_names(len(bought))
    prices = prices or [rng.randint(3, 99) for _ in bought]
    return [
        PURCHASE.format(day=say_date(day), buyer=buyer, item=item, seller=seller, price=price)
        for day, (buyer, item), seller, price in zip(days, bought, sellers, prices, strict=True)
    ]


def _item(
    number: int, rng: random.Random, question: Question, texts: Sequence[str], gold: range
) -> Item:
    """The question with its documents in a random order; `gold` are rows of the texts."""
    order = rng.sample(range(len(texts)), len(texts))
    documents: list[Document] = own(f"q{number}", (texts[i] for i in order))
    needed = tuple(documents[order.index(i)].id for i in gold)
    whole = Question(question.text, question.answers, needed, id=f"q{number}", kind=question.kind)
    return Item(whole, tuple(documents))


TASKS: tuple[Task, ...] = (
    beyond_task("counting", "Counting documents that say the same of somebody", counting),
    beyond_task("aggregating", "Totals and greatest values over documents", aggregating),
    beyond_task("comparing", "Comparing a figure of two documents", comparing, first_option),
    beyond_task("first_or_last", "The first or the last by date", choosing, first_option),
    beyond_task("ordering", "Ordering three documents by date", ordering, in_order),
)
