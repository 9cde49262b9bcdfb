"""Frozen settings that are checked when they are made, by pydantic.

What is wrong is one line: the path of the key, what was expected, what was given.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import ArgsKwargs

from msa.errors import ConfigError

T = TypeVar("T")

CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "dataclass_type": "a mapping",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "literal_error": "{expected}",
    "union_tag_invalid": "one of {expected_tags}",
}
"""What was expected, by pydantic's names for what can be wrong."""


def listed(value: Any) -> Any:
    """A list as the tuple that is kept."""
    return tuple(value) if isinstance(value, list) else value


# Nothing is made of something else ("3", 1.5 or true are no whole numbers), but a whole number is a
# number.
Text = Annotated[str, Strict()]
Texts = Annotated[tuple[Text, ...], BeforeValidator(listed)]
Switch = Annotated[bool, Strict()]
Integer = Annotated[int, Strict()]
Whole = Annotated[int, Strict(), Field(ge=0)]
Count = Annotated[int, Strict(), Field(ge=1)]
Weight = Annotated[float, Strict(), Field(ge=0)]
Rate = Annotated[float, Strict(), Field(gt=0)]
Share = Annotated[float, Strict(), Field(ge=0, le=1)]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """A class of settings: keyword arguments only, checked, frozen."""
    made: Any = pydantic_dataclass(frozen=True, kw_only=True, config=CONFIG)(cls)
    checked: Callable[..., None] = made.__init__

    def init(self: Any, **values: Any) -> None:
        with one_line_errors():
            checked(self, **values)

    made.__init__ = init
    result: type[T] = made
    return result


class one_line_errors:  # noqa: N801 - used like a function
    """Turns what pydantic finds into a `ConfigError` of one line."""

    def __init__(self, where: str = "", kinds: tuple[str, ...] = ()) -> None:
        """`where` stands in front; `kinds` are names of alternatives, which are no keys."""
        self.where, self.kinds = where, kinds

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, ValidationError):
            raise ConfigError(explain(error, self.where, self.kinds)) from None


def explain(error: ValidationError, where: str = "", kinds: tuple[str, ...] = ()) -> str:
    """The first thing that is wrong, in one line, and how many more there are."""
    found = error.errors(include_url=False)
    first = found[0]
    path = ""
    for at, part in enumerate(first["loc"]):
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in kinds or not isinstance(first["loc"][at - 1], int):
            path += f".{part}" if path else part
    if first["type"] == "union_tag_invalid":
        path += ".kind"
    reason = _reason(first)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return ": ".join(part for part in (where, path, reason) if part) + more


def _reason(error: Any) -> str:
    context = error.get("ctx", {})
    if error["type"] == "value_error":
        return str(context["error"])
    if error["type"] in ("missing", "missing_keyword_only_argument"):
        return "is missing"
    given = repr(context.get("tag", error["input"]))[:60]
    if error["type"] in EXPECTED:
        return f"expected {EXPECTED[error['type']].format(**context)}, got {given}"
    return f"{error['msg']}, got {given}"


@settings
class Settings:
    """Base of all settings: unknown keys are named together with the nearest known one."""

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, values: Any) -> Any:
        given = values.kwargs if isinstance(values, ArgsKwargs) else values
        if not isinstance(given, Mapping):
            return values
        known = [field.name for field in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                raise ValueError(f"unknown key {key!r}; {nearest(str(key), known)}")
        return values


def nearest(name: str, known: list[str]) -> str:
    """Of what is known, the nearest to a name, or all."""
    near = difflib.get_close_matches(name, known, 1, 0.6)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
