"""Routing keys in memory: as on disk, in another float type, or in int8 with re-scoring.

Keys in int8 find the candidates; these are scored once more with the keys on disk, which are
mapped, and the best of those scores are the selection. So int8 may cost a document that was no
candidate at all (how rare that is says `docs/inference.md`), never a wrong score.

Shapes: B batch, T query tokens, N rows, C chunks, U documents read, G KV heads, D head dim,
K documents per row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msa.errors import BankCorruptError, BudgetError
from msa.memory.store.document_table import DocumentTable
from msa.memory.store.mapped_pages import PageWindow
from msa.memory.store.segments import SegmentMissingError, chunk_offsets
from msa.ops.quantization import quantize
from msa.ops.routing import TopDocuments, selection_scores
from msa.types import Selection

# Candidates that int8 scores give for each document that is wanted, and at least so many more.
CANDIDATES = 4
MORE_CANDIDATES = 32
QUANTIZED_AT_ONCE = 1 << 14  # chunks


@dataclass(frozen=True, slots=True)
class LayerKeys:
    """Routing keys of one layer in one state of a bank.

    Attributes:
        keys: [C, G, D], a float type or int8.
        counts: [N] int64, chunks of each document; on the device of the keys.
        layer: index of the routing layer.
        scales: [C] float32 for int8 keys, else None.
        stored: the same keys on disk; with int8 keys only.
    """

    keys: Tensor
    counts: Tensor
    layer: int = 0
    scales: Tensor | None = None
    stored: StoredKeys | None = None

    @property
    def num_bytes(self) -> int:
        """Memory in use, the scales included."""
        return self.keys.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def num_candidates(self, top_k: int) -> int:
        """Documents to be looked for: more than are wanted if they are to be re-scored."""
        return top_k if self.stored is None else max(CANDIDATES * top_k, top_k + MORE_CANDIDATES)

    def rescored(
        self, vectors: Tensor, routing_mask: Tensor, found: Selection, top_k: int
    ) -> Selection:
        """The top-k of candidates by the scores of their keys on disk, if there are such.

        Args:
            vectors: [B, T, G*D] float32.
            routing_mask: [B, T] bool.
            found: candidates by the scores of the keys in memory.
            top_k: k >= 1.

        Raises:
            BankCorruptError: a candidate's key on disk is not what was loaded.
        """
        stored = self.stored
        if stored is None:
            return found
        num_documents = len(self.counts)
        best = TopDocuments(len(vectors), min(top_k, num_documents), num_documents)
        vectors, routing_mask = vectors.cpu(), routing_mask.cpu()
        for row, some in enumerate(found.documents.cpu()):
            some = some[some >= 0].sort().values
            if not len(some):
                continue
            counts = stored.rows.chunk_counts[some]
            keys = stored.read(self.layer, some)
            self._compare(stored, some, counts, keys)
            one = slice(row, row + 1)
            scores = selection_scores(vectors[one], routing_mask[one], keys)[0]
            scored = scores > -torch.inf
            documents = torch.repeat_interleave(some, counts)[scored]
            best.offer(torch.full_like(documents, row), documents, scores[scored])
        return best.selection(self.keys.device)

    def _compare(self, stored: StoredKeys, rows: Tensor, counts: Tensor, keys: Tensor) -> None:
        """Refuse keys that do not round to those that were loaded, when their hash was compared."""
        index = chunks_of(stored.first[rows], counts)
        values, scales = quantize(keys)
        assert self.scales is not None
        here = index.to(self.keys.device)
        same = (values == self.keys[here].cpu()).flatten(1).all(1)
        same &= scales == self.scales[here].cpu()
        if not bool(same.all()):
            bad = int(torch.repeat_interleave(counts)[int(same.int().argmin())])
            stored.raise_corrupt(int(rows[bad]))


class StoredKeys:
    """Routing keys as they lie on disk, mapped: to re-score a few documents.

    Args:
        rows: documents.
        maps: as many as `rows.segments`, of `map_keys`.
        window: counts what is read.
    """

    def __init__(
        self, rows: DocumentTable, maps: Sequence[Mapping[int, Tensor]], window: PageWindow
    ) -> None:
        self.rows = rows
        self.first = chunk_offsets(rows.chunk_counts)
        self._maps = tuple(maps)
        self._one_of_each = [tensor for one in self._maps for tensor in list(one.values())[:1]]
        self._window = window

    def read(self, layer: int, chosen: Tensor) -> Tensor:
        """Keys of rows [U], ascending: [C, G, D] in the stored dtype."""
        rows = self.rows
        segments, sizes = torch.unique_consecutive(rows.segment[chosen], return_counts=True)
        found = []
        for segment, some in zip(
            segments.tolist(), torch.split(chosen, sizes.tolist()), strict=True
        ):
            index = chunks_of(rows.first_chunk[some], rows.chunk_counts[some])
            found.append(self._maps[segment][layer].index_select(0, index))
        keys = torch.cat(found)
        self._window.touched(len(chosen), keys.nbytes, self._one_of_each)
        return keys

    def raise_corrupt(self, row: int) -> None:
        """Say which segment holds a row whose key has changed since it was loaded."""
        segment = self.rows.segments[int(self.rows.segment[row])]
        number = int(self.rows.numbers[row])
        raise segment.corrupt(f"the routing keys of document {number} changed since it was loaded")


def map_keys(path: Path, layers: Sequence[int]) -> dict[int, Tensor]:
    """Routing keys of a segment, mapped: routing layer -> [C, G, D].

    Raises:
        SegmentMissingError: no such file.
        BankCorruptError: no valid header.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {i: file.get_tensor(f"{i}.routing_keys") for i in layers}
    except FileNotFoundError as error:
        raise SegmentMissingError(f"segment '{path}' is missing") from error
    except SafetensorError as error:
        raise BankCorruptError(f"segment '{path}' has no valid header: {error}") from error


class KeyBuffers:
    """Room for the routing keys of all layers. Views take slices of what is written.

    New keys are written after those of the views in use, never over them. On a CPU, memory that
    was never written to costs nothing.

    Args:
        layers: routing layers.
        shape: G and D.
        dtype: a float type, or int8.
        device: where the keys are held.
        growth: room for so many times the chunks that are needed.
    """

    def __init__(
        self,
        layers: Sequence[int],
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        growth: float = 1.25,
    ) -> None:
        self.layers = tuple(layers)
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.growth = growth
        self._keys: dict[int, Tensor] = {}
        self._scales: dict[int, Tensor] = {}

    def with_room(self, used: int, needed: int) -> KeyBuffers:
        """These buffers, or larger ones that hold the first `used` chunks too.

        Raises:
            BudgetError: there is no memory for them.
            torch.OutOfMemoryError: the device has none.
        """
        if self._keys and len(self._keys[self.layers[0]]) >= needed:
            return self
        larger = KeyBuffers(self.layers, self.shape, self.dtype, self.device, self.growth)
        room = int(needed * self.growth) + 1
        for i in self.layers:
            larger._keys[i] = _allocated((room, *self.shape), self.dtype, self.device)
            if self._keys:
                larger._keys[i][:used] = self._keys[i][:used]
            if self.dtype == torch.int8:
                larger._scales[i] = _allocated((room,), torch.float32, self.device)
                if self._keys:
                    larger._scales[i][:used] = self._scales[i][:used]
        return larger

    def write(self, layer: int, start: int, keys: Tensor) -> None:
        """Put keys [C, G, D] (on the CPU) after the first `start` chunks."""
        if self.dtype != torch.int8:
            self._keys[layer][start : start + len(keys)] = keys  # converts dtype and device
            return
        # on the CPU, where they are made again to be compared; some at a time, as floats
        for part in torch.split(keys, QUANTIZED_AT_ONCE):
            end = start + len(part)
            values, scales = quantize(part)
            self._keys[layer][start:end] = values
            self._scales[layer][start:end] = scales
            start = end

    def layer(
        self, layer: int, counts: Tensor, num_chunks: int, stored: StoredKeys | None
    ) -> LayerKeys:
        """The first C keys of one layer; with those on disk, if they are held in int8."""
        scales = self._scales[layer][:num_chunks] if self._scales else None
        return LayerKeys(self._keys[layer][:num_chunks], counts, layer, scales, stored)


def _allocated(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:  # torch's allocator on the CPU
        raise BudgetError(
            f"no memory for {shape[0]} routing keys of {str(dtype).removeprefix('torch.')} on "
            f"'{device}'; take dtype=torch.int8, or hold shares of the bank in several processes"
        ) from error


def chunks_of(first: Tensor, counts: Tensor) -> Tensor:
    """Chunks of documents given by their first ones: [C] int64 for two [U]."""
    shift = torch.repeat_interleave(first - chunk_offsets(counts), counts)
    return torch.arange(len(shift)) + shift
