"""A bank loaded for asking: routing keys in memory, content mapped from its segments.

`ResidentBank` follows the bank (`refresh`); a `ResidentView` is one consistent state of it, and the
`MemoryReader` that a question uses from beginning to end. Views share the routing keys: new
documents are written behind the rows of the views that are in use, never over them.

Shapes: B batch, T query tokens, N rows (documents loaded, deleted ones included until the next
reload), C chunks, U selected documents, H query heads, G KV heads, D head dim, K documents per row.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from msa.errors import BankError, EmptyBankError, InputError
from msa.memory.bank import MemoryBank
from msa.memory.catalog import Snapshot
from msa.memory.segments import Segment, SegmentMissingError, chunk_offsets
from msa.ops.attention import gather_content
from msa.ops.routing import document_scores, select_documents
from msa.types import JSON, Content, Selection

Filter = Callable[[Mapping[str, JSON]], bool]

# Room for documents to come, so that a refresh copies only what is new. On a CPU, memory that was
# never written to costs nothing.
_GROWTH = 1.25
_LOAD_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class _Rows:
    """Per document of the view; all tensors on the CPU.

    Attributes:
        numbers, chunk_counts: [N] int64.
        segment: [N] int64, index into `segments`; ascending.
        first_chunk: [N] int64, first chunk within its segment.
        checksums: [N, R] int32.
        live: [N] bool, False for deleted documents.
        segments: opened.
    """

    numbers: Tensor
    chunk_counts: Tensor
    segment: Tensor
    first_chunk: Tensor
    checksums: Tensor
    live: Tensor
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class ResidentView:
    """One state of a bank, for asking; a `MemoryReader`. Rows are its documents, 0 to N - 1.

    Attributes:
        generation: of the bank when this state was read.
        top_k: documents that a layer selects, at most.
        num_documents: documents that can be selected.
    """

    bank: str
    generation: int
    layout: int
    top_k: int
    num_documents: int
    score: str
    dtype: torch.dtype
    _layers: tuple[int, ...]
    _keys: dict[int, Tensor]
    _counts: Tensor
    _mask: Tensor | None
    _rows: _Rows = field(repr=False)

    def __len__(self) -> int:
        """Number of documents that can be selected."""
        return self.num_documents

    def route(self, layer: int, routing_queries: Tensor, routing_mask: Tensor) -> Selection:
        """The layer's top-k documents for every row of a batch.

        Args:
            layer: index of a routing layer.
            routing_queries: [B, T, H, D].
            routing_mask: [B, T] bool.

        Returns:
            Selection with K = min(top_k, N), on the device of the routing keys.

        Raises:
            EmptyBankError: there is no document to select.

        Source: MSA 3.2.1, Eq. 2.
        """
        if not self.num_documents:
            raise EmptyBankError(
                f"bank '{self.bank}' holds no documents to ask (or none that pass the filter); add "
                "some with 'msa index' or MemoryBank.add"
            )
        keys = self._keys[layer]
        scores = document_scores(
            routing_queries.to(keys.device),
            routing_mask.to(keys.device),
            keys,
            self._counts,
            self.score,
            self._mask,
        )
        return select_documents(scores, self.top_k)

    def content(self, layer: int, selection: Selection) -> Content:
        """Pooled keys and values of the selected documents, read from their segments.

        Args:
            layer: index of a routing layer.
            selection: of `route` of the same view.

        Returns:
            Content on the device of the routing keys.

        Raises:
            BankCorruptError: what is on disk is not what was written.
        """
        rows = selection.documents.cpu()
        chosen = torch.unique(rows[rows >= 0])  # ascending, so those of one segment stand together
        counts = self._rows.chunk_counts[chosen]
        keys, values = self._read(layer, chosen)
        places = torch.searchsorted(chosen, rows.clamp(min=0)).masked_fill(rows < 0, -1)
        device = self._counts.device
        if not len(chosen):
            shape = (len(rows), 0, *keys.shape[1:])
            empty = torch.empty(shape, dtype=self.dtype, device=device)
            return Content(empty, empty, torch.empty(shape[:2], dtype=torch.bool, device=device))
        return gather_content(
            keys.to(device, self.dtype),
            values.to(device, self.dtype),
            counts.to(device),
            places.to(device),
        )

    def _read(self, layer: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled keys and values of rows [U], ascending: two [C, G, D]; one read per segment."""
        rows, column = self._rows, self._layers.index(layer)
        segments, sizes = torch.unique_consecutive(rows.segment[chosen], return_counts=True)
        keys, values = [self._keys[layer][:0].cpu()], [self._keys[layer][:0].cpu()]
        for segment, some in zip(
            segments.tolist(), torch.split(chosen, sizes.tolist()), strict=True
        ):
            k, v = rows.segments[segment].read(
                layer,
                rows.numbers[some],
                rows.chunk_counts[some],
                rows.first_chunk[some],
                rows.checksums[some, column],
            )
            keys.append(k.to(self.dtype))
            values.append(v.to(self.dtype))
        return torch.cat(keys), torch.cat(values)

    def rows_to_numbers(self, rows: Tensor) -> Tensor:
        """The bank's numbers of documents given by row: int64 of the same shape; -1 stays -1."""
        rows = rows.cpu()
        if not len(self._rows.numbers):
            return torch.full_like(rows, -1)
        return self._rows.numbers[rows.clamp(min=0)].masked_fill(rows < 0, -1)


class ResidentBank:
    """A bank loaded for asking; itself a `MemoryReader` over its latest state.

    A question that takes several rounds should use one `view()` throughout: rows of different
    views do not mean the same documents after a `compact`.

    Args:
        bank: open, with or without a model.
        device: where the routing keys are held and the results go.
        dtype: of the routing keys in memory; as on disk by default. float32 doubles the memory of a
            bfloat16 bank and gains nothing; bfloat16 halves that of a float32 bank and may swap
            documents whose scores are close.
        content_dtype: of the content that is handed out; the model's, else as on disk.
        top_k: documents that a layer selects; the model's, else the bank's, by default.

    Raises:
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
    ) -> None:
        manifest = bank.manifest
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k={top_k}: expected at least 1")
        self.bank = bank
        self.device = torch.device(device)
        self.dtype = dtype or manifest.torch_dtype
        self._lock = threading.Lock()
        self._buffers: dict[int, Tensor] = {}
        model = bank.model
        model_dtype = manifest.torch_dtype if model is None else model.dtype
        model_k = manifest.top_k_documents if model is None else model.config.top_k_documents
        self._view = ResidentView(
            bank=str(bank.path),
            generation=-1,
            layout=-1,
            top_k=top_k or model_k,
            num_documents=0,
            score=manifest.routing_score,
            dtype=content_dtype or model_dtype,
            _layers=manifest.routing_layers,
            _keys={},
            _counts=torch.empty(0, dtype=torch.int64, device=self.device),
            _mask=None,
            _rows=self._no_rows(),
        )
        self.refresh()

    # ---- asking

    def __len__(self) -> int:
        """Number of documents that can be selected."""
        return len(self._view)

    @property
    def generation(self) -> int:
        """Generation of the bank when it was last read."""
        return self._view.generation

    @property
    def num_bytes(self) -> int:
        """Memory of the routing keys in use."""
        return sum(k.nbytes for k in self._view._keys.values())

    def view(self, filter: Filter | None = None, *, top_k: int | None = None) -> ResidentView:
        """The latest state read by `refresh`, to ask from beginning to end.

        Args:
            filter: takes a document's metadata, tells whether the document may be selected. It is
                called once per distinct metadata, in time linear in the bank; keep the view.
            top_k: documents that a layer selects.

        Raises:
            InputError: top_k is below 1.
        """
        view = self._view
        if top_k is not None:
            if top_k < 1:
                raise InputError(f"top_k={top_k}: expected at least 1")
            view = replace(view, top_k=top_k)
        if filter is None:
            return view
        verdicts: dict[str, bool] = {}
        passing: list[int] = []
        for number, metadata in self.bank.catalog.metadata():
            if metadata not in verdicts:
                verdicts[metadata] = bool(filter(json.loads(metadata)))
            if verdicts[metadata]:
                passing.append(number)
        wanted = torch.tensor(passing, dtype=torch.int64)
        mask = view._rows.live & torch.isin(view._rows.numbers, wanted)
        return replace(view, num_documents=int(mask.sum()), _mask=mask.to(self.device))

    def route(self, layer: int, routing_queries: Tensor, routing_mask: Tensor) -> Selection:
        """See `ResidentView.route`."""
        return self._view.route(layer, routing_queries, routing_mask)

    def content(self, layer: int, selection: Selection) -> Content:
        """See `ResidentView.content`."""
        return self._view.content(layer, selection)

    def rows_to_numbers(self, rows: Tensor) -> Tensor:
        """See `ResidentView.rows_to_numbers`."""
        return self._view.rows_to_numbers(rows)

    # ---- following the bank

    def refresh(self) -> bool:
        """Take up what has changed in the bank; views handed out before stay as they are.

        Without a change this is one query. New documents cost what they hold, deleted ones a mask;
        after a `compact` everything is loaded again, with both states in memory meanwhile.

        Returns:
            True if there was a change.

        Raises:
            BankCorruptError: a segment to be loaded is damaged; the old state stays in use.
        """
        with self._lock:
            for attempt in range(_LOAD_ATTEMPTS):
                old = self._view
                if self.bank.generation == old.generation:
                    return False
                layout = self.bank.catalog.counter("layout")
                fresh = layout != old.layout
                try:
                    self._view = self._load(None if fresh else old)
                    return True
                except (SegmentMissingError, _LayoutChangedError):
                    # a compact came between reading the catalog and reading its segments
                    if attempt + 1 == _LOAD_ATTEMPTS or not self._moved(layout):
                        raise
            raise AssertionError("unreachable")

    def _moved(self, layout: int) -> bool:
        return self.bank.catalog.counter("layout") != layout

    def _load(self, old: ResidentView | None) -> ResidentView:
        """The present state, on top of an old one of the same layout."""
        if old is None:
            snapshot = self.bank.catalog.snapshot()
            rows = self._no_rows()
            buffers: dict[int, Tensor] = {}
            used = 0
        else:
            rows, buffers = old._rows, self._buffers
            used = int(rows.chunk_counts.sum())
            last = rows.segments[-1].entry.segment if rows.segments else 0
            snapshot = self.bank.catalog.snapshot(last, old.generation)
            if snapshot.layout != old.layout:
                raise _LayoutChangedError("the bank is being compacted over and over; try again")
        folder, layers = self.bank.segments_folder, self.bank.manifest.routing_layers
        segments = [Segment(folder, entry, layers) for entry in snapshot.segments]
        needed = used + sum(s.entry.num_chunks for s in segments)
        buffers = self._grown(buffers, used, needed)
        rows = self._appended(rows, segments, buffers, used)
        if snapshot.dead:
            gone = torch.isin(rows.numbers, torch.tensor(snapshot.dead, dtype=torch.int64))
            rows = replace(rows, live=rows.live & ~gone)
        self._buffers = buffers
        return self._made(snapshot, rows, needed)

    def _made(self, snapshot: Snapshot, rows: _Rows, num_chunks: int) -> ResidentView:
        return replace(
            self._view,
            generation=snapshot.generation,
            layout=snapshot.layout,
            num_documents=int(rows.live.sum()),
            _keys={i: b[:num_chunks] for i, b in self._buffers.items()},
            _counts=rows.chunk_counts.to(self.device),
            _mask=None if bool(rows.live.all()) else rows.live.to(self.device),
            _rows=rows,
        )

    def _grown(self, buffers: dict[int, Tensor], used: int, needed: int) -> dict[int, Tensor]:
        """Buffers with room for `needed` chunks, the first `used` as they were."""
        manifest = self.bank.manifest
        shape = (manifest.num_key_value_heads, manifest.head_dim)
        grown = {}
        for i in manifest.routing_layers:
            buffer = buffers.get(i)
            if buffer is None or len(buffer) < needed:
                room = int(needed * _GROWTH) + 1
                larger = torch.empty((room, *shape), dtype=self.dtype, device=self.device)
                if buffer is not None:
                    larger[:used] = buffer[:used]
                buffer = larger
            grown[i] = buffer
        return grown

    def _appended(
        self, rows: _Rows, segments: Sequence[Segment], buffers: Mapping[int, Tensor], used: int
    ) -> _Rows:
        """Rows and buffers with the documents of more segments behind those of before."""
        columns: dict[str, list[Tensor]] = {
            name: [getattr(rows, name)]
            for name in ("numbers", "chunk_counts", "segment", "first_chunk", "checksums")
        }
        # one for all: allocating and freeing one for each would fragment the heap
        largest = max((s.entry.routing_bytes for s in segments), default=0)
        scratch = torch.empty(largest, dtype=torch.uint8)
        for index, segment in enumerate(segments, start=len(rows.segments)):
            part = segment.routing_part(scratch)
            end = used + segment.entry.num_chunks
            for i, keys in part.routing_keys.items():
                buffers[i][used:end] = keys  # converts dtype and device
            used = end
            columns["numbers"].append(part.numbers)
            columns["chunk_counts"].append(part.chunk_counts)
            columns["segment"].append(torch.full_like(part.numbers, index))
            columns["first_chunk"].append(chunk_offsets(part.chunk_counts))
            columns["checksums"].append(part.checksums)
        joined: dict[str, Any] = {name: torch.cat(parts) for name, parts in columns.items()}
        live = torch.ones(len(joined["numbers"]), dtype=torch.bool)
        live[: len(rows.live)] = rows.live
        return _Rows(**joined, live=live, segments=(*rows.segments, *segments))

    def _no_rows(self) -> _Rows:
        empty = torch.empty(0, dtype=torch.int64)
        checksums = torch.empty((0, len(self.bank.manifest.routing_layers)), dtype=torch.int32)
        live = torch.empty(0, dtype=torch.bool)
        return _Rows(empty, empty, empty, empty, checksums, live, ())


class _LayoutChangedError(BankError):
    """Segments were replaced while a refresh was reading the catalog."""
