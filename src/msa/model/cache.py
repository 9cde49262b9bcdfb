"""The cache of a generation: local keys and values, and the memory that was selected for it."""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache

from msa.types import Content, Selection


class MSACache(DynamicCache):
    """A `DynamicCache` that also holds, per routing layer, the selected documents' content.

    Documents are chosen once, when a context is prefilled; every later token attends to the same
    content (paper 3.4), so a layer that has content here does not route again.

    Attributes:
        contents: routing layer -> content of the selected documents.
        selections: routing layer -> which documents these are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.contents: dict[int, Content] = {}
        self.selections: dict[int, Selection] = {}

    def remember(self, layer: int, selection: Selection, content: Content) -> None:
        """Keep what a layer selected."""
        self.selections[layer] = selection
        self.contents[layer] = content

    def truncate(self, length: int) -> None:
        """Forget all local tokens but the first `length`."""
        for layer in self.layers:
            layer.keys = layer.keys[:, :, :length]
            layer.values = layer.values[:, :, :length]

    def _select_memory(self, rows: Tensor) -> None:
        for layer, content in self.contents.items():
            self.contents[layer] = Content(
                content.keys[rows], content.values[rows], content.mask[rows]
            )
        for layer, selection in self.selections.items():
            self.selections[layer] = Selection(selection.documents[rows], selection.scores[rows])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch, [b] int64, in that order."""
        super().batch_select_indices(indices)
        self._select_memory(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        super().batch_repeat_interleave(repeats)
        for rows in [s.documents for s in self.selections.values()][:1]:
            index = rows.new_tensor(range(len(rows))).repeat_interleave(repeats)
            self._select_memory(index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, for beam search."""
        super().reorder_cache(beam_idx)
        self._select_memory(beam_idx)
