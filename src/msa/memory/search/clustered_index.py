"""Routing keys that are searched without reading all of them (off unless asked for).

`ClusteredIndex` holds the keys of a layer in an order in which similar ones are neighbors, cut into
blocks. A block keeps its mean m and the distance r of the key farthest from it, so no key k of it
can score more than

    v . k  =  v . m + v . (k - m)  <=  v . m + |v| r        (Cauchy-Schwarz)

for a routing token v. The best of this over the tokens bounds the chunk scores (Eq. 2) of the whole
block, at the price of one chunk. A scan that takes the blocks with the best bounds first may stop
when the k-th best document scores more than the next bound. Nothing is lost then.

In many dimensions the bound is far from what a block's best key really scores: v and k - m would
have to point the same way. With a slack s < 1 the bound is v . m + s |v| r: it is exceeded now and
then, so what is found is nearly, not always, what a full scan finds; and far fewer blocks are read.

Documents that are added later follow, in a tail that is read in full until it has grown to a
quarter; then all is clustered again.

Shapes: B batch, T query tokens, N documents, C chunks, M blocks, G KV heads, D head dim, K selected
documents per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msa.errors import InputError
from msa.memory.search.layer_index import LayerIndex
from msa.memory.search.layer_keys import LayerKeys, chunks_of
from msa.ops.kernels import route_documents
from msa.ops.routing import TopDocuments, check_routing
from msa.types import Selection

# Means of one k-means, its rounds, and the keys that each mean is learnt from.
BRANCHES = 64
ROUNDS = 5
SAMPLE = 128
# No block holds more than this many times the keys of a mean one.
LARGEST = 4
# Keys in float32 at once, while blocks are made and while they are scanned.
BUILD_ROWS = 1 << 14
SCAN_ROWS = 1 << 13
# The first step of a scan, which finds a threshold, reads about so many keys; the next ones double.
FIRST_ROWS = 1 << 10
# A layer that has grown to so many times the chunks of its blocks is clustered again.
REBUILD = 1.25
# Relative room for the rounding of means, distances and scores in float32.
_ROOM = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningSettings:
    """How keys are parted into blocks, and how many of them are read.

    Attributes:
        slack: 1 reads every block that can hold a document of the top-k: exact. Less than 1 trusts
            that a block's best key does not use up that share of its bound: nearly exact.
        block_size: chunks of a mean block. Smaller blocks have sharper bounds, and more of them.
        seed: of the clustering.

    Raises:
        InputError: slack outside 0 to 1, block_size below 1.
    """

    slack: float = 1.0
    block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.slack <= 1.0:
            raise InputError(f"slack={self.slack}: expected 0 to 1; 1 is exact")
        if self.block_size < 1:
            raise InputError(f"block_size={self.block_size}: expected at least 1")


class ClusteredIndex(LayerIndex):
    """The routing keys of one layer, in blocks, with a tail.

    Args:
        keys: of the layer, on the CPU.
        settings: of the build, and the slack of a search.
        blocks: of the first of these keys; they are copied there, into another order.
    """

    def __init__(self, keys: LayerKeys, settings: PruningSettings, blocks: KeyBlocks) -> None:
        super().__init__(keys)
        self.settings = settings
        self.blocks = blocks

    @classmethod
    def build(cls, keys: LayerKeys, settings: PruningSettings | None = None) -> ClusteredIndex:
        """Part the keys of a layer into blocks.

        Args:
            keys: [C, G, D] on the CPU; float32, bfloat16 or float16; int8 with scales.
            settings: exact by default.

        Raises:
            InputError: keys on another device, or of a shape that does not belong to the counts.
        """
        settings = settings or PruningSettings()
        _check_keys(keys)
        flat, scales = keys.keys.detach().flatten(1), keys.scales
        order, sizes = cluster_order(flat, settings.block_size, settings.seed, scales)
        documents = torch.repeat_interleave(keys.counts).int()[order]
        flat, scales = flat[order], None if scales is None else scales[order]
        means, radii, norm = describe_blocks(flat, sizes, scales)
        centroids = torch.cat([means, radii[:, None]], dim=1)
        count, ends = len(keys.counts), sizes.cumsum(0)
        return cls(keys, settings, KeyBlocks(flat, documents, count, ends, centroids, norm, scales))

    @property
    def num_bytes(self) -> int:
        """Memory in use: the keys, and their copy in blocks."""
        return self.keys.num_bytes + self.blocks.num_bytes

    def with_slack(self, slack: float) -> ClusteredIndex:
        """The same keys, searched with another slack."""
        return ClusteredIndex(self.keys, replace(self.settings, slack=slack), self.blocks)

    def followed(self, keys: LayerKeys) -> ClusteredIndex:
        """These blocks with new documents as the tail, or new blocks when that is a quarter."""
        if len(keys.keys) > REBUILD * len(self.blocks.keys):
            return ClusteredIndex.build(keys, self.settings)
        return ClusteredIndex(keys, self.settings, self.blocks)

    def _found(
        self, vectors: Tensor, routing_mask: Tensor, top_k: int, document_mask: Tensor | None
    ) -> Selection:
        """With a slack below 1 documents may be missing, or have the score of another chunk."""
        keys, counts, scales = self.keys.keys, self.keys.counts, self.keys.scales
        check_routing(vectors, keys, counts, top_k, document_mask, scales)
        best = TopDocuments(len(vectors), min(top_k, len(counts)), len(counts))
        chunks, documents = len(self.blocks.keys), self.blocks.num_documents
        if chunks < len(keys):  # the tail comes first, for the threshold that it gives
            tail = route_documents(
                vectors,
                routing_mask,
                keys[chunks:],
                counts[documents:],
                top_k,
                None if document_mask is None else document_mask[..., documents:],
                None if scales is None else scales[chunks:],
            )
            row, place = (tail.documents >= 0).nonzero(as_tuple=True)
            best.offer(row, tail.documents[row, place] + documents, tail.scores[row, place])
        masks = None if document_mask is None else document_mask.expand(len(vectors), -1)
        with torch.autocast("cpu", enabled=False):  # scores stay float32
            for row in routing_mask.any(1).nonzero()[:, 0].tolist() if chunks else ():
                mask = None if masks is None else masks[row]
                scan = BlockScan(self.blocks, vectors[row][routing_mask[row]], best, row, mask)
                scan.run(self.settings.slack)
        return best.selection(vectors.device)


def _check_keys(keys: LayerKeys) -> None:
    """Refuse keys that do not belong together.

    Raises:
        InputError: wrong device or shape, int8 keys without scales.
    """
    device, shape = keys.keys.device, keys.keys.shape
    if device.type != "cpu":
        raise InputError(f"routing keys on {device}: pruning works on the CPU; leave it out there")
    if len(shape) != 3:
        raise InputError(
            f"routing keys of shape {list(shape)}: expected [C, G, D]; give those of one layer"
        )
    vectors = torch.empty(0, 0, shape[1] * shape[2])
    check_routing(vectors, keys.keys, keys.counts, 1, None, keys.scales)


@dataclass(frozen=True, slots=True)
class KeyBlocks:
    """Keys of one routing layer in blocks.

    Attributes:
        keys: [C, G*D], in the order of the blocks; int8 only with `scales`.
        documents: [C] int32, the document of each key.
        num_documents: of them, all.
        ends: [M] int64, one past the last key of each block.
        centroids: [M, G*D + 1] float32, mean of each block, and its radius.
        norm: no key is longer.
        scales: [C] float32, or None.
    """

    keys: Tensor
    documents: Tensor
    num_documents: int
    ends: Tensor
    centroids: Tensor
    norm: float
    scales: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Memory that is held."""
        held = (self.keys, self.documents, self.ends, self.centroids, self.scales)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def bounds(self, vectors: Tensor, slack: float) -> Tensor:
        """Upper bound [M] float32 on the chunk scores of every block, true if `slack` is 1.

        Args:
            vectors: [T, G*D] float32, the routing tokens of one question; T >= 1.
            slack: share of the radius that counts.
        """
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        extended = torch.cat([vectors, slack * lengths], dim=1)
        error = _ROOM * self.norm * float(lengths.max())
        parts = torch.split(self.centroids, BUILD_ROWS)
        best = torch.cat([torch.mm(part, extended.T).amax(1) for part in parts])
        return best.add_(error).nan_to_num_(nan=math.inf)

    def rows(self, blocks: Tensor) -> Tensor:
        """Rows of the keys of some blocks, block by block; int64."""
        ends = self.ends[blocks]
        starts = torch.where(blocks > 0, self.ends[blocks - 1], 0)
        return chunks_of(starts, ends - starts)


class BlockScan:
    """The scan of one question over the blocks.

    Attributes:
        rows_read: keys that were scored.
    """

    def __init__(
        self,
        blocks: KeyBlocks,
        vectors: Tensor,
        best: TopDocuments,
        row: int = 0,
        document_mask: Tensor | None = None,
    ) -> None:
        """Begin.

        Args:
            blocks: of one layer.
            vectors: [T, G*D] float32, those of the question; T >= 1.
            best: takes what is found.
            row: of the question, there.
            document_mask: [N] bool or None.
        """
        self.blocks = blocks
        self.vectors = vectors
        self.best = best
        self.row = row
        self.mask = document_mask
        self.rows_read = 0

    @property
    def threshold(self) -> float:
        """The score of the k-th best document so far."""
        return float(self.best.thresholds[self.row])

    def run(self, slack: float = 1.0) -> None:
        """Read blocks, best bound first, while the bound is not below the threshold.

        A bound that equals it is no reason to stop: of equal scores the lower document wins.
        """
        bounds = self.blocks.bounds(self.vectors, slack)
        share = len(bounds) / max(1, len(self.blocks.keys))
        first = bounds.topk(min(math.ceil(FIRST_ROWS * share), len(bounds))).indices
        self._read(first)
        reachable = bounds >= self.threshold
        reachable[first] = False
        left = reachable.nonzero()[:, 0]
        bounds, order = bounds[left].sort(descending=True)
        left, begin, step = left[order], 0, FIRST_ROWS
        while begin < len(left) and bounds[begin] >= self.threshold:
            step = min(2 * step, SCAN_ROWS)
            some = slice(begin, begin + math.ceil(step * share))
            self._read(left[some][bounds[some] >= self.threshold])
            begin = some.stop

    def _read(self, blocks: Tensor) -> None:
        """Score all keys of some blocks and offer what may belong to the top-k."""
        rows = self.blocks.rows(blocks)
        documents = self.blocks.documents[rows].long()
        if self.mask is not None:
            allowed = self.mask[documents]
            rows, documents = rows[allowed], documents[allowed]
        if not len(rows):
            return
        self.rows_read += len(rows)
        keys = in_float32(self.blocks.keys, self.blocks.scales, rows)
        scores = torch.mm(keys, self.vectors.T)
        scores = scores.nan_to_num_(-math.inf, math.inf, -math.inf).amax(1)
        near = ((scores > -math.inf) & (scores >= self.threshold)).nonzero()[:, 0]
        if len(near):
            self.best.offer(torch.full_like(near, self.row), documents[near], scores[near])


def in_float32(keys: Tensor, scales: Tensor | None, rows: Tensor | slice) -> Tensor:
    """Some keys, [*, G*D] float32; `scales` as in `msa.ops.routing.selection_scores`."""
    some = keys[rows].float()
    return some if scales is None else some * scales[rows, None]


def _nearest(keys: Tensor, means: Tensor) -> Tensor:
    """The mean that is nearest to each key; int64."""
    offsets = means.square().sum(1) / -2
    parts = torch.split(keys, BUILD_ROWS)
    return torch.cat([torch.addmm(offsets, part, means.T).argmax(1) for part in parts])


def _means(keys: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centres of `count` clusters (k-means); keys are [c, n] float32, c >= 1."""
    means = keys[torch.randperm(len(keys), generator=generator)[:count]]
    for _ in range(ROUNDS):
        nearest = _nearest(keys, means)
        sizes = torch.bincount(nearest, minlength=len(means))[:, None]
        sums = torch.zeros_like(means).index_add_(0, nearest, keys)
        means = torch.where(sizes > 0, sums / sizes.clamp(min=1), means)
    return means


def cluster_order(
    keys: Tensor, block_size: int, seed: int, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """An order of the keys in which similar ones are neighbors, and where to cut it.

    k-means in levels, each of which parts a cell into `BRANCHES` at most or so: the work per key
    grows with the logarithm of C.

    Args:
        keys: [C, G*D], any float dtype; or int8 with `scales`.
        block_size: keys of a mean block; the largest holds `LARGEST` times as many.
        seed: of the first centres.
        scales: [C] float32.

    Returns:
        order: [C] int64, indices of keys; sizes: [M] int64, keys per block, none 0.

    Source: Lloyd's k-means.
    """
    generator = torch.Generator().manual_seed(seed)
    cells = [torch.arange(len(keys))] if len(keys) else []
    levels = math.ceil(math.log(max(1.0, len(keys) / block_size)) / math.log(BRANCHES))
    for level in range(levels, 0, -1):
        parted = []
        for cell in cells:
            # what is left to do, spread over the levels that are left
            count = math.ceil((len(cell) / block_size) ** (1 / level))
            count = min(count, 4 * BRANCHES)  # a cell that came out too large
            parted += [cell] if count < 2 else _part(keys, scales, cell, count, generator)
        cells = parted
    empty = torch.empty(0, dtype=torch.int64)
    sizes = torch.tensor([len(cell) for cell in cells], dtype=torch.int64)
    return torch.cat([empty, *cells]), _cut(sizes, block_size)


def _part(
    keys: Tensor, scales: Tensor | None, cell: Tensor, count: int, generator: torch.Generator
) -> list[Tensor]:
    """A cell (indices of keys) parted into `count` at most, none empty."""
    sample = cell[torch.randperm(len(cell), generator=generator)[: count * SAMPLE]]
    means = _means(in_float32(keys, scales, sample), count, generator)
    nearest = [
        _nearest(in_float32(keys, scales, part), means) for part in torch.split(cell, BUILD_ROWS)
    ]
    by_mean, order = torch.cat(nearest).sort(stable=True)
    sizes = torch.unique_consecutive(by_mean, return_counts=True)[1]
    return list(torch.split(cell[order], sizes.tolist()))


def _cut(sizes: Tensor, block_size: int) -> Tensor:
    """Sizes of clusters -> sizes of blocks: too large clusters cut into pieces."""
    largest = LARGEST * block_size
    pieces = (sizes + largest - 1) // largest
    owner = torch.repeat_interleave(pieces)
    piece = torch.arange(len(owner)) - (pieces.cumsum(0) - pieces)[owner]
    return sizes[owner] // pieces[owner] + (piece < sizes[owner] % pieces[owner])


def describe_blocks(
    keys: Tensor, sizes: Tensor, scales: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """Mean and radius of every block.

    Args:
        keys: [C, G*D], blocks one after the other.
        sizes: [M] int64.
        scales: [C] float32, for int8 keys.

    Returns:
        means: [M, G*D] float32; radii: [M] float32, never less than the distance from the mean of
        the farthest key; norm: no key is longer.
    """
    means = torch.zeros(len(sizes), keys.shape[1])
    radii = torch.zeros(len(sizes))
    norm = 0.0
    blocks = torch.repeat_interleave(sizes)
    for start in range(0, len(keys), BUILD_ROWS):
        part = slice(start, start + BUILD_ROWS)
        means.index_add_(0, blocks[part], in_float32(keys, scales, part))
    means /= sizes[:, None]
    for start in range(0, len(keys), BUILD_ROWS):
        part = slice(start, start + BUILD_ROWS)
        some = in_float32(keys, scales, part)
        away = torch.linalg.vector_norm(some - means[blocks[part]], dim=1)
        radii.scatter_reduce_(0, blocks[part], away, reduce="amax")
        norm = max(norm, float(torch.linalg.vector_norm(some, dim=1).nan_to_num(nan=0.0).max()))
    return means, radii * (1 + _ROOM) + _ROOM * norm, norm * (1 + _ROOM)
