"""Routing in one walk over the keys, block by block (ours; the rule is Eq. 2 of MSA).

Per block: one matrix product with the routing tokens of all questions, the best score of every
token, one comparison. Only a block that holds a score above a question's threshold (less the
rounding bound) is looked at more closely: its candidates are noted. The threshold is a score that k
documents are known to reach. After the first blocks candidates are rare: about k ln(N / k)
documents in all. At the end those that the last threshold leaves are scored exactly. A document may
span blocks; its score is that of its best candidate. So documents need no segment maximum, and
their lengths do not matter.

Passing over the others is safe. While blocks are walked in order, a later chunk changes the top-k
only if its exact score is *above* the k-th best (an equal score of a later document loses to the
lower row; a document that is chosen already is not made better). A chunk whose computed score is
not above the threshold by `msa.ops.kernels.rounding.error_bound` cannot do that. There is no slack
of fixed size to run out of: thousands of equal documents are thousands of candidates, scored when
there are too many to hold.

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

# The scores of a block take at most so many bytes, to stay in the cache, and at most such a part of
# the keys. So do keys that are converted.
BLOCK_BYTES = 1 << 22
BLOCK_PART = 96
# Keys in float32 that are multiplied at a time, per thread: a share of its cache.
PIECE_BYTES = 1 << 20
# Keys of so many bytes are fetched well by matrix products.
LONG_ROW = 1 << 11
# From so many routing tokens on, keys are multiplied as rows, and before as columns.
WIDE = 16
# Blocks have at least so many keys, and the first ones no more: there everything is a candidate.
MIN_BLOCK = 160
# Documents are counted, and candidates scored exactly, this many numbers at a time.
STEP = 1 << 14
# Candidates of a question that are noted, at most, before they are scored.
PENDING = 512


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
    """A question's routing tokens, its candidates and its running top-k.

    Attributes:
        row: in the batch.
        tokens: its rows of the scores of a block.
        vectors: [T, G*D], of its routing tokens.
        coefficient: times the length of a key, the rounding bound of a score.
        best: at most K documents and their exact scores, best first.
        threshold: a score that k documents reach; -inf before there are k.
        num_pending: candidates that are not scored exactly yet.
    """

    def __init__(self, row: int, tokens: slice, count: int, vectors: Tensor, bound: float) -> None:
        self.row = row
        self.tokens = tokens
        self.count = count
        self.vectors = vectors
        self.coefficient = bound * longest(vectors)
        self.best: list[tuple[int, float]] = []
        self.threshold = -math.inf
        self.num_pending = 0
        self._floors: list[tuple[int, float]] = []
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, chunks: Tensor, documents: Tensor, scores: Tensor, error: float) -> None:
        """Note candidates.

        Args:
            chunks, documents: [P] int64; a document may recur.
            scores: [P] float32, as computed.
            error: how far from the exact ones at most.
        """
        self._pending.append((chunks, documents, scores + error))
        self.num_pending += len(chunks)
        self._reached(documents, scores - error)

    def take(self) -> tuple[Tensor, Tensor]:
        """Candidates that may still be chosen: chunks [P], documents [P]; none is pending then."""
        chunks, documents, ceilings = (torch.cat(some) for some in zip(*self._pending, strict=True))
        self._pending, self.num_pending = [], 0
        near = ceilings >= self.threshold  # the threshold may come from a later document: not >
        return chunks[near], documents[near]

    def merge(self, documents: Tensor, scores: Tensor) -> None:
        """Take in exact chunk scores of documents (int64, float32 [P]); a document may recur."""
        self.best = _best(self.best, documents, scores, self.count)
        self._reached(documents, scores)

    def _reached(self, documents: Tensor, floors: Tensor) -> None:
        """Raise the threshold: documents, in order, have scores that are not below these floors."""
        floors = floors.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
        if len(documents) > 4 * self.count:  # lists of so many would take longer
            documents, index = torch.unique_consecutive(documents, return_inverse=True)
            best = floors.new_full(documents.shape, -torch.inf)
            best.scatter_reduce_(0, index, floors, reduce="amax")
            floors, index = best.topk(min(self.count, len(best)))
            documents = documents[index]
        self._floors = _best(self._floors, documents, floors, self.count)
        if len(self._floors) == self.count:
            self.threshold = max(self.threshold, self._floors[-1][1])


def _best(
    known: list[tuple[int, float]], documents: Tensor, scores: Tensor, count: int
) -> list[tuple[int, float]]:
    """The best documents, those known and others, best first, each with its best score.

    Args:
        documents, scores: [P] int64 and float32; a document may recur.
        count: to be kept.
    """
    best = dict(known)
    for document, score in zip(documents.tolist(), scores.tolist(), strict=True):
        if score > best.get(document, -math.inf):  # not so for NaN
            best[document] = score
    return sorted(best.items(), key=lambda found: (-found[1], found[0]))[:count]


class _Block:
    """Some chunks in a row and the documents that they are of.

    Attributes:
        keys: [c, G*D], as stored; those that are scored.
        scales: [c], of int8 keys.
        first, end: its documents, one past the last.
    """

    def __init__(
        self,
        keys: Tensor,
        scales: Tensor | None,
        start: int,
        first: int,
        counts: Tensor,
        into: int,
    ) -> None:
        self.keys = keys
        self.scales = scales
        self._start = start  # its first chunk
        self.first = first
        self.end = first + len(counts)
        self._counts = counts
        self._into = into  # chunks of the first document that lie in blocks before
        self._kept: Tensor | None = None  # those that are scored, if others were left out

    def chunks(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Of the keys at some places: chunks and documents [P] int64."""
        if self._kept is not None:
            places = self._kept[places]
        ends = self._counts.cumsum(0)
        documents = torch.searchsorted(ends, places + self._into, right=True)
        return self._start + places, self.first + documents

    def keep(self, allowed: Tensor) -> None:
        """Leave out keys of documents that nobody may choose ([n] bool), if most are."""
        size = len(self.keys)
        if int(self._counts[allowed].sum()) > size // 2:  # copying costs time as well
            return
        counts = self._counts.clone()
        counts[0] -= self._into
        counts[-1] -= counts.sum() - size  # chunks of the last document that lie behind
        documents = torch.repeat_interleave(counts, output_size=size)
        self._kept = allowed[documents].nonzero()[:, 0]
        self.keys = self.keys[self._kept]
        self.scales = None if self.scales is None else self.scales[self._kept]


class _Product:
    """Scores of blocks of keys for R routing tokens.

    A block is multiplied in pieces that the cache holds. Short keys that are float32 already are
    read once before, by a reduction: it fetches memory three times as fast as matrix products do,
    which take half the time or less when the cache holds the keys.

    Attributes:
        rows: keys of a block, at most.
        norm: length of the longest key of the block that was multiplied last, if it is measured.
    """

    def __init__(self, routing: Tensor, keys: Tensor, measure: bool) -> None:
        self.dtype = _product_dtype(keys)
        self.convert = keys.dtype != self.dtype
        self.measure = measure
        self.norm = 0.0
        self.size = len(routing)
        self.narrow = self.size < WIDE
        if not self.narrow:  # registers hold 8 columns
            routing = F.pad(routing, (0, 0, 0, -self.size % 8))
        self.vectors = routing.to(self.dtype)
        room = min(BLOCK_BYTES, keys.nbytes // BLOCK_PART)
        self.rows = min(max(room // (4 * len(routing)), MIN_BLOCK), len(keys))
        piece = PIECE_BYTES * torch.get_num_threads() // (4 * routing.shape[1])
        piece = min(max(min(piece, room // (4 * routing.shape[1])), MIN_BLOCK), self.rows)
        in_float32 = keys.device.type == "cpu" and self.dtype == torch.float32
        self.piece = piece if self.convert or in_float32 else self.rows
        self.keys = torch.empty(piece if self.convert else 0, keys.shape[1], device=keys.device)
        in_place = in_float32 and not self.convert
        self.read = in_place and 4 * routing.shape[1] < LONG_ROW
        self.onednn = in_place and not self.narrow and _has_onednn()

    def __call__(self, keys: Tensor) -> Tensor:
        """[c, G*D] -> [R, c] float32."""
        self.norm = 0.0
        shape = (self.size, len(keys)) if self.narrow else (len(keys), len(self.vectors))
        scores = torch.empty(shape, device=keys.device)
        for start in range(0, len(keys), self.piece):
            some = keys[start : start + self.piece]
            if self.convert:
                some = self.keys[: len(some)].copy_(some)
            elif self.read:
                some.amax()
            if self.measure:
                self.norm = max(self.norm, longest(some))
            self._multiply(some, scores, slice(start, start + len(some)))
        return scores if self.narrow else scores[:, : self.size].T

    def _multiply(self, keys: Tensor, scores: Tensor, part: slice) -> None:
        """Write the products of a piece into its part of the scores."""
        if not self.narrow:
            # torch.ops.mkldnn is what compiled models call. Of keys as they lie it takes less time
            # than torch.mm, which copies them into another order.
            product = torch.ops.mkldnn._linear_pointwise
            scores[part] = (
                product(keys, self.vectors, None, "none", [], "")
                if self.onednn
                else torch.mm(keys, self.vectors.T)
            )
        elif self.dtype != torch.float32:
            scores[:, part] = torch.mm(self.vectors, keys.T)
        elif self.size == 1:
            torch.mv(keys, self.vectors[0], out=scores[0, part])
        else:
            torch.mm(self.vectors, keys.T, out=scores[:, part])


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
        self._longest = 0.0  # of all keys that were scored

    def run(self, routing: Tensor, questions: list[_Question]) -> None:
        """Bring every question's top-k up to date with all keys; `routing` is [R, G*D]."""
        measure = self.scales is None and self.key_norm is None
        product = _Product(routing, self.keys, measure)
        thresholds, coefficients = routing.new_zeros(2, len(routing))
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
            passed = scores.amax(1) <= torch.add(thresholds, coefficients, alpha=-norm)
            if bool(passed.all()):  # not so for NaN
                continue
            above = (~passed).nonzero()[:, 0].cpu()
            for row in torch.unique(owner[above]).tolist():
                question = questions[row]
                self._offer(question, scores, above[owner[above] == row], block, norm)
                if question.num_pending > PENDING:
                    self._settle(question)
                thresholds[question.tokens] = question.threshold
        for question in questions:
            if question.num_pending:
                self._settle(question)

    def _score(self, product: _Product, block: _Block) -> tuple[Tensor, float]:
        """The scores of a block, [R, c], and a length that no key of it exceeds."""
        scores = product(block.keys)
        if block.scales is not None:
            scores *= block.scales
            norm = 128 * math.sqrt(block.keys.shape[1]) * longest(block.scales[:, None])
        else:
            norm = product.norm if self.key_norm is None else self.key_norm
        self._longest = max(self._longest, norm)
        return scores, norm

    def _offer(
        self, question: _Question, scores: Tensor, tokens: Tensor, block: _Block, norm: float
    ) -> None:
        """Note what a block may hold for a question's top-k.

        Args:
            scores: [R, c] of the block.
            tokens: those of the question with a score above the threshold somewhere, or NaN.
        """
        error = question.coefficient * norm
        some = scores.index_select(0, tokens.to(scores.device))
        best = some.nan_to_num_(-torch.inf, torch.inf, -torch.inf).amax(0)
        places = (best > question.threshold - error).nonzero()[:, 0]
        chunks, documents = block.chunks(places)
        if self.mask is not None:
            allowed = self.mask[question.row if len(self.mask) > 1 else 0][documents]
            places, chunks, documents = places[allowed], chunks[allowed], documents[allowed]
        question.add(chunks, documents, best[places], error)

    def _settle(self, question: _Question) -> None:
        """Score a question's candidates exactly, those that may still be chosen."""
        at_once = max(1, STEP // self.keys.shape[1])
        error = question.coefficient * self._longest
        vectors = question.vectors.float()
        for chunks, documents in zip(
            *(torch.split(each, at_once) for each in question.take()), strict=True
        ):
            keys = self.keys[chunks]
            scales = None if self.scales is None else self.scales[chunks]
            scores = torch.mm(keys.float(), vectors.T)
            if scales is not None:
                scores *= scales[:, None]
            # Exact scores differ by at most `error` from these, so of two tokens that differ by
            # more than twice that the lower one does not make a chunk's score.
            scores.nan_to_num_(-torch.inf, torch.inf, -torch.inf)
            near = scores >= scores.amax(1, keepdim=True) - 2 * error
            for pairs in torch.split(near.nonzero(), at_once):
                place, token = pairs.unbind(1)
                exact = exact_dots(question.vectors[token], keys[place])
                if scales is not None:
                    exact = exact * scales[place].double()
                question.merge(documents[place], exact.float())

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
            yield _Block(keys, scales, start, first[i], counts, start - before[i])


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
