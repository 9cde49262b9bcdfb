"""Left-padded batches of local contexts, and their continuation behind a cache.

Shapes: B batch, T prompt tokens, S continuation tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msa.model.modeling_msa import MSAForCausalLM, MSAOutput
from msa.text.prompts import LocalContext
from msa.types import MemoryReader


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids and marks of several rows, padded on the left.

    Attributes:
        input_ids: [B, T] int64.
        attention_mask: [B, T] int64, 0 for padding.
        position_ids: [B, T] int64; padding repeats the first position of its row.
        routing_mask, memory_mask: [B, T] bool, as `MSAForCausalLM.forward` takes them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    routing_mask: Tensor
    memory_mask: Tensor

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
        top_k: the model's own k, whatever is found: positions behind the prefix start k later.
        pad_token: fills the left; masked everywhere.
        device: of the tensors.

    Source: MSA 3.2.2 (positions); left padding as the released code does it.
    """
    positions = [c.positions(top_k) for c in contexts]
    return Batch(
        _left_padded([c.input_ids for c in contexts], pad_token, device),
        _left_padded([[1] * len(c.input_ids) for c in contexts], 0, device),
        _left_padded(positions, None, device),
        _left_padded([c.routes for c in contexts], False, device).bool(),
        _left_padded([c.sees_memory for c in contexts], False, device).bool(),
    )


def read_prompts(model: MSAForCausalLM, prompts: Batch, memory: MemoryReader) -> MSAOutput:
    """One forward over whole prompts, nothing cached: what they select, and their last logits.

    Args:
        model: in whatever mode it is.
        prompts: of `prompt_batch`.
        memory: selected from in every routing layer.
    """
    out: MSAOutput = model(
        prompts.input_ids,
        attention_mask=prompts.attention_mask,
        position_ids=prompts.position_ids,
        memory=memory,
        routing_mask=prompts.routing_mask,
        memory_mask=prompts.memory_mask,
        logits_to_keep=1,
        use_cache=False,
    )
    return out


def continued(
    prompts: Batch, rows: Tensor, continuations: Sequence[Sequence[int]], pad_token: int
) -> Batch:
    """Some rows of a batch with more tokens behind their prompts.

    Continuations are padded on the left too, so that all rows end in the same column and can be
    generated from together; the padding between prompt and continuation is masked.

    Args:
        prompts: the batch whose cache is continued.
        rows: [b] int64, rows of `prompts`.
        continuations: [b] token ids, none empty. They do not route and see the memory.
        pad_token: fills the gaps.
    """
    device = prompts.input_ids.device
    starts = (prompts.position_ids[rows, -1] + 1).tolist()
    positions = [
        list(range(start, start + len(ids)))
        for start, ids in zip(starts, continuations, strict=True)
    ]
    ones = [[1] * len(ids) for ids in continuations]
    attention = _left_padded(ones, 0, device)

    def both(prompt: Tensor, continuation: Tensor) -> Tensor:
        return torch.cat([prompt[rows], continuation], dim=1)

    return Batch(
        both(prompts.input_ids, _left_padded(continuations, pad_token, device)),
        both(prompts.attention_mask, attention),
        both(prompts.position_ids, _left_padded(positions, None, device)),
        both(prompts.routing_mask, torch.zeros_like(attention, dtype=torch.bool)),
        both(prompts.memory_mask, attention.bool()),
    )


def _left_padded(rows: Sequence[Sequence[int]], fill: int | None, device: torch.device) -> Tensor:
    """[B, T] int64; `fill` of `None` repeats each row's first value."""
    length = max(len(row) for row in rows)
    padded = [
        [row[0] if fill is None else fill] * (length - len(row)) + [int(v) for v in row]
        for row in rows
    ]
    return torch.tensor(padded, dtype=torch.long, device=device)
