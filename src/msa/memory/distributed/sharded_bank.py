"""Memory Parallel: one bank held in shards by several processes, on one machine or many.

The paper shards the memory over the GPUs of a node and sends every routing query to all of them
(3.4). Here every shard is an actor of Ray with a share of the rows
(`msa.memory.store.document_table.Partition`), its routing keys on its own device and its content in
its own RAM. Who asks has the model:

- route: the routing vectors (Eq. 2) go to all shards. Each scores its rows and returns its own
  top-k with scores and rows of the whole bank. The best of all are the selection: the higher score
  first, of equal ones the lower row. So it is that of one process, except among scores within 1e-5
  of each other.
- content: every shard reads the pooled keys and values of those of its rows that were selected.

Rows mean something in one generation of the bank alone. Shares follow from the list of segments, so
shards that read the same generation agree without a word; a question asks all of them for one. A
shard that dies is restarted by Ray and loads its share; if the bank has changed since, the question
ends with an error that says so, and the next one goes on.

Shapes: B batch, T query tokens, U selected documents, C their chunks, G KV heads, D head dim,
K documents per row.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msa.errors import EmptyBankError, InputError, WorkerError
from msa.memory.bank import MemoryBank
from msa.memory.distributed import cluster
from msa.memory.loaded import memory_plan
from msa.memory.loaded.content_store import CONTENT_READ
from msa.memory.loaded.latest import LatestReader
from msa.memory.loaded.loaded_bank import BankSnapshot, LoadedBank
from msa.memory.store.filters import Filter
from msa.memory.store.lifetime import ClosedAtExit
from msa.ops.attention import gather_content
from msa.types import Content, Selection

DEFAULT_TIMEOUT = 120.0
_LOAD_ATTEMPTS = 6
_LOAD_PAUSE = 0.2  # seconds; a commit that came between is over by then


@dataclass(frozen=True, slots=True)
class ShardState:
    """What a shard holds.

    Attributes:
        generation: of the bank that it has read.
        num_rows: of its share, deleted documents included.
        num_documents: of these, documents that can be selected.
    """

    generation: int
    num_rows: int
    num_documents: int


class Shard:
    """One share of a bank; an actor.

    Args:
        path: the bank's folder, as this process sees it.
        rank, world: which of how many.
        beside: shards on this machine, which plan with equal parts of its memory.
        options: of `LoadedBank`; "device" is where its routing keys go.
    """

    def __init__(
        self, path: Path, rank: int, world: int, beside: int, options: dict[str, Any]
    ) -> None:
        torch.set_num_threads(max(1, torch.get_num_threads() // beside))
        self._path, self._shard, self._beside, self._options = path, (rank, world), beside, options
        self._loaded: LoadedBank | None = None  # what is wrong with it is told by `load`
        self._views: dict[int, BankSnapshot] = {}
        self._readers: Counter[int] = Counter()  # of a generation, who loaded it and may ask

    def load(self) -> ShardState:
        """Take up the bank as it is now, and keep that until it is released as often."""
        view = self._latest()
        self._views[view.generation] = view
        self._readers[view.generation] += 1
        return ShardState(view.generation, view.num_rows, view.num_documents)

    def _latest(self) -> BankSnapshot:
        if self._loaded is None:
            self._loaded = self._opened()
        self._loaded.refresh()
        return self._loaded.view()

    def _opened(self) -> LoadedBank:
        bank, options = MemoryBank.open(self._path, read_only=True), dict(self._options)
        if options.get("plan") is None:
            options["plan"] = memory_plan.plan(
                bank,
                options.get("device", "cpu"),
                dtype=options.pop("dtype", None),
                content_dtype=options.get("content_dtype"),
                shard=self._shard,
                memory=memory_plan.available_memory() // self._beside,
            )
        return LoadedBank(bank, shard=self._shard, **options)

    def release(self, generation: int) -> None:
        """One who loaded this state asks for it no more."""
        self._readers[generation] -= 1
        if self._readers[generation] <= 0:
            del self._readers[generation]
            self._views.pop(generation, None)

    def route(
        self,
        generation: int,
        passing: Tensor | None,
        layer: int,
        vectors: Tensor,
        mask: Tensor,
        top_k: int,
    ) -> tuple[Tensor, Tensor]:
        """Rows [B, k] int64 of the whole bank and scores [B, k] float32, best first.

        Args:
            generation: the state that is asked.
            passing: [P] int64, numbers of the documents that may be selected; None for all.
            layer, vectors, mask, top_k: as `BankSnapshot.search` takes them.
        """
        view = self._view(generation)
        if passing is not None:
            view = view.among(passing)
        if not view.num_documents:
            empty = torch.empty((len(vectors), 0))
            return empty.long(), empty
        where = view.keys_device
        found = view.search(layer, vectors.to(where), mask.to(where), top_k)
        rows = (found.documents + view.first_row).masked_fill(found.documents < 0, -1)
        return rows.cpu(), found.scores.cpu()

    def content(
        self, generation: int, layer: int, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Of those of some rows that lie here: chunk counts [U], keys and values [C, G, D].

        Args:
            generation: the state that is asked.
            layer: index of a routing layer.
            rows: int64 of the whole bank, ascending.
        """
        view, mine = self._own(generation, rows)
        if not len(mine):
            return None
        found = view.content(layer, Selection(mine[:, None], torch.empty(0)))
        keys, values = found.keys[found.mask], found.values[found.mask]
        return found.mask.sum(1).cpu(), keys.cpu(), values.cpu()

    def numbers(self, generation: int, rows: Tensor) -> Tensor:
        """The bank's numbers of those of some rows that lie here: int64."""
        view, mine = self._own(generation, rows)
        return view.rows_to_numbers(mine)

    def _own(self, generation: int, rows: Tensor) -> tuple[BankSnapshot, Tensor]:
        view = self._view(generation)
        mine = rows - view.first_row
        return view, mine[(mine >= 0) & (mine < view.num_rows)]

    def _view(self, generation: int) -> BankSnapshot:
        """The state of a generation, which is loaded again after a restart.

        Raises:
            WorkerError: the bank has changed since.
        """
        if generation not in self._views:
            view = self._latest()
            if view.generation != generation:
                raise WorkerError(
                    f"shard {self._shard[0]} of {self._shard[1]} was restarted and the bank has "
                    "changed meanwhile; ask again"
                )
            self._views[generation] = view
        return self._views[generation]


class _Shards:
    """The shards together, as they are asked."""

    def __init__(self, actors: Sequence[Any], timeout: float) -> None:
        self.actors = list(actors)
        self._timeout = timeout

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Answers of all shards, in their order; see `cluster.gather` for errors."""
        refs = [getattr(actor, method).remote(*arguments) for actor in self.actors]
        found: list[Any] = cluster.gather(refs, self._timeout, "a shard of the bank")
        return found

    def release(self, states: Sequence[ShardState]) -> None:
        """Release what each shard has loaded; nothing is waited for."""
        for actor, state in zip(self.actors, states, strict=False):  # no actors once closed
            actor.release.remote(state.generation)


class _State:
    """One generation, held by all shards until this is collected."""

    def __init__(self, shards: _Shards, states: Sequence[ShardState]) -> None:
        self.shards = shards
        self.generation = states[0].generation
        self.num_rows = sum(state.num_rows for state in states)
        self.num_documents = sum(state.num_documents for state in states)
        self.release = weakref.finalize(self, shards.release, states)
        self.release.atexit = False

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """See `_Shards.ask`."""
        return self.shards.ask(method, self.generation, *arguments)


class ShardedBank(ClosedAtExit, LatestReader["ShardedSnapshot"]):
    """A bank loaded by several processes together; the interface of `LoadedBank`.

    Example::

        with ShardedBank(bank, shards=2) as memory:
            engine = MemoryEngine(bank, memory=memory)

    Args:
        bank: open; the shards open it again, so all machines must see its folder.
        device: where results go.
        shards: how many processes.
        address: of a Ray cluster; by default one is started on this machine.
        gpus_per_shard: GPUs that each shard reserves, for its routing keys; 0 holds them in RAM.
        timeout: seconds to wait for a shard's answer, its restart included.
        shared: use the shards that other processes of the cluster hold of this bank, or start them
            for all. They go on when this one closes, unless its bank is open for writing.
        **options: of `LoadedBank`, such as dtype, content_dtype, top_k.

    Raises:
        InputError: a number is not valid, or Ray is not installed.
        WorkerError: no cluster, or a shard failed for good.
        MSAError: as `LoadedBank` raises it in any of the shards.
    """

    def __init__(
        self,
        bank: MemoryBank,
        device: torch.device | str = "cpu",
        *,
        shards: int = 2,
        address: str | None = None,
        gpus_per_shard: float = 0,
        timeout: float = DEFAULT_TIMEOUT,
        top_k: int | None = None,
        shared: bool = False,
        **options: Any,
    ) -> None:
        if shards < 1 or timeout <= 0:
            raise InputError(f"shards={shards}, timeout={timeout}: expected at least 1, above 0")
        self.bank = bank
        self.device = torch.device(device)
        model = bank.model
        self._top_k = top_k or (
            bank.manifest.top_k_documents if model is None else model.config.top_k_documents
        )
        dtype = bank.manifest.torch_dtype if model is None else model.dtype
        self._dtype: torch.dtype = options.setdefault("content_dtype", dtype) or dtype
        options.setdefault("device", "cuda" if gpus_per_shard else "cpu")
        cluster.connect(address)
        beside = cluster.per_node(shards)
        arguments = [(bank.path, rank, shards, beside, dict(options)) for rank in range(shards)]
        name = f"{bank.path}/{bank.manifest.created}/{shards}" if shared else None
        actors = cluster.spawn(Shard, shards, gpus_per_shard, arguments, name)
        self._shards = _Shards(actors, timeout)
        self._ends_shards = not (shared and bank.read_only)
        self._lock = threading.Lock()
        try:
            self._view = self._loaded()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the shards, or leave them to others; calling it twice does nothing."""
        if not self._ends_shards and hasattr(self, "_view"):
            self._view._state.release()
        actors, self._shards.actors = self._shards.actors, []
        for actor in actors if self._ends_shards else ():
            cluster.connect().kill(actor)

    @property
    def num_shards(self) -> int:
        """How many processes hold the bank."""
        return len(self._shards.actors)

    def view(self, filter: Filter | None = None, *, top_k: int | None = None) -> ShardedSnapshot:
        """The latest state read by `refresh`, to ask from beginning to end.

        Args:
            filter: see `LoadedBank.view`; it is applied here alone.
            top_k: documents that a layer selects.

        Raises:
            InputError: top_k is below 1.
        """
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k={top_k}: expected at least 1")
        view = self._view
        if filter is not None:
            passing = torch.tensor(self.bank.catalog.passing(filter), dtype=torch.int64)
            held = cluster.connect().put(passing)  # once, not with every call
            view = replace(view, num_documents=len(passing), _passing=held)
        return view if top_k is None else replace(view, top_k=top_k)

    def refresh(self) -> bool:
        """Take up what has changed in the bank, in all shards; see `LoadedBank.refresh`.

        Returns:
            True if there was a change.

        Raises:
            WorkerError: a shard failed for good, or the shards do not come to read the same state.
            BankCorruptError: a segment that some shard must load is damaged; the old state stays in
                use.
        """
        with self._lock:
            if self.bank.generation == self._view.generation:
                return False
            self._view = self._loaded()
            return True

    def _loaded(self) -> ShardedSnapshot:
        """The present state; if a commit came between, the shards load again."""
        least = self.bank.generation  # on another machine, a commit may be seen later
        states: list[ShardState] = []
        for attempt in range(_LOAD_ATTEMPTS):
            if attempt:
                time.sleep(_LOAD_PAUSE)
            states = self._shards.ask("load")
            generations = [state.generation for state in states]
            if min(generations) == max(generations) >= least:
                break
            self._shards.release(states)
        else:
            found = ", ".join(str(state.generation) for state in states)
            raise WorkerError(
                f"the shards do not come to read the same state of the bank (generations {found}): "
                "either it changes all the time, or they do not see the same folder. Ask again "
                "when it is still, or open one that all of them share"
            )
        manifest = self.bank.manifest
        state = _State(self._shards, states)
        return ShardedSnapshot(
            bank=str(self.bank.path),
            generation=state.generation,
            top_k=self._top_k,
            num_documents=state.num_documents,
            dtype=self._dtype,
            _shape=(manifest.num_key_value_heads, manifest.head_dim),
            _device=self.device,
            _state=state,
        )


@dataclass(frozen=True, slots=True)
class ShardedSnapshot:
    """One state of a bank in shards, for asking; a `MemoryReader`.

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
    dtype: torch.dtype
    _shape: tuple[int, int]
    _device: torch.device
    _state: _State = field(repr=False)
    _passing: Any = field(default=None, repr=False)

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
            WorkerError: a shard failed for good.

        Source: MSA 3.2.1, Eq. 2; 3.4.
        """
        if not self.num_documents:
            raise EmptyBankError(
                f"bank '{self.bank}' holds no documents to ask (or none that pass the filter); add "
                "some with 'msa index' or MemoryBank.add"
            )
        asked = (self._passing, layer, vectors.cpu(), routing_mask.cpu(), self.top_k)
        found = self._state.ask("route", *asked)
        documents = torch.cat([rows for rows, _ in found], dim=1)
        scores = torch.cat([scores for _, scores in found], dim=1)
        # Shards lie in the order of the rows, and each has its equal scores in that order too, so
        # a stable sort puts the lower row first.
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        best = slice(None, min(self.top_k, self._state.num_rows))
        return Selection(
            documents.gather(1, order)[:, best].to(self._device), scores[:, best].to(self._device)
        )

    @torch.no_grad()
    def content(self, layer: int, selection: Selection) -> Content:
        """Pooled keys and values of the selected documents, from the shards that hold them.

        Args:
            layer: index of a routing layer.
            selection: of `route` of the same view.

        Returns:
            Content on the device given to `ShardedBank`.

        Raises:
            BankCorruptError: what some shard has on disk is not what was written.
            WorkerError: a shard failed for good.
        """
        rows = selection.documents.cpu()
        chosen = torch.unique(rows[rows >= 0])
        if not len(chosen):
            shape = (len(rows), 0, *self._shape)
            empty = torch.empty(shape, dtype=self.dtype, device=self._device)
            return Content(empty, empty, empty.new_empty(shape[:2], dtype=torch.bool))
        found = [part for part in self._state.ask("content", layer, chosen) if part is not None]
        counts, keys, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        CONTENT_READ.add(keys.nbytes + values.nbytes)
        places = torch.searchsorted(chosen, rows.clamp(min=0)).masked_fill(rows < 0, -1)
        return gather_content(
            keys.to(self._device, self.dtype),
            values.to(self._device, self.dtype),
            counts.to(self._device),
            places.to(self._device),
        )

    def rows_to_numbers(self, rows: Tensor) -> Tensor:
        """The bank's numbers of documents given by row: int64 of the same shape; -1 stays -1.

        Raises:
            WorkerError: a shard failed for good.
        """
        rows = rows.cpu()
        chosen = torch.unique(rows[rows >= 0])
        if not len(chosen):
            return torch.full_like(rows, -1)
        numbers = torch.cat(self._state.ask("numbers", chosen))
        places = torch.searchsorted(chosen, rows.clamp(min=0))
        return numbers[places].masked_fill(rows < 0, -1)
