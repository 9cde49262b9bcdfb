"""Content of the documents: held in RAM, or mapped from the segments; fetched ahead.

Two tiers with one address, (segment, chunk within it):

- held: all content in RAM (pinned for a GPU), compared with its checksums once, when it is loaded;
- mapped: read from the segments when it is asked for, and compared then.

A document chosen in one routing layer is often chosen by the next as well, so once a layer has its
content, a thread fetches the same documents for the next layer: from disk, and to the GPU on a side
stream. Who asks for content waits only for what is not there yet.

Shapes: B batch, N rows, C chunks, U documents, G KV heads, D head dim.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from msa.errors import BankCorruptError, MSAError
from msa.memory.store.document_table import DocumentTable, SegmentSlice
from msa.memory.store.lifetime import Lifetime
from msa.memory.store.mapped_pages import PageWindow
from msa.memory.store.segments import RoutingPart, Segment, chunk_offsets
from msa.ops.quantization import packed_width, unpack
from msa.ops.ragged import ragged_range

# Pinned memory is given out in powers of two; blocks of one such size waste none of it.
BLOCK_BYTES = 64 << 20
_ALIGNMENT = 64

log = logging.getLogger(__name__)


class Tally:
    """A count that several threads add to."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count so many more."""
        with self._lock:
            self.total += count


CONTENT_READ = Tally()
"""Bytes of content that this process has fetched for questions, from RAM, disk or shards."""


class Arena:
    """Memory for many tensors that are never given back one by one.

    Args:
        pinned: page-locked, so that a GPU can fetch from it by itself.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self.pinned = pinned
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of this shape and dtype."""
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > len(self._block):
            # what is larger than a block gets one of its own, and the present one stays
            block = self._block_of(max(size, BLOCK_BYTES))
            if size > BLOCK_BYTES:
                return block.view(dtype).view(*shape)
            self._block, self._used = block, 0
        start = self._used
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return self._block[start : start + size].view(dtype).view(*shape)

    def _block_of(self, size: int) -> Tensor:
        if self.pinned:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                log.warning("no pinned memory (%s); content is held in plain RAM", reason)
                self.pinned = False
        return torch.empty(size, dtype=torch.uint8)


class ResidentSegment:
    """Content of a piece of a segment in RAM.

    A layer with damage is not held but read from the segment, which says what is wrong with the
    document that is asked for; the others can be used.

    Args:
        segment: opened.
        part: its routing part.
        piece: what of it is held.
        dtype: of the content in memory.
        arena: where it is held.

    Attributes:
        segment: of which it is a part.
        layers: routing layer -> keys and values [C, G, D], chunks of the piece.
        first: chunks of the segment before the piece.
    """

    def __init__(
        self,
        segment: Segment,
        part: RoutingPart,
        piece: SegmentSlice,
        dtype: torch.dtype,
        arena: Arena,
    ) -> None:
        self.segment = segment
        self.first = piece.chunks.start
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        counts = part.chunk_counts[piece.rows]
        starts = chunk_offsets(counts) + self.first
        for column, layer in enumerate(segment.layers):
            checksums = part.checksums[piece.rows, column]
            try:
                read = segment.read(layer, part.numbers[piece.rows], counts, starts, checksums)
            except BankCorruptError:
                continue
            keys, values = (arena.take(t.shape, dtype).copy_(t) for t in read)
            self.layers[layer] = keys, values


@dataclass(frozen=True, slots=True)
class Fetched:
    """Content of some documents, where it is needed.

    Attributes:
        rows: [U] int64, which ones; on the CPU.
        counts: [U] int64, their chunks; on the CPU.
        keys, values: [C, G, D], in the order of `rows`.
        event: on a GPU, when they are there.
    """

    rows: Tensor
    counts: Tensor
    keys: Tensor
    values: Tensor
    event: torch.cuda.Event | None = None

    def places(self, rows: Tensor) -> Tensor:
        """Index into `rows` of rows given in any shape; -1 stays -1."""
        ascending, order = self.rows.sort()
        if not len(order):
            return torch.full_like(rows, -1)
        found = torch.searchsorted(ascending, rows.clamp(min=0)).clamp(max=len(order) - 1)
        return order[found].masked_fill(rows < 0, -1)

    def only(self, chosen: Tensor) -> Fetched:
        """Those of some rows, each of which is among these; no copy when that is all."""
        keep = torch.isin(self.rows, chosen)
        if bool(keep.all()):
            return self
        chunks = torch.repeat_interleave(keep, self.counts).to(self.keys.device)
        return Fetched(
            self.rows[keep], self.counts[keep], self.keys[chunks], self.values[chunks], self.event
        )


class ContentStore:
    """Where content of the rows of one layout is fetched from.

    Args:
        layers: routing layers, ascending.
        shape: G and D.
        device: where content is needed.
        dtype: in which it is needed.
        held: keep all of it in RAM; else it is read from the segments.
        prefetch: fetch ahead for the next layer.
        packed: precision of packed content, which is unpacked where it is needed; None when it is
            stored as floats.
    """

    def __init__(
        self,
        layers: Sequence[int],
        shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
        *,
        held: bool,
        prefetch: bool,
        packed: str | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.packed = packed
        groups, dim = shape
        self.shape = (groups, packed_width(dim, packed) if packed else dim)
        self.device = device
        self.dtype = dtype
        self.stored = torch.uint8 if packed else dtype
        self.held = held
        self.window = PageWindow()
        self._life = Lifetime("the bank that was loaded", "load it again")
        self._arena = Arena(pinned=device.type == "cuda")
        self._held: list[
            ResidentSegment
        ] = []  # as many as the rows have segments; only appended to
        self._prefetcher = Prefetcher(self) if prefetch else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def num_bytes(self) -> int:
        """Memory of the content that is held."""
        return sum(t.nbytes for h in self._held for pair in h.layers.values() for t in pair)

    def check(self) -> None:
        """Refuse in a forked child, which has none of the threads that fetch.

        Raises:
            BankError: one line that says what to do.
        """
        self._life.check()

    def add(self, segment: Segment, part: RoutingPart, piece: SegmentSlice, index: int) -> None:
        """Take up a piece of a segment that is to be number `index` of the rows' segments."""
        if self.held:
            del self._held[index:]  # left by a refresh that failed
            self._held.append(ResidentSegment(segment, part, piece, self.stored, self._arena))

    def fetch(self, rows: DocumentTable, layer: int, chosen: Tensor) -> Fetched:
        """Content of rows in one layer, and a start on the same rows in the next.

        Args:
            rows: those that `add` was called for, or the first of them.
            layer: index of a routing layer.
            chosen: [U] int64, ascending.

        Returns:
            Content of exactly these rows, in any order, ready on `device`.

        Raises:
            BankCorruptError: what is on disk is not what was written.
        """
        self.check()
        prefetched = None if self._prefetcher is None else self._prefetcher.take(layer)
        result = self._joined(prefetched, rows, layer, chosen)
        if self._prefetcher is not None and layer != self.layers[-1] and len(chosen):
            self._prefetcher.start(rows, self.layers[self.layers.index(layer) + 1], chosen)
        return result

    def _joined(
        self, prefetched: Fetched | None, rows: DocumentTable, layer: int, chosen: Tensor
    ) -> Fetched:
        """What was prefetched and is of use, and the rest."""
        there = chosen[:0] if prefetched is None else chosen[torch.isin(chosen, prefetched.rows)]
        if prefetched is None or not len(there):
            return self._ready(self._copied(rows, layer, chosen))
        first = self._ready(prefetched).only(there)
        if len(there) == len(chosen):
            return first
        rest = chosen[~torch.isin(chosen, there)]
        second = self._ready(self._copied(rows, layer, rest))
        return Fetched(
            torch.cat([first.rows, second.rows]),
            torch.cat([first.counts, second.counts]),
            torch.cat([first.keys, second.keys]),
            torch.cat([first.values, second.values]),
        )

    def _ready(self, fetched: Fetched) -> Fetched:
        """The same, waited for by the stream that goes on with it."""
        if fetched.event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(fetched.event)
            for tensor in (fetched.keys, fetched.values):
                tensor.record_stream(stream)  # its memory is of the side stream
        return fetched

    def _copied(self, rows: DocumentTable, layer: int, chosen: Tensor) -> Fetched:
        """Content of rows [U], ascending, on its way to the device."""
        counts = rows.chunk_counts[chosen]
        CONTENT_READ.add(2 * int(counts.sum()) * math.prod(self.shape) * self.stored.itemsize)
        if self._stream is None:
            stored = (t.to(self.device) for t in self.read(rows, layer, chosen))
            keys, values = (self._unpacked(t) for t in stored)
            return Fetched(chosen, counts, keys, values)
        with torch.cuda.stream(self._stream):
            if self._is_held(rows, layer, chosen):
                keys, values = self._pulled(rows, layer, chosen)
            else:
                pinned = (t.pin_memory() for t in self.read(rows, layer, chosen))
                keys, values = (t.to(self.device, non_blocking=True) for t in pinned)
            keys, values = self._unpacked(keys), self._unpacked(values)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return Fetched(chosen, counts, keys, values, event)

    def _unpacked(self, stored: Tensor) -> Tensor:
        """[C, G, D] in the dtype that is needed."""
        return unpack(stored, self.packed, self.dtype) if self.packed else stored

    def _is_held(self, rows: DocumentTable, layer: int, chosen: Tensor) -> bool:
        segments = torch.unique(rows.segment[chosen]).tolist()
        return self.held and all(layer in self._held[s].layers for s in segments)

    def _pulled(self, rows: DocumentTable, layer: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Held content copied to the device document by document, with no copy on the way."""
        counts = rows.chunk_counts[chosen].tolist()
        shape = (sum(counts), *self.shape)
        keys, values = (torch.empty(shape, dtype=self.stored, device=self.device) for _ in range(2))
        done = 0
        for segment, first, count in zip(
            rows.segment[chosen].tolist(), rows.first_chunk[chosen].tolist(), counts, strict=True
        ):
            held = self._held[segment]
            start = first - held.first
            for target, source in zip((keys, values), held.layers[layer], strict=True):
                target[done : done + count].copy_(source[start : start + count], non_blocking=True)
            done += count
        return keys, values

    def read(self, rows: DocumentTable, layer: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled keys and values of rows [U], ascending: two [C, G, D] on the CPU.

        One read per segment. Packed content is returned as it is packed.

        Raises:
            BankCorruptError: see `fetch`.
        """
        column = self.layers.index(layer)
        segments, sizes = torch.unique_consecutive(rows.segment[chosen], return_counts=True)
        empty = torch.empty((0, *self.shape), dtype=self.stored)
        keys, values, mapped = [empty], [empty], 0
        for index, some in zip(segments.tolist(), torch.split(chosen, sizes.tolist()), strict=True):
            counts, first = rows.chunk_counts[some], rows.first_chunk[some]
            held = self._held[index] if self.held else None
            if held is not None and layer in held.layers:
                chunks = ragged_range(first - held.first, counts)
                k, v = (t.index_select(0, chunks) for t in held.layers[layer])
            else:
                numbers, checksums = rows.numbers[some], rows.checksums[some, column]
                k, v = rows.segments[index].read(layer, numbers, counts, first, checksums)
                mapped += k.nbytes + v.nbytes
            keys.append(k.to(self.stored))
            values.append(v.to(self.stored))
        if mapped:
            self.window.touched(2 * len(chosen), mapped, (s.mapped_tensor for s in rows.segments))
        return torch.cat(keys), torch.cat(values)


class Prefetcher:
    """Content that one thread fetches before it is asked for.

    What turns out to be of no use, or damaged, is dropped: the layer that asks for it reads it
    itself, and raises what is wrong.
    """

    def __init__(self, store: ContentStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._pending: dict[int, Future[Fetched | None]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="msa-content")

    def start(self, rows: DocumentTable, layer: int, chosen: Tensor) -> None:
        """Begin to fetch rows [U], ascending, of a layer; forget what was begun for it before."""
        with self._lock:
            before = self._pending.pop(layer, None)
            if before is not None:
                before.cancel()
            self._pending[layer] = self._thread.submit(self._fetched, rows, layer, chosen)

    def take(self, layer: int) -> Fetched | None:
        """What was fetched for a layer; None if nothing was, or it was not begun yet."""
        with self._lock:
            future = self._pending.pop(layer, None)
        if future is None or future.cancel():
            return None
        return future.result()

    def _fetched(self, rows: DocumentTable, layer: int, chosen: Tensor) -> Fetched | None:
        try:
            return self._store._copied(rows, layer, chosen)
        except (MSAError, torch.OutOfMemoryError):
            return None
