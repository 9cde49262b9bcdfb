"""Encoding (stage 1) beside the plain backbone's forward on the same batches.

Shapes: N documents of a batch, L tokens of its longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from measuring.report import Report, Row
from measuring.timing import REPEATS, Note, Run, machine, seconds, side_by_side
from msa.memory.ingest.encoder import DEFAULT_BATCH_TOKENS, DocumentEncoder, Tokens, length_buckets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from msa.model.modeling_msa import MSAForCausalLM

Batch = tuple[Tensor, Tensor]
SHORTEST, LONGEST = 32, 512
MAX_SECONDS = 60.0


def random_documents(count: int, vocabulary: int, longest: int, seed: int) -> list[Tokens]:
    """Numbers and token ids of documents; lengths spread evenly on a logarithmic scale."""
    generator = torch.Generator().manual_seed(seed)
    shortest = min(SHORTEST, longest)
    spread = torch.rand(count, generator=generator)
    lengths = (shortest * (longest / shortest) ** spread).round().long().tolist()
    return [
        (i + 1, torch.randint(0, vocabulary, (length,), generator=generator).tolist())
        for i, length in enumerate(lengths)
    ]


def in_order(documents: Sequence[Tokens], batch_tokens: int) -> Iterator[list[Tokens]]:
    """Batches in the order given: what bucketing by length is compared with."""
    batch: list[Tokens] = []
    for item in documents:
        longest = max(len(ids) for _, ids in [*batch, item])
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def padded(batches: Iterable[Sequence[Tokens]], device: torch.device) -> list[Batch]:
    """Right-padded ids [N, L] and lengths [N] of every batch."""
    found = []
    for batch in batches:
        lengths = [len(ids) for _, ids in batch]
        rows = [[*ids, *([0] * (max(lengths) - len(ids)))] for _, ids in batch]
        found.append((torch.tensor(rows).to(device), torch.tensor(lengths).to(device)))
    return found


def backbone_forward(model: MSAForCausalLM, ids: Tensor) -> Tensor:
    """The plain backbone with the model's weights: hidden states [N, L, E], no logits.

    Without a memory the model is its backbone (`test_without_memory_the_model_is_its_backbone`).
    """
    from msa.model.modeling_msa import Step

    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    hidden: Tensor = model.model(model.model.embed_tokens(ids), positions, Step())
    return hidden


def encoding(
    model: MSAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "default model",
    documents: int = 400,
    longest: int = LONGEST,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    compiled: bool = False,
    repeats: int = REPEATS,
    seed: int = 0,
    note: Note = lambda _: None,
) -> Report:
    """Tokens per second of encoding and of the plain backbone's forward, in turns.

    Args:
        model: in evaluation mode, on the device to be measured.
        tokenizer: the model's.
        name: of the model, for people.
        documents: how many, of random tokens.
        longest: tokens of a document, at most.
        batch_tokens: N * L of a batch.
        compiled: measure the encoder under `torch.compile`, too.
        repeats: passes over all documents of each, in turns; medians are reported.
        seed: of the documents.
        note: told what is measured next.
    """
    device = model.device
    longest = min(longest, int(model.config.max_position_embeddings))
    items = random_documents(documents, model.config.vocab_size, longest, seed)
    tokens = sum(len(ids) for _, ids in items)
    arrival = padded(in_order(items, batch_tokens), device)
    bucketed = padded(length_buckets(items, batch_tokens), device)
    encoder = DocumentEncoder(model, tokenizer)

    def every(batches: list[Batch], call: Callable[[Tensor, Tensor], Any]) -> Run:
        def run() -> None:
            for ids, lengths in batches:
                call(ids, lengths)

        return run

    runs: dict[str, Run] = {
        "backbone": every(bucketed, lambda ids, _: backbone_forward(model, ids)),
        "encode": every(bucketed, model.encode_documents),
        "encoder": lambda: [None for _ in encoder.encode_tokens(items, batch_tokens)],
        "arrival_order": every(arrival, model.encode_documents),
    }
    if compiled:
        fast: Any = torch.compile(model.encode_documents, dynamic=True)
        runs["compiled"] = every(bucketed, fast)
    compiling = None
    with torch.inference_mode():
        if compiled:
            note("compiling")
            compiling = seconds(runs["compiled"], device)
        note(f"{documents} documents, {tokens:,} tokens")
        times = side_by_side(runs, device, repeats, MAX_SECONDS)
    report = Report("encoding", machine(device))
    report.settings |= {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "document tokens": f"{min(SHORTEST, longest)} to {longest}",
        "batch tokens": batch_tokens,
        "seed": seed,
        "repeats": repeats,
    }
    report.rows.append(_row(tokens, documents, bucketed, arrival, times))
    if compiling is not None:
        report.rows[0]["compiling_seconds"] = compiling
    report.notes.append(
        "`backbone`: all layers on the same padded batches, same weights, no logits. `encode`: "
        "`encode_documents` on these batches. `encoder`: `DocumentEncoder`, from token ids to "
        "checked states on the CPU. `arrival order`: `encode_documents` on batches that are not "
        "sorted by length."
    )
    return report


def _row(
    tokens: int,
    documents: int,
    bucketed: list[Batch],
    arrival: list[Batch],
    times: dict[str, float],
) -> Row:
    row: Row = {"tokens": tokens, "documents": documents, "batches": len(bucketed)}
    row |= {f"{name}_tokens_per_second": tokens / t for name, t in times.items()}
    row |= {
        f"{name}_over_backbone_ratio": times["backbone"] / t
        for name, t in times.items()
        if name != "backbone"
    }
    for name, batches in (("bucketed", bucketed), ("arrival_order", arrival)):
        row[f"{name}_padding_share"] = 1 - tokens / sum(ids.numel() for ids, _ in batches)
    return row
