"""What was routed: a memory reader that takes notes, and the fusion of layers into one score."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from msa.errors import ModelError
from msa.types import Content, MemoryReader, Selection


def fuse_layers(
    layers: Mapping[int, Sequence[tuple[int, float]]], temperature: float = 0.1
) -> dict[int, float]:
    """One score per document from the documents that each layer selected.

    The mean over layers of each layer's softmax(score / temperature) over what it selected; a
    document that a layer did not select gets nothing from it. Ours: the layers' scores are not on
    one scale, their softmax is, and Eq. 5 trains exactly this softmax.

    Args:
        layers: routing layer -> (document, score of Eq. 2), each document once.
        temperature: tau of the softmax, above 0.

    Returns:
        Document -> score in (0, 1], best first; they sum to 1 (empty without documents).
    """
    fused: dict[int, float] = {}
    filled = [selected for selected in layers.values() if selected]
    for selected in filled:
        best = max(score for _, score in selected)
        weights = [math.exp((score - best) / temperature) for _, score in selected]
        share = 1.0 / (sum(weights) * len(filled))
        for (document, _), weight in zip(selected, weights, strict=True):
            fused[document] = fused.get(document, 0.0) + weight * share
    return dict(sorted(fused.items(), key=lambda item: (-item[1], item[0])))


class TracingReader:
    """A `MemoryReader` that notes what was selected, and how long routing took.

    It may route to more documents than the model is given: `retrieve(top_k)` lists as many as the
    caller wants, while the model sees the `visible` best, as when it is asked; what it sees in one
    layer decides what it looks for in the next.
    """

    def __init__(self, memory: MemoryReader, visible: int | None = None) -> None:
        """Wrap a memory.

        Args:
            memory: does the work.
            visible: documents per layer and row whose content the model gets; `None`: all routed.
        """
        self._memory = memory
        self._visible = visible
        self.selections: dict[int, Selection] = {}
        self.seconds = 0.0

    def route(self, layer: int, vectors: Tensor, routing_mask: Tensor) -> Selection:
        """Route as the memory does, and note the selection.

        Raises:
            ModelError: vectors are NaN or infinite; by their scores no document would be found.
        """
        start = time.perf_counter()
        if not bool(torch.isfinite(vectors[routing_mask]).all()):
            raise ModelError(
                f"Routing queries of layer {layer} are NaN or infinite: the model's weights are "
                "damaged, or overflow in this dtype. Load the checkpoint again, or in float32."
            )
        selection = self._memory.route(layer, vectors, routing_mask)
        self.seconds += time.perf_counter() - start
        self.selections[layer] = selection
        if self._visible is None:
            return selection
        best = slice(None, self._visible)
        return Selection(selection.documents[:, best], selection.scores[:, best])

    def content(self, layer: int, selection: Selection) -> Content:
        """Fetch what the memory holds."""
        return self._memory.content(layer, selection)

    def rows(self) -> list[dict[int, list[tuple[int, float]]]]:
        """Per row of the batch: routing layer -> (memory row, score), best first."""
        batch: list[dict[int, list[tuple[int, float]]]] = []
        for layer, selection in sorted(self.selections.items()):
            documents = selection.documents.tolist()
            scores = selection.scores.tolist()
            for i, (row, row_scores) in enumerate(zip(documents, scores, strict=True)):
                if i == len(batch):
                    batch.append({})
                pairs = zip(row, row_scores, strict=True)
                batch[i][layer] = [(document, score) for document, score in pairs if document >= 0]
        return batch
