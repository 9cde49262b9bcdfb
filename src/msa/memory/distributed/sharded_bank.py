"""Memory Parallel: one bank held in shares by several processes, on one host or many (ours).

The paper shards the memory over the GPUs of a node and sends every routing query to all of them.
Here every rank of a `torch.distributed` group loads a share of the rows
(`msa.memory.store.document_table.Partition`), runs a model of its own, and may ask at any time:

- route: the asker folds its routing queries (Eq. 2) and sends the vectors to all ranks. Each scores
  its share and returns its own top-k with scores and rows of the whole bank. The asker merges: the
  higher score first, of equal ones the lower row. So the selection is that of one process, except
  among scores within 1e-5 of each other. Requests for one layer that arrive together share one pass
  over the keys.
- content: every owner reads the pooled keys and values of those of its rows that were selected. The
  asker puts them together as one process would.

The ranks meet in turns (`msa.memory.distributed.collective_rpc`), each in a thread of its own: a
rank without a question only answers, and one that generates for long keeps nobody waiting.

One state for all. Rows mean something in one generation of the bank alone, so a question needs
shares that were cut from the same. A rank that finds the bank changed says so in the turn's header;
then all load it, in a thread beside the turns, and when all report the same generation they take it
into use in the same turn. If a commit came between, they load again. A view that was opened before
keeps its own state on all ranks until it is let go.

With int8 keys the shares offer more candidates for re-scoring than one process would, so a document
may be found that one process misses; float keys give the same selection.

Shapes: B batch, T query tokens, R routing tokens of the batch, N rows of the whole bank, U selected
documents, C their chunks, H query heads, G KV heads, D head dim, K documents per row.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from msa.errors import EmptyBankError, InputError, RankError
from msa.memory.bank import MemoryBank
from msa.memory.distributed.collective_rpc import Exchange, as_bytes, from_bytes
from msa.memory.distributed.shard_server import (
    CLOSE,
    CONTENT,
    DTYPES,
    NUMBERS,
    OPEN,
    ROUTE,
    ShardServer,
    said,
)
from msa.memory.loaded import memory_plan
from msa.memory.loaded.latest import LatestReader
from msa.memory.loaded.loaded_bank import LoadedBank
from msa.memory.store.filters import Filter
from msa.memory.store.manifest import BANK_FILE
from msa.ops.attention import gather_content
from msa.types import Content, Selection

DEFAULT_TIMEOUT = 60.0
START_TIMEOUT = 600.0
_DOCUMENT_BYTES = 12  # of a routed document: row int64, score float32


class ShardedBank(LatestReader["ShardedSnapshot"]):
    """A bank loaded by several processes together; the interface of `LoadedBank`.

    All ranks make one, of the same bank, with the same settings. What a rank asks it asks alone;
    making and closing are done by all. A rank without a question closes it at once, and answers the
    others until all have closed::

        torch.distributed.init_process_group("gloo")
        with ShardedBank(bank) as memory:
            if torch.distributed.get_rank() == 0:
                model(question, memory=memory.view())

    Leaving the block by an error stops all ranks.

    Args:
        bank: open; a rank that only answers needs no model.
        device: where this rank holds its routing keys and gets its results. The ranks may differ.
            Requests travel by NCCL if each has a GPU of its own, else by gloo.
        group: the ranks; all by default.
        timeout: seconds for which a rank may be silent before the others give up.
        start_timeout: seconds that a rank may come later than another.
        **options: of `LoadedBank`, such as dtype, content_dtype, top_k. Ranks of one host, and of
            one GPU, plan with equal parts of its memory.

    Attributes:
        rank, world: this one, and how many.

    Raises:
        ConfigError: there is no process group.
        RankError: a rank failed, ended, fell silent or did not come.
        BankMismatchError: the ranks opened different banks, or load them differently.
        MSAError: as `LoadedBank` raises it, on any of the ranks.
    """

    def __init__(
        self,
        bank: MemoryBank,
        device: torch.device | str = "cpu",
        *,
        group: dist.ProcessGroup | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        start_timeout: float = START_TIMEOUT,
        **options: Any,
    ) -> None:
        if timeout <= 0 or start_timeout <= 0:
            raise InputError(f"timeout={timeout}, start_timeout={start_timeout}: expected above 0")
        self.bank = bank
        self.device = torch.device(device)
        self._share = ShardServer(_digest(bank, options))
        self._exchange = Exchange(self._share, self.device, group, timeout, start_timeout)
        self.rank, self.world = self._exchange.rank, self._exchange.world
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        try:
            resident = LoadedBank(
                bank, device, shard=(self.rank, self.world), **self._planned(options)
            )
            self._share.begin(resident, self._exchange)
            self._share.reach(0)
            self._view = self._open(None)
        except BaseException as error:
            self._exchange.stop(said(error))
            raise

    def _planned(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options with a plan for this rank's part of the memory, where ranks have to share it."""
        peers = self._exchange.peers
        mine = peers[self.rank]
        here = [peer for peer in peers if peer.host == mine.host]
        if len(here) == 1 or options.get("plan") is not None:
            return options
        beside = [peer for peer in here if peer.gpu == mine.gpu]
        share = min(peer.gpu_memory for peer in beside) // len(beside)
        rest = {name: value for name, value in options.items() if name != "dtype"}
        rest["plan"] = memory_plan.plan(
            self.bank,
            self.device,
            dtype=options.get("dtype"),
            content_dtype=options.get("content_dtype"),
            shard=(self.rank, self.world),
            memory=min(peer.memory for peer in here) // len(here),
            device_memory=share if mine.gpu else None,
        )
        return rest

    # ---- life

    def serve(self) -> None:
        """Answer the other ranks until all of them serve or close; then nothing can be asked.

        Raises:
            RankError: a rank failed, ended or fell silent before that.
        """
        self._exchange.finish()

    def close(self) -> None:
        """`serve`, and let go of the share. Calling it twice does nothing."""
        self.serve()
        self._share.forget()

    def __enter__(self) -> ShardedBank:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.stop(error)

    def failure(self, wait: float = 0.0) -> RankError | None:
        """What has gone wrong with another rank; waits some seconds for it to show."""
        return self._exchange.failure(wait)

    def stop(self, error: BaseException) -> None:
        """Leave at once and stop the other ranks, which are told the error."""
        self._exchange.stop(said(error))

    # ---- asking

    @property
    def num_bytes(self) -> int:
        """Memory of the routing keys in use, of this rank."""
        return self._share.resident.num_bytes

    def view(self, filter: Filter | None = None, *, top_k: int | None = None) -> ShardedSnapshot:
        """The state that `refresh` has agreed on, to ask from beginning to end.

        Args:
            filter: see `LoadedBank.view`; it is applied on this rank alone.
            top_k: documents that a layer selects.

        Raises:
            InputError: top_k is below 1.
            RankError: a rank failed, ended or fell silent.
        """
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k={top_k}: expected at least 1")
        view = self._view if filter is None else self._open(filter)
        return view if top_k is None else replace(view, top_k=top_k)

    def refresh(self) -> bool:
        """Take up what has changed in the bank, on all ranks; see `LoadedBank.refresh`.

        Returns:
            True if there was a change.

        Raises:
            RankError: a rank failed, ended or fell silent, or the ranks do not come to read the
                same state.
            BankCorruptError: a segment that some rank must load is damaged; the old state stays in
                use.
        """
        with self._lock:
            generation = self.bank.generation
            if generation == self._view.generation:
                return False
            self._share.reach(generation)
            self._view = self._open(None)
            return True

    def _open(self, filter: Filter | None) -> ShardedSnapshot:
        """A view of the state that all ranks agree on now."""
        name, payload = next(self._ids), None
        if filter is not None:
            payload = _bits(self.bank, filter)
        answers = self._exchange.ask(OPEN, (name, filter is not None), payload)
        table = [from_bytes(answer, torch.int64).tolist() for answer in answers]
        handle = _Handle(self._exchange, name, [row[1] for row in table], [row[2] for row in table])
        view = self._share.resident.view()
        return ShardedSnapshot(
            bank=str(self.bank.path),
            generation=table[0][0],
            top_k=view.top_k,
            num_documents=sum(row[3] for row in table),
            score=view.score,
            dtype=view.dtype,
            _groups=self.bank.manifest.num_key_value_heads,
            _dim=self.bank.manifest.head_dim,
            _device=self.device,
            _handle=handle,
        )


@dataclass(frozen=True, slots=True)
class ShardedSnapshot:
    """One state of a bank that several ranks hold, for asking; a `MemoryReader`.

    Rows are those of the whole bank, 0 to N - 1, as in a `BankSnapshot` of one process.

    Attributes:
        generation: of the bank when this state was read.
        top_k: documents that a layer selects, at most.
        num_documents: documents that can be selected, in the whole bank.
    """

    bank: str
    generation: int
    top_k: int
    num_documents: int
    score: str
    dtype: torch.dtype
    _groups: int
    _dim: int
    _device: torch.device
    _handle: _Handle = field(repr=False)

    def __len__(self) -> int:
        """Number of documents that can be selected."""
        return self.num_documents

    @torch.no_grad()
    def route(self, layer: int, vectors: Tensor, routing_mask: Tensor) -> Selection:
        """The layer's top-k documents for every row of a batch, of the whole bank.

        Args:
            layer: index of a routing layer.
            vectors: [B, T, G*D] float32, of `msa.ops.routing.reduce_queries`.
            routing_mask: [B, T] bool.

        Returns:
            Selection with K = min(top_k, N), on the device given to `ShardedBank`; that of a
            `BankSnapshot` of one process, except among scores within 1e-5 of each other.

        Raises:
            EmptyBankError: there is no document to select.
            RankError: a rank failed, ended or fell silent.

        Source: MSA 3.2.1, Eq. 2; 3.4 (memory over several GPUs); the merging is ours.
        """
        if not self.num_documents:
            raise EmptyBankError(
                f"bank '{self.bank}' holds no documents to ask (or none that pass the filter); add "
                "some with 'msa index' or MemoryBank.add"
            )
        mask = routing_mask.to(self._device)
        routing = vectors.to(self._device)[mask]
        payload = torch.cat([as_bytes(mask.sum(1)), as_bytes(routing)])
        batch = len(mask)
        answers = self._handle.ask(ROUTE, (layer, self.top_k, batch), payload)
        parts = [_selection_from(answer.to(self._device), batch) for answer in answers]
        # Shares lie in the order of the rows, and each has its equal scores in that order too, so
        # a stable sort puts the lower row first.
        scores = torch.cat([part.scores for part in parts], dim=1)
        documents = torch.cat([part.documents for part in parts], dim=1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        count = min(self.top_k, self._handle.num_rows)
        return Selection(documents.gather(1, order)[:, :count], scores[:, :count])

    @torch.no_grad()
    def content(self, layer: int, selection: Selection) -> Content:
        """Pooled keys and values of the selected documents, from the ranks that hold them.

        Args:
            layer: index of a routing layer.
            selection: of `route` of the same view.

        Returns:
            Content on the device given to `ShardedBank`.

        Raises:
            BankCorruptError: what some rank has on disk is not what was written.
            RankError: a rank failed, ended or fell silent.
        """
        rows = selection.documents.cpu()
        chosen = torch.unique(rows[rows >= 0])
        if not len(chosen):
            shape = (len(rows), 0, self._groups, self._dim)
            empty = torch.empty(shape, dtype=self.dtype, device=self._device)
            return Content(empty, empty, torch.empty(shape[:2], dtype=torch.bool).to(self._device))
        answers = self._handle.ask(CONTENT, (layer,), chosen)
        counts, keys, values = [], [], []
        for answer, size in zip(answers, self._handle.owned(chosen), strict=True):
            if not size:
                continue
            head = from_bytes(answer[: 8 * (1 + size)], torch.int64)
            numbers = from_bytes(answer[8 * (1 + size) :], DTYPES[int(head[0])])
            both = numbers.to(self._device, self.dtype).view(2, -1, self._groups, self._dim)
            counts.append(head[1:])
            keys.append(both[0])
            values.append(both[1])
        places = torch.searchsorted(chosen, rows.clamp(min=0)).masked_fill(rows < 0, -1)
        return gather_content(
            torch.cat(keys),
            torch.cat(values),
            torch.cat(counts).to(self._device),
            places.to(self._device),
        )

    def rows_to_numbers(self, rows: Tensor) -> Tensor:
        """The bank's numbers of documents given by row: int64 of the same shape; -1 stays -1.

        Raises:
            RankError: a rank failed, ended or fell silent.
        """
        rows = rows.cpu()
        chosen = torch.unique(rows[rows >= 0])
        if not len(chosen):
            return torch.full_like(rows, -1)
        answers = self._handle.ask(NUMBERS, (), chosen)
        numbers = torch.cat([from_bytes(answer, torch.int64).cpu() for answer in answers])
        places = torch.searchsorted(chosen, rows.clamp(min=0))
        return numbers[places].masked_fill(rows < 0, -1)


class _Handle:
    """A view that is open on all ranks; they let go of it when nobody holds this any more.

    Args:
        exchange: asks.
        name: of the view, among those of this rank.
        first_rows, num_rows: of every rank's share.
    """

    def __init__(
        self, exchange: Exchange, name: int, first_rows: Sequence[int], num_rows: Sequence[int]
    ) -> None:
        self._exchange = exchange
        self._name = name
        self._firsts = list(first_rows)
        self._sizes = list(num_rows)
        self.num_rows = sum(num_rows)
        weakref.finalize(self, exchange.post, CLOSE, (name,)).atexit = False

    def ask(self, kind: int, arguments: Sequence[int], payload: Tensor) -> list[Tensor]:
        """Answers of all ranks; see `Exchange.ask`."""
        return self._exchange.ask(kind, (self._name, *arguments), payload)

    def owned(self, rows: Tensor) -> list[int]:
        """How many of some rows, each given once, every rank holds."""
        return [
            int(((rows >= first) & (rows < first + size)).sum())
            for first, size in zip(self._firsts, self._sizes, strict=True)
        ]


def _bits(bank: MemoryBank, filter: Filter) -> Tensor:
    """One bit per document number, set for those that pass; a function cannot be sent."""
    passing = bank.catalog.passing(filter)
    bits = numpy.zeros(max(passing, default=0) + 1, dtype=bool)
    bits[passing] = True
    return torch.from_numpy(numpy.packbits(bits))


def _selection_from(answer: Tensor, batch: int) -> Selection:
    """A rank's selection [B, k] out of its bytes."""
    size = len(answer) // _DOCUMENT_BYTES
    documents = from_bytes(answer[: 8 * size], torch.int64)
    scores = from_bytes(answer[8 * size :], torch.float32)
    shape = (batch, size // batch)
    return Selection(documents.view(shape), scores.view(shape))


def _digest(bank: MemoryBank, options: dict[str, Any]) -> int:
    """Of what must be the same on all ranks: the bank's file, and how it is loaded."""
    own = {"content_dtype", "top_k"}  # what a rank asks for itself
    settings = sorted((name, str(value)) for name, value in options.items() if name not in own)
    text = (bank.path / BANK_FILE).read_bytes() + json.dumps(settings).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
