"""How much a bank's precision changes what is selected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from msa.inference.batch import prompt_batch
from msa.inference.decoding import prefill
from msa.memory.ingest.encoder import DocumentEncoder
from msa.memory.latent import LatentMemory
from msa.ops.quantization import unpack
from msa.types import LatentStates, LayerStates

if TYPE_CHECKING:
    from msa.memory.bank import MemoryBank

SAMPLE_DOCUMENTS = 256
SAMPLE_QUESTIONS = 48
QUESTION_WORDS = 16


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a bank's precision keeps of the selection.

    Attributes:
        precision: of the content, and of the other states when that differs.
        documents, questions: of the sample.
        by_layer: routing layer -> share of the documents selected at the model's own precision that
            are selected at the bank's too.
    """

    precision: str
    documents: int
    questions: int
    by_layer: dict[int, float]

    @property
    def selected(self) -> float:
        """Mean over routing layers."""
        return sum(self.by_layer.values()) / max(len(self.by_layer), 1)


def selection_agreement(
    bank: MemoryBank,
    documents: int = SAMPLE_DOCUMENTS,
    questions: int = SAMPLE_QUESTIONS,
) -> Agreement:
    """Ask a sample of a bank at the model's precision and at the bank's, and compare.

    Documents are drawn evenly from the whole bank and encoded twice; the questions are the first
    words of some of them. Every layer selects its own documents, and the later ones see the content
    of the earlier, so that errors of the content count too.

    Args:
        bank: open, with its model; at least one document.
        documents: size of the sample; all if the bank has fewer.
        questions: how many are asked.

    Source: ours.
    """
    assert bank.model is not None
    assert bank.tokenizer is not None
    manifest, model = bank.manifest, bank.model
    count = min(documents, len(bank))
    offsets = [len(bank) * i // count for i in range(count)]
    sample = [bank.documents(1, offset)[0] for offset in offsets]
    encode = DocumentEncoder(model, bank.tokenizer, bank.template, dtype=model.dtype)
    stored = DocumentEncoder(
        model, bank.tokenizer, bank.template, dtype=manifest.torch_dtype, packed=manifest.packed
    )
    pairs = [(s.number, s.document) for s in sample]
    exact = _joined(encode, pairs, None, model.dtype)
    rounded = _joined(stored, pairs, manifest.packed, model.dtype)
    asked = sample[:: max(1, count // questions)][:questions]
    texts = [" ".join(s.document.content.split()[:QUESTION_WORDS]) for s in asked]
    found = [list(_selected(bank, states, texts)) for states in (exact, rounded)]
    shares: dict[int, list[float]] = {layer: [] for layer in manifest.routing_layers}
    for one, other in zip(*found, strict=True):
        for layer, wanted in one.items():
            shares[layer].append(len(wanted & other[layer]) / len(wanted))
    name = manifest.content_dtype
    return Agreement(
        name if manifest.packed is None else f"{name}, routing keys {manifest.dtype}",
        count,
        len(texts),
        {layer: sum(s) / len(s) for layer, s in shares.items()},
    )


def _joined(
    encoder: DocumentEncoder,
    documents: Sequence[tuple[int, object]],
    packed: str | None,
    dtype: torch.dtype,
) -> LatentStates:
    """States of documents as of one batch, in a float dtype, as they are asked."""
    batches = list(encoder.encode(documents))  # type: ignore[arg-type]
    layers = {}
    for layer in batches[0].states.layers:
        parts = [b.states.layers[layer] for b in batches]
        content = [
            torch.cat([getattr(p, name) for p in parts])
            for name in ("pooled_keys", "pooled_values")
        ]
        keys, values = (
            unpack(t, packed, dtype) if packed is not None else t.to(dtype) for t in content
        )
        layers[layer] = LayerStates(keys, values, torch.cat([p.routing_keys for p in parts]))
    return LatentStates(torch.cat([b.states.chunk_counts for b in batches]), layers)


@torch.no_grad()
def _selected(
    bank: MemoryBank, states: LatentStates, questions: Sequence[str]
) -> Iterator[dict[int, set[int]]]:
    """Per question: routing layer -> rows selected in round 1."""
    model = bank.model
    assert model is not None
    assert bank.tokenizer is not None
    encoder = DocumentEncoder(model, bank.tokenizer, bank.template).prompts
    top_k = model.config.top_k_documents
    device = model.device
    moved = LatentStates(
        states.chunk_counts.to(device),
        {
            i: LayerStates(
                s.pooled_keys.to(device), s.pooled_values.to(device), s.routing_keys.to(device)
            )
            for i, s in states.layers.items()
        },
    )
    model.eval()
    for text in questions:
        memory = LatentMemory(moved, top_k)
        batch = prompt_batch([encoder.context(text)], top_k, 0, device)
        selections = prefill(model, batch, memory).selections
        assert selections is not None
        yield {layer: set(s.documents[0].tolist()) - {-1} for layer, s in selections.items()}
