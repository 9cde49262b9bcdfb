"""Lists a page at a time, as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Literal, Self, TypeVar

from pydantic import BaseModel

from msa.serve.errors import invalid

Order = Literal["asc", "desc"]
Item = TypeVar("Item")


class Listable(BaseModel):
    """What stands in a list."""

    id: str


Listed = TypeVar("Listed", bound=Listable)


class Page(BaseModel, Generic[Listed]):
    """A page of a list."""

    object: Literal["list"] = "list"
    data: list[Listed]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, data: list[Listed], has_more: bool) -> Self:
        """A page that holds `data`; `has_more` says whether there are others after it."""
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(data=data, first_id=first, last_id=last, has_more=has_more)


def page_of(
    items: Sequence[Item],
    name: Callable[[Item], str],
    *,
    limit: int,
    order: Order,
    after: str | None = None,
    before: str | None = None,
) -> tuple[list[Item], bool]:
    """A page of a list that is given oldest first, and whether there is more.

    Raises:
        ServiceError: 400; `after` or `before` is not in the list.
    """
    listed = list(items if order == "asc" else reversed(items))
    ids = [name(item) for item in listed]
    for cursor, param in ((after, "after"), (before, "before")):
        if cursor is not None and cursor not in ids:
            raise invalid(f"There is no {cursor!r} in this list (any more).", param)
    start = 0 if after is None else ids.index(after) + 1
    end = len(ids) if before is None else ids.index(before)
    if before is not None and after is None:  # the page that ends there
        return listed[max(0, end - limit) : end], end > limit
    return listed[start:end][:limit], end - start > limit
