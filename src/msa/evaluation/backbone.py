"""Mean-pooled hidden states of the model itself, as a dense retriever.

Shapes: N texts, L tokens of the longest, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from msa.evaluation.retrieval import Progress, Scores, cached_embeddings
from msa.memory.ingest.encoder import DEFAULT_BATCH_TOKENS, length_buckets
from msa.model.checkpoint import Checkpoint
from msa.model.identity import model_fingerprints
from msa.types import Document


class BackboneRetriever:
    """Cosine between mean-pooled final hidden states, every text alone and without the template.

    Args:
        checkpoint: the model; as without a memory.
        documents: the corpus.
        batch_tokens: of texts of similar length, padding included.
        progress: while the corpus is encoded.
        cache: folder where embeddings of a corpus are kept, by a hash of model and texts.
    """

    name = "backbone"

    def __init__(
        self,
        checkpoint: Checkpoint,
        documents: Sequence[Document],
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        progress: Progress | None = None,
        cache: str | Path | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._batch_tokens = batch_tokens
        texts = [document.content for document in documents]
        self._documents = cached_embeddings(
            lambda: f"pooled states {model_fingerprints(checkpoint.model)}",
            texts,
            cache,
            lambda: self._embedded(texts, progress),
        )

    def scores(self, questions: Sequence[str]) -> Scores:
        """[Q, N] float32 cosines."""
        found: Scores = self._embedded(questions, None) @ self._documents.T
        return found

    @torch.no_grad()
    def _embedded(self, texts: Sequence[str], progress: Progress | None) -> Scores:
        """[N, E] float32, unit length; texts that are too long for the model are cut."""
        model, tokenizer = self._checkpoint.model, self._checkpoint.tokenizer
        longest = model.config.max_position_embeddings
        ids = [tokenizer.encode(text, add_special_tokens=False)[:longest] or [0] for text in texts]
        found = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
        done = 0
        for batch in length_buckets(list(enumerate(ids)), self._batch_tokens):
            width = len(batch[-1][1])
            tokens = torch.tensor([[*row, *[0] * (width - len(row))] for _, row in batch])
            lengths = torch.tensor([len(row) for _, row in batch])
            hidden = model.model.encode(
                tokens.to(model.device), lengths.to(model.device), with_hidden=True
            )[1]
            assert hidden is not None
            weights = (torch.arange(width) < lengths[:, None]).float()[..., None]
            pooled = F.normalize((hidden.float().cpu() * weights).sum(1), dim=-1)
            found[[row for row, _ in batch]] = pooled.numpy()
            done += len(batch)
            if progress is not None:
                progress(done, len(texts))
        return found
