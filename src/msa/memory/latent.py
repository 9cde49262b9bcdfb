"""A memory held in plain tensors: for training, and for callers that have the states."""

from __future__ import annotations

from torch import Tensor

from msa.ops.attention import gather_content
from msa.ops.routing import document_scores, select_documents
from msa.types import Content, LatentStates, Selection


class LatentMemory:
    """A `MemoryReader` over the latent states of one call of `encode_documents`.

    Gradients flow through it: through the content into the documents' keys and values, and through
    `scores` into the router (Eq. 5).

    Attributes:
        scores: routing layer -> [B, N] float32 document scores of the last routing.
        last_token_scores: the same, with the last routing token of every row alone.
    """

    def __init__(
        self,
        states: LatentStates,
        top_k: int,
        *,
        with_last_token: bool = False,
    ) -> None:
        """Hold `states`.

        Args:
            states: of N documents.
            top_k: documents that a layer selects.
            with_last_token: fill `last_token_scores` too.
        """
        self.states = states
        self.top_k = top_k
        self.with_last_token = with_last_token
        self.scores: dict[int, Tensor] = {}
        self.last_token_scores: dict[int, Tensor] = {}
        self._is_closed = False

    def close(self) -> None:
        """Release the scores, and record no more: those that a backward pass computes again."""
        self.scores, self.last_token_scores, self._is_closed = {}, {}, True

    def route(self, layer: int, vectors: Tensor, routing_mask: Tensor) -> Selection:
        """Top-k documents of every row by Eq. 2."""
        keys = self.states.layers[layer].routing_keys
        counts = self.states.chunk_counts
        scores = document_scores(vectors, routing_mask, keys, counts)
        if not self._is_closed:
            self.scores[layer] = scores
        if self.with_last_token:
            later = routing_mask.flip(1).cumsum(1).flip(1)  # routing tokens from here on
            last = routing_mask & (later == 1)
            last_scores = document_scores(vectors, last, keys, counts)
            if not self._is_closed:
                self.last_token_scores[layer] = last_scores
        return select_documents(scores, self.top_k)

    def content(self, layer: int, selection: Selection) -> Content:
        """Pooled keys and values of the selected documents."""
        states = self.states.layers[layer]
        return gather_content(
            states.pooled_keys, states.pooled_values, self.states.chunk_counts, selection.documents
        )
