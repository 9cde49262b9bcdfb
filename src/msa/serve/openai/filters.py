"""Filters as OpenAI's clients write them, as those of a bank."""

from __future__ import annotations

from typing import Any

from msa.errors import InputError
from msa.memory.store import filters
from msa.serve.errors import ServiceError, invalid

_GROUPS = ("and", "or")
_MAX_DEPTH = 16


def bank_filter(given: Any, param: str = "filters") -> dict[str, Any]:
    """The filter of a bank for a comparison, or for several that are joined by "and" or "or".

    Args:
        given: such as `{"type": "eq", "key": "year", "value": 1910}`, or
            `{"type": "and", "filters": [...]}`.
        param: name of the field, for the message.

    Raises:
        ServiceError: 400; it is neither.
    """
    found = _filter(given, param, 0)
    try:
        filters.parse(found)
    except InputError as error:
        raise invalid(str(error), param) from None
    return found


def _filter(given: Any, param: str, depth: int) -> dict[str, Any]:
    if depth > _MAX_DEPTH:
        raise invalid(f"Filters are nested more than {_MAX_DEPTH} times.", param)
    if not isinstance(given, dict):
        raise invalid(f"A filter is an object, not a {type(given).__name__}.", param)
    kind = given.get("type")
    if kind in _GROUPS:
        _check_fields(given, {"type", "filters"}, param)
        inner = given["filters"]
        if not isinstance(inner, list):
            raise invalid(f"A filter of type {kind!r} has a list of filters.", f"{param}.filters")
        return {kind: [_filter(one, f"{param}.filters", depth + 1) for one in inner]}
    if kind not in filters.OPERATORS:
        expected = ", ".join((*filters.OPERATORS, *_GROUPS))
        raise invalid(f"The type of a filter is one of {expected}.", f"{param}.type")
    _check_fields(given, {"type", "key", "value"}, param)
    if not isinstance(given["key"], str):
        raise invalid("The key of a filter is text.", f"{param}.key")
    return {given["key"]: {kind: given["value"]}}


def _check_fields(given: dict[str, Any], expected: set[str], param: str) -> None:
    """Refuse a filter with other fields.

    Raises:
        ServiceError: 400.
    """
    for name in sorted(expected - set(given)):
        raise missing(f"{param}.{name}")
    for name in sorted(set(map(str, given)) - expected):
        raise invalid(f"A filter has no {name!r}.", f"{param}.{name}", "unsupported_parameter")


def missing(param: str) -> ServiceError:
    """400: a field that has to be there is not."""
    return invalid(f"{param} is missing.", param, "missing_required_parameter")
