"""Needles: short documents that hide one or two arbitrary facts among filler.

The subject of a needle is a site such as "Marlow archive".
"""

from __future__ import annotations

import random
from typing import Final

from msa.synthetic_worlds.tables import words

__all__ = ["needle_value"]

_COLORS: Final = words("needle_colors")
_ANIMALS: Final = words("needle_animals")
_HIDING_RELATIONS: Final = ("under", "behind", "inside", "beneath", "next to")
_HIDING_PLACES: Final = words("needle_hiding_places")


def needle_value(relation: str, rng: random.Random, stem: str) -> tuple[str, tuple[str, ...]]:
    """Draw the value of a needle.

    Args:
        relation: A section of the phrase tables.
        rng: Source of randomness.
        stem: A stem from the split's name lists, used for made-up words.

    Returns:
        The value and its other accepted forms.
    """
    if relation == "access_code":
        return str(rng.randrange(10**3, 10 ** rng.randint(4, 6))), ()
    if relation == "password":
        return stem.lower() + rng.choice(("wick", "lume", "dor", "quill", "thorn", "sel")), ()
    if relation == "frequency":
        value = str(rng.randrange(150, 9999))
        return value, (f"{value} kilohertz",)
    if relation == "door_colour":
        return rng.choice(_COLORS), ()
    if relation == "key_place":
        return f"{rng.choice(_HIDING_RELATIONS)} {rng.choice(_HIDING_PLACES)}", ()
    if relation == "closing_time":
        minute = rng.choice(("05", "10", "15", "20", "30", "40", "45", "50"))
        hour = rng.randint(1, 11)
        return f"{hour}:{minute} pm", (f"{hour}:{minute} p.m.", f"{hour}:{minute}")
    if relation == "inventory":
        value = str(rng.randint(12, 990))
        return value, (f"{value} crates",)
    return rng.choice(_ANIMALS), ()
