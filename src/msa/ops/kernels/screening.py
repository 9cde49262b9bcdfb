"""Routing over many keys on a CPU: int8 products leave few keys to the exact kernel (ours).

Without matrix units a processor multiplies int8 two to three times as fast as float32. `Screen` is
a copy of a layer's routing keys in int8, packed for torch's int8 product (FBGEMM). Per question it
gives every chunk an upper bound of its score: what the product says, and what rounding the key and
the query can have taken away. Those chunks whose bound is not below the k-th best document are
given to `msa.ops.kernels.routing_cpu`, which scores them exactly. So the selection is that of the
reference, to the last bit; only the work differs. Keys among which nothing stands out leave too
many such chunks: then all are scored, and soon the copy is no longer asked.

The bounds, by Cauchy-Schwarz: for a key k, rounded to k', and a query q, rounded to q',
|q . k - q' . k'| <= |q| |k - k'| + |q - q'| |k'|. The product of the rounded ones is exact: sums of
integers. Queries take 7 bits, since FBGEMM adds pairs of products in 16 bits on AVX2.

Shapes: B batch, T query tokens, N documents, C chunks, W = G*D numbers of a key, K selected
documents; c, n chunks and documents that the screen covers.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msa.ops import routing
from msa.ops.kernels import routing_cpu
from msa.ops.kernels.rounding import longest
from msa.ops.routing import check_routing
from msa.types import Selection

# Chunks of a block, at most, and its numbers; chunks of the smallest layer with a screen, and that
# may lie behind the last block.
BLOCK = 1 << 14
BLOCK_NUMBERS = 1 << 22
SMALLEST = 1 << 13
TAIL = 1 << 12
# Query tokens that are multiplied together: their scores stay in the cache, and their memory is
# small enough to be used again at once (what is larger, the C library gives back every time).
TOKENS = 48
# Bounds of so many bytes are held at once; they are looked at so many at a time.
BOUNDS_BYTES = 1 << 28
GROUP = 256
# Keys are rounded so many at a time; and scored exactly so many numbers at a time.
STEP = 1 << 12
EXACT_NUMBERS = 1 << 20
KEY_LEVELS = 127
QUERY_LEVELS = 63
ZERO_POINT = 64
# FBGEMM packs keys of any width as if they had a multiple of so many numbers (on AVX2; less on
# AVX-512).
PACKED = 512
# Float32 roundings of a bound, per |q| |k|, with room.
ROUNDING = 4e-6
# So few pairs of a token and a key are scored by the reference, which has no blocks to prepare.
PLAIN = 1 << 10
# Where more than one chunk of so many is left, scoring all of them is faster than picking them.
FEW = 16
# After so many searches in a row that left too many, one of so many still asks the copy.
PATIENCE = 3
RETRY = 64


@functools.cache
def is_available() -> bool:
    """Whether torch has the int8 product here and bfloat16 is not multiplied natively, as fast."""
    if routing_cpu.multiplies_bfloat16() or torch.backends.quantized.engine not in (
        "x86",
        "fbgemm",
    ):
        return False
    keys = torch.tensor([[KEY_LEVELS] * 32, [-KEY_LEVELS] * 32, [1] * 32], dtype=torch.int8)
    queries = torch.full((2, 32), float(QUERY_LEVELS))
    try:
        with warnings.catch_warnings():  # quantized tensors are to go; then this is not available
            warnings.simplefilter("ignore")
            found = _product(queries, _pack(keys))
    except (RuntimeError, AttributeError):
        return False
    return torch.equal(found, queries @ keys.float().T)


def is_worthwhile(num_chunks: int) -> bool:
    """Whether a layer of so many chunks is to have a screen, if it lies on the CPU."""
    return num_chunks >= SMALLEST and is_available()


@dataclass(frozen=True, slots=True)
class _Block:
    """Packed keys of some documents in a row.

    Attributes:
        num_documents, num_chunks: of the block.
        weights: int8 keys [c, W], as torch packs them.
        scales: [c] float32; a key is scales * its int8 values, nearly.
        residuals: [c] float32, no less than the length of what rounding took away.
    """

    num_documents: int
    num_chunks: int
    weights: Any
    scales: Tensor
    residuals: Tensor


class _Record:
    """Whether a layer's copy has been worth its time lately. Threads may share it."""

    def __init__(self) -> None:
        self._failed = self._skipped = 0

    def asks(self) -> bool:
        """Whether the next search is to ask the copy."""
        if self._failed < PATIENCE:
            return True
        self._skipped = (self._skipped + 1) % RETRY
        return self._skipped == 0

    def note(self, worth: bool) -> None:
        """What came of asking it."""
        self._failed = 0 if worth else self._failed + 1


@dataclass(frozen=True, slots=True)
class Screen:
    """The first keys of one layer, in int8. Frozen, but for its record: views may share it.

    Attributes:
        num_documents, num_chunks: n and c, that it covers; those behind are scored in full.
        width: W.
    """

    num_documents: int
    num_chunks: int
    width: int
    _blocks: tuple[_Block, ...]
    _residuals: Tensor
    _norm: float
    _record: _Record

    @classmethod
    def followed(cls, before: Screen | None, keys: Tensor, counts: Tensor) -> Screen | None:
        """A screen of a layer that may have grown since `before` was made of its first documents.

        Args:
            before: of the same layer, or None.
            keys: [C, G, D] float on the CPU.
            counts: [N] int64, chunks of each document.

        Returns:
            `before` if little has come since; None if there are few keys, or some are not finite.
        """
        covered = 0 if before is None else before.num_chunks
        if len(keys) < SMALLEST or len(keys) - covered < TAIL:
            return before
        width = keys[0].numel()
        size = max(1, min(BLOCK, BLOCK_NUMBERS // width))
        blocks = [b for b in before._blocks if b.num_chunks >= size] if before else []
        norm = before._norm if before else 0.0
        document = sum(b.num_documents for b in blocks)
        chunk = sum(b.num_chunks for b in blocks)
        ends = counts.cumsum(0)
        for end in _edges(ends, document, chunk, size):
            some = keys[chunk : int(ends[end - 1])].flatten(1)
            block, length = _rounded(some, end - document)
            if not math.isfinite(length):
                return None
            blocks.append(block)
            norm, document, chunk = max(norm, length), end, chunk + len(some)
        residuals = torch.cat([block.residuals for block in blocks])
        record = before._record if before else _Record()
        return cls(document, chunk, width, tuple(blocks), residuals, norm, record)

    @property
    def num_bytes(self) -> int:
        """Memory that is held."""
        return screen_bytes(self.num_chunks, self.width)

    @torch.no_grad()
    def search(
        self,
        vectors: Tensor,
        routing_mask: Tensor,
        routing_keys: Tensor,
        chunk_counts: Tensor,
        top_k: int,
        document_mask: Tensor | None = None,
        key_norm: float | None = None,
    ) -> Selection:
        """Twin of `msa.ops.routing.route_documents`, to the last bit.

        Args:
            routing_keys, chunk_counts: of the whole layer, whose first documents this covers.

        Other arguments, and returns: as there.
        """
        check_routing(vectors, routing_keys, chunk_counts, top_k, document_mask, None)

        def in_full(vectors: Tensor, routes: Tensor, mask: Tensor | None) -> Selection:
            return routing_cpu.route_documents(
                vectors, routes, routing_keys, chunk_counts, top_k, mask, key_norm=key_norm
            )

        rows = routing_mask.any(1).nonzero()[:, 0].tolist()
        if not rows or not self._record.asks():
            return in_full(vectors, routing_mask, document_mask)
        count = min(top_k, len(chunk_counts))
        documents = torch.full((len(vectors), count), -1)
        scores = torch.full((len(vectors), count), -torch.inf)
        ends = chunk_counts.cumsum(0)
        behind = torch.arange(self.num_chunks, len(routing_keys))
        left, hidden = [], None
        for row, query, bounds in self._bounds(rows, vectors, routing_mask):
            mask = _of_rows(document_mask, row)
            if mask is not None:
                if hidden is None or mask is not document_mask:
                    hidden = self._hidden(mask, chunk_counts)
                bounds[: self.num_chunks][hidden] = -torch.inf
            near = self._near(query, bounds, count, ends)
            if len(near) > self.num_chunks // FEW:
                left.append(row)
                continue
            places = torch.cat([near, behind])
            owners = _owners(ends, places)
            some, best = _exact(query.vectors, routing_keys, places, owners, top_k, mask, key_norm)
            documents[row, : len(some)], scores[row, : len(some)] = some, best
        self._record.note(2 * len(left) <= len(rows))
        if left:
            rest = in_full(vectors[left], routing_mask[left], _of_rows(document_mask, left))
            documents[left], scores[left] = rest.documents, rest.scores
        return Selection(documents, scores)

    def _hidden(self, mask: Tensor, chunk_counts: Tensor) -> Tensor:
        """[c] bool, chunks of documents that must not be chosen."""
        covered = slice(self.num_documents)
        return torch.repeat_interleave(~mask[covered], chunk_counts[covered])

    def _bounds(
        self, rows: list[int], vectors: Tensor, routing_mask: Tensor
    ) -> Iterator[tuple[int, _Query, Tensor]]:
        """Of every row: its number, its query, upper bounds of the scores of chunks.

        Bounds are [c] float32, filled up with -inf to whole groups.
        """
        size = -(-self.num_chunks // GROUP) * GROUP
        at_once = max(1, BOUNDS_BYTES // (4 * size))
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            queries = [_Query.of(vectors[row][routing_mask[row]], self._norm) for row in some]
            together = _Together(queries)
            bounds = torch.empty(len(some), size)
            bounds[:, self.num_chunks :] = -torch.inf
            chunk = 0
            for block in self._blocks:
                together.write(block, bounds[:, chunk : chunk + block.num_chunks])
                chunk += block.num_chunks
            yield from zip(some, queries, bounds, strict=True)

    def _near(self, query: _Query, bounds: Tensor, count: int, ends: Tensor) -> Tensor:
        """Chunks [c'] int64, ascending, that may be the best ones of the top-k documents."""
        groups = bounds.view(-1, GROUP)
        heads = groups.amax(1)
        take, lowest = 0, -math.inf
        while lowest == -math.inf and take < len(heads):
            take = min(max(4 * take, count), len(heads))
            places = _chunks(heads.topk(take).indices)
            places = places[bounds[places] > -torch.inf]
            lowest = self._kth_best(query, bounds, places, count, ends)
        near = _chunks((heads >= lowest).nonzero()[:, 0])
        found = bounds[near]
        return near[(found >= lowest) & (found > -torch.inf)]

    def _kth_best(
        self, query: _Query, bounds: Tensor, places: Tensor, count: int, ends: Tensor
    ) -> float:
        """A score that k documents reach, by these chunks; -inf if they are of fewer documents."""
        scores = bounds[places] - 2 * query.errors(self._residuals[places])
        size = 8 * count  # the best of so many chunks are of k documents, mostly
        while True:
            best, order = scores.topk(min(size, len(scores)))
            owners = _owners(ends, places[order]).tolist()
            seen = set()
            for owner, score in zip(owners, best.tolist(), strict=True):
                seen.add(owner)
                if len(seen) == count:
                    return float(score)
            if size >= len(scores):
                return -math.inf
            size *= 8


@dataclass(frozen=True, slots=True)
class _Query:
    """The routing tokens of a question, rounded to integers.

    Attributes:
        vectors: [T, W] float32, as they were.
        rounded: [T, W] float32, integers.
        scale: a vector is scale * rounded, nearly.
        length: no vector is longer.
        error: no score is further off than this for what rounding does to queries, and floats.
    """

    vectors: Tensor
    rounded: Tensor
    scale: float
    length: float
    error: float

    @classmethod
    def of(cls, vectors: Tensor, norm: float) -> _Query:
        """Rounded for keys that are not longer than `norm`."""
        scale = max(float(vectors.abs().max()) / QUERY_LEVELS, torch.finfo(torch.float32).tiny)
        rounded = (vectors / scale).round_().clamp_(-QUERY_LEVELS, QUERY_LEVELS)
        length = longest(vectors)
        lost = longest(vectors - rounded * scale)
        return cls(vectors, rounded, scale, length, (lost + ROUNDING * length) * norm)

    def product(self, block: _Block) -> Tensor:
        """[c] best product over the tokens, of the integers."""
        parts = torch.tensor_split(self.rounded, -(-len(self.rounded) // TOKENS))
        return torch.stack([_product(some, block.weights).amax(0) for some in parts]).amax(0)

    def errors(self, residuals: Tensor) -> Tensor:
        """[c] how far bounds are above the scores of the rounded, for residuals [c] of keys."""
        return residuals * self.length + self.error


class _Together:
    """Some questions whose bounds are written together, block by block.

    Questions of a single vector are multiplied together, which takes little longer than one alone.
    """

    def __init__(self, queries: list[_Query]) -> None:
        self.queries = queries
        numbers = torch.tensor([[q.scale, q.length, q.error] for q in queries])
        self._scale, self._length, self._error = numbers.T[:, :, None]
        self._rounded = torch.cat([query.rounded for query in queries])

    def write(self, block: _Block, into: Tensor) -> None:
        """Upper bounds [B, c] of the best score over the tokens."""
        if len(self._rounded) == len(self.queries):
            some = torch.split(self._rounded, TOKENS)
            parts = [_product(each, block.weights) for each in some]
            products = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            products = torch.stack([query.product(block) for query in self.queries])
        errors = torch.addcmul(self._error, self._length, block.residuals)
        torch.addcmul(errors, products.mul_(self._scale), block.scales, out=into)


def _exact(
    vectors: Tensor,
    keys: Tensor,
    places: Tensor,
    owners: Tensor,
    top_k: int,
    mask: Tensor | None,
    key_norm: float | None,
) -> tuple[Tensor, Tensor]:
    """The top-k of the documents of some chunks, by routing tokens [T, W]: [K], [K], best first.

    Args:
        keys: [C, G, D].
        places: chunks, ascending.
        owners: their documents.
        mask: [N] bool, or None.
    """
    found, sizes = torch.unique_consecutive(owners, return_counts=True)
    ends = sizes.cumsum(0)
    routes = torch.ones(1, len(vectors), dtype=torch.bool)
    documents, scores, begin, chunk = [places[:0]], [vectors.new_empty(0)], 0, 0
    for end in _edges(ends, 0, 0, max(1, EXACT_NUMBERS // vectors.shape[1])):
        part = slice(begin, end)
        some = keys[places[chunk : int(ends[end - 1])]]
        allowed = None if mask is None else mask[found[part]]
        plain = len(vectors) * len(some) <= PLAIN
        route = routing.route_documents if plain else routing_cpu.route_documents
        best = route(vectors[None], routes, some, sizes[part], top_k, allowed, key_norm=key_norm)
        chosen = best.documents[0] >= 0
        documents.append(found[part][best.documents[0][chosen]])
        scores.append(best.scores[0][chosen])
        begin, chunk = end, chunk + len(some)
    # of equal scores those of lower documents stand first, and stay so
    ranked, order = torch.cat(scores).sort(descending=True, stable=True)
    return torch.cat(documents)[order[:top_k]], ranked[:top_k]


def screen_bytes(num_chunks: int, width: int) -> int:
    """Memory of a screen: packed int8 keys, their sums, scales and residuals (twice)."""
    return num_chunks * (-(-width // PACKED) * PACKED + 4 * 4)


def working_bytes(num_chunks: int, num_queries: int) -> int:
    """Memory of a search, at most, when so many queries come together."""
    bounds = 4 * (num_chunks + GROUP)
    return max(bounds, min(BOUNDS_BYTES, num_queries * bounds)) + bounds + 8 * BLOCK * TOKENS


def _edges(ends: Tensor, document: int, chunk: int, size: int) -> Iterator[int]:
    """Where blocks end, in documents: at least `size` chunks each, the last one what is left."""
    while document < len(ends):
        document = int(torch.searchsorted(ends, chunk + size)) + 1
        document = min(document, len(ends))
        chunk = int(ends[document - 1])
        yield document


def _rounded(keys: Tensor, num_documents: int) -> tuple[_Block, float]:
    """Keys [c, W] as a block, and a length that no key has, rounded or not."""
    values = torch.empty(keys.shape, dtype=torch.int8)
    scales, residuals = torch.empty(2, len(keys))
    norm = 0.0
    for start in range(0, len(keys), STEP):
        part = slice(start, start + STEP)
        floats = keys[part].float()
        scales[part] = floats.abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny)
        scales[part] /= KEY_LEVELS
        whole = (floats / scales[part, None]).round_().clamp_(-KEY_LEVELS, KEY_LEVELS)
        values[part] = whole
        lost = torch.linalg.vector_norm(floats - whole * scales[part, None], dim=1)
        residuals[part] = lost * 1.001
        lengths = torch.linalg.vector_norm(floats, dim=1)
        norm = max(norm, float((lengths + lost).max()) * 1.001)
    block = _Block(num_documents, len(keys), _pack(values), scales, residuals)
    return block, norm if bool(scales.isfinite().all()) else math.inf


def _pack(values: Tensor) -> Any:
    """Int8 [c, W] for `_product`."""
    weights = torch._make_per_tensor_quantized_tensor(values, 1.0, 0)
    return torch.ops.quantized.linear_prepack(weights, None)


def _product(rounded: Tensor, weights: Any) -> Tensor:
    """Integers [T, W] in float32, packed int8 keys -> [T, c] float32, exact below 2^24."""
    product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    scores: Tensor = product(rounded, 1.0, ZERO_POINT, weights)
    return scores


def _of_rows(document_mask: Tensor | None, rows: int | list[int]) -> Tensor | None:
    """The mask of some rows; one for all rows stays what it is."""
    if document_mask is None or document_mask.dim() == 1:
        return document_mask
    return document_mask[rows]


def _owners(ends: Tensor, places: Tensor) -> Tensor:
    """Documents of chunks."""
    return torch.searchsorted(ends, places, right=True)


def _chunks(groups: Tensor) -> Tensor:
    """The chunks of groups, in their order."""
    return (groups[:, None] * GROUP + torch.arange(GROUP)).flatten()
