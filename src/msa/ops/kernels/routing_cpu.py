"""Routing in one walk over the keys, block by block (the rule is Eq. 2 of MSA).

Per block: the scores of the routing tokens of all questions, and one comparison with the score of
the question's k-th best document so far. Only what is better is looked at more closely. After the
first blocks that is rare: about k ln(N / k) documents in all. A document may span blocks; its score
is that of its best chunk. So documents need no segment maximum, and their lengths do not matter.
Keys are read once, for all questions together; with one vector per question that is what bounds the
time. A processor scans them for few routing tokens by `msa.ops.kernels.key_scan`; for many, or on
another device, a block's scores are one matrix product.

Held besides: a block of keys in float32, its scores, the running top-k, where documents end; and
the chunks that a filter leaves, if those are less than half.

Shapes: B batch, T query tokens, N documents, C chunks, G KV heads, D head dim, R routing tokens of
all questions, K selected documents.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from msa.ops.routing import TopDocuments, check_routing
from msa.types import Selection

# The scores of a block take at most so many bytes, to stay in the cache, and of many keys at most
# such a part. So do keys that are converted. Blocks of less than `SMALL` cost more than they spare.
BLOCK_BYTES = 1 << 22
BLOCK_PART = 96
SMALL = 1 << 20
# Float32 keys that are multiplied at a time, per thread: a share of its cache.
PIECE_BYTES = 1 << 20
# A scan takes less time than products while the routing tokens fit in a core's first cache, with
# so many bytes. Of less than so many bytes of keys it is not worth loading what compiles it.
SCANNED_VECTORS = 1 << 15
SCANNED_FROM = 1 << 22
# Keys that are scanned, by the dtype that their bits are taken in.
SCANNED = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.int8: torch.int8}
# Blocks have at least so many keys, and the first one no more: there everything is a candidate.
MIN_BLOCK = 160
# A scanned block is so many times as large as the one before.
GROWTH = 4


@torch.no_grad()
def route_documents(
    vectors: Tensor,
    routing_mask: Tensor,
    routing_keys: Tensor,
    chunk_counts: Tensor,
    top_k: int,
    document_mask: Tensor | None = None,
    scales: Tensor | None = None,
) -> Selection:
    """Twin of `msa.ops.routing.route_documents`; arguments and returns as there."""
    check_routing(vectors, routing_keys, chunk_counts, top_k, document_mask, scales)
    routing = vectors[routing_mask]  # [R, G*D], questions in order
    owner = routing_mask.nonzero()[:, 0]
    num_documents = len(chunk_counts)
    best = TopDocuments(len(vectors), min(top_k, num_documents), num_documents)
    if len(routing) and len(routing_keys):
        walk = _Walk(routing_keys.flatten(1), chunk_counts, document_mask, scales)
        with torch.autocast(vectors.device.type, enabled=False):  # products stay float32
            walk.run(routing, owner, best)
    return best.selection(vectors.device)


class _Walk:
    """The walk over the keys of one routing layer; see the top of this file."""

    def __init__(
        self,
        keys: Tensor,
        chunk_counts: Tensor,
        document_mask: Tensor | None,
        scales: Tensor | None,
    ) -> None:
        self.keys = keys
        self.scales = scales
        self.ends = chunk_counts.cumsum(0)  # one past the last chunk of each document
        self.mask = None if document_mask is None else document_mask.reshape(-1, len(chunk_counts))
        # [C'] chunks to be scored, when a filter leaves so few that gathering them takes less time
        self.chosen: Tensor | None = None
        if self.mask is not None:
            allowed = self.mask.any(0)
            if int(chunk_counts[allowed].sum()) <= len(keys) // 2:
                every = torch.repeat_interleave(allowed, chunk_counts, output_size=len(keys))
                self.chosen = every.nonzero()[:, 0]

    def run(self, routing: Tensor, owner: Tensor, best: TopDocuments) -> None:
        """Offer what may belong to the top-k; `routing` is [R, G*D], `owner` [R] its questions."""
        if _can_scan(self.keys, routing):
            self._scan(routing, owner, best)
        else:
            self._multiply(routing, owner, best)

    @property
    def _total(self) -> int:
        return len(self.keys) if self.chosen is None else len(self.chosen)

    def _scan(self, routing: Tensor, owner: Tensor, best: TopDocuments) -> None:
        from msa.ops.kernels.key_scan import KeyScan  # loads a compiler

        keys = self.keys.view(SCANNED[self.keys.dtype])
        scan = KeyScan(keys, self.scales, self.chosen, routing)
        tokens = torch.arange(len(routing))
        start, size = 0, MIN_BLOCK
        while start < self._total:
            end = min(start + size, self._total)
            chunks, scores, start = scan(start, end, best.thresholds[owner])
            size *= GROWTH
            if len(chunks):
                self._offer(scores, chunks, tokens, owner, best)

    def _multiply(self, routing: Tensor, owner: Tensor, best: TopDocuments) -> None:
        product = _Product(routing, self.keys)
        thresholds = best.thresholds.to(routing.device)
        for start, end in _blocks(self._total, product.rows):
            chunks: slice | Tensor = slice(start, end)
            if self.chosen is not None:
                chunks = self.chosen[start:end]
            scores = product(chunks, end - start)
            if self.scales is not None:
                scores *= self.scales[chunks]
            above = ~(scores.amax(1) <= thresholds[owner])  # so for NaN, too
            if not bool(above.any()):
                continue
            self._offer(scores, chunks, above.nonzero()[:, 0], owner, best)
            thresholds = best.thresholds.to(routing.device)

    def _offer(
        self,
        scores: Tensor,
        chunks: slice | Tensor,
        tokens: Tensor,
        owner: Tensor,
        best: TopDocuments,
    ) -> None:
        """Offer what is above a question's threshold in a block.

        Args:
            scores: [R, c] of the block.
            chunks: its c chunks.
            tokens: those with a score above the threshold somewhere, or NaN.
        """
        questions, sizes = torch.unique_consecutive(owner[tokens], return_counts=True)
        some = scores.index_select(0, tokens)
        some = some.nan_to_num_(-torch.inf, torch.inf, -torch.inf)
        if len(questions) < len(tokens):
            some = torch.stack([part.amax(0) for part in torch.split(some, sizes.tolist())])
        thresholds = best.thresholds.to(some.device)[questions]
        row, place = (some > thresholds[:, None]).nonzero(as_tuple=True)
        found = chunks.start + place if isinstance(chunks, slice) else chunks[place]
        documents = torch.searchsorted(self.ends, found, right=True)
        values, rows = some[row, place], questions[row]
        if self.mask is not None:
            allowed = self.mask[rows if len(self.mask) > 1 else 0, documents]
            rows, documents, values = rows[allowed], documents[allowed], values[allowed]
        best.offer(rows, documents, values)


class _Product:
    """Scores of blocks of keys for R routing tokens, in pieces that the cache holds.

    Attributes:
        rows: keys of a block, at most.
    """

    def __init__(self, routing: Tensor, keys: Tensor) -> None:
        self.keys = keys
        self.size, width = routing.shape
        # registers hold 8 columns
        self.vectors = F.pad(routing, (0, 0, 0, -self.size % 8)).float()
        room = min(BLOCK_BYTES, max(keys.nbytes // BLOCK_PART, SMALL))
        self.rows = min(max(room // (4 * len(self.vectors)), MIN_BLOCK), len(keys))
        on_cpu, self.convert = keys.device.type == "cpu", keys.dtype != torch.float32
        piece = min(PIECE_BYTES * torch.get_num_threads(), room)
        piece = min(max(piece // (4 * width), MIN_BLOCK), self.rows)
        self.onednn = on_cpu and not self.convert and _has_onednn()
        if self.onednn:
            piece = 1 << (piece.bit_length() - 1)
            self.rows -= self.rows % piece
        self.piece = piece if self.convert or on_cpu else self.rows
        self.buffer = torch.empty(piece if self.convert else 0, width, device=keys.device)

    def __call__(self, chunks: slice | Tensor, size: int) -> Tensor:
        """[R, c] float32 for c keys: a slice of them, or their indices."""
        scores = torch.empty(size, len(self.vectors), device=self.keys.device)
        keys = self.keys[chunks] if isinstance(chunks, slice) else self.keys
        for start in range(0, size, self.piece):
            part = slice(start, min(start + self.piece, size))
            some = keys[part] if isinstance(chunks, slice) else keys[chunks[part]]
            if self.convert:
                some = self.buffer[: len(some)].copy_(some)
            # torch.ops.mkldnn is what compiled models call. Of keys as they lie it takes less time
            # than torch.mm, which copies them into another order. It keeps code for every shape
            # that it has met, so it is given few: whole pieces, of powers of two.
            scores[part] = (
                torch.ops.mkldnn._linear_pointwise(some, self.vectors, None, "none", [], "")
                if self.onednn and len(some) == self.piece
                else torch.mm(some, self.vectors.T)
            )
        return scores[:, : self.size].T


def _blocks(total: int, rows: int) -> Iterator[tuple[int, int]]:
    """First and end of every block: small ones, then such of so many rows."""
    start, size = 0, min(MIN_BLOCK, rows)
    while start < total:
        yield start, min(start + size, total)
        start, size = start + size, min(2 * size, rows)


def _has_onednn() -> bool:
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _can_scan(keys: Tensor, routing: Tensor) -> bool:
    usual = keys.device.type == routing.device.type == "cpu" and keys.is_contiguous()
    usual = usual and keys.dtype in SCANNED
    return usual and keys.nbytes >= SCANNED_FROM and 4 * routing.numel() <= SCANNED_VECTORS
