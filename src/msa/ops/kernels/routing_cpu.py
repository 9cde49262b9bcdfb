"""Routing in one walk over the keys, block by block (ours; the rule is Eq. 2 of MSA).

Per block: one matrix product with the routing tokens of all questions, the best score of every
token, one comparison. Only a block that holds a score above a question's present k-th best (less
the rounding bound) is looked at more closely: its candidates are scored exactly and merged into the
running top-k. After the first blocks that is rare: about k ln(N / k) documents in all. A document
may span blocks; its score is that of its best candidate. So documents need no segment maximum, and
their lengths do not matter.

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
from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from msa.ops.kernels.rounding import error_bound, longest
from msa.ops.routing import check_routing, exact_dots
from msa.types import Selection

# What is written per block (its scores; its keys, where they are converted) takes at most so many
# bytes, to stay in the cache, and at most such a part of the keys.
BLOCK_BYTES = 1 << 22
BLOCK_PART = 96
# Blocks have at least so many keys, and the first ones no more: there everything is a candidate.
MIN_BLOCK = 256
# Documents are counted, and candidates scored exactly, this many numbers at a time.
STEP = 1 << 14


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
        with torch.autocast(vectors.device.type, enabled=False):  # products stay float32
            walk.run(routing, questions)
    documents = torch.full((len(questions), count), -1)
    scores = torch.full((len(questions), count), -torch.inf)
    for question in questions:
        for place, (document, score) in enumerate(question.best):
            documents[question.row, place] = document
            scores[question.row, place] = score
    return Selection(documents.to(vectors.device), scores.to(vectors.device))


class _Question:
    """A question's routing tokens and its running top-k.

    Attributes:
        row: in the batch.
        tokens: its columns of the scores of a block.
        vectors: [T, G*D], of its routing tokens.
        coefficient: times the length of a key, the rounding bound of a score.
        best: at most K documents and their exact scores, best first.
        threshold: the k-th best score, -inf before there are k.
    """

    def __init__(self, row: int, tokens: slice, count: int, vectors: Tensor, bound: float) -> None:
        self.row = row
        self.tokens = tokens
        self.count = count
        self.vectors = vectors
        self.coefficient = bound * longest(vectors)
        self.best: list[tuple[int, float]] = []
        self.threshold = -math.inf

    def merge(self, documents: Tensor, scores: Tensor) -> None:
        """Take in exact chunk scores of documents (int64, float32 [P]); a document may recur."""
        best = dict(self.best)
        for document, score in zip(documents.tolist(), scores.tolist(), strict=True):
            if score > best.get(document, -math.inf):  # not so for NaN
                best[document] = score
        ranked = sorted(best.items(), key=lambda found: (-found[1], found[0]))
        self.best = ranked[: self.count]
        if len(ranked) >= self.count:
            self.threshold = self.best[-1][1]


class _Block:
    """Some chunks in a row and the documents that they are of.

    Attributes:
        keys: [c, G*D], as stored; those that are scored.
        scales: [c], of int8 keys.
        first, end: its documents, one past the last.
    """

    def __init__(
        self, keys: Tensor, scales: Tensor | None, first: int, counts: Tensor, into: int
    ) -> None:
        self.keys = keys
        self.scales = scales
        self.first = first
        self.end = first + len(counts)
        self._counts = counts
        self._into = into  # chunks of the first document that lie in blocks before
        self._kept: Tensor | None = None

    def documents(self, places: Tensor) -> Tensor:
        """Documents of the keys at some places, counted from `first`; int64."""
        if self._kept is not None:
            return self._kept[places]
        return torch.searchsorted(self._counts.cumsum(0), places + self._into, right=True)

    def keep(self, allowed: Tensor) -> None:
        """Leave out keys of documents that nobody may choose ([n] bool), if most are."""
        size = len(self.keys)
        if int(self._counts[allowed].sum()) > size // 2:  # copying costs time as well
            return
        counts = self._counts.clone()
        counts[0] -= self._into
        counts[-1] -= counts.sum() - size  # chunks of the last document that lie behind
        documents = torch.repeat_interleave(counts, output_size=size)
        places = allowed[documents].nonzero()[:, 0]
        self._kept = documents[places]
        self.keys = self.keys[places]
        self.scales = None if self.scales is None else self.scales[places]


class _Product:
    """Scores of blocks of keys for R routing tokens.

    Attributes:
        rows: keys of a block, at most.
    """

    def __init__(self, routing: Tensor, keys: Tensor) -> None:
        self.dtype = _product_dtype(keys)
        self.convert = keys.dtype != self.dtype
        self.vectors = routing.to(self.dtype)
        written = 4 * (len(routing) + (routing.shape[1] if self.convert else 0))  # per key
        room = min(BLOCK_BYTES, keys.nbytes // BLOCK_PART)
        self.rows = min(max(room // written, MIN_BLOCK), len(keys))
        size = self.rows if self.convert else 0
        self.keys = torch.empty(size, routing.shape[1], device=keys.device)
        self.onednn = keys.device.type == "cpu" and self.dtype == torch.float32 and _has_onednn()

    def __call__(self, keys: Tensor) -> Tensor:
        """[c, G*D] -> [c, R] float32."""
        if self.convert:
            keys = self.keys[: len(keys)].copy_(keys)
        if self.onednn:
            # What compiled models call. With so few columns it takes a third less time than
            # torch.mm, which first copies the keys into another order.
            scores: Tensor = torch.ops.mkldnn._linear_pointwise(
                keys, self.vectors, None, "none", [], ""
            )
            return scores
        return torch.mm(keys, self.vectors.T).float()

    def norm(self, keys: Tensor) -> float:
        """Length of the longest key of the block that was multiplied last."""
        if self.convert:
            keys = self.keys[: len(keys)]
        return longest(keys)


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
        self.mask = document_mask
        if document_mask is not None and document_mask.dim() == 1:
            self.mask = document_mask[None]
        self.scales = scales
        self.key_norm = key_norm

    def run(self, routing: Tensor, questions: list[_Question]) -> None:
        """Bring every question's top-k up to date with all keys; `routing` is [R, G*D]."""
        padded = F.pad(routing, (0, 0, 0, -len(routing) % 8))  # registers hold 8 columns
        product = _Product(padded, self.keys)
        thresholds, coefficients = padded.new_zeros(2, len(padded))  # per column
        owner = torch.empty(len(routing), dtype=torch.int64)
        for question in questions:
            thresholds[question.tokens] = question.threshold
            coefficients[question.tokens] = question.coefficient
            owner[question.tokens] = question.row
        for block in self._blocks(product.rows):
            if self.mask is not None:
                block.keep(self.mask[:, block.first : block.end].any(0))
                if not len(block.keys):
                    continue
            scores, norm = self._score(product, block)
            passed = scores.amax(0) <= torch.add(thresholds, coefficients, alpha=-norm)
            passed = passed[: len(routing)]
            if bool(passed.all()):  # not so for NaN
                continue
            above = (~passed).nonzero()[:, 0].cpu()
            for row in torch.unique(owner[above]).tolist():
                question = questions[row]
                self._offer(question, scores, above[owner[above] == row], block, norm)
                thresholds[question.tokens] = question.threshold

    def _score(self, product: _Product, block: _Block) -> tuple[Tensor, float]:
        """The scores of a block, [c, R], and a length that no key of it exceeds."""
        scores = product(block.keys)
        if block.scales is not None:
            scores *= block.scales[:, None]
            return scores, 128 * math.sqrt(block.keys.shape[1]) * longest(block.scales[:, None])
        return scores, product.norm(block.keys) if self.key_norm is None else self.key_norm

    def _offer(
        self, question: _Question, scores: Tensor, columns: Tensor, block: _Block, norm: float
    ) -> None:
        """Merge what a block may hold for a question's top-k.

        Args:
            scores: [c, R] of the block.
            columns: tokens of the question with a score above the threshold somewhere, or NaN.
        """
        error = question.coefficient * norm
        above = scores.index_select(1, columns.to(scores.device)) > question.threshold - error
        places = torch.unique_consecutive(above.nonzero()[:, 0])
        documents = block.documents(places)
        if self.mask is not None:
            mask = self.mask[question.row if len(self.mask) > 1 else 0]
            allowed = mask[block.first : block.end][documents]
            places, documents = places[allowed], documents[allowed]
        tokens = scores[places, question.tokens]
        tokens = tokens.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        # Exact scores differ by at most `error`, so of two that differ by more than twice that the
        # lower one can be neither a document's best score nor, below k others, a choice.
        best = tokens.new_full((block.end - block.first,), -torch.inf)
        best.scatter_reduce_(0, documents, tokens.amax(1), reduce="amax")
        lowest = best[documents]
        if len(best) > question.count:
            lowest = lowest.clamp(min=best.topk(question.count).values[-1])
        pairs = (tokens >= lowest[:, None] - 2 * error).nonzero()
        for some in torch.split(pairs, max(1, STEP // block.keys.shape[1])):
            place, token = places[some[:, 0]], some[:, 1]
            exact = exact_dots(question.vectors[token], block.keys[place])
            if block.scales is not None:
                exact = exact * block.scales[place].double()
            question.merge(block.first + documents[some[:, 0]], exact.float())

    def _blocks(self, rows: int) -> Iterator[_Block]:
        """All chunks in order: small blocks, then such of so many rows."""
        num_chunks, num_documents = len(self.keys), len(self.chunk_counts)
        edges, size = [0], min(MIN_BLOCK, rows)
        while edges[-1] < num_chunks:
            edges.append(min(edges[-1] + size, num_chunks))
            size = min(2 * size, rows)
        begins = torch.tensor(edges[:-1], device=self.keys.device)
        firsts, befores = torch.empty_like(begins), torch.empty_like(begins)
        passed = done = 0
        for start in range(0, num_documents, STEP):
            counts = self.chunk_counts[start : start + STEP]
            ends = counts.cumsum(0) + passed
            passed = int(ends[-1])
            here = bisect_left(edges, passed, hi=len(begins))  # blocks that begin before `passed`
            index = torch.searchsorted(ends, begins[done:here], right=True)
            firsts[done:here] = start + index
            befores[done:here] = ends[index] - counts[index]
            done = here
        first, before = firsts.tolist(), befores.tolist()
        last = [i + 1 for i in first[1:]] + [num_documents]
        for i, (start, end) in enumerate(pairwise(edges)):
            keys, counts = self.keys[start:end], self.chunk_counts[first[i] : last[i]]
            scales = None if self.scales is None else self.scales[start:end]
            yield _Block(keys, scales, first[i], counts, start - before[i])


def _has_onednn() -> bool:
    return _mkldnn() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _mkldnn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _product_dtype(keys: Tensor) -> torch.dtype:
    """bfloat16 keys are multiplied as they are where the processor can; all else in float32."""
    if keys.dtype == torch.bfloat16 and keys.device.type == "cpu" and multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def multiplies_bfloat16() -> bool:
    """AMX: sixteen times the rate of float32. Elsewhere bfloat16 products are slow or emulated."""
    return _mkldnn() and bool(torch.cpu._is_amx_tile_supported())
