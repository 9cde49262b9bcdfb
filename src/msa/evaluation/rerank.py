"""A reranker that needs no other model: how likely the backbone finds the question after a text."""

from __future__ import annotations

from collections.abc import Sequence

from msa.inference.judging import judge, make_trials
from msa.model.checkpoint import Checkpoint
from msa.text.prompts import PromptEncoder

BATCH_SIZE = 8


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
        positions = self._model.config.max_position_embeddings
        tried = make_trials(self._encoder, question, texts, positions)
        scores: list[float] = []
        for start in range(0, len(tried), BATCH_SIZE):
            scores += judge(self._model, tried[start : start + BATCH_SIZE], self._pad)
        best = sorted(range(len(tried)), key=lambda i: -scores[i])
        return best or list(range(len(texts))), sum(map(len, tried))
