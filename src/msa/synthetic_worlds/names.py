"""Names of invented people, places, works, organisations and sites.

Every list is divided by a hash into a training part and a held-out part. Surnames, place stems and
title words of test worlds come from the held-out parts only; first names of test worlds come from
both, half of the time from the held-out part.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from msa.errors import InputError
from msa.synthetic_worlds.tables import words, words_by_type

__all__ = ["HELD_OUT_PERCENT", "NameBook", "NameParts", "is_held_out", "name_parts"]

HELD_OUT_PERCENT: Final = 15
_INITIALS: Final = "ABCDEFGHJKLMNOPRSTVW"
_AWARD_ENDINGS: Final = words("award_endings")
_ORGANISATION_NAMES: Final = words_by_type("organisation_names")
_PLACE_ENDINGS: Final = words("place_endings")
_REGION_ENDINGS: Final = words("region_endings")
_REGION_PREFIXES: Final = words("region_prefixes")
_RIVER_ENDINGS: Final = words("river_endings")
_SCHOOL_ENDINGS: Final = words("school_endings")
_SITES: Final = words("needle_sites")


def is_held_out(word: str) -> bool:
    """Tell whether a word belongs to the held-out part of its list."""
    return zlib.crc32(word.lower().encode()) % 100 < HELD_OUT_PERCENT


@dataclass(frozen=True, slots=True)
class NameParts:
    """The building blocks of names in one split.

    Attributes:
        male: First names of men.
        female: First names of women.
        rare_male: First names of men that only this split has.
        rare_female: First names of women that only this split has.
        surnames: Surnames.
        words: Stems of place names that are English words.
        stems: All stems of place names, rivers, regions, schools, awards and passwords.
        adjectives: Adjectives for titles.
        nouns: Nouns for titles.
    """

    male: tuple[str, ...]
    female: tuple[str, ...]
    rare_male: tuple[str, ...]
    rare_female: tuple[str, ...]
    surnames: tuple[str, ...]
    words: tuple[str, ...]
    stems: tuple[str, ...]
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]


def _all_surnames() -> tuple[str, ...]:
    built = (
        stem + ending for stem in words("surname_stems") for ending in words("surname_endings")
    )
    return tuple(dict.fromkeys((*words("surnames"), *built)))


def _all_stems() -> tuple[str, ...]:
    built = (
        onset + nucleus + coda
        for onset in words("place_onsets")
        for nucleus in words("place_nuclei")
        for coda in (words("place_codas") if len(nucleus) == 1 else words("diphthong_codas"))
    )
    stems = dict.fromkeys((*words("place_stems"), *built))
    return tuple(stem for stem in stems if stem not in words("unwanted_stems"))


@lru_cache(maxsize=2)
def name_parts(split: str) -> NameParts:
    """Return the building blocks of names of a split.

    Args:
        split: ``"train"`` or ``"test"``.

    Returns:
        The parts of every list that the split may use.

    Raises:
        InputError: the split is unknown.
    """
    if split not in ("train", "test"):
        raise InputError(f"split={split!r}: expected 'train' or 'test'")
    test = split == "test"

    def part(listed: Sequence[str]) -> tuple[str, ...]:
        return tuple(word for word in listed if is_held_out(word) == test)

    male, female = part(words("male")), part(words("female"))
    return NameParts(
        male=words("male") if test else male,
        female=words("female") if test else female,
        rare_male=male,
        rare_female=female,
        surnames=part(_all_surnames()),
        words=part(words("place_stems")),
        stems=part(_all_stems()),
        adjectives=part(words("title_adjectives")),
        nouns=part(words("title_nouns")),
    )


class NameBook:
    """Draws names that are unique among all names drawn with the same ``taken`` set."""

    def __init__(
        self,
        rng: random.Random,
        split: str,
        taken: set[str],
        avoid: frozenset[str] = frozenset(),
    ) -> None:
        """Create a book.

        Args:
            rng: Source of randomness.
            split: ``"train"`` or ``"test"``.
            taken: Names in use; drawn names are added to it.
            avoid: More names that must not be drawn.
        """
        self._avoid = avoid
        self._rng = rng
        self._parts = name_parts(split)
        self._taken = taken
        self._first_names: dict[str, list[str]] = {"m": [], "f": []}
        self._local_stems: list[str] = []
        self._pairs: set[tuple[str, str]] = set()

    def _unique(self, draw: Callable[[int], str]) -> str:
        """Draw until the name is new; ``draw`` gets the number of the attempt."""
        attempt = 0
        while True:
            name = draw(attempt)
            if name not in self._taken and name not in self._avoid:
                self._taken.add(name)
                return name
            attempt += 1

    def surname(self) -> str:
        """Draw a surname (surnames repeat)."""
        return self._rng.choice(self._parts.surnames)

    def stem(self) -> str:
        """Draw a stem of a place name (stems repeat)."""
        parts = self._parts
        return self._rng.choice(parts.words if self._rng.random() < 0.2 else parts.stems)

    def _first_name(self, gender: str) -> str:
        rng = self._rng
        seen = self._first_names[gender]
        if seen and rng.random() < 0.3:
            return rng.choice(seen)
        parts = self._parts
        common, rare = (
            (parts.male, parts.rare_male) if gender == "m" else (parts.female, parts.rare_female)
        )
        name = rng.choice(rare if rng.random() < 0.5 else common)
        seen.append(name)
        return name

    def person(self, gender: str, surname: str) -> str:
        """Draw the full name of a person with a given surname."""
        rng = self._rng

        def draw(attempt: int) -> str:
            first = self._first_name(gender)
            while (first, surname) in self._pairs and rng.random() < 0.85:
                first = self._first_name(gender)
            self._pairs.add((first, surname))
            if attempt < 4 and rng.random() < 0.88:
                return f"{first} {surname}"
            if attempt < 30:
                return f"{first} {rng.choice(_INITIALS)}. {surname}"
            return f"{first} {rng.choice(_INITIALS)}. {rng.choice(_INITIALS)}. {surname}"

        return self._unique(draw)

    def place(self) -> str:
        """Draw the name of a place; some share their stem with another one."""
        rng = self._rng

        def draw(attempt: int) -> str:
            if self._local_stems and rng.random() < 0.2:
                stem = rng.choice(self._local_stems)
            else:
                stem = self.stem()
                self._local_stems.append(stem)
            ending = rng.choice(_PLACE_ENDINGS)
            if stem[-1] == ending[0]:
                ending = "ing" + ending if len(ending) > 3 else "en"
            if attempt > 3 or rng.random() < 0.06:
                return f"{rng.choice(('New', 'Upper', 'Lower', 'Great', 'Little'))} {stem}{ending}"
            return stem + ending

        return self._unique(draw)

    def work(self) -> str:
        """Draw the title of a work."""
        rng, parts = self._rng, self._parts

        def draw(attempt: int) -> str:
            adjective, noun, other = (
                rng.choice(parts.adjectives),
                rng.choice(parts.nouns),
                rng.choice(parts.nouns),
            )
            while adjective in (noun, other):
                adjective = rng.choice(parts.adjectives)
            shape = rng.randrange(9) if attempt < 3 else rng.randrange(6, 9)
            if shape < 3 or noun == other:
                return f"The {adjective} {noun}"
            if shape < 5:
                return f"The {noun} and the {other}"
            if shape < 6:
                return f"The {noun} of the {adjective} {other}"
            preposition = rng.choice(("of", "at", "near", "from"))
            return f"The {noun} {preposition} {self.stem()}{rng.choice(_PLACE_ENDINGS)}"

        return self._unique(draw)

    def organisation(self, kind: str) -> str:
        """Draw the name of an organisation of a kind such as ``"gallery"``."""
        rng = self._rng
        ending = rng.choice(_ORGANISATION_NAMES[kind])

        def draw(attempt: int) -> str:
            shape = rng.randrange(4) if attempt < 3 else 3
            if shape == 0:
                return f"{self.surname()} {ending}"
            if shape == 1:
                return f"{self.surname()} and {self.surname()} {ending}"
            if shape == 2:
                return f"{self.stem()}{rng.choice(_RIVER_ENDINGS)} {ending}"
            return f"{self.stem()}{rng.choice(_PLACE_ENDINGS)} {ending}"

        return self._unique(draw)

    def needle(self) -> str:
        """Draw the name of a site such as ``"Marlow archive"``."""
        rng = self._rng

        def draw(attempt: int) -> str:
            stem = self.stem() + rng.choice(_PLACE_ENDINGS)
            return f"{stem} {rng.choice(_SITES)}"

        return self._unique(draw)

    def river(self) -> str:
        """Draw the name of a river (rivers are not entities and may repeat)."""
        return self.stem() + self._rng.choice(_RIVER_ENDINGS)

    def region(self) -> str:
        """Draw the name of a region."""
        rng = self._rng
        name = self.stem() + rng.choice(_REGION_ENDINGS)
        return f"{rng.choice(_REGION_PREFIXES)} {name}" if rng.random() < 0.5 else name

    def school(self) -> str:
        """Draw the name of a school."""
        rng = self._rng
        stem = self.surname() if rng.random() < 0.5 else self.stem() + "ford"
        return f"{stem} {rng.choice(_SCHOOL_ENDINGS)}"

    def award(self) -> str:
        """Draw the name of an award."""
        return f"{self.surname()} {self._rng.choice(_AWARD_ENDINGS)}"
