"""The search of one routing layer: what an index answers, and the one that scores every key.

`LoadedBank` and its shares know `LayerIndex` alone. `FlatIndex` reads all keys;
`msa.memory.search.clustered_index.ClusteredIndex` those that can matter.

Shapes: B batch, T vectors per question (its routing tokens, or one that they are pooled to),
N documents, C chunks, G KV heads, D head dim, K documents per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from msa.memory.search.layer_keys import LayerKeys
from msa.ops.kernels import route_documents
from msa.types import Selection


class LayerIndex(ABC):
    """The documents of one routing layer in one state of a bank, to be searched.

    An index does not change, so views may share it; `followed` gives that of a later state.

    Attributes:
        keys: the routing keys of the layer.
    """

    def __init__(self, keys: LayerKeys) -> None:
        self.keys = keys

    @property
    def num_bytes(self) -> int:
        """Memory in use, the keys and all copies of them included."""
        return self.keys.num_bytes

    @torch.no_grad()
    def search(
        self,
        vectors: Tensor,
        routing_mask: Tensor,
        top_k: int,
        document_mask: Tensor | None = None,
    ) -> Selection:
        """The top-k documents of every row of a batch, by the best score of a vector and a chunk.

        Args:
            vectors: [B, T, G*D] float32, of `msa.ops.routing.reduce_queries`: a vector per routing
                token, or a single one (T = 1); on the device of the keys.
            routing_mask: [B, T] bool.
            top_k: k >= 1.
            document_mask: [N] bool, or [B, N]; False for documents that must not be chosen.

        Returns:
            Selection with K = min(top_k, N), best first, equal scores in favor of the lower row;
            that of `msa.ops.routing.route_documents`, except among scores within 1e-5.

        Raises:
            InputError: shapes that do not belong together, top_k below 1.
            BankCorruptError: a candidate's key on disk is not what was loaded (int8 keys).

        Source: MSA 3.2.1, Eq. 2.
        """
        wanted = self.keys.num_candidates(top_k)
        found = self._found(vectors, routing_mask, wanted, document_mask)
        return self.keys.rescored(vectors, routing_mask, found, top_k)

    @abstractmethod
    def _found(
        self, vectors: Tensor, routing_mask: Tensor, top_k: int, document_mask: Tensor | None
    ) -> Selection:
        """As `search`, by the keys in memory."""

    @abstractmethod
    def followed(self, keys: LayerKeys) -> LayerIndex:
        """The index of the same layer of a bank that has grown.

        Args:
            keys: of the whole layer; those of this index are the first of them.
        """


class FlatIndex(LayerIndex):
    """Scores every key, in one pass for all questions of a batch."""

    def _found(
        self, vectors: Tensor, routing_mask: Tensor, top_k: int, document_mask: Tensor | None
    ) -> Selection:
        keys = self.keys
        return route_documents(
            vectors, routing_mask, keys.keys, keys.counts, top_k, document_mask, keys.scales
        )

    def followed(self, keys: LayerKeys) -> FlatIndex:
        """The index of these keys."""
        return FlatIndex(keys)
