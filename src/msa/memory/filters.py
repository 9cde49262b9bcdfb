"""Which documents may be selected, by their metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msa.errors import InputError
from msa.types import JSON

Filter = Mapping[str, JSON] | Callable[[Mapping[str, JSON]], bool]
"""Metadata that a document must have (every key with an equal value), or a function of it."""


def metadata_test(filter: Filter) -> Callable[[Mapping[str, JSON]], bool]:
    """The function that tells whether a document with some metadata passes.

    Raises:
        InputError: the filter is neither a mapping nor a function.
    """
    if callable(filter):
        return filter
    if not isinstance(filter, Mapping):
        raise InputError(
            f"The filter is {type(filter).__name__}; give a mapping of metadata values, or a "
            "function of a document's metadata."
        )
    wanted = dict(filter)
    return lambda metadata: all(k in metadata and metadata[k] == v for k, v in wanted.items())
