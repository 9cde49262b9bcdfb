"""Sizes of memories as people write them."""

from __future__ import annotations

from msa.errors import InputError


def parse_size(text: str) -> int:
    """Tokens from `250k`, `1M`, `1.5M`, `1G` or a plain number; decimal units.

    Raises:
        InputError: it is none of these, or below 1.
    """
    units = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
    word = text.strip().lower().replace("_", "")
    factor = units.get(word[-1:], 1)
    try:
        count = float(word.removesuffix(word[-1:]) if factor > 1 else word) * factor
        if not 1 <= count < 1e15:
            raise ValueError
    except ValueError:
        raise InputError(
            f"{text!r} is no size of a memory; give tokens as 250k, 1M or 100M"
        ) from None
    return round(count)
