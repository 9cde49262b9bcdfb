"""Encode a large corpus on a Ray cluster, into one memory bank.

    pip install 'msa-memory[ray]'
    python examples/ray_index.py corpus/*.jsonl --bank /shared/bank --workers 8 --gpus-per-worker 1

Every line of the files is a JSON object with "text" and, if you have them, "id" and "title"; what
else it holds becomes metadata. Ray Data reads the files and hands blocks of lines to a pool of
actors, each of which encodes and writes its own segments. One actor, the writer, holds the bank: it
says what is stored already, gives the numbers and commits. The bank must lie on a file system that
all nodes share.

A block counts as done when its documents are committed. When a node is lost, Ray gives the block to
another actor; when all of it is stopped, run the same command again: what is stored is not encoded
twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import ray

from msa import Document, MemoryBank, load
from msa.memory.distributed.bulk_ingest import BulkEncoder, Coordinator
from msa.memory.store.reports import AddReport


@ray.remote(num_cpus=0)
class Writer:
    """Holds the bank. Its methods are those of `Coordinator`, which does the work."""

    def __init__(self, path: str, model: str | None) -> None:
        if (Path(path) / "bank.json").exists():
            self.bank = MemoryBank.open(path)
        else:
            self.bank = MemoryBank.create(path, load(model))
        self.coordinator = Coordinator(self.bank, on_duplicate="update")

    def call(self, method: str, *arguments: Any) -> Any:
        """One question of an encoder."""
        return getattr(self.coordinator, method)(*arguments)

    def finish(self) -> AddReport:
        """Close the bank and count."""
        try:
            return self.coordinator.finish()
        finally:
            self.coordinator.close()
            self.bank.close()


class Desk:
    """The writer, as the encoders know it (`msa.memory.distributed.bulk_ingest.Desk`)."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def __getattr__(self, method: str) -> Any:
        return lambda *arguments: ray.get(self.writer.call.remote(method, *arguments))


class Encode:
    """One actor of the pool: a model, and a folder for its segments."""

    def __init__(self, path: str, model: str | None, gpu: bool, writer: Any) -> None:
        checkpoint = load(model, device="cuda" if gpu else "cpu")
        # The same after a restart: what it had claimed and not stored is then free again.
        name = ray.get_runtime_context().get_actor_id() or "driver"
        self.encoder = BulkEncoder(
            path,
            checkpoint.model,
            checkpoint.tokenizer,
            Desk(writer),
            name,
            template=checkpoint.template,
        )

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Encode a block of lines; they are stored on return."""
        self.encoder.add(document(line) for line in block["text"])
        return {"documents": np.array([len(block["text"])])}


def document(line: str) -> Document:
    """The document of one line; without an id, the hash of the line is its id."""
    record = json.loads(line)
    name = str(record.pop("id", None) or hashlib.sha256(line.encode()).hexdigest()[:16])
    text, title = record.pop("text"), record.pop("title", None)
    return Document(id=name, text=text, title=title, metadata=record)


def index(
    files: list[str], bank: str, model: str | None, workers: int, gpus_per_worker: float
) -> AddReport:
    """Encode the files into the bank; call `ray.init` before."""
    writer = Writer.remote(bank, model)
    lines = ray.data.read_text(files)
    done = lines.map_batches(
        Encode,
        fn_constructor_args=(bank, model, gpus_per_worker > 0, writer),
        batch_size=256,
        # from one actor upwards, so that reading is left a CPU on a small machine
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
        num_gpus=gpus_per_worker,
    )
    done.materialize()
    return ray.get(writer.finish.remote())


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description="Encode JSONL files into a bank, on Ray.")
    parser.add_argument("files", nargs="+", type=lambda name: str(Path(name).absolute()))
    parser.add_argument("--bank", required=True, type=lambda name: str(Path(name).absolute()))
    parser.add_argument("--model", help="name, folder or Hub id; the default model if not given")
    parser.add_argument("--workers", type=int, default=2, help="actors that encode")
    parser.add_argument("--gpus-per-worker", type=float, default=0)
    given = parser.parse_args()
    ray.init()  # joins the cluster that RAY_ADDRESS names, or starts one on this machine
    report = index(given.files, given.bank, given.model, given.workers, given.gpus_per_worker)
    print(
        f"{report.added} added, {report.updated} updated, {report.unchanged} unchanged, "
        f"{len(report.failed)} failed"
    )
    for name, reason in report.failed:
        print(f"  {name}: {reason}")


if __name__ == "__main__":
    main()
