"""Memory of a training step over the tokens of its documents, with and without recomputation.

    python benchmarks/training_memory.py [--tokens 1K 2K 4K 8K 16K] [--output docs/results]

A random model of 6 layers on the CPU; documents of 256 tokens, four questions, the routing loss and
the language model's. Each step is run in a process of its own, forwards and backwards; what is
reported is the peak of its resident memory above that before the step (/proc, so Linux only).
Writes training_memory.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import subprocess
from pathlib import Path

import torch

from msa import MSAConfig
from msa.training.config import LossSettings
from msa.training.model import MSAForTraining
from msa.training.samples import IGNORED

UNITS = {"K": 1024}
DOCUMENT = 256  # tokens
QUESTIONS, LENGTH = 4, 64
CONFIG = {
    "vocab_size": 1024,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "chunk_size": 32,
    "top_k_documents": 4,
    "routing_layers": [3, 4, 5],
}
# name -> (gradient_checkpointing, document_batch)
WAYS = {
    "everything is held": (False, 0),
    "`gradient_checkpointing`": (True, 0),
    "`document_batch: 2`": (False, 2),
    "both": (True, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of a training step.")
    parser.add_argument("--tokens", nargs="+", default=["1K", "2K", "4K", "8K", "16K"])
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    rows = []
    for text in given.tokens:
        documents = int(text[:-1]) * UNITS[text[-1]] // DOCUMENT
        peaks = [measured(documents, *way) for way in WAYS.values()]
        rows.append((documents * DOCUMENT, peaks))
        print(rows[-1], flush=True)
    page = given.output / "training_memory.md"
    page.write_text(written(rows, given.tokens), encoding="utf-8")


def measured(documents: int, layers: bool, batch: int) -> float:
    """Peak of a step in MB above what was there before, in a process of its own."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=take_step, args=(theirs, documents, layers, batch))
    process.start()
    peak = mine.recv()
    process.join()
    return peak / 1024


def take_step(pipe, documents: int, layers: bool, batch: int) -> None:
    torch.manual_seed(0)
    model = MSAForTraining(MSAConfig(**CONFIG)).train()
    model.loss_settings = LossSettings(routing=0.1, documents=0.0)
    model.checkpoint_activations(layers)
    model.document_batch = batch
    step = step_of(documents)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    model(**step)["loss"].backward()
    pipe.send(status("VmHWM") - before)


def status(name: str) -> int:
    """A number of kB that Linux says of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise KeyError(name)


def step_of(documents: int) -> dict[str, object]:
    """Random documents, and questions that each ask for one of them."""
    ids = torch.randint(2, CONFIG["vocab_size"], (QUESTIONS, LENGTH))
    right = torch.zeros(QUESTIONS, documents, dtype=torch.bool)
    right[:, 0] = True
    everywhere = torch.ones(QUESTIONS, LENGTH, dtype=torch.bool)
    group = {
        "input_ids": ids,
        "position_ids": torch.arange(LENGTH).expand(QUESTIONS, -1),
        "routing_mask": everywhere,
        "memory_mask": everywhere,
        "labels": torch.where(torch.arange(LENGTH) < LENGTH // 2, IGNORED, ids),
        "weights": torch.ones(QUESTIONS, LENGTH),
        "positives": right,
        "read": torch.zeros_like(right),
    }
    return {
        "documents": torch.randint(2, CONFIG["vocab_size"], (documents, DOCUMENT)),
        "lengths": torch.full((documents,), DOCUMENT),
        "digits": torch.zeros(documents, 8, dtype=torch.int64),
        "groups": [group],
    }


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "?"


def written(rows: list[tuple[int, list[float]]], tokens: list[str]) -> str:
    """The page."""
    lines = [
        "# Memory of a training step",
        "",
        f"`python benchmarks/training_memory.py --tokens {' '.join(tokens)}`",
        "",
        f"commit: {commit()}; machine: {platform.machine()}, 1 thread, CPU; torch: "
        f"{torch.__version__}; model: {CONFIG['num_hidden_layers']} layers of width "
        f"{CONFIG['hidden_size']}, random; documents of {DOCUMENT} tokens.",
        "",
        "Peak of the resident memory above that before the step, in MB:",
        "",
        "| tokens of documents | " + " | ".join(WAYS) + " |",
        "|---|" + "---|" * len(WAYS),
    ]
    lines += [f"| {n:,} | " + " | ".join(f"{p:.0f}" for p in peaks) + " |" for n, peaks in rows]
    return "\n".join([*lines, "", *REMARKS, ""])


REMARKS = [
    "With `document_batch` the activations of one batch of documents are held at a time, so that",
    "what grows with the documents is what they leave in the routing layers (pooled keys, pooled",
    "values and routing keys, one of each per chunk) and its gradient. `gradient_checkpointing`",
    "alone holds the input of every layer for every token.",
    "",
    "What that means for 64k tokens of documents and Qwen3-4B (36 layers of width 2560, 8 KV heads",
    "of 128, 18 routing layers, chunks of 64 tokens), by arithmetic, not by a run: with both, and",
    "batches of 4 documents of 256 tokens, the inputs of the layers take 36 x 1,024 x 2,560 x 2",
    "bytes = 0.19 GB, one layer's inside about 0.15 GB, and the states of all documents",
    "18 x 3 x 1,024 chunks x 1,024 numbers x 4 bytes = 0.23 GB, twice that with their gradients.",
    "Held in whole, the inside of all layers for 65,536 tokens would take more than 300 GB.",
]


if __name__ == "__main__":
    main()
