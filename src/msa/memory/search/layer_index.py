"""Routing keys in memory: as on disk, in another float type, or in int8 with exact re-scoring.

Keys in int8 find the candidates; these are scored once more with the keys on disk, which are
mapped, and the best of those scores are the selection. So int8 may cost a document that was no
candidate at all (how rare that is says `docs/inference.md`), never a wrong score.

Shapes: B batch, T query tokens, N rows, C chunks, U documents read, G KV heads, D head dim,
K documents per row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msa.errors import BankCorruptError, BudgetError
from msa.memory.search.clustered_index import ClusteredIndex
from msa.memory.store.document_table import DocumentTable
from msa.memory.store.mapped_pages import PageWindow
from msa.memory.store.segments import SegmentMissingError, chunk_offsets
from msa.ops.kernels import route_documents
from msa.ops.kernels.screening import Screen
from msa.ops.quantisation import quantise
from msa.ops.routing import exact_scores, select_documents
from msa.types import Selection

# Candidates that int8 scores give for each document that is wanted, and at least so many more.
CANDIDATES = 4
MORE_CANDIDATES = 32
QUANTISED_AT_ONCE = 1 << 14  # chunks


class LayerSearch(Protocol):
    """The search of one routing layer; whatever finds the same selection may take its place."""

    def search(
        self,
        vectors: Tensor,
        routing_mask: Tensor,
        top_k: int,
        document_mask: Tensor | None = None,
    ) -> Selection:
        """See `LayerIndex.search`."""
        ...


@dataclass(frozen=True, slots=True)
class LayerIndex:
    """Routing keys of one layer in one state of a bank.

    Attributes:
        keys: [C, G, D], a float type or int8.
        counts: [N] int64, chunks of each document; on the device of the keys.
        scales: [C] float32 for int8 keys, else None.
        key_norm: no key is longer than this, if that is known.
        stored: the same keys on disk; with int8 keys only.
        layer: index of the routing layer.
        pruned: the same keys in blocks, to be searched instead; none by default.
        screen: most of the same keys in int8, to be read first; it finds the same.
    """

    keys: Tensor
    counts: Tensor
    layer: int
    scales: Tensor | None = None
    key_norm: float | None = None
    stored: StoredKeys | None = None
    pruned: ClusteredIndex | None = None
    screen: Screen | None = None

    @property
    def num_bytes(self) -> int:
        """Memory in use, the scales and all copies of the keys included."""
        copies = sum(copy.num_bytes for copy in (self.pruned, self.screen) if copy is not None)
        return self.keys.nbytes + (0 if self.scales is None else self.scales.nbytes) + copies

    def search(
        self,
        vectors: Tensor,
        routing_mask: Tensor,
        top_k: int,
        document_mask: Tensor | None = None,
    ) -> Selection:
        """The top-k documents of every row of a batch.

        Args:
            vectors: [B, T, G*D] float32, of `routing_vectors`, on the device of the keys.
            routing_mask: [B, T] bool.
            top_k: k >= 1.
            document_mask: [N] or [B, N] bool, False for documents that must not be chosen.

        Returns:
            Selection with K = min(top_k, N), best first, equal scores in favour of the lower row.

        Raises:
            BankCorruptError: a candidate's key on disk is not what was loaded.

        Source: MSA 3.2.1, Eq. 2; the two passes over int8 keys are ours.
        """
        wanted = top_k
        if self.stored is not None:
            wanted = max(CANDIDATES * top_k, top_k + MORE_CANDIDATES)
        if self.pruned is not None:
            found = self.pruned.search(vectors, routing_mask, wanted, document_mask)
        else:
            scan = partial(route_documents, scales=self.scales)
            found = (scan if self.screen is None else self.screen.search)(
                vectors,
                routing_mask,
                self.keys,
                self.counts,
                wanted,
                document_mask,
                key_norm=self.key_norm,
            )
        if self.stored is None:
            return found
        return self._rescored(self.stored, vectors, routing_mask, found.documents, top_k)

    def _rescored(
        self,
        stored: StoredKeys,
        vectors: Tensor,
        routing_mask: Tensor,
        candidates: Tensor,
        top_k: int,
    ) -> Selection:
        """The top-k of candidates [B, K'] by the exact scores of their keys on disk."""
        rows = candidates.cpu().sort(1).values  # ascending, so that ties fall to the lower row
        count = min(top_k, len(self.counts))
        documents = torch.full((len(rows), count), -1)
        scores = torch.full((len(rows), count), -torch.inf)
        vectors, routing_mask = vectors.cpu(), routing_mask.cpu()
        for row, some in enumerate(rows):
            some = some[some >= 0]
            if not len(some):
                continue
            counts = stored.rows.chunk_counts[some]
            keys = stored.read(self.layer, some)
            self._compare(stored, some, counts, keys)
            one = slice(row, row + 1)
            chunks = exact_scores(vectors[one], routing_mask[one], keys)[0]
            best = chunks.new_full((len(some),), -torch.inf)
            owner = torch.repeat_interleave(counts)
            best.scatter_reduce_(0, owner, chunks, reduce="amax")
            chosen = select_documents(best[None], top_k)
            size = chosen.documents.shape[1]
            places = chosen.documents[0]
            documents[row, :size] = some[places.clamp(min=0)].masked_fill(places < 0, -1)
            scores[row, :size] = chosen.scores[0]
        device = self.keys.device
        return Selection(documents.to(device), scores.to(device))

    def _compare(self, stored: StoredKeys, rows: Tensor, counts: Tensor, keys: Tensor) -> None:
        """Refuse keys that do not round to those that were loaded, when their hash was compared."""
        index = _chunks(stored.first[rows], counts)
        values, scales = quantise(keys)
        assert self.scales is not None
        here = index.to(self.keys.device)
        same = (values == self.keys[here].cpu()).flatten(1).all(1)
        same &= scales == self.scales[here].cpu()
        if not bool(same.all()):
            bad = int(torch.repeat_interleave(counts)[int(same.int().argmin())])
            stored.raise_corrupt(int(rows[bad]))


class StoredKeys:
    """Routing keys as they lie on disk, mapped: for exact scores of a few documents.

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
            index = _chunks(rows.first_chunk[some], rows.chunk_counts[some])
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

    New keys are written behind those of the views in use, never over them. On a CPU, memory that
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
        """Put keys [C, G, D] (on the CPU) behind the first `start` chunks."""
        if self.dtype != torch.int8:
            self._keys[layer][start : start + len(keys)] = keys  # converts dtype and device
            return
        # on the CPU, where they are made again to be compared; some at a time, as floats
        for part in torch.split(keys, QUANTISED_AT_ONCE):
            end = start + len(part)
            values, scales = quantise(part)
            self._keys[layer][start:end] = values
            self._scales[layer][start:end] = scales
            start = end

    def layer(
        self, layer: int, counts: Tensor, num_chunks: int, key_norm: float | None
    ) -> LayerIndex:
        """The first C keys of one layer. `stored` is to be set for int8 keys."""
        scales = self._scales[layer][:num_chunks] if self._scales else None
        return LayerIndex(self._keys[layer][:num_chunks], counts, layer, scales, key_norm)


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


def _chunks(first: Tensor, counts: Tensor) -> Tensor:
    """Chunks of documents given by their first ones: [C] int64 for two [U]."""
    shift = torch.repeat_interleave(first - chunk_offsets(counts), counts)
    return torch.arange(len(shift)) + shift
