"""The rows of a bank that is loaded for asking, and the share of them that one process holds.

Shapes: N documents, R routing layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msa.errors import InputError
from msa.memory.store.records import SegmentEntry
from msa.memory.store.segments import RoutingPart, Segment, chunk_offsets


@dataclass(frozen=True, slots=True)
class DocumentTable:
    """Per document; all tensors on the CPU.

    Attributes:
        numbers, chunk_counts: [N] int64.
        segment: [N] int64, index into `segments`; ascending.
        first_chunk: [N] int64, first chunk within its segment.
        checksums: [N, R] int32.
        live: [N] bool, False for deleted documents.
        segments: opened.
    """

    numbers: Tensor
    chunk_counts: Tensor
    segment: Tensor
    first_chunk: Tensor
    checksums: Tensor
    live: Tensor
    segments: tuple[Segment, ...]

    @classmethod
    def none(cls, num_layers: int) -> DocumentTable:
        """No documents, R routing layers."""
        empty = torch.empty(0, dtype=torch.int64)
        checksums = torch.empty((0, num_layers), dtype=torch.int32)
        return cls(empty, empty, empty, empty, checksums, torch.empty(0, dtype=torch.bool), ())

    @property
    def num_chunks(self) -> int:
        """C, deleted documents included."""
        return int(self.chunk_counts.sum())

    def without(self, dead: Sequence[int]) -> Tensor:
        """`live`, less the documents with these numbers."""
        if not dead:
            return self.live
        return self.live & ~torch.isin(self.numbers, torch.tensor(dead, dtype=torch.int64))


@dataclass(frozen=True, slots=True)
class SegmentSlice:
    """The documents of one segment that are held.

    Attributes:
        rows: of the segment's documents.
        chunks: of its chunks; the same documents.
    """

    rows: slice
    chunks: slice


class RowsBuilder:
    """Rows with the documents of more segments after the present ones."""

    def __init__(self, rows: DocumentTable) -> None:
        self._rows = rows
        self._segments = list(rows.segments)
        self._columns: dict[str, list[Tensor]] = {
            name: [getattr(rows, name)]
            for name in ("numbers", "chunk_counts", "segment", "first_chunk", "checksums")
        }

    def add(self, segment: Segment, part: RoutingPart, piece: SegmentSlice) -> None:
        """The documents of a piece of a segment."""
        numbers = part.numbers[piece.rows]
        self._columns["numbers"].append(numbers)
        self._columns["chunk_counts"].append(part.chunk_counts[piece.rows])
        self._columns["segment"].append(torch.full_like(numbers, len(self._segments)))
        self._columns["first_chunk"].append(chunk_offsets(part.chunk_counts)[piece.rows])
        self._columns["checksums"].append(part.checksums[piece.rows])
        self._segments.append(segment)

    def build(self) -> DocumentTable:
        """All of them."""
        joined: dict[str, Any] = {name: torch.cat(parts) for name, parts in self._columns.items()}
        live = torch.ones(len(joined["numbers"]), dtype=torch.bool)
        live[: len(self._rows.live)] = self._rows.live
        return DocumentTable(**joined, live=live, segments=tuple(self._segments))


@dataclass(frozen=True, slots=True)
class Partition:
    """Which shard of a bank one of several processes holds.

    The bank's chunks, C in all, are cut into `world` equal ranges; a document belongs to the range
    in which its first chunk lies. So shares are contiguous, hold whole documents, differ by no more
    than a document's chunks, and follow from the list of segments alone: processes that read the
    same state of the catalog agree without a word. With fewer documents than ranks some are empty.

    Attributes:
        rank: 0 to world - 1.
        world: number of processes.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise InputError(
                f"shard=({self.rank}, {self.world}): expected (rank, world) with 0 <= rank < world"
            )

    def range(self, num_chunks: int) -> tuple[int, int]:
        """First chunk of this share and of the next one."""
        return num_chunks * self.rank // self.world, num_chunks * (self.rank + 1) // self.world

    def entries(self, entries: Sequence[SegmentEntry]) -> Iterator[tuple[SegmentEntry, int]]:
        """Segments that reach into this share, each with the chunks before it in the bank."""
        low, high = self.range(sum(e.num_chunks for e in entries))
        first = 0
        for entry in entries:
            if first < high and first + entry.num_chunks > low:
                yield entry, first
            first += entry.num_chunks

    def rows_before(self, entries: Sequence[SegmentEntry]) -> int:
        """Documents of the segments that end before this share."""
        low, _ = self.range(sum(e.num_chunks for e in entries))
        first = count = 0
        for entry in entries:
            first += entry.num_chunks
            count += entry.num_documents if first <= low else 0
        return count

    def piece(self, counts: Tensor, first: int, num_chunks: int) -> SegmentSlice:
        """What of a segment lies in this share.

        Args:
            counts: [N] int64, chunks of the segment's documents.
            first: chunks before the segment in the bank.
            num_chunks: of the bank.
        """
        offsets = torch.cat([chunk_offsets(counts), counts.sum()[None]])
        begins = offsets[:-1] + first
        low, high = self.range(num_chunks)
        rows = int((begins < low).sum()), int((begins < high).sum())
        return SegmentSlice(slice(*rows), slice(int(offsets[rows[0]]), int(offsets[rows[1]])))
