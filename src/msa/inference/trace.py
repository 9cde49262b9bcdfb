"""What was routed: a memory reader that takes notes, and the candidates of every question."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msa.errors import ModelError
from msa.inference.fusion import Fused, fuse
from msa.inference.options import AskOptions
from msa.inference.snapshot import QuerySnapshot
from msa.memory.store.word_index import LexicalQuery
from msa.types import Content, MemoryReader, Selection


class CandidateReader:
    """A `MemoryReader` that keeps every layer's candidates, and shows the model the best of them.

    The fused ranking looks deeper than the model does: a layer lists as many candidates as the
    memory selects, while the model attends to the `visible` best.

    Attributes:
        selections: routing layer -> all of its candidates.
        seconds: time that routing took.
    """

    def __init__(self, memory: MemoryReader, visible: int) -> None:
        """Wrap a memory.

        Args:
            memory: does the work.
            visible: documents per layer and row whose content the model gets.
        """
        self._memory = memory
        self._visible = visible
        self._sound: dict[int, Tensor] = {}
        self.selections: dict[int, Selection] = {}
        self.seconds = 0.0

    def route(self, layer: int, vectors: Tensor, routing_mask: Tensor) -> Selection:
        """The best of what the memory selects."""
        start = time.perf_counter()
        self._sound[layer] = (vectors.isfinite().all(dim=-1) | ~routing_mask).all()
        selection = self._memory.route(layer, vectors, routing_mask)
        self.seconds += time.perf_counter() - start
        self.selections[layer] = selection
        best = slice(None, self._visible)
        return Selection(selection.documents[:, best], selection.scores[:, best])

    def content(self, layer: int, selection: Selection) -> Content:
        """Fetch what the memory holds."""
        return self._memory.content(layer, selection)

    def check(self) -> None:
        """Refuse what was routed by vectors that are not numbers: no document is found by those.

        Raises:
            ModelError: with the first layer of which this is so.
        """
        layers = sorted(self._sound)
        sound = torch.stack([self._sound[layer] for layer in layers]).tolist() if layers else []
        for layer, fine in zip(layers, sound, strict=True):
            if not fine:
                raise ModelError(
                    f"Routing queries of layer {layer} are NaN or infinite: the model's weights "
                    "are damaged, or overflow in this dtype. Load the checkpoint again, or in "
                    "float32."
                )

    def rows(self) -> list[dict[int, list[tuple[int, float]]]]:
        """Per row of the batch: routing layer -> (memory row, score), best first.

        Raises:
            ModelError: see `check`.
        """
        self.check()
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


@dataclass(frozen=True, slots=True)
class Candidates:
    """The documents that came up for one question, by number.

    Attributes:
        layers: routing layer -> (number, score of Eq. 2), best first.
        fused: the ranking of them all, best first.
    """

    layers: dict[int, list[tuple[int, float]]]
    fused: dict[int, Fused]


def candidates(
    reader: CandidateReader,
    snapshot: QuerySnapshot,
    options: AskOptions,
    queries: Sequence[LexicalQuery],
) -> list[Candidates]:
    """What every question of a batch was routed to.

    Args:
        reader: through which the batch was prefilled.
        snapshot: of the same memory.
        options: as asked.
        queries: per question, what words are looked for when `lexical_weight` is above 0.

    Raises:
        ModelError: it was routed by vectors that are not numbers.
        LexicalIndexError: see `QuerySnapshot.lexical`.
    """
    batch = reader.rows()
    rows = sorted({row for layers in batch for found in layers.values() for row, _ in found})
    numbers = dict(zip(rows, snapshot.numbers(rows), strict=True))
    lexical = None
    if options.lexical_weight > 0:
        lexical = snapshot.lexical(queries, options.candidates)
    all_candidates = []
    for i, layers in enumerate(batch):
        named = {layer: [(numbers[r], s) for r, s in found] for layer, found in layers.items()}
        fused = fuse(
            named,
            temperature=options.prior_temperature,
            layer_weights=options.layer_weights,
            lexical=lexical[i] if lexical is not None else None,
            lexical_weight=options.lexical_weight,
        )
        all_candidates.append(Candidates(named, fused))
    return all_candidates
