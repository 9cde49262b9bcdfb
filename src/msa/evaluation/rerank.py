"""A reranker that needs no other model: how likely the backbone finds the question after a text.

Shapes: B texts, T tokens of the longest with the question, S tokens of the question, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msa.model.checkpoint import Checkpoint
from msa.text.prompts import PromptEncoder

MAX_TEXT_TOKENS = 512
"""Longer texts are cut there."""
BATCH_SIZE = 8
BEFORE_QUESTION = "\nQuestion: "


class Reranker:
    """Orders texts by log p(question | text) of the plain backbone: no memory, no template.

    Args:
        checkpoint: the model.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._model = checkpoint.model
        self._encoder = PromptEncoder(checkpoint.tokenizer, checkpoint.template)
        pad = checkpoint.tokenizer.pad_token_id
        self._pad = 0 if pad is None else int(pad)

    def order(self, question: str, texts: Sequence[str]) -> tuple[list[int], int]:
        """Places of the texts, likeliest first, and how many tokens were read for it."""
        asked = self._encoder.plain(question)
        between = self._encoder.plain(BEFORE_QUESTION)
        room = self._model.config.max_position_embeddings - len(asked) - len(between)
        limit = max(1, min(MAX_TEXT_TOKENS, room))
        rows = [[*self._encoder.plain(t)[:limit], *between, *asked] for t in texts]
        scores: list[float] = []
        for start in range(0, len(rows), BATCH_SIZE):
            scores += self._likelihoods(rows[start : start + BATCH_SIZE], len(asked)).tolist()
        best = sorted(range(len(texts)), key=lambda i: -scores[i])
        return best, sum(map(len, rows))

    @torch.no_grad()
    def _likelihoods(self, rows: Sequence[Sequence[int]], length: int) -> Tensor:
        """[B] float32: log-probability of the last `length` tokens of every row."""
        width = max(map(len, rows))
        padded = [[self._pad] * (width - len(row)) + list(row) for row in rows]
        ids = torch.tensor(padded, device=self._model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        mask = mask.to(ids.device)
        out = self._model(
            ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=length + 1,
            use_cache=False,
        )
        logits = out.logits[:, :-1].float().log_softmax(-1)  # [B, S, V]
        wanted = ids[:, -length:]
        found: Tensor = logits.gather(-1, wanted[..., None])[..., 0].sum(1)
        return found.cpu()
