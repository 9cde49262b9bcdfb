"""What the tests of the memory bank share."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from msa import Document
from msa.memory.bank import MemoryBank
from msa.memory.loaded.loaded_bank import LoadedBank

LAYERS = (2, 3)
WORDS = ("river", "stone", "lamp", "coat", "seven", "garden", "window", "iron", "letter", "morning")


def make_document(name: str, seed: int | None = None, words: int = 12) -> Document:
    """A document whose text is decided by its name and seed."""
    rng = random.Random(f"{name}/{seed}")
    text = f"{name}: " + " ".join(rng.choice(WORDS) for _ in range(words))
    return Document(name, text, metadata={"seed": seed})


def make_documents(count: int, prefix: str = "doc") -> list[Document]:
    """Documents of varied length."""
    return [make_document(f"{prefix}{i}", words=1 + i * 7 % 20) for i in range(count)]


def routed(reader, queries, layer=2):
    """Numbers and scores that a reader selects, best first."""
    selection = reader.route(layer, *queries)
    return reader.rows_to_numbers(selection.documents), selection.scores


# number -> layer -> (routing keys, pooled keys, pooled values)
StoredStates = dict[int, dict[int, tuple[torch.Tensor, ...]]]


def states_of(bank: MemoryBank) -> StoredStates:
    """States of all live documents, as a reader gets them."""
    view = LoadedBank(bank).view()
    rows = view._rows
    found: StoredStates = {}
    starts = rows.chunk_counts.cumsum(0) - rows.chunk_counts
    for row in rows.live.nonzero().flatten().tolist():
        start, count = int(starts[row]), int(rows.chunk_counts[row])
        layers = {}
        for layer in LAYERS:
            keys, values = view._content.read(view._rows, layer, torch.tensor([row]))
            layers[layer] = (
                view._indexes[layer].keys.keys[start : start + count].clone(),
                keys,
                values,
            )
        found[int(rows.numbers[row])] = layers
    return found


def ids_of(bank: MemoryBank) -> list[str]:
    """Ids in the order of their numbers."""
    return [s.document.id for s in bank.documents()]


def folder_state(folder: Path) -> dict[str, bytes]:
    """Segment files of a bank and what they hold."""
    return {p.name: p.read_bytes() for p in (folder / "segments").iterdir()}


def same_states(one: StoredStates, other: StoredStates) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(a, b)
        for number in one
        for layer in one[number]
        for a, b in zip(one[number][layer], other[number][layer], strict=True)
    )
