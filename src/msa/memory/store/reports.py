"""What a memory bank tells its caller: stored documents, progress and reports. All frozen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from msa.types import Document


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document as the bank holds it.

    Attributes:
        document: as it was added; for a part, its own id ("book#2") and its piece of the text.
        number: by which the model knows it; assigned by the bank, never used twice.
        num_tokens: tokens encoded, template included.
        num_chunks: rows of latent state in every routing layer.
        part_of: id of the document that was too long and was split; None for a whole document.
        part: 1 for the first part; 0 for a whole document.
        num_parts: parts of that document; 1 for a whole document.
    """

    document: Document
    number: int
    num_tokens: int
    num_chunks: int
    part_of: str | None = None
    part: int = 0
    num_parts: int = 1

    @property
    def part_ids(self) -> tuple[str, ...]:
        """Ids of all parts of the split document, in order; its own id for a whole document."""
        if self.part_of is None:
            return (self.document.id,)
        return tuple(part_id(self.part_of, i + 1) for i in range(self.num_parts))


def part_id(source: str, part: int) -> str:
    """Id of a part of a split document, counted from 1."""
    return f"{source}#{part}"


@dataclass(frozen=True, slots=True)
class AddProgress:
    """Where an `add` stands after a commit: all of this is on disk and survives anything.

    Attributes:
        documents: documents taken from the caller so far, failed and unchanged ones included.
        added, updated, unchanged, failed: how they ended.
        tokens: tokens encoded so far.
        seconds: since the call began.
    """

    documents: int
    added: int
    updated: int
    unchanged: int
    failed: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class AddReport:
    """How an `add` ended. Every document given is in exactly one of the four counts.

    Attributes:
        added: documents stored under a new id.
        updated: documents that replaced another text or other metadata under their id.
        unchanged: documents that the bank already held unchanged.
        failed: (id, reason) of the documents that were not stored.
        parts: documents that the model knows now, parts of split ones counted each.
        tokens: tokens encoded.
        seconds: wall time.
    """

    added: int
    updated: int
    unchanged: int
    failed: tuple[tuple[str, str], ...]
    parts: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CompactReport:
    """What `compact` did.

    Attributes:
        segments_before, segments_after: number of segment files.
        bytes_before, bytes_after: their sizes together.
        dropped: deleted documents whose latent states are gone now.
    """

    segments_before: int
    segments_after: int
    bytes_before: int
    bytes_after: int
    dropped: int


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        problems: one line each; empty when the bank is sound.
        damaged_segments: names of the segment files that cannot be trusted.
        damaged_ids: ids of the live documents in them.
        orphans: files that no commit names; harmless, removed when a writer opens the bank.
        num_documents, num_segments, num_bytes: what was checked.
    """

    problems: tuple[str, ...]
    damaged_segments: tuple[str, ...]
    damaged_ids: tuple[str, ...]
    orphans: tuple[str, ...]
    num_documents: int
    num_segments: int
    num_bytes: int

    @property
    def ok(self) -> bool:
        """True when nothing is wrong."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class BankInfo:
    """Figures of a bank.

    Attributes:
        path: its folder.
        num_documents: documents that the model knows, parts of split ones counted each.
        num_ids: documents as they were given.
        num_tokens, num_chunks: of the live documents.
        num_deleted: deleted documents whose latent states wait for `compact`.
        num_segments: segment files.
        segment_bytes, catalog_bytes: sizes on disk.
        generation: grows with every commit.
        model: name of the model that encodes it.
        chunk_size, routing_layers, dtype, content_dtype, max_document_tokens: as in bank.json.
        created: ISO 8601, UTC.
    """

    path: Path
    num_documents: int
    num_ids: int
    num_tokens: int
    num_chunks: int
    num_deleted: int
    num_segments: int
    segment_bytes: int
    catalog_bytes: int
    generation: int
    model: str
    chunk_size: int
    routing_layers: tuple[int, ...]
    dtype: str
    content_dtype: str
    max_document_tokens: int
    created: str
