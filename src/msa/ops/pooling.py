"""φ: from tokens to chunks (paper section 3.2.1).

Shapes: N documents, L tokens (right-padded), C chunks of all documents in a row, G heads, D dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chunk_counts(lengths: Tensor, chunk_size: int) -> Tensor:
    """Number of chunks of each document.

    Args:
        lengths: [N] int64, tokens of each document, all >= 1.
        chunk_size: tokens per chunk, P.

    Returns:
        [N] int64; the last chunk of a document may be short.
    """
    return torch.div(lengths + (chunk_size - 1), chunk_size, rounding_mode="floor")


def pool_chunks(x: Tensor, lengths: Tensor, chunk_size: int) -> Tensor:
    """Mean over each chunk's true tokens, summed in float32.

    A chunk never spans documents, and the last one is divided by its true length.

    Args:
        x: [N, L, G, D], right-padded; what stands in the padding is ignored.
        lengths: [N] int64, true tokens of each document, 1 <= length <= L.
        chunk_size: tokens per chunk, P.

    Returns:
        [C, G, D] in the dtype of `x`, chunks in document order.

    Source: MSA 3.2.1 (mean pooling φ).
    """
    num_documents, num_tokens, num_heads, head_dim = x.shape
    padding = -num_tokens % chunk_size
    if padding:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding))
    chunks_per_row = (num_tokens + padding) // chunk_size
    token = torch.arange(num_tokens + padding, device=x.device)
    is_true = token < lengths[:, None]
    x = x.masked_fill(~is_true[:, :, None, None], 0)
    split = (num_documents, chunks_per_row, chunk_size)
    sums = x.view(*split, num_heads, head_dim).sum(dim=2, dtype=torch.float32)
    sizes = is_true.view(split).sum(dim=2)
    exists = sizes > 0
    return (sums[exists] / sizes[exists][:, None, None]).to(x.dtype)
