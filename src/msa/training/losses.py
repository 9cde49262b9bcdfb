"""Losses: the auxiliary routing loss (Eq. 5) and the language model's.

Shapes: B batch, T tokens, N documents, V vocabulary, E hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def routing_loss(
    scores: Tensor,
    positives: Tensor,
    temperature: float | Tensor,
    ignored: Tensor | None = None,
) -> Tensor:
    """Contrastive loss over document scores, in which positives do not compete.

    Args:
        scores: [B, N] document scores of one routing layer (Eq. 2).
        positives: [B, N] bool. Rows without a positive count nothing.
        temperature: τ.
        ignored: [B, N] bool, documents that are no negatives either: those that were read
            already. The question still asks for them, and they cannot be named again.

    Returns:
        Scalar float32, mean over rows of the mean over their positives of
        -log(exp(s_i / τ) / (exp(s_i / τ) + Σ over negatives exp(s_j / τ))).

    Source: MSA 3.3.1, Eq. 5.
    """
    counts = positives.sum(dim=1)
    # a row without a positive may hold -inf alone, whose gradient would be NaN
    logits = scores.float().masked_fill(counts[:, None] == 0, 0.0) / temperature
    left_out = positives if ignored is None else positives | ignored
    negatives = logits.masked_fill(left_out, -torch.inf).logsumexp(dim=1, keepdim=True)
    losses = torch.logaddexp(logits, negatives) - logits
    per_row = losses.masked_fill(~positives, 0).sum(dim=1) / counts.clamp(min=1)
    rows = (counts > 0).sum().clamp(min=1)
    return per_row.sum() / rows


def language_model_loss(
    hidden: Tensor, labels: Tensor, head: nn.Module, weights: Tensor | None = None
) -> Tensor:
    """Cross entropy of the next token, with logits made only where there is a label.

    Args:
        hidden: [B, T, E] after the final norm.
        labels: [B, T] int64, -100 for tokens that are not predicted.
        head: the language model head, E -> V.
        weights: [B, T] float weights of the labels; by default 1.

    Returns:
        Scalar float32: the weighted mean; 0 when nothing is labelled.
    """
    targets = labels[:, 1:]
    wanted = targets != -100
    logits = head(hidden[:, :-1][wanted]).float()
    losses = nn.functional.cross_entropy(logits, targets[wanted], reduction="none")
    factor = torch.ones_like(losses) if weights is None else weights[:, 1:][wanted]
    return (losses * factor).sum() / factor.sum().clamp(min=1e-6)
