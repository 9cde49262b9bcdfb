"""Filters: which documents may be selected, by their metadata. Defined here once, for every use.

A filter is data: `{"user": "a", "year": {"gte": 1990}}`. A document passes when all its
conditions are met. A value is short for `{"eq": value}`; the operators are those of `OPERATORS`.
The keys "and" and "or" take a list of filters.

Values compare by their JSON types: numbers with numbers (1 equals 1.0), text with text (code point
by code point, in Unicode's NFC, as are the keys), true, false and null with themselves; 1 is not
true, and 1910 is not "1910" (`msa --filter year=1910` looks for either). A list
in the metadata meets a condition when one of its elements, or the list as a whole, does. "ne" and
"nin" are the opposites of "eq" and "in", so that a document without the key passes them; it meets
no other condition.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from msa.errors import InputError
from msa.text.normalization import nfc
from msa.types import JSON

Filter = Mapping[str, Any] | Callable[[Mapping[str, JSON]], bool]
"""Conditions on a document's metadata, or a function of it."""

Comparable = int | float | str
"""A value as it is compared and stored in the catalog: a number, or text that begins with its type
(s text, h the hash of a long text, b truth value, n null, j list or object). Numbers sort before
text, in SQLite as here."""

OPERATORS = ("eq", "ne", "gt", "gte", "lt", "lte", "in", "nin")
MAX_TEXT = 512
"""Longer texts can be compared for equality only."""
MAX_CONDITIONS = 256
MAX_VALUES = 10_000
_MAX_DEPTH = 32


# ---- values


def comparable(value: JSON) -> Comparable:
    """The form in which a JSON value is compared."""
    if value is None:
        return "n"
    if isinstance(value, bool):
        return f"b{value:d}"
    if isinstance(value, int):
        if -(2**63) <= value < 2**63:
            return value
        try:
            return float(value)
        except OverflowError:
            return f"j{value}"
    if isinstance(value, float):
        return value
    if isinstance(value, str):
        value = nfc(value)
        if len(value) <= MAX_TEXT:
            return "s" + value
        return "h" + hashlib.sha256(value.encode()).hexdigest()
    text = json.dumps(_plain(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return "j" + (text if len(text) <= MAX_TEXT else hashlib.sha256(text.encode()).hexdigest())


def _plain(value: Any) -> Any:
    """Numbers and texts that are equal written in the same way."""
    if isinstance(value, str):
        return nfc(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {nfc(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def fields(metadata: Mapping[str, JSON]) -> Iterator[tuple[str, Comparable]]:
    """What conditions can be met by: (key, value), one for each element of a list too."""
    for key, value in metadata.items():
        key = nfc(key)
        yield key, comparable(value)
        if isinstance(value, list):
            for element in dict.fromkeys(comparable(v) for v in value):
                yield key, element


# ---- filters


@dataclass(frozen=True, slots=True)
class Condition:
    """One operator on one key.

    Attributes:
        key: of the metadata.
        operator: "in", or "gt", "gte", "lt" or "lte".
        values: to compare with; one except for "in".
        negated: for "nin" and "ne".
    """

    key: str
    operator: str
    values: tuple[Comparable, ...]
    negated: bool = False

    def is_met(self, found: Mapping[str, Sequence[Comparable]]) -> bool:
        """For the fields of a document, by key."""
        return any(map(self._meets, found.get(self.key, ()))) != self.negated

    def _meets(self, value: Comparable) -> bool:
        if self.operator == "in":
            return value in self.values
        (limit,) = self.values
        if isinstance(value, str) != isinstance(limit, str):
            return False
        if isinstance(value, str) and not value.startswith("s"):
            return False
        return {
            "gt": value > limit,  # type: ignore[operator]
            "gte": value >= limit,  # type: ignore[operator]
            "lt": value < limit,  # type: ignore[operator]
            "lte": value <= limit,  # type: ignore[operator]
        }[self.operator]

    def sql(self) -> tuple[str, list[Comparable]]:
        """The same as a condition on `documents.number`, by the table `fields`."""
        if self.operator == "in":
            test, values = f"value IN ({','.join('?' * len(self.values))})", list(self.values)
        else:
            sign = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}[self.operator]
            # numbers stand before all text, text between 's' and 't'
            first, last = ("'s'", "'t'") if isinstance(self.values[0], str) else ("-9e999", "''")
            test, values = f"value {sign} ? AND value >= {first} AND value < {last}", [*self.values]
        query = f"(SELECT number FROM fields WHERE key = ? AND {test})"
        return f"number {'NOT ' * self.negated}IN {query}", [self.key, *values]


@dataclass(frozen=True, slots=True)
class Group:
    """Several conditions; all must be met, or one of them."""

    kind: Literal["and", "or"]
    parts: tuple[Condition | Group, ...]

    def is_met(self, found: Mapping[str, Sequence[Comparable]]) -> bool:
        """For the fields of a document, by key."""
        return (all if self.kind == "and" else any)(part.is_met(found) for part in self.parts)

    def sql(self) -> tuple[str, list[Comparable]]:
        """The same as a condition on `documents.number`, by the table `fields`."""
        texts, values = [], []
        for part in self.parts:
            text, more = part.sql()
            texts.append(text)
            values += more
        if not texts:
            return ("1" if self.kind == "and" else "0"), []
        return f"({f' {self.kind.upper()} '.join(texts)})", values


def parse(filter: Mapping[str, Any]) -> Group:
    """Read a filter.

    Raises:
        InputError: it is none; the message says what is wrong with which part.
    """
    try:
        text = json.dumps(filter, allow_nan=False, ensure_ascii=False)
        text.encode()  # no half of a surrogate pair
        plain = json.loads(text)  # tuples are lists, and so on
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"The filter holds what is no JSON value ({error}).") from error
    for key in filter:
        if not isinstance(key, str):
            raise InputError(f"The filter has the key {key!r}; keys are text.")
    group = _group(plain, 0)
    conditions = list(_conditions(group))
    count = sum(len(c.values) for c in conditions)
    if len(conditions) > MAX_CONDITIONS or count > MAX_VALUES:
        raise InputError(
            f"The filter has {len(conditions)} conditions with {count} values; at most "
            f"{MAX_CONDITIONS} with {MAX_VALUES} are allowed. 'in' takes many values in one "
            "condition; else give a function."
        )
    return group


def metadata_test(filter: Filter) -> Callable[[Mapping[str, JSON]], bool]:
    """The function that tells whether a document with some metadata passes.

    Raises:
        InputError: the filter is neither a mapping that can be read nor a function.
    """
    if callable(filter):
        return filter
    group = parse(check_mapping(filter))

    def passes(metadata: Mapping[str, JSON]) -> bool:
        found: dict[str, list[Comparable]] = {}
        for key, value in fields(metadata):
            found.setdefault(key, []).append(value)
        return group.is_met(found)

    return passes


def text_test(filter: Filter) -> Callable[[str], bool]:
    """The same of metadata as JSON text; a test is made once per distinct text.

    Raises:
        InputError: the filter is neither a mapping that can be read nor a function.
    """
    test = metadata_test(filter)
    known: dict[str, bool] = {}

    def passes(text: str) -> bool:
        if text not in known:
            known[text] = bool(test(json.loads(text)))
        return known[text]

    return passes


def check_mapping(filter: object) -> Mapping[str, Any]:
    """The filter, if it is data.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(filter, Mapping):
        raise InputError(
            f"The filter is {type(filter).__name__}; give a mapping such as {{'user': 'a', 'year': "
            "{'gte': 1990}}, or a function of a document's metadata."
        )
    return filter


def _group(filter: Mapping[str, Any], depth: int) -> Group:
    if depth > _MAX_DEPTH:
        raise InputError(f"The filter is nested more than {_MAX_DEPTH} times.")
    parts: list[Condition | Group] = []
    for key, value in filter.items():
        if key in ("and", "or") and isinstance(value, list):
            inner = [_group(check_mapping(part), depth + 1) for part in value]
            parts.append(Group("and" if key == "and" else "or", tuple(inner)))
        elif isinstance(value, dict):
            parts += [_condition(key, *pair) for pair in (value or {"": None}).items()]
        else:
            parts.append(_condition(key, "eq", value))
    return Group("and", tuple(parts))


def _condition(key: str, operator: str, value: JSON) -> Condition:
    key = nfc(key)
    if operator not in OPERATORS:
        near = difflib.get_close_matches(operator, OPERATORS, 1)
        raise InputError(
            f"The filter's {key!r} has the operator {operator!r}"
            + (f" (do you mean {near[0]!r}?)" if near else "")
            + f"; expected one of {', '.join(OPERATORS)}. To compare with an object, write "
            f"{{{key!r}: {{'eq': ...}}}}."
        )
    if operator in ("in", "nin"):
        if not isinstance(value, list):
            raise InputError(f"The filter's {key!r} has {operator!r} without a list of values.")
        return Condition(key, "in", tuple(map(comparable, value)), operator == "nin")
    limit = comparable(value)
    if operator in ("eq", "ne"):
        return Condition(key, "in", (limit,), operator == "ne")
    if isinstance(limit, str) and not limit.startswith("s"):
        raise InputError(
            f"The filter's {key!r} has {operator!r} with {json.dumps(value)[:80]}; expected a "
            f"number or a text of at most {MAX_TEXT} characters."
        )
    return Condition(key, operator, (limit,))


def _conditions(group: Group) -> Iterator[Condition]:
    for part in group.parts:
        if isinstance(part, Condition):
            yield part
        else:
            yield from _conditions(part)
