"""What passes between the parts of a bank.

Shapes: N documents, C chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

from msa.types import LatentStates


def segment_name(segment: int) -> str:
    """File name of a segment in the bank's `segments` folder."""
    return f"{segment:06d}.safetensors"


@dataclass(frozen=True, slots=True)
class SegmentEntry:
    """What the catalog knows of a segment; all that `Segment` trusts.

    Attributes:
        segment: its number, never used twice.
        size_bytes, sha256: of the whole file.
        routing_bytes, routing_sha256: of the file's beginning, header to routing keys.
        num_documents, num_chunks: N and C.
    """

    segment: int
    size_bytes: int
    sha256: str
    routing_bytes: int
    routing_sha256: str
    num_documents: int
    num_chunks: int

    @property
    def name(self) -> str:
        """File name in the bank's `segments` folder."""
        return segment_name(self.segment)


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A segment that is on disk and in no catalog yet.

    Attributes:
        name: its path below the bank's `segments` folder.
        entry: what the catalog is to know of it; its segment number is only that of the file name.
        numbers: the documents in it.
    """

    name: str
    entry: SegmentEntry
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Documents that were encoded together.

    Attributes:
        numbers: the bank's numbers of the N documents.
        states: their latent states, in that order.
    """

    numbers: tuple[int, ...]
    states: LatentStates

    @property
    def num_bytes(self) -> int:
        """Size of the states."""
        return sum(
            t.nbytes
            for s in self.states.layers.values()
            for t in (s.routing_keys, s.pooled_keys, s.pooled_values)
        )
