"""How well a model routes over a whole corpus: every document's score in every routing layer.

A bank selects k documents per layer; here all documents are scored, so that ranks of gold documents
are known however low they are. Round 1 only: the question as it routes before anything was read.

Shapes: Q questions, N documents, C chunks, G KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from msa.evaluation.retrieval import Scores, z_scores
from msa.inference.batch import prompt_batch
from msa.inference.decoding import prefill
from msa.memory.bank import MemoryBank
from msa.memory.latent import LatentMemory
from msa.memory.store.segments import Segment
from msa.model.checkpoint import Checkpoint
from msa.ops.ragged import ragged_range
from msa.text.prompts import PromptEncoder
from msa.types import Document, LatentStates, LayerStates

QUESTION_BATCH = 32


def bank_states(bank: MemoryBank, documents: Sequence[Document]) -> LatentStates:
    """All latent states of a bank, in memory; the parts of a document that was split are one.

    Args:
        bank: holds all of `documents`; others are left out.
        documents: in the order of the rows of the result.
    """
    rows = {document.id: row for row, document in enumerate(documents)}
    layers = bank.manifest.routing_layers
    order: list[tuple[int, int, int]] = []  # row, number and place of every stored document
    batches = []
    for entry in bank.catalog.snapshot().segments:
        segment = Segment(bank.segments_folder, entry, layers)
        part = segment.routing_part()
        batches.append(segment.select(torch.arange(len(part.numbers)), part))
        ids = bank.ids(part.numbers.tolist())
        for number in part.numbers.tolist():
            name = ids.get(number, "")  # of a deleted document there is none
            row = rows.get(name, rows.get(name.rpartition("#")[0]))
            order.append((len(rows) if row is None else row, number, len(order)))
    counts = torch.cat([batch.states.chunk_counts for batch in batches])
    kept = [place for row, _, place in sorted(order) if row < len(rows)]
    of_row = torch.tensor([row for row, _, _ in sorted(order) if row < len(rows)])
    firsts = (counts.cumsum(0) - counts)[kept]
    chunks = ragged_range(firsts, counts[kept])
    totals = torch.zeros(len(rows), dtype=torch.int64).index_add(0, of_row, counts[kept])

    def joined(layer: int, name: str) -> Tensor:
        return torch.cat([getattr(b.states.layers[layer], name) for b in batches])[chunks]

    names = ("pooled_keys", "pooled_values", "routing_keys")
    return LatentStates(totals, {i: LayerStates(*(joined(i, n) for n in names)) for i in layers})


@torch.no_grad()
def layer_scores(
    checkpoint: Checkpoint,
    states: LatentStates,
    questions: Sequence[str],
    *,
    batch_size: int = QUESTION_BATCH,
) -> dict[int, Scores]:
    """Document scores (Eq. 2) of questions in every routing layer.

    Every layer sees what the layers below selected, as when a bank is asked.

    Args:
        checkpoint: the model, with its tokenizer and text format.
        states: of the corpus, of `bank_states`.
        questions: as asked.
        batch_size: questions in one forward.

    Returns:
        Routing layer -> [Q, N] float32.
    """
    model = checkpoint.model
    prompts = PromptEncoder(checkpoint.tokenizer, checkpoint.template)
    contexts = [prompts.context(question) for question in questions]
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i].input_ids))
    shape = (len(questions), len(states.chunk_counts))
    found = {layer: np.empty(shape, dtype=np.float32) for layer in states.layers}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        memory = LatentMemory(states, model.config.top_k_documents)
        batch = prompt_batch(
            [contexts[i] for i in rows], model.config.top_k_documents, 0, model.device
        )
        prefill(model, batch, memory, routing_only=True)
        for layer, scores in memory.scores.items():
            found[layer][rows] = scores.numpy()
    return found


def fuse(
    layers: Mapping[int, Scores],
    weights: Mapping[int, float] | None = None,
    *,
    normalized: bool = False,
) -> Scores:
    """One score per document: the (weighted) sum of its scores over the layers.

    Args:
        layers: routing layer -> [Q, N].
        weights: layer -> weight, 0 for layers not named; all 1 by default.
        normalized: add z-scores per question instead of the scores themselves.

    Returns:
        [Q, N] float32.
    """
    weights = dict.fromkeys(layers, 1.0) if weights is None else weights
    total = sum(
        weights.get(layer, 0.0) * (z_scores(scores) if normalized else scores)
        for layer, scores in layers.items()
    )
    return np.asarray(total, dtype=np.float32)
