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

import torch
from torch import Tensor

from msa.errors import BankError, EmptyBankError, InputError
from msa.memory.bank import MemoryBank
from msa.memory.catalog import Snapshot
from msa.memory.records import SegmentEntry
from msa.memory.rows import Piece, Rows, RowsBuilder, Shard
from msa.memory.segments import Segment, SegmentMissingError
from msa.ops.attention import gather_content
from msa.ops.routing import document_scores, select_documents
from msa.types import JSON, Content, Selection

Filter = Callable[[Mapping[str, JSON]], bool]

# Room for documents to come, so that a refresh copies only what is new. On a CPU, memory that was
# never written to costs nothing.
_GROWTH = 1.25
_LOAD_ATTEMPTS = 5
_WHOLE = Shard()


@dataclass(frozen=True, slots=True)
class ResidentView:
    """One state of a bank, for asking; a `MemoryReader`. Rows are its documents, 0 to N - 1.

    Attributes:
        generation: of the bank when this state was read.
        top_k: documents that a layer selects, at most.
        num_documents: documents that can be selected.
        shard: the share of the bank that this view holds; the whole by default. Rows and selections
            are local to it.
        first_row: row of the whole bank at which the share begins.
        total_documents: documents of the whole bank that can be selected.
        total_rows: rows of the whole bank, deleted documents included.
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
    _rows: Rows = field(repr=False)
    first_row: int = 0
    total_documents: int = 0
    total_rows: int = 0
    shard: Shard = _WHOLE
    _next_number: int = 0

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
            Selection with K = min(top_k, N), on the device of the routing keys; K = 0 from a share
            of a bank in which there is no document to select.

        Raises:
            EmptyBankError: there is no document to select in the whole bank.

        Source: MSA 3.2.1, Eq. 2.
        """
        if not self.num_documents and self.shard.world > 1:
            device = self._counts.device
            empty = torch.empty((len(routing_queries), 0), device=device)
            return Selection(empty.long(), empty.float())
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
        shard: (rank, world), to hold one of `world` shares of the bank (see `Shard`). A share is
            loaded anew when documents were added, since the ranges move; deleting changes a mask.

    Raises:
        InputError: top_k or shard is not valid.
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
    ) -> None:
        manifest = bank.manifest
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k={top_k}: expected at least 1")
        self.bank = bank
        self.device = torch.device(device)
        self.dtype = dtype or manifest.torch_dtype
        self.shard = Shard(*shard)
        self._lock = threading.Lock()
        self._buffers: dict[int, Tensor] = {}
        self._entries: tuple[SegmentEntry, ...] = ()
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
            _rows=Rows.none(len(manifest.routing_layers)),
            shard=self.shard,
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
        count = int(mask.sum())
        total = count if self.shard.world == 1 else int((wanted < view._next_number).sum())
        return replace(view, num_documents=count, total_documents=total, _mask=mask.to(self.device))

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
        if self.shard.world > 1:
            return self._load_share(old)
        if old is None:
            snapshot = self.bank.catalog.snapshot()
            rows = Rows.none(len(self.bank.manifest.routing_layers))
            buffers: dict[int, Tensor] = {}
        else:
            rows, buffers = old._rows, self._buffers
            last = rows.segments[-1].entry.segment if rows.segments else 0
            snapshot = self.bank.catalog.snapshot(last, old.generation)
            if snapshot.layout != old.layout:
                raise _LayoutChangedError("the bank is being compacted over and over; try again")
        segments = [(self._opened(entry), _whole(entry)) for entry in snapshot.segments]
        rows = self._appended(rows, segments, buffers)
        rows = replace(rows, live=rows.without(snapshot.dead))
        live = int(rows.live.sum())
        return replace(self._made(snapshot, rows), total_documents=live, total_rows=len(rows.live))

    def _load_share(self, old: ResidentView | None) -> ResidentView:
        """The present state of this process's share; loaded anew unless documents only went."""
        catalog = self.bank.catalog
        while True:
            snapshot = catalog.snapshot()
            total, next_number = catalog.count(), catalog.counter("next_number")
            if catalog.counter("generation") == snapshot.generation:
                break
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
            rows = self._appended(Rows.none(len(self._view._layers)), segments, {})
        else:
            rows, first_row = old._rows, old.first_row
        everything = replace(rows, live=torch.ones_like(rows.live))
        rows = replace(rows, live=everything.without(snapshot.dead))
        self._entries = entries
        return replace(
            self._made(snapshot, rows),
            first_row=first_row,
            total_documents=total,
            total_rows=sum(e.num_documents for e in entries),
            _next_number=next_number,
        )

    def _opened(self, entry: SegmentEntry) -> Segment:
        return Segment(self.bank.segments_folder, entry, self.bank.manifest.routing_layers)

    def _made(self, snapshot: Snapshot, rows: Rows) -> ResidentView:
        num_chunks = rows.num_chunks
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
        self, rows: Rows, segments: Sequence[tuple[Segment, Piece]], buffers: dict[int, Tensor]
    ) -> Rows:
        """Rows and buffers with the documents of more segments behind those of before."""
        used = rows.num_chunks
        needed = used + sum(piece.chunks.stop - piece.chunks.start for _, piece in segments)
        buffers = self._grown(buffers, used, needed)
        builder = RowsBuilder(rows)
        scratch = _scratch([segment.entry for segment, _ in segments])
        for segment, piece in segments:
            part = segment.routing_part(scratch)
            end = used + piece.chunks.stop - piece.chunks.start
            for i, keys in part.routing_keys.items():
                buffers[i][used:end] = keys[piece.chunks]  # converts dtype and device
            used = end
            builder.add(segment, part, piece)
        self._buffers = buffers
        return builder.build()


def _whole(entry: SegmentEntry) -> Piece:
    return Piece(slice(0, entry.num_documents), slice(0, entry.num_chunks))


def _scratch(entries: Sequence[SegmentEntry]) -> Tensor:
    """To read routing parts into; one for all, since one for each would fragment the heap."""
    return torch.empty(max((e.routing_bytes for e in entries), default=0), dtype=torch.uint8)


class _LayoutChangedError(BankError):
    """Segments were replaced while a refresh was reading the catalog."""
