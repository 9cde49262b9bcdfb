"""Encoding in several processes: one pipeline decides, numbers and commits; workers encode.

`IngestPipeline` passes full windows to a `SegmentPool`. Every worker is an actor of Ray with a
model of its own. It writes the segments of a window into a folder of its own below the bank's, and
the pipeline takes them over in the order of the windows, one transaction each. A worker that dies
is restarted and its window encoded again; what it had written is no part of the bank, and the next
writer removes it. When everything dies, the same command goes on: what is stored is unchanged.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from msa.errors import InputError
from msa.memory.distributed import cluster
from msa.memory.ingest.encoder import DocumentEncoder
from msa.memory.store.lifetime import ClosedAtExit
from msa.memory.store.manifest import Manifest
from msa.memory.store.records import WrittenFile
from msa.memory.store.segments import SegmentWriter

if TYPE_CHECKING:
    from msa.memory.bank import MemoryBank

DEFAULT_TIMEOUT = 3600.0
FOLDER_PREFIX = "incoming-"
_WINDOWS_PER_WORKER = 2  # one is encoded, one waits


class EncodingWorker:
    """Encodes windows of documents into segments; an actor.

    Args:
        folder: the bank's segments, as this process sees it.
        manifest: of the bank.
        parts: model and tokenizer.
        device: where the model is moved to.
        beside: workers on this machine.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, parts: tuple[Any, Any], device: str, beside: int
    ) -> None:
        torch.set_num_threads(max(1, torch.get_num_threads() // beside))
        self._folder, self._manifest, self._parts, self._device = folder, manifest, parts, device
        self._made: tuple[DocumentEncoder, SegmentWriter] | None = None

    def _tools(self) -> tuple[DocumentEncoder, SegmentWriter]:
        """Made at the first window, whose error tells what is wrong with them."""
        if self._made is None:
            if not self._folder.is_dir():
                raise InputError(
                    f"{self._folder} is not there: the bank must lie on a file system that all "
                    "machines share, under the same path"
                )
            model, tokenizer = self._parts
            encoder = DocumentEncoder(
                model.to(self._device).eval(),
                tokenizer,
                self._manifest.prompt_template,
                dtype=self._manifest.torch_dtype,
                packed=self._manifest.packed,
            )
            # Never the folder of a former life, whose files may be taken over just now.
            own = self._folder / f"{FOLDER_PREFIX}{uuid.uuid4().hex[:12]}"
            own.mkdir()
            self._made = encoder, SegmentWriter(own, 1)
        return self._made

    def write(
        self, pieces: Sequence[tuple[int, Sequence[int]]], batch_tokens: int
    ) -> list[WrittenFile]:
        """Encode documents, given as (number, tokens), and write them; synced on return."""
        encoder, writer = self._tools()
        written = writer.write_all(encoder.encode_tokens(pieces, batch_tokens))
        return [WrittenFile(f"{writer.folder.name}/{e.name}", e, numbers) for e, numbers in written]


class EncodingPool(ClosedAtExit):
    """Workers that encode for one bank; give it to `MemoryBank.add`, and close it.

    Example::

        with EncodingPool(bank, workers=4) as pool:
            bank.add(documents, pool=pool)

    Args:
        bank: open for writing, with its model, which every worker gets a copy of.
        workers: how many.
        address: of a Ray cluster; by default one is started on this machine.
        gpus_per_worker: GPUs that each worker reserves.
        timeout: seconds that one window may take.

    Raises:
        InputError: a number is not valid, the bank has no model, or Ray is not installed.
        WorkerError: no cluster.
    """

    def __init__(
        self,
        bank: MemoryBank,
        workers: int,
        *,
        address: str | None = None,
        gpus_per_worker: float = 0,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        if workers < 1:
            raise InputError(f"workers={workers}: expected at least 1")
        if bank.model is None or bank.tokenizer is None:
            raise InputError(f"bank '{bank.path}' was opened without a model; give it its own")
        ray = cluster.connect(address)
        # Held here: a worker that is restarted asks for it again.
        self._parts = ray.put((bank.model, bank.tokenizer))
        device = "cuda" if gpus_per_worker else "cpu"
        beside = cluster.per_node(workers)
        arguments = (bank.segments_folder, bank.manifest, self._parts, device, beside)
        self._workers = cluster.spawn(
            EncodingWorker, workers, gpus_per_worker, [arguments] * workers
        )
        self._waiting = [0] * workers
        self._timeout = timeout
        self._folder = bank.segments_folder

    @property
    def capacity(self) -> int:
        """Windows that are best on their way at once."""
        return _WINDOWS_PER_WORKER * len(self._workers)

    def submit(
        self, pieces: Sequence[tuple[int, Sequence[int]]], batch_tokens: int
    ) -> Callable[[], list[WrittenFile]]:
        """Let the worker with the least to do encode a window.

        Args:
            pieces: (number, tokens) of every document.
            batch_tokens: of one batch, padding included.

        Returns:
            Call it to wait for the files; it raises what `cluster.gather` does.
        """
        index = self._waiting.index(min(self._waiting))
        self._waiting[index] += 1
        reference = self._workers[index].write.remote(list(pieces), batch_tokens)

        def wait() -> list[WrittenFile]:
            try:
                found: list[WrittenFile] = cluster.gather(
                    reference, self._timeout, "a worker that encodes"
                )
                return found
            finally:
                self._waiting[index] -= 1

        return wait

    def close(self) -> None:
        """End the workers and remove their empty folders; calling it twice does nothing."""
        workers, self._workers = self._workers, []
        for worker in workers:
            cluster.connect().kill(worker)
        for folder in self._folder.glob(f"{FOLDER_PREFIX}*"):
            with contextlib.suppress(OSError):  # what is left in it, the next writer removes
                folder.rmdir()
