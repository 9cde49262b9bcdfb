"""What banks that are loaded for asking share: reading from the latest view."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from torch import Tensor

from msa.memory.store.lifetime import NotPickled
from msa.types import Content, MemoryReader, Selection


class View(MemoryReader, Protocol):
    """One state of a bank, which stays as it is; see `BankSnapshot` and `ShardedSnapshot`."""

    @property
    def generation(self) -> int:
        """Generation of the bank that was read."""
        ...

    def __len__(self) -> int:
        """Number of documents that can be selected."""
        ...

    def rows_to_numbers(self, rows: Tensor) -> Tensor:
        """The bank's numbers of documents given by row: int64 of the same shape; -1 stays -1."""
        ...


AnyView = TypeVar("AnyView", bound=View)


class LatestReader(NotPickled, Generic[AnyView]):
    """A `MemoryReader` over the latest state of a bank, which its `refresh` puts into `_view`."""

    _view: AnyView

    def _check(self) -> None:
        """Refuse what cannot be asked any more."""

    def __len__(self) -> int:
        """Number of documents that can be selected, in the whole bank."""
        return len(self._view)

    @property
    def generation(self) -> int:
        """Generation of the bank when it was last read."""
        return self._view.generation

    def route(self, layer: int, vectors: Tensor, routing_mask: Tensor) -> Selection:
        """See `BankSnapshot.route`."""
        self._check()
        return self._view.route(layer, vectors, routing_mask)

    def content(self, layer: int, selection: Selection) -> Content:
        """See `BankSnapshot.content`."""
        self._check()
        return self._view.content(layer, selection)

    def rows_to_numbers(self, rows: Tensor) -> Tensor:
        """See `BankSnapshot.rows_to_numbers`."""
        self._check()
        return self._view.rows_to_numbers(rows)
