"""Left-padded batches of local contexts. Shapes: B batch, T prompt tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msa.text.prompts import LocalContext


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids and marks of several rows, padded on the left.

    Attributes:
        input_ids: [B, T] int64.
        attention_mask: [B, T] int64, 0 for padding; None when there is none.
        position_ids: [B, T] int64; padding repeats the first position of its row.
        routing_mask, memory_mask: [B, T] bool, as `MSAForCausalLM.forward` takes them.
        next_positions: [B], position of the token that follows each row.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    routing_mask: Tensor
    memory_mask: Tensor
    next_positions: tuple[int, ...]

    @property
    def length(self) -> int:
        """Columns, T."""
        return self.input_ids.shape[1]


def prompt_batch(
    contexts: Sequence[LocalContext], top_k: int, pad_token: int, device: torch.device
) -> Batch:
    """Bring the prompts of one round together.

    Args:
        contexts: one per row.
        top_k: the model's own k, whatever is found: positions after the prefix start k later.
        pad_token: fills the left; masked everywhere.
        device: of the tensors.

    Source: MSA 3.2.2 (positions); left padding as the released code does it.
    """
    positions = [c.positions(top_k) for c in contexts]
    padded = len({len(c.input_ids) for c in contexts}) > 1
    ones = [[1] * len(c.input_ids) for c in contexts]
    return Batch(
        left_padded([c.input_ids for c in contexts], pad_token, device),
        left_padded(ones, 0, device) if padded else None,
        left_padded(positions, None, device),
        left_padded([c.routes for c in contexts], False, device).bool(),
        left_padded([c.sees_memory for c in contexts], False, device).bool(),
        tuple(row[-1] + 1 for row in positions),
    )


def left_padded(rows: Sequence[Sequence[int]], fill: int | None, device: torch.device) -> Tensor:
    """[B, T] int64, T the longest row; a `fill` of None repeats each row's first value."""
    length = max(len(row) for row in rows)
    padded = [
        [row[0] if fill is None else fill] * (length - len(row)) + [int(v) for v in row]
        for row in rows
    ]
    return torch.tensor(padded, dtype=torch.long, device=device)
