"""Words, keys, values, names and dates that the tasks draw. The lists are files in `data/`."""

from __future__ import annotations

import random
import string
import uuid
import zlib
from collections.abc import Callable, Iterable
from datetime import date, timedelta
from functools import cache
from importlib.resources import files

from msa.errors import InputError
from msa.synthetic_worlds.tables import words as world_words

NUMBER_DIGITS = 7
VARIABLE_LETTERS = 5
QUESTION_SHARE = 10
"""One key of so many is for questions; the others are for haystacks."""


@cache
def words(name: str) -> tuple[str, ...]:
    """A list of `data/`, such as "nouns"."""
    return tuple(dict.fromkeys(_read(f"{name}.txt").split()))


@cache
def rows(name: str) -> dict[str, tuple[tuple[str, ...], ...]]:
    """A table of `data/`: `# title` opens a section, other lines are fields between bars."""
    table: dict[str, list[tuple[str, ...]]] = {}
    section: list[tuple[str, ...]] = []
    for line in filter(None, map(str.strip, _read(f"{name}.txt").splitlines())):
        if line.startswith("#"):
            section = table.setdefault(line.removeprefix("#").strip(), [])
        else:
            section.append(tuple(field.strip() for field in line.split("|")))
    return {title: tuple(lines) for title, lines in table.items()}


def _read(name: str) -> str:
    return (files("msa.evaluation.tasks") / "data" / name).read_text(encoding="utf-8")


def draw_number(rng: random.Random) -> str:
    """A number of seven digits."""
    return str(rng.randrange(10 ** (NUMBER_DIGITS - 1), 10**NUMBER_DIGITS))


def draw_uuid(rng: random.Random) -> str:
    """A random UUID (version 4)."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def draw_letters(rng: random.Random) -> str:
    """A variable's name of five capital letters."""
    return "".join(rng.choices(string.ascii_uppercase, k=VARIABLE_LETTERS))


def draw_assigned(rng: random.Random) -> str:
    """A variable's value of five digits."""
    return str(rng.randrange(10_000, 100_000))


def draw_words(rng: random.Random, *, asked: bool) -> str:
    """An adjective and a noun, such as "amber-canoe".

    Args:
        rng: source.
        asked: True for a pair that questions may ask about, False for one of the others.
    """
    adjectives, nouns = words("adjectives"), words("nouns")
    while True:
        pair = f"{rng.choice(adjectives)}-{rng.choice(nouns)}"
        if asked == (zlib.crc32(pair.encode()) % QUESTION_SHARE == 0):
            return pair


def draw_distinct(draw: Callable[[], str], count: int, used: set[str]) -> list[str]:
    """So many strings that were not drawn before; `used` holds them afterwards.

    Raises:
        InputError: no new one comes any more; fewer questions need fewer.
    """
    found: list[str] = []
    tries = 0
    while len(found) < count:
        one = draw()
        if one not in used:
            used.add(one)
            found.append(one)
        tries += 1
        if tries > 1000 * (count + 10):
            raise InputError(
                f"{count} new keys were wanted and only {len(found)} found; ask fewer questions"
            )
    return found


class Names:
    """Names of people and places that stand nowhere else.

    Surnames are made of stems and endings; none is given twice, and none occurs in the texts.

    Args:
        rng: source.
        texts: what the names must not occur in.
    """

    def __init__(self, rng: random.Random, texts: Iterable[str] = ()) -> None:
        self._rng = rng
        self._first = sorted({*world_words("male"), *world_words("female")})
        stems = [stem for stem in world_words("surname_stems") if len(stem) > 2]
        built = {stem + end for stem in stems for end in world_words("surname_endings")}
        built -= {word for text in texts for word in built & set(split_words(text))}
        self._surnames = sorted(built)
        rng.shuffle(self._surnames)

    def surname(self) -> str:
        """A surname, or the name of a house or place.

        Raises:
            InputError: all are used.
        """
        if not self._surnames:
            raise InputError("there are not enough names for so many questions; ask fewer")
        return self._surnames.pop()

    def person(self) -> str:
        """First name and surname."""
        return f"{self._rng.choice(self._first)} {self.surname()}"

    def first_names(self, count: int) -> list[str]:
        """Different first names."""
        return self._rng.sample(self._first, count)


def split_words(text: str) -> list[str]:
    """Words as they are written, without marks around them."""
    return [word.strip(".,;:!?()[]\"'“”‘’") for word in text.split()]


def draw_dates(rng: random.Random, count: int, first: int = 2011, last: int = 2034) -> list[date]:
    """Different dates, from the oldest to the newest, at least ten days apart.

    Args:
        rng: source.
        count: how many.
        first, last: years.
    """
    start = date(first, 1, 1)
    steps = (date(last, 12, 31) - start).days // 10
    return [start + timedelta(days=10 * step) for step in sorted(rng.sample(range(steps), count))]


def say_date(day: date) -> str:
    """A date as it is read out, such as "3 May 2031"."""
    months = world_words("months")
    return f"{day.day} {months[day.month - 1]} {day.year}"


def listed(items: Iterable[str]) -> str:
    """Items as a sentence lists them: "A", "A and B", "A, B, and C"."""
    *rest, last = items
    if not rest:
        return last
    return f"{rest[0]} and {last}" if len(rest) == 1 else f"{', '.join(rest)}, and {last}"
