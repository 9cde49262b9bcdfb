"""Blocks of alike keys and an upper bound on their scores: what a pruned scan needs (ours).

Keys are put in an order in which alike ones are neighbours, and cut into blocks. A block keeps its
mean m and the distance r of the key farthest from it, so no key k of it can score more than

    v . k  =  v . m + v . (k - m)  <=  v . m + |v| r        (Cauchy-Schwarz)

for a routing token v. The best of this over the tokens bounds the chunk scores (Eq. 2) of the whole
block, at the price of one chunk. A scan that takes the blocks with the best bounds first may stop
when the k-th best document scores more than the next bound. Nothing is lost then.

In many dimensions the bound is far from what a block's best key really scores: v and k - m would
have to point the same way. With a slack s < 1 the bound is v . m + s |v| r: it is exceeded now and
then, so what is found is nearly, not always, what a full scan finds; and far fewer blocks are read.

Shapes: T query tokens, N documents, C chunks, M blocks, G KV heads, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from msa.ops.kernels.rounding import error_bound
from msa.ops.routing import exact_dots

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
# Relative room for the rounding of means and distances in float32.
_ROOM = 1e-5


def in_float32(keys: Tensor, scales: Tensor | None, rows: Tensor | slice) -> Tensor:
    """Some keys, [*, G*D] float32; `scales` as in `msa.ops.routing.exact_scores`."""
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
    """An order of the keys in which alike ones are neighbours, and where to cut it.

    k-means in levels, each of which parts a cell into `BRANCHES` at most or so: the work per key
    grows with the logarithm of C.

    Args:
        keys: [C, G*D], any float dtype; or int8 with `scales`.
        block_size: keys of a mean block; the largest holds `LARGEST` times as many.
        seed: of the first centres.
        scales: [C] float32.

    Returns:
        order: [C] int64, indices of keys; sizes: [M] int64, keys per block, none 0.

    Source: ours; Lloyd's k-means.
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


@dataclass(frozen=True, slots=True)
class KeyBlocks:
    """Keys of one routing layer in blocks.

    Attributes:
        keys: [C, G*D], in the order of the blocks; int8 only with `scales`.
        documents: [C] int32, the document of each key.
        ends: [M] int64, one past the last key of each block.
        outline: [M, G*D + 1] float32, mean and radius of each block.
        norm: no key is longer.
        scales: [C] float32, or None.
    """

    keys: Tensor
    documents: Tensor
    ends: Tensor
    outline: Tensor
    norm: float
    scales: Tensor | None = None

    def bounds(self, vectors: Tensor, slack: float) -> Tensor:
        """Upper bound [M] float32 on the chunk scores of every block, true if `slack` is 1.

        Args:
            vectors: [T, G*D] float32, the routing tokens of one question; T >= 1.
            slack: share of the radius that counts.
        """
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        extended = torch.cat([vectors, slack * lengths], dim=1)
        # all that rounds: two products over G*D + 1 numbers, of m and r, each no more than 2 |k|
        error = 4 * error_bound(vectors.shape[1] + 1) * self.norm * float(lengths.max())
        parts = torch.split(self.outline, BUILD_ROWS)
        best = torch.cat([torch.mm(part, extended.T).amax(1) for part in parts])
        return best.add_(error).nan_to_num_(nan=math.inf)

    def rows(self, blocks: Tensor) -> Tensor:
        """Rows of the keys of some blocks, block by block; int64."""
        ends = self.ends[blocks]
        starts = torch.where(blocks > 0, self.ends[blocks - 1], 0)
        sizes = ends - starts
        before = sizes.cumsum(0) - sizes
        return torch.repeat_interleave(starts - before, sizes) + torch.arange(int(sizes.sum()))


class BlockScan:
    """The scan of one question: its running top-k over the blocks read so far.

    Attributes:
        documents, scores: [<= K] int64 and float32, best first; scores are exact.
        threshold: the K-th best score, -inf before there are K.
        rows_read: keys that were scored.
    """

    def __init__(
        self, blocks: KeyBlocks, vectors: Tensor, count: int, document_mask: Tensor | None
    ) -> None:
        """Begin.

        Args:
            blocks: of one layer.
            vectors: [T, G*D] float32, the tokens that route; T >= 1.
            count: K >= 1.
            document_mask: [N] bool or None.
        """
        self.blocks = blocks
        self.vectors = vectors
        self.count = count
        self.mask = document_mask
        longest = float(torch.linalg.vector_norm(vectors, dim=1).max())
        self.error = error_bound(vectors.shape[1]) * longest * blocks.norm * (1 + _ROOM)
        self.documents = torch.empty(0, dtype=torch.int64)
        self.scores = torch.empty(0, dtype=torch.float32)
        self.threshold = -math.inf
        self.rows_read = 0

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
        """Score all keys of some blocks and merge what may belong to the top-k."""
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
        scores = scores.masked_fill_(scores.isnan(), -math.inf)
        chunks = scores.amax(1)
        near = (chunks > -math.inf) & (chunks >= self.threshold - self.error)
        near = self._ahead(near.nonzero()[:, 0], documents, chunks)
        if len(near):
            self._merge(near, rows, documents, chunks, scores)

    def _ahead(self, near: Tensor, documents: Tensor, chunks: Tensor) -> Tensor:
        """Of some places, those that are their document's best and may be among the K best."""
        found, owner = torch.unique(documents[near], return_inverse=True)
        best = chunks.new_full((len(found),), -math.inf)
        best.scatter_reduce_(0, owner, chunks[near], reduce="amax")
        # Exact scores are off by `error` at most: two that differ by more than twice that keep
        # their order.
        ahead = chunks[near] >= best[owner] - 2 * self.error
        if len(found) > self.count:
            ahead &= chunks[near] >= best.topk(self.count).values[-1] - 2 * self.error
        return near[ahead]

    def _merge(
        self, near: Tensor, rows: Tensor, documents: Tensor, chunks: Tensor, scores: Tensor
    ) -> None:
        """Score some places exactly and take them into the top-k."""
        pairs = (scores[near] >= chunks[near, None] - 2 * self.error).nonzero()
        for some, tokens in zip(
            torch.split(pairs[:, 0], SCAN_ROWS), torch.split(pairs[:, 1], SCAN_ROWS), strict=True
        ):
            places = near[some]
            exact = exact_dots(self.vectors[tokens], self.blocks.keys[rows[places]])
            if self.blocks.scales is not None:
                exact = exact * self.blocks.scales[rows[places]].double()
            self._take(documents[places], exact.float())

    def _take(self, documents: Tensor, scores: Tensor) -> None:
        documents = torch.cat([self.documents, documents])
        documents, owner = torch.unique(documents, return_inverse=True)
        scores = torch.cat([self.scores, scores])
        best = scores.new_full((len(documents),), -math.inf)
        best.scatter_reduce_(0, owner, scores, reduce="amax")
        # documents ascend here, and the sort keeps the order of equal scores
        best, order = best.sort(descending=True, stable=True)
        self.scores, self.documents = best[: self.count], documents[order[: self.count]]
        if len(self.scores) == self.count:
            self.threshold = float(self.scores[-1])
