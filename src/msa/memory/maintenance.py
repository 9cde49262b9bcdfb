"""Care of a bank's segments: verify, compact, repair, and removal of what no commit names."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from msa.errors import BankCorruptError, StorageError
from msa.memory.ingest.encoder import DocumentEncoder
from msa.memory.store.catalog import Catalog
from msa.memory.store.durable_files import storage_errors, sync_folder
from msa.memory.store.records import EncodedBatch, SegmentEntry
from msa.memory.store.reports import CompactReport, VerifyReport
from msa.memory.store.segments import SEGMENT_BYTES, Segment, SegmentWriter


class Maintenance:
    """Does what `MemoryBank.verify`, `compact` and `repair` say.

    Args:
        catalog: the bank's.
        folder: its `segments` folder.
        layers: its routing layers.
    """

    def __init__(self, catalog: Catalog, folder: Path, layers: Sequence[int]) -> None:
        self._catalog = catalog
        self._folder = folder
        self._layers = layers

    def orphans(self) -> list[str]:
        """Files in the segments folder that no commit names."""
        with storage_errors(f"read {self._folder}"):
            names = {p.name for p in self._folder.iterdir()}
        # listed first: a segment that a writer commits meanwhile is then known, not an orphan
        return sorted(names - {e.name for e in self._catalog.segments()})

    def remove(self, names: Sequence[str]) -> None:
        """Remove files of the segments folder, and folders that a bulk encoding left there."""
        if not names:
            return
        with storage_errors(f"remove old segments in {self._folder}"):
            for name in names:
                path = self._folder / name
                if path.is_dir():  # a rank that outlives its run may still write there
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            sync_folder(self._folder)

    def compact(self, writer: SegmentWriter) -> CompactReport:
        """See `MemoryBank.compact`."""
        before = self._catalog.segments()
        dead = self._catalog.dead_counts()
        small = [e for e in before if e.size_bytes < SEGMENT_BYTES // 2]
        merge = {e.segment for e in small} if len(small) > 1 else set()
        todo = [e for e in before if e.segment in merge or dead.get(e.segment)]
        for group in _groups(todo, dead):
            written = writer.write_all(b for e in group for b in self._live_states(e))
            self._catalog.replace_segments([e.segment for e in group], written)
            self.remove([e.name for e in group])
        self._catalog.shrink()
        after = self._catalog.segments()
        return CompactReport(
            len(before),
            len(after),
            sum(e.size_bytes for e in before),
            sum(e.size_bytes for e in after),
            sum(dead.values()),
        )

    def _live_states(self, entry: SegmentEntry) -> Iterator[EncodedBatch]:
        """States of a segment's live documents, compared with their checksum first."""
        live = self._catalog.live_in(entry.segment)
        if not live:  # a damaged segment whose documents are all deleted can always be dropped
            return
        segment = Segment(self._folder, entry, self._layers)
        segment.verify()
        part = segment.routing_part()
        wanted = torch.tensor(sorted(live), dtype=torch.int64)
        rows = torch.isin(part.numbers, wanted).nonzero().flatten()
        yield segment.select(rows, part)

    def repair(self, writer: SegmentWriter, encoder: DocumentEncoder) -> int:
        """See `MemoryBank.repair`."""
        self._catalog.repair_indexes()
        repaired = 0
        for entry in self._catalog.segments():
            if self._damage(entry) is None:
                continue
            live = self._catalog.by_numbers(self._catalog.live_in(entry.segment))
            documents = [(s.number, s.document) for s in live.values()]
            written = writer.write_all(encoder.encode(documents))
            self._catalog.replace_segments([entry.segment], written)
            self.remove([entry.name])
            repaired += len(documents)
        return repaired

    def verify(self) -> VerifyReport:
        """See `MemoryBank.verify`."""
        problems = self._catalog.problems()
        damaged: list[str] = []
        ids: list[str] = []
        segments = self._catalog.segments()
        for entry in segments:
            problem = self._damage(entry)
            if problem is None or entry not in self._catalog.segments():
                continue  # a writer's compact may have replaced the segment meanwhile
            problems.append(problem)
            damaged.append(entry.name)
            live = self._catalog.by_numbers(self._catalog.live_in(entry.segment))
            ids += [s.document.id for s in live.values()]
        return VerifyReport(
            tuple(problems),
            tuple(damaged),
            tuple(sorted(ids)),
            tuple(self.orphans()),
            self._catalog.count(),
            len(segments),
            sum(e.size_bytes for e in segments),
        )

    def _damage(self, entry: SegmentEntry) -> str | None:
        """What is wrong with a segment; None if nothing is."""
        try:
            segment = Segment(self._folder, entry, self._layers)
            segment.verify()
            part = segment.routing_part()
        except (BankCorruptError, StorageError) as error:
            return str(error)
        held = dict(zip(part.numbers.tolist(), part.chunk_counts.tolist(), strict=True))
        live = self._catalog.live_in(entry.segment)
        wrong = [n for n, chunks in live.items() if held.get(n) != chunks]
        if wrong:
            return f"Segment '{entry.name}' lacks documents that the catalog puts there: {wrong}"
        return None


def _groups(entries: Iterable[SegmentEntry], dead: dict[int, int]) -> Iterator[list[SegmentEntry]]:
    """Segments to be rewritten together: their live states fill one new segment."""
    group: list[SegmentEntry] = []
    size = 0.0
    for entry in entries:
        group.append(entry)
        size += entry.size_bytes * (1 - dead.get(entry.segment, 0) / entry.num_documents)
        if size >= SEGMENT_BYTES:
            yield group
            group, size = [], 0.0
    if group:
        yield group
