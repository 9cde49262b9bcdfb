"""How well a model routes over a whole corpus: every document's score in every routing layer.

A bank selects k documents per layer; here all documents are scored, so that ranks of gold documents
are known however low they are. Round 1 only: the question as it routes before anything was read.

Shapes: Q questions, N documents, C chunks, G KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from msa.evaluation.retrieval import Progress, Scores, z_scores
from msa.inference.batch import prompt_batch
from msa.inference.decoding import prefill
from msa.memory.ingest.encoder import DEFAULT_BATCH_TOKENS, DocumentEncoder
from msa.memory.latent import LatentMemory
from msa.model.checkpoint import Checkpoint
from msa.text.prompts import PromptEncoder
from msa.types import Document, LatentStates, LayerStates

QUESTION_BATCH = 32


def encode_corpus(
    checkpoint: Checkpoint,
    documents: Sequence[Document],
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: Progress | None = None,
) -> LatentStates:
    """Latent states of a corpus in memory, document i with the number i + 1; none is split.

    Args:
        checkpoint: encodes, in its model's dtype.
        documents: the corpus.
        batch_tokens: of a batch of documents of similar length, padding included.
        progress: called with the tokens encoded so far, and all of them.
    """
    encoder = DocumentEncoder(checkpoint.model, checkpoint.tokenizer, checkpoint.template)
    tokens = [(i + 1, encoder.tokens(i + 1, d)) for i, d in enumerate(documents)]
    whole, done = sum(len(ids) for _, ids in tokens), 0
    batches = []
    for batch in encoder.encode_tokens(tokens, batch_tokens):
        batches.append(batch)
        done += sum(len(tokens[number - 1][1]) for number in batch.numbers)
        if progress is not None:
            progress(done, whole)
    numbers = torch.tensor([number for batch in batches for number in batch.numbers])
    counts = torch.cat([batch.states.chunk_counts for batch in batches])
    order = numbers.argsort()
    firsts = counts.cumsum(0) - counts
    chunks = torch.cat(
        [
            torch.arange(int(f), int(f + c))
            for f, c in zip(firsts[order], counts[order], strict=True)
        ]
    )
    layers = {}
    for layer in batches[0].states.layers:
        parts = [batch.states.layers[layer] for batch in batches]
        layers[layer] = LayerStates(
            torch.cat([p.pooled_keys for p in parts])[chunks],
            torch.cat([p.pooled_values for p in parts])[chunks],
            torch.cat([p.routing_keys for p in parts])[chunks],
        )
    return LatentStates(counts[order], layers)


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
        states: of the corpus, of `encode_corpus`.
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
