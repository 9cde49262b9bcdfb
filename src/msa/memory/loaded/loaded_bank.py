"""A bank loaded for asking: routing keys in memory, content in RAM or mapped from its segments.

`LoadedBank` follows the bank (`refresh`); a `BankSnapshot` is one consistent state of it, and the
`MemoryReader` that a question uses from beginning to end. Views share the routing keys: new
documents are written after the rows of the views that are in use, never over them. What lies where
is decided by a `msa.memory.loaded.memory_plan.MemoryPlan`.

Shapes: B batch, T query tokens, N rows (documents loaded, deleted ones included until the next
reload), C chunks, U selected documents, H query heads, G KV heads, D head dim, K documents per row.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from msa.errors import BankError, BudgetError, EmptyBankError, InputError
from msa.memory.bank import MemoryBank
from msa.memory.loaded import memory_plan
from msa.memory.loaded.content_store import ContentStore
from msa.memory.loaded.latest import LatestReader
from msa.memory.loaded.memory_plan import MemoryPlan
from msa.memory.loaded.reservations import RESERVATIONS, Reservation
from msa.memory.search.clustered_index import ClusteredIndex, PruningSettings
from msa.memory.search.layer_index import FlatIndex, LayerIndex
from msa.memory.search.layer_keys import KeyBuffers, LayerKeys, StoredKeys, map_keys
from msa.memory.store.catalog import Snapshot
from msa.memory.store.document_table import DocumentTable, Partition, RowsBuilder, SegmentSlice
from msa.memory.store.filters import Filter
from msa.memory.store.lifetime import ClosedAtExit, Lifetime, NotPickled
from msa.memory.store.mapped_pages import release_heap
from msa.memory.store.records import SegmentEntry
from msa.memory.store.segments import Segment, SegmentMissingError
from msa.ops.attention import gather_content
from msa.types import Content, Selection, whole_number

_LOAD_ATTEMPTS = 5
_WHOLE = Partition()
_RELEASE_EVERY = 16  # segments loaded

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BankSnapshot(NotPickled):
    """One state of a bank, for asking; a `MemoryReader`. Rows are its documents, 0 to N - 1.

    Attributes:
        generation: of the bank when this state was read.
        top_k: documents that a layer selects, at most.
        num_documents: documents that can be selected.
        keys_device: where the routing keys are.
        shard: the share of the bank that this view holds; the whole by default. DocumentTable and
            selections are local to it.
        first_row: row of the whole bank at which the share begins.
    """

    bank: str
    generation: int
    layout: int
    top_k: int
    num_documents: int
    score: str
    dtype: torch.dtype
    device: torch.device
    keys_device: torch.device
    _layers: tuple[int, ...]
    _indexes: Mapping[int, LayerIndex]
    _mask: Tensor | None
    _content: ContentStore = field(repr=False)
    _rows: DocumentTable = field(repr=False)
    first_row: int = 0
    shard: Partition = _WHOLE

    def __len__(self) -> int:
        """Number of documents that can be selected."""
        return self.num_documents

    def route(self, layer: int, vectors: Tensor, routing_mask: Tensor) -> Selection:
        """The layer's top-k documents for every row of a batch.

        Args:
            layer: index of a routing layer.
            vectors: [B, T, G*D] float32, of `msa.ops.routing.reduce_queries`.
            routing_mask: [B, T] bool.

        Returns:
            Selection with K = min(top_k, N), on the view's device; K = 0 from a share of a bank in
            which there is no document to select.

        Raises:
            EmptyBankError: there is no document to select in the whole bank.
            BankCorruptError: with keys in int8, those on disk are not what was loaded.
            BudgetError: the device ran out of memory.

        Source: MSA 3.2.1, Eq. 2.
        """
        self._content.check()
        if not self.num_documents and self.shard.world > 1:
            empty = torch.empty((len(vectors), 0), device=self.device)
            return Selection(empty.long(), empty.float())
        if not self.num_documents:
            raise EmptyBankError(
                f"bank '{self.bank}' holds no documents to ask (or none that pass the filter); add "
                "some with 'msa index' or MemoryBank.add"
            )
        where = self.keys_device
        found = self.search(layer, vectors.to(where), routing_mask.to(where), self.top_k)
        return Selection(found.documents.to(self.device), found.scores.to(self.device))

    def search(self, layer: int, vectors: Tensor, routing_mask: Tensor, top_k: int) -> Selection:
        """The same from vectors that are made already, on the device of the routing keys.

        Args:
            layer: index of a routing layer.
            vectors: [B, T, G*D] float32, of `reduce_queries`.
            routing_mask: [B, T] bool.
            top_k: k >= 1.

        Raises:
            BankCorruptError, BudgetError: see `route`.
        """
        with _out_of_memory("routing", self.keys_device):
            return self._indexes[layer].search(vectors, routing_mask, top_k, self._mask)

    def content(self, layer: int, selection: Selection) -> Content:
        """Pooled keys and values of the selected documents, held or read from their segments.

        The same documents are fetched for the next layer meanwhile, if the plan says so.

        Args:
            layer: index of a routing layer.
            selection: of `route` of the same view.

        Returns:
            Content on the view's device.

        Raises:
            BankCorruptError: what is on disk is not what was written.
            BudgetError: the device ran out of memory.
        """
        rows = selection.documents.cpu()
        chosen = torch.unique(rows[rows >= 0])  # ascending, so those of one segment stand together
        with _out_of_memory("fetching content", self.device):
            fetched = self._content.fetch(self._rows, layer, chosen)
            if not len(chosen):
                shape = (len(rows), 0, *fetched.keys.shape[1:])
                empty = torch.empty(shape, dtype=self.dtype, device=self.device)
                return Content(empty, empty, empty.new_empty(shape[:2], dtype=torch.bool))
            return gather_content(
                fetched.keys.to(self.dtype),
                fetched.values.to(self.dtype),
                fetched.counts.to(self.device),
                fetched.places(rows).to(self.device),
            )

    @property
    def num_rows(self) -> int:
        """Rows of the share, deleted documents included."""
        return len(self._rows.numbers)

    def among(self, numbers: Tensor) -> BankSnapshot:
        """The same state, of which only documents with these numbers [P] may be selected."""
        mask = self._rows.live & torch.isin(self._rows.numbers, numbers)
        return replace(self, num_documents=int(mask.sum()), _mask=mask.to(self.keys_device))

    def rows_to_numbers(self, rows: Tensor) -> Tensor:
        """The bank's numbers of documents given by row: int64 of the same shape; -1 stays -1."""
        rows = rows.cpu()
        if not len(self._rows.numbers):
            return torch.full_like(rows, -1)
        return self._rows.numbers[rows.clamp(min=0)].masked_fill(rows < 0, -1)


class LoadedBank(ClosedAtExit, LatestReader[BankSnapshot]):
    """A bank loaded for asking; itself a `MemoryReader` over its latest state.

    A question that takes several rounds should use one `view()` throughout: rows of different
    views do not mean the same documents after a `compact`. What its plan reserves of the memory is
    counted for other banks of the process, until `close` or until it is collected.

    Args:
        bank: open, with or without a model.
        device: where the results go, and the routing keys are held if they fit.
        dtype: of the routing keys in memory; by default the plan's. float32 keys of a bfloat16 bank
            give the same scores; bfloat16 halves the memory of a float32 bank and may swap
            documents whose scores are close; int8 is re-scored with the keys on disk.
        content_dtype: of the content that is returned; the model's, else as on disk.
        top_k: documents that a layer selects; the model's, else the bank's, by default.
        shard: (rank, world), to hold one of `world` shares of the bank (see `Partition`). A share
            is loaded again when documents were added, since the ranges move; deleting changes a
            mask.
        plan: which tier holds what; by default `msa.memory.loaded.memory_plan.plan` decides, now
            and again when the bank has grown by a quarter.
        pruning: search the routing keys in blocks, not all of them; on a CPU only, off by default.
            It takes a second copy of the keys, which the plan counts, and time to make it while
            loading.

    Raises:
        InputError: top_k or shard is not valid, plan and dtype are both given, or pruning is asked
            for with keys that are not on the CPU.
        BudgetError: the bank does not fit.
        BankError: it is closed, or this is a forked child.
        BankCorruptError: a segment that holds live documents is damaged; nothing is answered from
            the bank until it is repaired.
    """

    def __init__(
        self,
        bank: MemoryBank,
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype | None = None,
        content_dtype: torch.dtype | None = None,
        top_k: int | None = None,
        shard: tuple[int, int] = (0, 1),
        plan: MemoryPlan | None = None,
        pruning: PruningSettings | None = None,
    ) -> None:
        bank.check_open()
        manifest = bank.manifest
        if top_k is not None:
            top_k = whole_number(top_k, "top_k", 1)
        if plan is not None and dtype is not None:
            raise InputError("plan and dtype are both given; make the plan with that dtype")
        self.bank = bank
        self.device = torch.device(device)
        self.shard = Partition(*shard)
        self._dtype = dtype
        self._pruning = pruning
        self._lock = threading.Lock()
        self._buffers: KeyBuffers | None = None
        self._maps: tuple[dict[int, Tensor], ...] = ()
        self._entries: tuple[SegmentEntry, ...] = ()
        model = bank.model
        model_dtype = manifest.torch_dtype if model is None else model.dtype
        model_k = manifest.top_k_documents if model is None else model.config.top_k_documents
        self._content_dtype = content_dtype or model_dtype
        self._planned = plan is None
        self._life = Lifetime(
            f"the loaded bank '{bank.path}'", "load it again: LoadedBank(MemoryBank.open(...))"
        )
        with RESERVATIONS.lock:
            self.plan = self._new_plan() if plan is None else plan
            RESERVATIONS.enter(self)
        self._view = BankSnapshot(
            bank=str(bank.path),
            generation=-1,
            layout=-1,
            top_k=top_k or model_k,
            num_documents=0,
            score=manifest.routing_score,
            dtype=self._content_dtype,
            device=self.device,
            _layers=manifest.routing_layers,
            _indexes={},
            keys_device=torch.device(self.plan.keys_device),
            _mask=None,
            _content=self._new_content(),
            _rows=DocumentTable.none(len(manifest.routing_layers)),
            shard=self.shard,
        )
        try:
            self.refresh()
        except BaseException:
            self.close()
            raise

    # ---- life

    def close(self) -> None:
        """Release what is in memory, and the reservation of more; calling it twice does nothing.

        The bank stays open, and views that were taken before stay as they are.
        """
        if self._life.is_elsewhere:
            return
        with self._lock:
            self._life.end()
            RESERVATIONS.end(self)
            self._buffers, self._maps, self._entries = None, (), ()
            self._view = replace(
                self._view,
                num_documents=0,
                _indexes={},
                _mask=None,
                _content=self._new_content(),
                _rows=DocumentTable.none(len(self.bank.manifest.routing_layers)),
            )

    def _check(self) -> None:
        self._life.check()

    def reservation(self) -> Reservation:
        """What the plan counts with and is not taken yet; see `msa.memory.loaded.reservations`."""
        plan, view = self.plan, getattr(self, "_view", None)
        loaded = view is not None and view.generation >= 0
        taken = view._content.num_bytes if view is not None and loaded else 0
        device_taken = 0
        if loaded and plan.keys_device == "cpu":
            taken += self.num_bytes
        elif loaded:
            device_taken = self.num_bytes
        whole = plan.memory_bytes
        if loaded:  # what loading takes for a while has been given back
            whole -= max(0, plan.loading_bytes - plan.question_bytes)
        return Reservation(
            max(0, whole - taken), self.device, max(0, plan.device_bytes - device_taken)
        )

    def _new_plan(self, in_use: int = 0) -> MemoryPlan:
        """What is to lie where; RAM that is in use now counts as free."""
        return memory_plan.plan(
            self.bank,
            self.device,
            dtype=self._dtype,
            content_dtype=self._content_dtype,
            pruning=self._pruning,
            shard=(self.shard.rank, self.shard.world),
            reserver=self,
            in_use=in_use,
        )

    def _new_content(self) -> ContentStore:
        manifest = self.bank.manifest
        return ContentStore(
            manifest.routing_layers,
            (manifest.num_key_value_heads, manifest.head_dim),
            self.device,
            self._content_dtype,
            held=self.plan.content == "held",
            prefetch=self.plan.prefetch,
            packed=manifest.packed,
        )

    def _new_buffers(self) -> KeyBuffers:
        manifest = self.bank.manifest
        where = torch.device(self.plan.keys_device)
        # RAM that was never written to costs nothing
        growth = (
            max(self.plan.growth, memory_plan.GROWTH) if where.type == "cpu" else self.plan.growth
        )
        shape = (manifest.num_key_value_heads, manifest.head_dim)
        return KeyBuffers(manifest.routing_layers, shape, self.plan.torch_dtype, where, growth)

    # ---- asking

    @property
    def num_bytes(self) -> int:
        """Memory of the routing keys in use, with the copies that their indexes keep."""
        return sum(index.num_bytes for index in self._view._indexes.values())

    @property
    def dtype(self) -> torch.dtype:
        """Of the routing keys in memory."""
        return self.plan.torch_dtype

    def view(self, filter: Filter | None = None, *, top_k: int | None = None) -> BankSnapshot:
        """The latest state read by `refresh`, to ask from beginning to end.

        Args:
            filter: which documents may be selected, see `msa.memory.store.filters`. A mapping is
                one query of the catalog; a function is called once per distinct metadata.
            top_k: documents that a layer selects.

        Raises:
            InputError: top_k is below 1, or the filter cannot be read.
            BankError: it is closed, or this is a forked child.
        """
        self._check()
        view = self._view
        if top_k is not None:
            view = replace(view, top_k=whole_number(top_k, "top_k", 1))
        if filter is None:
            return view
        return view.among(torch.tensor(self.bank.catalog.passing(filter), dtype=torch.int64))

    # ---- following the bank

    def refresh(self) -> bool:
        """Load what has changed in the bank; views taken before stay as they are.

        Without a change this is one query. New documents cost what they hold, deleted ones a mask;
        after a `compact` everything is loaded again, with both states in memory meanwhile.

        If a device has no memory for the plan, the next tier is taken, with a warning in the log.

        Returns:
            True if there was a change.

        Raises:
            BankCorruptError: a segment to be loaded is damaged; the old state stays in use.
            BudgetError: the bank does not fit; the old state stays in use.
            BankError: it is closed, this is a forked child, or another bank has taken its place on
                disk.
        """
        self._life.check_process()
        with self._lock:
            self._check()
            for attempt in range(_LOAD_ATTEMPTS):
                old = self._view
                if self.bank.generation == old.generation:
                    return False
                layout = self.bank.catalog.counter("layout")
                fresh = layout != old.layout
                try:
                    self._view = self._loaded(None if fresh else old)
                    return True
                except (SegmentMissingError, _LayoutChangedError):
                    # a compact came between reading the catalog and reading its segments
                    if attempt + 1 == _LOAD_ATTEMPTS or not self._moved(layout):
                        raise
            raise AssertionError("unreachable")

    def _moved(self, layout: int) -> bool:
        return self.bank.catalog.counter("layout") != layout

    def _loaded(self, old: BankSnapshot | None) -> BankSnapshot:
        """The present state, by the plan, or by a lower one where there is no memory for it."""
        plan, old = self.plan, self._replanned(old)
        try:
            while True:
                try:
                    return self._load_share(old) if self.shard.world > 1 else self._load(old)
                except torch.OutOfMemoryError as error:
                    self._fall_back(error)
                    old = None
        except BaseException:
            self.plan = plan
            raise

    def _replanned(self, old: BankSnapshot | None) -> BankSnapshot | None:
        """The state to build on; None when the bank has outgrown its plan and changes its tiers."""
        if not self._planned or self._view.generation < 0:
            return old
        total = sum(e.num_chunks for e in self.bank.catalog.segments()) // self.shard.world
        if total <= self.plan.num_chunks * memory_plan.GROWTH:
            return old
        with RESERVATIONS.lock:
            plan = self._new_plan(self.num_bytes + self._view._content.num_bytes)
            self.plan, before = plan, self.plan
        same = all(
            getattr(plan, name) == getattr(before, name)
            for name in ("keys_dtype", "keys_device", "content", "prefetch")
        )
        return old if same else None

    def _fall_back(self, error: Exception) -> None:
        """Go one tier down.

        Raises:
            BudgetError: there is none, or the dtype was asked for.
        """
        plan = self.plan
        place = f"'{plan.keys_device}' for the routing keys of bank '{self.bank.path}'"
        lower = memory_plan.lower(plan, self.bank, self) if self._dtype is None else None
        if lower is None:
            raise BudgetError(
                f"no memory on {place} in {plan.keys_dtype}; free some, or hold shares of the bank "
                "in several processes"
            ) from error
        log.warning(
            "no memory on %s in %s; they are held on '%s' in %s",
            *(place, plan.keys_dtype, lower.keys_device, lower.keys_dtype),
        )
        self.plan = lower

    def _load(self, old: BankSnapshot | None) -> BankSnapshot:
        """The present state, on top of an old one of the same layout."""
        if old is None:
            snapshot = self.bank.catalog.snapshot()
        else:
            rows = old._rows
            last = rows.segments[-1].entry.segment if rows.segments else 0
            snapshot = self.bank.catalog.snapshot(last, old.generation)
            if snapshot.layout != old.layout:
                raise _LayoutChangedError("the bank is being compacted over and over; try again")
        segments = [(self._opened(entry), _whole(entry)) for entry in snapshot.segments]
        view = self._appended(old, segments)
        rows = replace(view._rows, live=view._rows.without(snapshot.dead))
        return self._at(view, snapshot, rows)

    def _load_share(self, old: BankSnapshot | None) -> BankSnapshot:
        """The present state of this process's share; loaded again unless documents only went."""
        snapshot = self.bank.catalog.snapshot()
        entries = snapshot.segments
        if old is None or entries != self._entries:
            num_chunks = sum(e.num_chunks for e in entries)
            low, high = self.shard.range(num_chunks)
            first_row = self.shard.rows_before(entries)
            segments, scratch = [], _scratch(entries)
            for index, (entry, first) in enumerate(self.shard.entries(entries)):
                segment, piece = self._opened(entry), _whole(entry)
                if first < low or first + entry.num_chunks > high:  # only a part of it
                    counts = segment.routing_part(scratch).chunk_counts
                    piece = self.shard.piece(counts, first, num_chunks)
                    first_row += piece.rows.start if index == 0 else 0
                segments.append((segment, piece))
            view = self._appended(None, segments)
        else:
            view, first_row = old, old.first_row
        everything = replace(view._rows, live=torch.ones_like(view._rows.live))
        rows = replace(view._rows, live=everything.without(snapshot.dead))
        self._entries = entries
        return replace(self._at(view, snapshot, rows), first_row=first_row)

    def _opened(self, entry: SegmentEntry) -> Segment:
        return Segment(self.bank.segments_folder, entry, self.bank.manifest.routing_layers)

    def _at(self, view: BankSnapshot, snapshot: Snapshot, rows: DocumentTable) -> BankSnapshot:
        """The view with these rows live, at the moment of the snapshot."""
        return replace(
            view,
            generation=snapshot.generation,
            layout=snapshot.layout,
            num_documents=int(rows.live.sum()),
            _mask=None if bool(rows.live.all()) else rows.live.to(self.plan.keys_device),
            _rows=rows,
        )

    def _appended(
        self, old: BankSnapshot | None, segments: Sequence[tuple[Segment, SegmentSlice]]
    ) -> BankSnapshot:
        """A view with the documents of more segments after its own, if there are any."""
        layers = self.bank.manifest.routing_layers
        rows = DocumentTable.none(len(layers)) if old is None else old._rows
        content = self._new_content() if old is None else old._content
        buffers = self._buffers if old is not None and self._buffers else self._new_buffers()
        maps = list(self._maps) if old is not None else []
        used = rows.num_chunks
        needed = used + sum(piece.chunks.stop - piece.chunks.start for _, piece in segments)
        buffers = buffers.with_room(used, needed)
        builder = RowsBuilder(rows)
        scratch = _scratch([segment.entry for segment, _ in segments])
        for index, (segment, piece) in enumerate(segments, start=len(rows.segments)):
            part = segment.routing_part(scratch)
            for i, keys in part.routing_keys.items():
                buffers.write(i, used, keys[piece.chunks])
            if buffers.dtype == torch.int8:
                maps.append(map_keys(segment.path, layers))
            content.add(segment, part, piece, index)
            used += piece.chunks.stop - piece.chunks.start
            builder.add(segment, part, piece)
            if index % _RELEASE_EVERY == 0:
                release_heap()
        rows = builder.build()
        del scratch
        release_heap()
        stored = StoredKeys(rows, maps, content.window) if maps else None
        counts = rows.chunk_counts.to(buffers.device)
        self._buffers, self._maps = buffers, tuple(maps)
        before = {} if old is None else old._indexes
        found = {i: buffers.layer(i, counts, used, stored) for i in layers}
        return replace(
            self._view,
            _indexes={i: self._index(keys, before.get(i)) for i, keys in found.items()},
            keys_device=buffers.device,
            _content=content,
            _rows=rows,
        )

    def _index(self, keys: LayerKeys, before: LayerIndex | None) -> LayerIndex:
        """The index of a layer, made on top of that of the state before if there is one."""
        if before is not None:
            return before.followed(keys)
        if self._pruning is not None:
            return ClusteredIndex.build(keys, self._pruning)
        return FlatIndex(keys)


def _whole(entry: SegmentEntry) -> SegmentSlice:
    return SegmentSlice(slice(0, entry.num_documents), slice(0, entry.num_chunks))


def _scratch(entries: Sequence[SegmentEntry]) -> Tensor:
    """To read routing parts into; one for all, since one for each would fragment the heap."""
    return torch.empty(max((e.routing_bytes for e in entries), default=0), dtype=torch.uint8)


@contextlib.contextmanager
def _out_of_memory(doing: str, device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BudgetError(
            f"'{device}' ran out of memory while {doing}; ask fewer questions at once (batch_size) "
            "or hold the routing keys in int8; the bank is as it was"
        ) from error


class _LayoutChangedError(BankError):
    """Segments were replaced while a refresh was reading the catalog."""
