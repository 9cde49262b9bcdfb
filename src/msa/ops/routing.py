"""Routing (paper section 3.2.1, Eq. 2), as one matrix product.

Eq. 2 averages cosines over query heads. The mean is linear, and the query heads of a group share
their key, so normalised query heads are summed by group and the whole of it is
[T, G*D] x [G*D, C] / H. No [H, T, C] tensor is ever built.

Shapes: B batch, T query tokens, N documents, C chunks, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from msa.types import Selection

# Scores of this many chunks are held at once when no gradient is needed.
CHUNK_BLOCK = 1 << 16


def normalise(x: Tensor) -> Tensor:
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

    Source: MSA 3.2.1, Eq. 2; the folding is ours (the mean over heads is linear).
    """
    batch, tokens, heads, dim = routing_queries.shape
    queries = routing_queries.float()
    queries = F.normalize(queries, dim=-1) if score == "cosine" else queries * dim**-0.5
    groups = queries.view(batch, tokens, num_key_value_heads, heads // num_key_value_heads, dim)
    return groups.sum(dim=3).flatten(2) / heads


def chunk_scores(vectors: Tensor, routing_mask: Tensor, routing_keys: Tensor) -> Tensor:
    """Max over routing tokens of the score of every chunk.

    Args:
        vectors: [B, T, G*D] float32, of `routing_vectors`.
        routing_mask: [B, T] bool, True for tokens that route.
        routing_keys: [C, G, D].

    Returns:
        [B, C] float32; -inf in a row without routing tokens.
    """
    batch, tokens, _ = vectors.shape
    keys = routing_keys.flatten(1).float()
    with torch.autocast(vectors.device.type, enabled=False):  # scores stay float32
        scores = (vectors.flatten(0, 1) @ keys.T).view(batch, tokens, -1)
    return scores.masked_fill(~routing_mask[:, :, None], -torch.inf).amax(dim=1)


def document_scores(
    routing_queries: Tensor,
    routing_mask: Tensor,
    routing_keys: Tensor,
    chunk_counts: Tensor,
    score: str = "cosine",
    document_mask: Tensor | None = None,
) -> Tensor:
    """s_i: the best chunk score of every document.

    Args:
        routing_queries: [B, T, H, D], as projected.
        routing_mask: [B, T] bool.
        routing_keys: [C, G, D]; unit length per head when `score` is "cosine".
        chunk_counts: [N] int64, chunks of each document, in the order of the keys.
        score: "cosine" or "dot".
        document_mask: [N] bool, False for documents that must not be chosen.

    Returns:
        [B, N] float32; -inf for masked documents. Differentiable.

    Source: MSA 3.2.1, Eq. 2.
    """
    vectors = routing_vectors(routing_queries, routing_keys.shape[1], score)
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
    """The top-k documents of every row, best first; equal scores in favour of the lower row.

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
