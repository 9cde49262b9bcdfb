"""Segments that workers wrote to become the bank's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from msa.errors import StorageError
from msa.memory.ingest.pipeline import SegmentPool, Submit, Written
from msa.memory.store.durable_files import publish, storage_errors, sync_folder
from msa.memory.store.records import SegmentEntry, WrittenFile
from msa.memory.store.segments import SegmentWriter


def adopting(pool: SegmentPool, writer: SegmentWriter, folder: Path) -> Submit:
    """Encodes and writes by a pool; its files are taken over when they are waited for.

    Args:
        pool: workers that write into sub-folders of `folder`.
        writer: of the bank; it numbers the segments, so that numbers rise with commits, as readers
            expect.
        folder: the bank's `segments` folder.
    """

    def submit(
        pieces: Sequence[tuple[int, Sequence[int]]], batch_tokens: int
    ) -> Callable[[], Written]:
        files = pool.submit(pieces, batch_tokens)
        return lambda: _take_over(files(), writer, folder)

    return submit


def _take_over(files: Sequence[WrittenFile], writer: SegmentWriter, folder: Path) -> Written:
    """Move files to the next numbers.

    Raises:
        StorageError: a file is not there as it was written, or the disk refused.
    """
    written = [(_taken_over(file, writer, folder), file.numbers) for file in files]
    with storage_errors(f"take over segments into {folder}"):
        sync_folder(folder)
    return written


def _taken_over(file: WrittenFile, writer: SegmentWriter, folder: Path) -> SegmentEntry:
    entry = replace(file.entry, segment=writer.take())
    path = folder / file.name
    with storage_errors(f"take over segment {path}"):
        size = path.stat().st_size
        if size != entry.size_bytes:
            raise StorageError(
                f"segment {path} has {size} bytes, {entry.size_bytes} were written; do all "
                "hosts see one file system there?"
            )
        publish(path, folder / entry.name)
    return entry
