"""A memory as it was when a question came, and the texts of its rows."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from msa.errors import EmptyBankError, InputError, LexicalIndexError
from msa.memory.bank import MemoryBank
from msa.memory.distributed.sharded_bank import ShardedBank, ShardedSnapshot
from msa.memory.loaded.loaded_bank import BankSnapshot, LoadedBank
from msa.memory.store.filters import Filter
from msa.memory.store.reports import StoredDocument
from msa.memory.store.word_index import LexicalQuery
from msa.types import MemoryReader

# Views with a filter cost a pass over the catalog; as many are kept while the bank stands still.
_VIEWS_KEPT = 64


class QuerySnapshot(Protocol):
    """What rounds need of a memory."""

    @property
    def reader(self) -> MemoryReader:
        """Routes and fetches content; the same state from beginning to end."""
        ...

    def numbers(self, rows: Sequence[int]) -> list[int]:
        """Document numbers of memory rows."""
        ...

    def ids(self, numbers: Iterable[int]) -> Mapping[int, str]:
        """Number -> id, without documents that were deleted meanwhile; reads no texts."""
        ...

    def texts(self, numbers: Iterable[int]) -> Mapping[int, StoredDocument]:
        """Number -> the document, without those that were deleted meanwhile."""
        ...

    def copies(self, asked: Sequence[tuple[Iterable[int], Iterable[int]]]) -> list[set[int]]:
        """For each pair, the first numbers whose document has the text of one of the second."""
        ...

    def lexical(self, queries: Sequence[LexicalQuery], top_k: int) -> list[dict[int, float]]:
        """Per query, number -> score in [0, 1] of the documents that its words find.

        Raises:
            LexicalIndexError: the bank has no word index; the message says what to type.
        """
        ...

    def coverage(self, question: str, texts: Sequence[str]) -> list[float] | None:
        """See `MemoryBank.lexical_coverage`; None where the bank has no word index."""
        ...


class BankQuerySnapshot:
    """A `QuerySnapshot` over one view of a loaded or sharded bank."""

    def __init__(
        self, bank: MemoryBank, view: BankSnapshot | ShardedSnapshot, where: Filter | None = None
    ) -> None:
        self._bank = bank
        self._view = view
        self._where = where
        self._next_number = bank.catalog.counter("next_number")

    @property
    def reader(self) -> MemoryReader:
        """The view."""
        return self._view

    @property
    def generation(self) -> int:
        """Of the bank, as it was seen."""
        return self._view.generation

    def numbers(self, rows: Sequence[int]) -> list[int]:
        """See `QuerySnapshot.numbers`."""
        wanted = torch.tensor(list(rows), dtype=torch.int64)
        numbers: list[int] = self._view.rows_to_numbers(wanted).tolist()
        return numbers

    def ids(self, numbers: Iterable[int]) -> Mapping[int, str]:
        """See `QuerySnapshot.ids`."""
        return self._bank.ids(numbers)

    def texts(self, numbers: Iterable[int]) -> Mapping[int, StoredDocument]:
        """See `QuerySnapshot.texts`."""
        return self._bank.get_many(numbers)

    def copies(self, asked: Sequence[tuple[Iterable[int], Iterable[int]]]) -> list[set[int]]:
        """See `QuerySnapshot.copies`."""
        return self._bank.catalog.copies(asked)

    def lexical(self, queries: Sequence[LexicalQuery], top_k: int) -> list[dict[int, float]]:
        """See `QuerySnapshot.lexical`; documents that came after the view are left out."""
        found = self._bank.lexical_ranking(queries, top_k, filter=self._where)
        return [{n: s for n, s in some if n < self._next_number} for some in found]

    def coverage(self, question: str, texts: Sequence[str]) -> list[float] | None:
        """See `QuerySnapshot.coverage`."""
        try:
            return self._bank.lexical_coverage(question, texts)
        except LexicalIndexError:
            return None


class SnapshotCache:
    """Snapshots of the latest state of a bank, kept until it changes."""

    def __init__(self, bank: MemoryBank, loaded: LoadedBank | ShardedBank) -> None:
        """Take a bank that is loaded for asking.

        Args:
            bank: open.
            loaded: the same bank, loaded.
        """
        self.bank = bank
        self._loaded = loaded
        self._known: dict[tuple[str, int], BankQuerySnapshot] = {}  # of filter and top_k

    def snapshot(self, top_k: int, where: Filter | None = None) -> BankQuerySnapshot:
        """The bank as it is now.

        Args:
            top_k: documents that a layer selects.
            where: see `msa.memory.store.filters`.

        Raises:
            EmptyBankError: there is no document to ask, or none that passes.
            InputError: `where` is neither a mapping nor a function.
        """
        self._loaded.refresh()
        key = (_filter_key(where), top_k)
        known = self._known.get(key)
        if known is not None and known.generation == self._loaded.generation:
            return known
        view = self._loaded.view() if where is None else self._loaded.view(where)
        if not view.num_documents:
            if where is not None and len(self._loaded):
                raise EmptyBankError(
                    f"No document of bank '{self.bank.path}' passes the filter; ask with another, "
                    "or without."
                )
            raise EmptyBankError(
                f"Bank '{self.bank.path}' holds no documents; add some with "
                f"'msa index FILES... --bank {shlex.quote(str(self.bank.path))}' or MemoryBank.add."
            )
        snapshot = BankQuerySnapshot(self.bank, replace(view, top_k=top_k), where)
        if not callable(where):
            if len(self._known) >= _VIEWS_KEPT:
                self._known.clear()
            self._known[key] = snapshot
        return snapshot


def _filter_key(where: Filter | None) -> str:
    """A text that is the same for equal filters; no two functions are equal.

    Raises:
        InputError: it is neither a mapping of JSON values nor a function.
    """
    if where is None or callable(where):
        return "" if where is None else f"function {id(where)}"
    if not isinstance(where, Mapping):
        raise InputError(
            f"The filter is {type(where).__name__}; give a mapping of metadata values, or a "
            "function of a document's metadata."
        )
    try:
        return json.dumps(where, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"The filter holds what is no JSON value ({error}).") from error
