"""Attention over the prefix, the selected documents' chunks and the local tokens (Eq. 3, 4).

Shapes: B batch, T query tokens, S local keys, M memory rows, C chunks, H query heads, G KV heads,
D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from msa.types import Content


def gather_content(
    keys: Tensor, values: Tensor, chunk_counts: Tensor, documents: Tensor
) -> Content:
    """Pooled keys and values of the documents that every row selected, all their chunks.

    Args:
        keys, values: [C, G, D], chunks of all documents in a row.
        chunk_counts: [N] int64.
        documents: [B, K] int64 rows; -1 for none.

    Returns:
        Content with M = the longest row's number of chunks.
    """
    ends = chunk_counts.cumsum(0)
    chosen = documents.clamp(min=0)
    counts = chunk_counts[chosen].masked_fill(documents < 0, 0)  # [B, K]
    row_ends = counts.cumsum(1)
    totals = row_ends[:, -1:]
    slot = torch.arange(int(totals.max()), device=keys.device).expand(len(documents), -1)
    mask = slot < totals
    # which of the row's documents a slot belongs to, and which of its chunks it is
    rank = torch.searchsorted(row_ends, slot.contiguous(), right=True)
    rank = rank.clamp(max=documents.shape[1] - 1)
    first_slot = (row_ends - counts).gather(1, rank)
    first_chunk = (ends - chunk_counts)[chosen.gather(1, rank)]
    index = (first_chunk + slot - first_slot).masked_fill(~mask, 0)
    return Content(keys[index], values[index], mask)


def local_mask(
    num_queries: int, attention_mask: Tensor | None, num_keys: int, device: torch.device
) -> Tensor:
    """Causal mask over the local keys, without padding.

    A padding query sees itself, so that its softmax is defined.

    Args:
        num_queries: T, the last T of the S keys.
        attention_mask: [B, S], 0 for padding; or None.
        num_keys: S.
        device: where the mask is made.

    Returns:
        [B or 1, T, S] bool.
    """
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)
    causal = (key <= query)[None]
    if attention_mask is None:
        return causal
    return causal & attention_mask[:, None, :].bool() | (key == query)


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A row of a batch as it would be alone, without the padding that others bring.

    Attributes:
        tokens: query tokens of its own, the last ones; 0 for none.
        keys: local keys of its own.
        mask: [1, tokens, number of keys] bool, or None; see `attend`.
    """

    tokens: int
    keys: slice | Tensor
    mask: Tensor | None


def rows_alone(attention_mask: Tensor, num_queries: int) -> list[BatchRow] | None:
    """Every row of a batch by itself.

    Args:
        attention_mask: [B, S], 0 for padding, wherever it is.
        num_queries: T, the last T of the S keys.

    Returns:
        None if the queries are padded elsewhere than in front.
    """
    used = attention_mask.bool()
    counts = used[:, -num_queries:].sum(dim=1).tolist()
    rows = []
    for row, tokens in zip(used, counts, strict=True):
        if not bool(row[len(row) - tokens :].all()):
            return None
        keys = row.nonzero()[:, 0]
        total, first = len(keys), int(keys[0]) if len(keys) else 0
        mask = None
        if 1 < tokens < total:
            mask = local_mask(tokens, None, total, row.device)
        ends_together = first + total == len(row)
        rows.append(BatchRow(tokens, slice(first, None) if ends_together else keys, mask))
    return rows


def memory_mask_of(mask: Tensor, content: Content, memory_mask: Tensor | None) -> Tensor:
    """Put the memory rows in front of a local mask.

    Args:
        mask: [B or 1, T, S] bool.
        content: M memory rows.
        memory_mask: [B, T] bool, False for tokens that see no memory; None if all see it.

    Returns:
        [B, T, M + S] bool.
    """
    batch, rows = content.mask.shape
    sees = content.mask[:, None, :].expand(batch, mask.shape[1], rows)
    if memory_mask is not None:
        sees = sees & memory_mask[:, :, None]
    return torch.cat([sees, mask.expand(batch, -1, -1)], dim=2)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Softmax attention with grouped heads.

    Args:
        queries: [B, T, H, D].
        keys, values: [B, S, G, D], H a multiple of G.
        mask: [B or 1, T, S] bool; None for causal attention with S = T, or for a single token that
            sees all keys.
        scaling: factor of the scores.

    Returns:
        [B, T, H, D].

    Source: MSA 3.2.1, Eq. 3 and 4, with the concatenation made by the caller.
    """
    if queries.shape[1] == 1 and queries.device.type == "cpu" and queries.dtype.itemsize < 4:
        return _attend_once(queries, keys, values, mask, scaling)
    out = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=None if mask is None else mask[:, None],
        is_causal=mask is None and queries.shape[1] > 1,
        scale=scaling,
        enable_gqa=queries.shape[2] != keys.shape[2],
    )
    return out.transpose(1, 2)


def _attend_once(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """`attend` for a single token, T = 1, in two products of float32.

    On a CPU in bfloat16 torch's fused kernel takes six times as long for one token, and products
    in bfloat16 are compiled anew for every number of keys.
    """
    batch, _, heads, dim = queries.shape
    groups = keys.shape[2]
    grouped = queries.reshape(batch, groups, heads // groups, dim).float()
    scores = grouped @ keys.float().permute(0, 2, 3, 1) * scaling  # [B, G, H/G, S]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    out = scores.softmax(dim=-1) @ values.float().transpose(1, 2)
    return out.to(queries.dtype).reshape(batch, 1, heads, dim)
