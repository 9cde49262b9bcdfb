"""Routing (paper section 3.2.1, Eq. 2), as one matrix product.

Eq. 2 averages cosines over query heads. The mean is linear, and the query heads of a group share
their key, so normalized query heads are summed by group and the whole of it is
[T, G*D] x [G*D, C] / H. No [H, T, C] tensor is ever built.

Shapes: B batch, T query tokens, N documents, C chunks, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from msa.errors import InputError
from msa.types import Selection

# Scores of this many chunks are held at once when no gradient is needed.
CHUNK_BLOCK = 1 << 16
QUERY_REDUCTIONS = ("max", "mean", "last", "pooled")


def normalize(x: Tensor) -> Tensor:
    """Unit length over the last dimension, computed in float32; same shape and dtype."""
    return F.normalize(x.float(), dim=-1).to(x.dtype)


def routing_vectors(routing_queries: Tensor, num_key_value_heads: int, score: str) -> Tensor:
    """Fold the query heads of every group, so that one dot product gives the mean over heads.

    Args:
        routing_queries: [B, T, H, D], as projected.
        num_key_value_heads: G.
        score: "cosine" (the paper) or "dot" (scaled by D ** -0.5; some released checkpoints).

    Returns:
        [B, T, G*D] float32.

    Source: MSA 3.2.1, Eq. 2 (folded, since the mean over heads is linear).
    """
    batch, tokens, heads, dim = routing_queries.shape
    queries = routing_queries.float()
    queries = F.normalize(queries, dim=-1) if score == "cosine" else queries * dim**-0.5
    groups = queries.view(batch, tokens, num_key_value_heads, heads // num_key_value_heads, dim)
    return groups.sum(dim=3).flatten(2) / heads


def token_weights(logarithms: Tensor) -> Tensor:
    """Weights [B, T] float32 of the routing tokens in a pooled query, from their logarithms."""
    return logarithms.float().clamp(-15, 15).exp()


def reduce_queries(
    routing_queries: Tensor,
    routing_mask: Tensor,
    num_key_value_heads: int,
    score: str,
    reduction: str = "max",
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Routing queries of all tokens as the vectors that memory is searched with.

    Args:
        routing_queries: [B, T, H, D], as projected.
        routing_mask: [B, T] bool, True for tokens that route.
        num_key_value_heads: G.
        score: "cosine" or "dot", see `routing_vectors`.
        reduction: how the tokens of a question come together.
            "max" (paper, Eq. 2): one vector per token, the best token of a chunk counts.
            "mean": the mean over tokens of their chunk scores, which is the score of their mean
            vector (`query_reduce_method` "mean" of the released code).
            "last": the last routing token alone (`query_reduce_method` "last").
            "pooled": the raw queries are averaged, head by head, before they are normalized.
        token_weights: [B, T] float, >= 0, weights of the tokens in "pooled"; equal by default.

    Returns:
        Vectors [B, S, G*D] float32 and their mask [B, S] bool; S = T for "max", else 1. A row
        without routing tokens has a mask without True.

    Raises:
        InputError: another reduction.

    Source: MSA 3.2.1, Eq. 2 ("max"); "pooled" is not in the paper.
    """
    if reduction not in QUERY_REDUCTIONS:
        raise InputError(f"reduction={reduction!r}: expected one of {QUERY_REDUCTIONS}")
    if reduction == "max":
        return routing_vectors(routing_queries, num_key_value_heads, score), routing_mask
    routes = routing_mask.any(dim=1, keepdim=True)
    if reduction == "last":
        token = torch.arange(routing_mask.shape[1], device=routing_mask.device)
        last = (token * routing_mask).argmax(dim=1)
        rows = torch.arange(len(last), device=last.device)
        picked = routing_queries[rows, last][:, None]
        return routing_vectors(picked, num_key_value_heads, score), routes
    # zeros, not a product with the mask: what does not route may be anything, NaN too
    queries = routing_queries.masked_fill(~routing_mask[:, :, None, None], 0.0)
    if reduction == "mean":
        vectors = routing_vectors(queries, num_key_value_heads, score)
        tokens = routing_mask.sum(dim=1).clamp(min=1)
        return vectors.sum(dim=1, keepdim=True) / tokens[:, None, None], routes
    weights = routing_mask.float()
    if token_weights is not None:
        weights = token_weights.float().masked_fill(~routing_mask, 0.0)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
    with torch.autocast(routing_queries.device.type, enabled=False):
        pooled = torch.einsum("bt,bthd->bhd", weights, queries.float())[:, None]
    return routing_vectors(pooled, num_key_value_heads, score), routes


def chunk_scores(vectors: Tensor, routing_mask: Tensor, routing_keys: Tensor) -> Tensor:
    """Max over routing tokens of the score of every chunk.

    Args:
        vectors: [B, T, G*D] float32, of `routing_vectors`.
        routing_mask: [B, T] bool, True for tokens that route.
        routing_keys: [C, G, D].

    Returns:
        [B, C] float32; -inf in a row without routing tokens. Differentiable.
    """
    scores = _token_scores(vectors, routing_keys)
    return scores.masked_fill(~routing_mask[:, :, None], -torch.inf).amax(dim=1)


def _token_scores(vectors: Tensor, routing_keys: Tensor, scales: Tensor | None = None) -> Tensor:
    """[B, T, C] float32, the score of every chunk for every token; arguments as below."""
    batch, tokens, _ = vectors.shape
    keys = routing_keys.flatten(1).float()
    with torch.autocast(vectors.device.type, enabled=False):  # scores stay float32
        scores = (vectors.flatten(0, 1) @ keys.T).view(batch, tokens, len(keys))
    return scores if scales is None else scores * scales


@torch.no_grad()
def selection_scores(
    vectors: Tensor, routing_mask: Tensor, routing_keys: Tensor, scales: Tensor | None = None
) -> Tensor:
    """Chunk scores that documents are selected by: `chunk_scores` in which NaN counts as -inf.

    Args:
        vectors: [B, T, G*D] float32, of `routing_vectors`.
        routing_mask: [B, T] bool, True for tokens that route.
        routing_keys: [C, G, D] float32, bfloat16 or float16; or int8 with `scales`.
        scales: [C] float32; a key is its int8 values times its scale.

    Returns:
        [B, C] float32; -inf in a row without routing tokens. No gradient.

    Source: MSA 3.2.1, Eq. 2.
    """
    scores = _token_scores(vectors, routing_keys, scales)
    return scores.masked_fill_(scores.isnan() | ~routing_mask[:, :, None], -torch.inf).amax(dim=1)


def document_scores(
    vectors: Tensor,
    routing_mask: Tensor,
    routing_keys: Tensor,
    chunk_counts: Tensor,
    document_mask: Tensor | None = None,
) -> Tensor:
    """s_i: the best chunk score of every document.

    Args:
        vectors: [B, T, G*D] float32, of `reduce_queries`.
        routing_mask: [B, T] bool.
        routing_keys: [C, G, D]; unit length per head when routing is by cosine.
        chunk_counts: [N] int64, chunks of each document, in the order of the keys.
        document_mask: [N] bool, False for documents that must not be chosen.

    Returns:
        [B, N] float32; -inf for masked documents. Differentiable.

    Source: MSA 3.2.1, Eq. 2.
    """
    documents = torch.repeat_interleave(chunk_counts)
    result = vectors.new_full((vectors.shape[0], chunk_counts.shape[0]), -torch.inf)
    needs_grad = torch.is_grad_enabled() and (vectors.requires_grad or routing_keys.requires_grad)
    block = routing_keys.shape[0] if needs_grad else CHUNK_BLOCK
    for start in range(0, routing_keys.shape[0], max(block, 1)):
        part = slice(start, start + block)
        scores = chunk_scores(vectors, routing_mask, routing_keys[part])
        index = documents[part].expand_as(scores)
        result = result.scatter_reduce(1, index, scores, reduce="amax")
    if document_mask is not None:
        result = result.masked_fill(~document_mask, -torch.inf)
    return result


def select_documents(scores: Tensor, top_k: int) -> Selection:
    """The top-k documents of every row, best first; equal scores in favor of the lower row.

    Args:
        scores: [B, N] float32; -inf for documents that must not be chosen.
        top_k: k >= 1.

    Returns:
        Selection with K = min(top_k, N); -1 and -inf where a row has fewer documents.
    """
    scores = scores.detach()
    count = min(top_k, scores.shape[1])
    best, documents = torch.topk(scores, count, dim=1)
    # topk orders equal scores as it likes; only where there are some is a stable sort needed
    last = best[:, -1:]
    among = (best[:, 1:] == best[:, :-1]) & (best[:, 1:] > -torch.inf)
    beyond = ((scores == last).sum(1) > (best == last).sum(1)) & (last > -torch.inf).all(1)
    if bool(among.any() | beyond.any()):
        best, documents = (t[:, :count] for t in scores.sort(dim=1, descending=True, stable=True))
    return Selection(documents.masked_fill(best == -torch.inf, -1), best)


class TopDocuments:
    """The best documents of every row of a batch among all that were offered, on the CPU.

    Args:
        batch: B.
        count: K, documents that are kept of each row; at least 1.
        num_documents: N.
    """

    def __init__(self, batch: int, count: int, num_documents: int) -> None:
        self._documents = torch.full((batch, count), -1)
        self._scores = torch.full((batch, count), -torch.inf)
        self._num_documents = num_documents

    @property
    def thresholds(self) -> Tensor:
        """[B] float32, the score of the K-th best document; -inf where there are fewer."""
        return self._scores[:, -1]

    def offer(self, rows: Tensor, documents: Tensor, scores: Tensor) -> None:
        """Take in chunk scores; a document's score is that of its best chunk.

        Args:
            rows, documents: [P] int64, in any order; both may recur.
            scores: [P] float32, above -inf.
        """
        held, place = (self._documents >= 0).nonzero(as_tuple=True)
        rows, documents = rows.cpu(), documents.cpu()
        documents = torch.cat([self._documents[held, place], documents])
        pairs = torch.cat([held, rows]) * self._num_documents + documents
        pairs, owner = torch.unique(pairs, return_inverse=True)
        scores = torch.cat([self._scores[held, place], scores.cpu()])
        best = scores.new_full((len(pairs),), -torch.inf)
        best.scatter_reduce_(0, owner, scores, reduce="amax")
        # pairs ascend and sorting keeps the order of equals, so ties go to the lower document
        best, order = best.sort(descending=True, stable=True)
        rows, by_row = (pairs[order] // self._num_documents).sort(stable=True)
        best, documents = best[by_row], pairs[order[by_row]] % self._num_documents
        place = torch.arange(len(rows)) - torch.searchsorted(rows, rows)
        kept = place < self._documents.shape[1]
        self._documents[rows[kept], place[kept]] = documents[kept]
        self._scores[rows[kept], place[kept]] = best[kept]

    def selection(self, device: torch.device) -> Selection:
        """What was found, best first, equal scores in favor of the lower document."""
        return Selection(self._documents.to(device), self._scores.to(device))


def check_routing(
    vectors: Tensor,
    routing_keys: Tensor,
    chunk_counts: Tensor,
    top_k: int,
    document_mask: Tensor | None,
    scales: Tensor | None,
) -> None:
    """Refuse what `route_documents` cannot work on.

    Raises:
        InputError: shapes that do not belong together, int8 keys without scales, top_k below 1.
    """
    batch, num_documents = vectors.shape[0], chunk_counts.shape[0]
    num_chunks, width = routing_keys.shape[0], routing_keys[:0].flatten(1).shape[1]
    if top_k < 1:
        raise InputError(f"top_k={top_k}: expected at least 1")
    if vectors.shape[-1] != width:
        raise InputError(
            f"vectors of {vectors.shape[-1]} numbers and keys of {width}: expected the same; use "
            "the vectors of routing_vectors for these keys"
        )
    if int(chunk_counts.sum()) != num_chunks:
        raise InputError(
            f"chunk_counts add up to {int(chunk_counts.sum())}, but there are {num_chunks} keys; "
            "give the counts of exactly these keys"
        )
    if (routing_keys.dtype == torch.int8) != (scales is not None):
        raise InputError(
            f"keys of {routing_keys.dtype} {'with' if scales is not None else 'without'} scales: "
            "expected scales for int8 keys and for no others"
        )
    if scales is not None and scales.shape != (num_chunks,):
        raise InputError(
            f"scales of shape {list(scales.shape)}: expected one per key, [{num_chunks}]"
        )
    shapes = [(num_documents,), (batch, num_documents)]
    if document_mask is not None and tuple(document_mask.shape) not in shapes:
        raise InputError(
            f"document_mask of shape {list(document_mask.shape)}: expected [{num_documents}] or "
            f"[{batch}, {num_documents}]"
        )


def route_documents(
    vectors: Tensor,
    routing_mask: Tensor,
    routing_keys: Tensor,
    chunk_counts: Tensor,
    top_k: int,
    document_mask: Tensor | None = None,
    scales: Tensor | None = None,
) -> Selection:
    """Scores and selection in one: the reference of the kernels, plain and slow.

    Kernels, and parts of a bank whose selections are merged, give this selection, except among
    documents whose scores are within 1e-5 of each other: a float32 product is rounded differently
    in blocks of other sizes. (That is for unit keys, which cosine routing has; else 1e-5 times
    the lengths of vector and key. And for torch's default precision of float32 products.)

    Args:
        vectors: [B, T, G*D] float32, of `routing_vectors`.
        routing_mask: [B, T] bool, True for tokens that route.
        routing_keys: [C, G, D] float32, bfloat16 or float16; or int8 with `scales`.
        chunk_counts: [N] int64, chunks of each document, in the order of the keys.
        top_k: k >= 1.
        document_mask: [N] bool, or [B, N] for a filter per question; False for documents that must
            not be chosen.
        scales: [C] float32, for int8 keys only; a key is its int8 values times its scale.

    Returns:
        Selection with K = min(top_k, N), best first, equal scores in favor of the lower row; -1
        and -inf where a row has fewer documents or no routing token. NaN counts as -inf.

    Raises:
        InputError: see `check_routing`.

    Source: MSA 3.2.1, Eq. 2.
    """
    check_routing(vectors, routing_keys, chunk_counts, top_k, document_mask, scales)
    documents = torch.repeat_interleave(chunk_counts)
    result = vectors.new_full((vectors.shape[0], chunk_counts.shape[0]), -torch.inf).detach()
    for start in range(0, routing_keys.shape[0], CHUNK_BLOCK):
        part = slice(start, start + CHUNK_BLOCK)
        some = None if scales is None else scales[part]
        scores = selection_scores(vectors, routing_mask, routing_keys[part], some)
        result.scatter_reduce_(1, documents[part].expand_as(scores), scores, reduce="amax")
    if document_mask is not None:
        result = result.masked_fill(~document_mask, -torch.inf)
    return select_documents(result, top_k)
