"""State tracking in the manner of bAbI's qa1 to qa5, told by documents in long noise.

A small simulator moves people and things about a house. Every entry of the house's log is a
document with the time of day in its title, so that the order is known wherever it lies; bAbI's
stories, and BABILong's, have the order of the text instead. Rooms, things and the wording are ours.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from msa.evaluation.question_sets import Question
from msa.evaluation.tasks.base import Task
from msa.evaluation.tasks.beyond import beyond_task
from msa.evaluation.tasks.haystacks import Item, own
from msa.evaluation.tasks.words import Names

KINDS = ("one fact", "two facts", "three facts", "two arguments", "three arguments")
PEOPLE, THINGS_THERE = 3, 2
ENTRIES = {"one fact": 8, "two facts": 14, "three facts": 24, "three arguments": 16}
TRIES = 200
ROOMS = ("kitchen", "library", "cellar", "garden", "attic", "hallway", "pantry", "workshop")
THINGS = ("lantern", "teapot", "hammer", "compass", "umbrella", "notebook", "scarf", "whistle")
SIDES = {"north": "south", "south": "north", "east": "west", "west": "east"}
WENT = "{who} went to the {room}."
TOOK = "{who} picked up the {thing}."
LEFT = "{who} put down the {thing}."
GAVE = "{who} gave the {thing} to {other}."


@dataclass(slots=True)
class House:
    """A log that is being written, and what follows from it.

    Attributes:
        entries: what happened, in order.
        went: person -> rows of the entries that moved them, oldest first.
        room: person -> where they are.
        holder: thing -> who holds it, for things that are held.
        taken: thing -> row of the entry by which its holder got it.
        trail: thing -> rooms it has been in, each with the entries that tell so.
        given: (giver, thing, receiver, row), oldest first.
    """

    entries: list[str] = field(default_factory=list)
    went: dict[str, list[int]] = field(default_factory=dict)
    room: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)
    trail: dict[str, list[tuple[str, tuple[int, ...]]]] = field(default_factory=dict)
    given: list[tuple[str, str, str, int]] = field(default_factory=list)

    def say(self, text: str) -> int:
        """A new entry; its row."""
        self.entries.append(text)
        return len(self.entries) - 1

    def move(self, who: str, room: str) -> None:
        """A person goes to a room, with all that they hold."""
        self.went.setdefault(who, []).append(self.say(WENT.format(who=who, room=room)))
        self.room[who] = room
        for thing in [t for t, holder in self.holder.items() if holder == who]:
            self._mark(thing, who)

    def take(self, who: str, thing: str) -> None:
        """A person picks up a thing where they are."""
        self.taken[thing] = self.say(TOOK.format(who=who, thing=thing))
        self.holder[thing] = who
        if not self.trail.get(thing):
            self._mark(thing, who)

    def leave(self, who: str, thing: str) -> None:
        """A person puts down what they hold."""
        row = self.say(LEFT.format(who=who, thing=thing))
        del self.holder[thing]
        self.trail[thing][-1] = (self.room[who], (row, self.went[who][-1]))

    def give(self, who: str, thing: str, other: str) -> None:
        """A person passes a thing to another in the same room."""
        row = self.say(GAVE.format(who=who, thing=thing, other=other))
        self.holder[thing], self.taken[thing] = other, row
        self.given.append((who, thing, other, row))

    def _mark(self, thing: str, who: str) -> None:
        rows = (self.taken[thing], self.went[who][-1])
        self.trail.setdefault(thing, []).append((self.room[who], rows))


def story(number: int, rng: random.Random, names: Names) -> Iterator[Item]:
    """One log and one question about it."""
    kind = KINDS[number % len(KINDS)]
    place = names.surname()
    if kind == "two arguments":
        yield _plan(number, rng, place)
        return
    people = names.first_names(PEOPLE)
    for _ in range(TRIES):
        house = _simulate(rng, people, ENTRIES[kind], giving=kind == "three arguments")
        asked = _ASK[kind](rng, house)
        if asked is not None:
            break
    else:
        raise AssertionError(f"no house in {TRIES} gave a question of {kind}")
    text, answer, rows = asked
    minutes = sorted(rng.sample(range(7 * 60, 22 * 60), len(house.entries)))
    titles = [f"Log of {place} House, {m // 60:02}:{m % 60:02}" for m in minutes]
    order = rng.sample(range(len(titles)), len(titles))
    documents = own(f"q{number}", (house.entries[i] for i in order), (titles[i] for i in order))
    gold = tuple(documents[order.index(i)].id for i in dict.fromkeys(rows))
    question = Question(
        f"By the log of {place} House, {text}", (answer,), gold, id=f"q{number}", kind=kind
    )
    yield Item(question, tuple(documents))


def _simulate(rng: random.Random, people: list[str], length: int, *, giving: bool) -> House:
    house = House()
    things = rng.sample(THINGS, THINGS_THERE)
    for who in people:
        house.move(who, rng.choice(ROOMS))
    while len(house.entries) < length:
        who = rng.choice(people)
        held = [thing for thing in things if house.holder.get(thing) == who]
        here = [
            thing
            for thing in things
            if thing not in house.holder
            and (thing not in house.trail or house.trail[thing][-1][0] == house.room[who])
        ]
        company = [p for p in people if p != who and house.room[p] == house.room[who]]
        draw = rng.random()
        if giving and held and draw < 0.8:
            other = rng.choice(company or [p for p in people if p != who])
            if other not in company:
                house.move(other, house.room[who])
            house.give(who, rng.choice(held), other)
        elif here and draw < 0.4:
            house.take(who, rng.choice(here))
        elif held and draw < 0.55:
            house.leave(who, rng.choice(held))
        else:
            house.move(who, rng.choice([room for room in ROOMS if room != house.room[who]]))
    return house


_Asked = tuple[str, str, tuple[int, ...]]
_Ask = Callable[[random.Random, House], _Asked | None]


def _ask_person(rng: random.Random, house: House) -> _Asked:
    who = rng.choice(sorted(house.room))
    return f"in which room is {who} at the end?", house.room[who], (house.went[who][-1],)


def _ask_thing(rng: random.Random, house: House) -> _Asked | None:
    if not house.trail:
        return None
    thing = rng.choice(sorted(house.trail))
    room, rows = house.trail[thing][-1]
    return f"in which room is the {thing} at the end?", room, rows


def _ask_before(rng: random.Random, house: House) -> _Asked | None:
    """Where a thing was before it came to a room that it came to once."""
    found = []
    for thing, trail in sorted(house.trail.items()):
        rooms = [room for room, _ in trail]
        found += [(thing, at) for at in range(1, len(trail)) if rooms.count(rooms[at]) == 1]
    if not found:
        return None
    thing, at = rng.choice(found)
    (before, told_before), (room, told) = house.trail[thing][at - 1 : at + 1]
    return (
        f"in which room was the {thing} just before it came to the {room}?",
        before,
        (*told_before, *told),
    )


def _ask_gift(rng: random.Random, house: House) -> _Asked | None:
    """One of giver, thing and receiver, where the other two leave no doubt."""
    found = []
    for giver, thing, other, row in house.given:
        for asked in range(3):
            known = [x for i, x in enumerate((giver, thing, other)) if i != asked]
            same = {
                gift[asked]
                for gift in house.given
                if [x for i, x in enumerate(gift[:3]) if i != asked] == known
            }
            if len(same) == 1:
                found.append((asked, giver, thing, other, row))
    if not found:
        return None
    asked, giver, thing, other, row = rng.choice(found)
    text = (
        f"who gave the {thing} to {other}?",
        f"what did {giver} give to {other}?",
        f"to whom did {giver} give the {thing}?",
    )[asked]
    return text, (giver, thing, other)[asked], (row,)


_ASK: Mapping[str, _Ask] = {
    "one fact": _ask_person,
    "two facts": _ask_thing,
    "three facts": _ask_before,
    "three arguments": _ask_gift,
}


def _plan(number: int, rng: random.Random, place: str) -> Item:
    """Rooms that lie beside each other; which lies on one side of another."""
    rooms = rng.sample(ROOMS, 5)
    sides = [rng.choice(sorted(SIDES)) for _ in rooms[1:]]
    texts, told = [], []
    for (a, b), side in zip(pairwise(rooms), sides, strict=True):
        a, b, side = (a, b, side) if rng.random() < 0.5 else (b, a, SIDES[side])
        texts.append(f"The {a} is directly {side} of the {b}.")
        told.append((a, side, b))
    order = rng.sample(range(len(texts)), len(texts))
    documents = own(
        f"q{number}", (texts[i] for i in order), [f"Plan of {place} House"] * len(order)
    )
    found = []
    for row, (a, side, b) in enumerate(told):
        found.append((f"which room is directly {side} of the {b}?", a, row))
        found.append((f"which room is directly {SIDES[side]} of the {a}?", b, row))
    single = [one for one in found if [text for text, _, _ in found].count(one[0]) == 1]
    text, answer, row = rng.choice(single)  # that of the first room is
    question = Question(
        f"By the plan of {place} House, {text}",
        (answer,),
        (documents[order.index(row)].id,),
        id=f"q{number}",
        kind="two arguments",
    )
    return Item(question, tuple(documents))


TASKS: tuple[Task, ...] = (
    beyond_task("state_tracking", "Where people and things are, after a log of moves", story),
)
