"""Routing in one walk over the keys, block by block (ours; the rule is Eq. 2 of MSA).

Per block: one matrix product with the routing tokens of all questions, the best score of every
token, one comparison. Only a block that holds a score above a question's present k-th best (less
the rounding bound) is looked at more closely: its candidates are scored exactly and merged into the
running top-k. After the first blocks that is rare: about k ln(C / k) documents in all. A document
may span blocks; its score is that of its best candidate.

Passing over the others is safe. While blocks are walked in order, a later chunk changes the top-k
only if its exact score is *above* the k-th best (an equal score of a later document loses to the
lower row; a document that is chosen already is not made better). A chunk whose computed score is
not above the threshold by `msa.ops.kernels.rounding.error_bound` cannot do that. There is no slack
of fixed size to run out of: thousands of equal documents are thousands of candidates.

Nothing of size C or [B, N] is held: a block of keys in float32, its scores, the running top-k.

Shapes: B batch, T query tokens, N documents, C chunks, G KV heads, D head dim, R routing tokens of
all questions, K selected documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from msa.ops.kernels.rounding import error_bound
from msa.ops.routing import check_routing, exact_dots
from msa.types import Selection

# A block of keys in float32 and its scores take about this much, so that they stay in the cache.
BLOCK_BYTES = 1 << 20
MIN_BLOCK = 128
# Documents are counted, and candidates scored exactly, this many numbers at a time.
STEP = 1 << 16


@torch.no_grad()
def route_documents(
    vectors: Tensor,
    routing_mask: Tensor,
    routing_keys: Tensor,
    chunk_counts: Tensor,
    top_k: int,
    document_mask: Tensor | None = None,
    scales: Tensor | None = None,
    key_norm: float | None = None,
) -> Selection:
    """Twin of `msa.ops.routing.route_documents`, to the last bit; arguments and returns as there.

    Without `key_norm` the keys are measured on the way (int8 keys never need it).
    """
    check_routing(vectors, routing_keys, chunk_counts, top_k, document_mask, scales)
    count = min(top_k, len(chunk_counts))
    routing = vectors[routing_mask]  # [R, G*D], questions in order
    ends = routing_mask.sum(1).cumsum(0).tolist()
    bound = error_bound(routing.shape[1], _product_dtype(routing_keys))
    questions = [
        _Question(row, slice(start, end), count, routing[start:end], bound)
        for row, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    if len(routing) and len(routing_keys):
        walk = _Walk(routing_keys.flatten(1), chunk_counts, document_mask, scales, key_norm)
        walk.run(routing, questions)
    documents = torch.full((len(questions), count), -1, device=vectors.device)
    scores = vectors.new_full((len(questions), count), -torch.inf)
    for question in questions:
        found = len(question.documents)
        documents[question.row, :found] = question.documents
        scores[question.row, :found] = question.scores
    return Selection(documents, scores)


class _Question:
    """A question's routing tokens and its running top-k.

    Attributes:
        row: in the batch.
        tokens: its columns of the scores of a block.
        vectors: [T, G*D], of its routing tokens.
        coefficient: times the length of a key, the rounding bound of a score.
        documents, scores: [<= K] int64 and float32, best first; exact.
        threshold: the k-th best score, -inf before there are k.
    """

    def __init__(self, row: int, tokens: slice, count: int, vectors: Tensor, bound: float) -> None:
        self.row = row
        self.tokens = tokens
        self.count = count
        self.vectors = vectors
        longest = float(torch.linalg.vector_norm(vectors, dim=1).max()) if len(vectors) else 0.0
        self.coefficient = bound * longest
        self.documents = torch.empty(0, dtype=torch.int64, device=vectors.device)
        self.scores = torch.empty(0, dtype=torch.float32, device=vectors.device)
        self.threshold = -math.inf

    def merge(self, documents: Tensor, scores: Tensor) -> None:
        """Take in exact chunk scores of documents (int64, float32 [P]); a document may recur."""
        documents, places = torch.unique(
            torch.cat([self.documents, documents]), return_inverse=True
        )
        scores = torch.cat([self.scores, scores])
        best = scores.new_full((len(documents),), -torch.inf)
        best.scatter_reduce_(0, places, scores, reduce="amax")
        # documents ascend here, and the sort keeps the order of equal scores
        best, order = best.sort(descending=True, stable=True)
        self.scores = best[: self.count]
        self.documents = documents[order[: self.count]]
        if len(self.scores) == self.count:
            self.threshold = float(self.scores[-1])


@dataclass(frozen=True, slots=True)
class _Block:
    """Some chunks in a row and the documents that they are of.

    Attributes:
        start: index of the first chunk.
        keys: [c, G*D], as stored.
        norm: no key is longer.
        first: the first document.
        local: [c] int64, document of each chunk, counted from `first`.
        num_documents: the block has chunks of.
    """

    start: int
    keys: Tensor
    norm: float
    first: int
    local: Tensor
    num_documents: int


class _Product:
    """Scores of blocks of keys for R routing tokens, in buffers that are used again."""

    def __init__(self, routing: Tensor, keys: Tensor, rows: int) -> None:
        self.dtype = _product_dtype(keys)
        self.convert = keys.dtype != self.dtype
        shape = (rows, routing.shape[1])
        self.keys = torch.empty(shape if self.convert else (0, 0), device=keys.device)
        self.vectors = routing.to(self.dtype)
        self.onednn = keys.device.type == "cpu" and self.dtype == torch.float32 and _has_onednn()
        if not self.onednn:
            self.scores = torch.empty(rows, len(routing), dtype=self.dtype, device=keys.device)

    def __call__(self, keys: Tensor) -> Tensor:
        """[c, G*D] -> [c, R] float32."""
        if self.convert:
            keys = self.keys[: len(keys)].copy_(keys)
        if self.onednn:
            # The product that compiled models use; for so few columns up to a third faster than
            # that of torch.mm, and it takes the keys as they lie.
            scores: Tensor = torch.ops.mkldnn._linear_pointwise(
                keys, self.vectors, None, "none", [], ""
            )
            return scores
        return torch.mm(keys, self.vectors.T, out=self.scores[: len(keys)]).float()

    def norm(self, keys: Tensor) -> float:
        """Length of the longest key of the block that was multiplied last."""
        if self.convert:
            keys = self.keys[: len(keys)]
        return float(torch.linalg.vector_norm(keys, dim=1, dtype=torch.float32).max()) * 1.001


class _Walk:
    """The walk over the keys of one routing layer; see the top of this file."""

    def __init__(
        self,
        keys: Tensor,
        chunk_counts: Tensor,
        document_mask: Tensor | None,
        scales: Tensor | None,
        key_norm: float | None,
    ) -> None:
        self.keys = keys
        self.chunk_counts = chunk_counts
        self.mask = document_mask if document_mask is None else torch.atleast_2d(document_mask)
        self.scales = scales
        self.key_norm = key_norm

    def run(self, routing: Tensor, questions: list[_Question]) -> None:
        """Bring every question's top-k up to date with all keys."""
        sizes = [len(q.vectors) for q in questions]
        padded = torch.nn.functional.pad(routing, (0, 0, 0, -len(routing) % 8))  # full registers
        rows = max(BLOCK_BYTES // (4 * sum(padded.shape)), MIN_BLOCK)
        product = _Product(padded, self.keys, min(rows, len(self.keys)))
        device = routing.device
        owner = torch.repeat_interleave(torch.tensor(sizes, device=device))
        # per column; columns of padding are never above their threshold
        thresholds = torch.full((len(padded),), torch.inf, device=device)
        thresholds[: len(routing)] = -torch.inf
        coefficients = torch.zeros(len(padded), device=device)
        coefficients[: len(routing)] = routing.new_tensor([q.coefficient for q in questions])[owner]
        for start, first, end, before in self._blocks(rows):
            if self.mask is not None and not bool(self.mask[:, first:end].any()):
                continue
            keys = self.keys[start : start + rows]
            scores = product(keys)
            if self.scales is not None:
                scores *= self.scales[start : start + rows, None]
            norm = self._norm(product, keys, start)
            passed = scores.amax(0) <= torch.add(thresholds, coefficients, alpha=-norm)
            if bool(passed.all()):  # not so for NaN
                continue
            local = self._local(start, len(keys), first, end, before)
            block = _Block(start, keys, norm, first, local, end - first)
            for index in torch.unique(owner[~passed[: len(owner)]]).tolist():
                question = questions[index]
                self._offer(question, scores[:, question.tokens], block)
                thresholds[question.tokens] = question.threshold

    def _norm(self, product: _Product, keys: Tensor, start: int) -> float:
        if self.scales is not None:
            largest = float(self.scales[start : start + len(keys)].abs().max())
            return 128 * math.sqrt(keys.shape[1]) * largest
        return product.norm(keys) if self.key_norm is None else self.key_norm

    def _offer(self, question: _Question, scores: Tensor, block: _Block) -> None:
        """Merge what the block ([c, T] scores) may hold for a question's top-k."""
        scores = scores.masked_fill(scores.isnan(), -torch.inf)
        chunks = scores.amax(1)
        if self.mask is not None:
            mask = self.mask[question.row if len(self.mask) > 1 else 0]
            allowed = mask[block.first : block.first + block.num_documents][block.local]
            chunks = chunks.masked_fill(~allowed, -torch.inf)
        best = chunks.new_full((block.num_documents,), -torch.inf)
        best.scatter_reduce_(0, block.local, chunks, reduce="amax")
        error = question.coefficient * block.norm
        # Exact scores differ by at most `error`, so of two that differ by more than twice that the
        # lower one can be neither a document's best chunk nor, below k others, a choice.
        candidates = (chunks > question.threshold - error) & (
            chunks >= best[block.local] - 2 * error
        )
        if len(best) >= question.count:
            candidates &= chunks >= best.topk(question.count).values[-1] - 2 * error
        found = candidates.nonzero()[:, 0]
        if not len(found):
            return
        pairs = (scores[found] >= chunks[found, None] - 2 * error).nonzero()
        step = max(1, STEP // block.keys.shape[1])
        for some, tokens in zip(pairs[:, 0].split(step), pairs[:, 1].split(step), strict=True):
            places = found[some]
            exact = exact_dots(question.vectors[tokens], block.keys[places])
            if self.scales is not None:
                exact = exact * self.scales[block.start + places].double()
            question.merge(block.first + block.local[places], exact.float())

    def _blocks(self, rows: int) -> Iterator[tuple[int, int, int, int]]:
        """Where blocks begin, their documents (first, one past the last), chunks before those."""
        num_chunks, num_documents = len(self.keys), len(self.chunk_counts)
        begins = torch.arange(0, num_chunks, rows, device=self.keys.device)
        firsts, befores = torch.empty_like(begins), torch.empty_like(begins)
        passed = done = 0
        for start in range(0, num_documents, STEP):
            counts = self.chunk_counts[start : start + STEP]
            ends = counts.cumsum(0) + passed
            passed = int(ends[-1])
            here = -(-min(passed, num_chunks) // rows)  # blocks that begin before `passed`
            index = torch.searchsorted(ends, begins[done:here], right=True)
            firsts[done:here] = start + index
            befores[done:here] = ends[index] - counts[index]
            done = here
        first, before = firsts.tolist(), befores.tolist()
        last = [i + 1 for i in first[1:]] + [num_documents]
        yield from zip(range(0, num_chunks, rows), first, last, before, strict=True)

    def _local(self, start: int, size: int, first: int, end: int, before: int) -> Tensor:
        """[size] int64: document of each chunk from `start` on, counted from `first`."""
        ends = self.chunk_counts[first:end].cumsum(0) + before
        chunks = torch.arange(start, start + size, device=ends.device)
        return torch.searchsorted(ends, chunks, right=True)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product_dtype(keys: Tensor) -> torch.dtype:
    """bfloat16 keys are multiplied as they are where the processor can; all else in float32."""
    if keys.dtype == torch.bfloat16 and keys.device.type == "cpu" and _multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def _multiplies_bfloat16() -> bool:
    """AMX: sixteen times the rate of float32. Elsewhere bfloat16 products are slow or emulated."""
    return torch.backends.mkldnn.is_available() and bool(torch.cpu._is_amx_tile_supported())
