"""One call of `MemoryBank.add`: check, split, encode, commit, count.

Documents are taken from the caller one by one and committed in windows of bounded size, so memory
stays flat for any number of them. A document and all its parts are in one commit.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from msa.errors import DuplicateDocumentError, InputError
from msa.memory.catalog import Catalog, CatalogRow
from msa.memory.encoder import DEFAULT_BATCH_TOKENS, DocumentEncoder
from msa.memory.reports import AddProgress, AddReport, part_id
from msa.memory.segments import SegmentWriter
from msa.types import Document

OnDuplicate = Literal["error", "skip", "update"]

MAX_ID_CHARACTERS = 512
MAX_TEXT_CHARACTERS = 50_000_000
# A commit waits for three fsyncs; this much work makes that small, and is what a crash costs.
COMMIT_TOKENS = 65_536
COMMIT_DOCUMENTS = 4_096
# Tokens of a split text may join differently at the edges of the template.
_SPLIT_MARGIN = 4


@dataclass(frozen=True, slots=True)
class AddOptions:
    """How to add.

    Attributes:
        on_duplicate: what to do with a document whose id is in the bank with other content:
            "error" raises, "skip" reports it as failed, "update" replaces it. A document that is
            in the bank as given is unchanged in all three.
        batch_tokens: tokens of one batch of the encoder, padding included.
        commit_tokens: tokens after which a commit is made.
        progress: called after every commit.
    """

    on_duplicate: OnDuplicate = "error"
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    commit_tokens: int = COMMIT_TOKENS
    progress: Callable[[AddProgress], None] | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            InputError: a value is not one of those above.
        """
        if self.on_duplicate not in ("error", "skip", "update"):
            raise InputError(
                f"on_duplicate={self.on_duplicate!r}: expected 'error', 'skip' or 'update'"
            )
        if self.batch_tokens < 1 or self.commit_tokens < 1:
            raise InputError(
                f"batch_tokens={self.batch_tokens}, commit_tokens={self.commit_tokens}: "
                "expected at least 1"
            )


@dataclass(frozen=True, slots=True)
class Piece:
    """A document or part with its tokens, ready to be encoded."""

    number: int
    document: Document
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class _Pending:
    """A document given by the caller that the next commit stores.

    Attributes:
        document: as given.
        content_hash, metadata: to compare with what is stored.
        pieces: itself or its parts; none when only its metadata changes.
        replaces: numbers of the documents stored under its id until now.
    """

    document: Document
    content_hash: bytes
    metadata: str
    pieces: tuple[Piece, ...]
    replaces: tuple[int, ...]


class _RejectedError(Exception):
    """Why a document cannot be stored; the others go on."""


@dataclass(slots=True)
class _Counts:
    documents: int = 0
    added: int = 0
    updated: int = 0
    unchanged: int = 0
    parts: int = 0
    tokens: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


def content_hash(document: Document) -> bytes:
    """SHA-256 of what is encoded of a document: its title and text."""
    text = json.dumps([document.title, document.text], ensure_ascii=True)
    return hashlib.sha256(text.encode()).digest()


def check_document(document: Document) -> str:
    """Check what the caller gave.

    Returns:
        The metadata as JSON text.

    Raises:
        _RejectedError: the reason.
    """
    for name, value in (
        ("id", document.id),
        ("text", document.text),
        ("title", "" if document.title is None else document.title),
    ):
        if not isinstance(value, str):
            raise _RejectedError(f"its {name} is {type(value).__name__}; expected text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _RejectedError(
                f"its {name} is not valid Unicode: lone surrogate U+{ord(value[error.start]):04X} "
                f"at character {error.start}; was it read with the wrong encoding?"
            ) from None
    if not document.id.strip():
        raise _RejectedError("its id is empty")
    if len(document.id) > MAX_ID_CHARACTERS:
        raise _RejectedError(
            f"its id has {len(document.id)} characters; at most {MAX_ID_CHARACTERS} are allowed"
        )
    if not document.text.strip():
        raise _RejectedError("its text is empty")
    if len(document.text) > MAX_TEXT_CHARACTERS:
        raise _RejectedError(
            f"its text has {len(document.text)} characters; at most {MAX_TEXT_CHARACTERS} are "
            "allowed; give it in several documents"
        )
    try:
        metadata = dict(document.metadata)
        text = json.dumps(metadata, ensure_ascii=False, sort_keys=True, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise _RejectedError(f"its metadata cannot be written as JSON: {error}") from None
    return text


def printable(document_id: object) -> str:
    """An id that can be shown, whatever it is: of bounded length, valid Unicode."""
    text = str(document_id)
    text = text if len(text) <= 80 else text[:77] + "..."
    return text.encode(errors="backslashreplace").decode()


class Ingest:
    """One call of `add`; see `MemoryBank.add`."""

    def __init__(
        self,
        catalog: Catalog,
        writer: SegmentWriter,
        encoder: DocumentEncoder,
        max_document_tokens: int,
        options: AddOptions,
    ) -> None:
        self._catalog = catalog
        self._writer = writer
        self._encoder = encoder
        self._max_tokens = max_document_tokens
        self._options = options
        self._first_number = self._next_number = catalog.counter("next_number")
        self._pending: dict[str, _Pending] = {}
        self._pending_parts: set[str] = set()
        self._pending_tokens = 0
        self._since_progress = 0
        self._counts = _Counts()
        self._start = time.perf_counter()

    def run(self, documents: Iterable[Document]) -> AddReport:
        """Take all documents; the report counts each of them once."""
        for document in documents:
            if not isinstance(document, Document):
                raise InputError(
                    f"add() was given a {type(document).__name__}: expected msa.Document objects, "
                    "as in bank.add([Document(id='a', text='...')])"
                )
            self._take(document)
            if (
                self._pending_tokens >= self._options.commit_tokens
                or self._since_progress >= COMMIT_DOCUMENTS
            ):
                self._commit()
        if self._since_progress:
            self._commit()
        counts = self._counts
        return AddReport(
            counts.added,
            counts.updated,
            counts.unchanged,
            tuple(counts.failed),
            counts.parts,
            counts.tokens,
            time.perf_counter() - self._start,
        )

    # ---- one document

    def _take(self, document: Document) -> None:
        self._counts.documents += 1
        self._since_progress += 1
        try:
            pending = self._prepare(document)
        except _RejectedError as reason:
            self._counts.failed.append((printable(document.id), str(reason)))
            return
        if pending is None:
            self._counts.unchanged += 1
            return
        self._pending[document.id] = pending
        self._pending_tokens += sum(len(p.tokens) for p in pending.pieces)
        if len(pending.pieces) > 1:
            self._pending_parts.update(p.document.id for p in pending.pieces)

    def _prepare(self, document: Document) -> _Pending | None:
        """What to store for a document; None when it is stored as given."""
        metadata = check_document(document)
        digest = content_hash(document)
        waiting = self._pending.get(document.id)
        numbers: tuple[int, ...] = ()
        if waiting is not None:
            known_as, twice = (waiting.content_hash, waiting.metadata), True
        else:
            known = self._catalog.known(document.id)
            if known.part_of is not None or document.id in self._pending_parts:
                raise _RejectedError(
                    "its id names a part of a document that was split; choose another"
                )
            known_as, numbers = (known.content_hash, known.metadata), known.numbers
            twice = bool(numbers) and numbers[0] >= self._first_number
            if not numbers:
                pieces = self._pieces(document)
                return _Pending(document, digest, metadata, pieces, ())
        if known_as == (digest, metadata):
            return None
        self._check_duplicate(document, twice)
        # Numbers stand in the encoded text: new text, new number. Metadata is not encoded.
        if known_as[0] == digest:
            return _Pending(document, digest, metadata, (), ())
        return _Pending(document, digest, metadata, self._pieces(document), numbers)

    def _check_duplicate(self, document: Document, twice: bool) -> None:
        """Other content is stored, or was given in this call, under the document's id."""
        where = "was given twice in this call" if twice else "is in the bank"
        if self._options.on_duplicate == "error":
            stored = self._counts.added + self._counts.updated
            raise DuplicateDocumentError(
                f"document '{printable(document.id)}' {where} with other content; use "
                "on_duplicate='update' to replace what the bank holds, or 'skip' to keep it "
                f"({stored} documents of this call were stored before)"
            )
        if twice:
            raise _RejectedError("its id was given twice in this call with different content")
        if self._options.on_duplicate == "skip":
            raise _RejectedError(
                "the bank holds other content under its id; use on_duplicate='update' to replace it"
            )

    def _pieces(self, document: Document) -> tuple[Piece, ...]:
        tokens = self._encoder.tokens(self._next_number, document)
        if len(tokens) <= self._max_tokens:
            return (self._piece(document, tokens),)
        texts = self._split(document)
        if len(texts) == 1:  # white space at its ends was what made it too long
            short = replace(document, text=texts[0])
            return (self._piece(short, self._encoder.tokens(self._next_number, short)),)
        parts = [
            replace(document, id=part_id(document.id, i + 1), text=text)
            for i, text in enumerate(texts)
        ]
        for part in parts:
            taken = self._catalog.known(part.id)
            if taken.numbers or part.id in self._pending:
                raise _RejectedError(
                    f"it must be split, and its part '{part.id}' has the id of another document"
                )
        number = self._next_number
        encoded = [self._encoder.tokens(number + i, part) for i, part in enumerate(parts)]
        longest = max(map(len, encoded))
        if longest > self._encoder.max_tokens:
            raise _RejectedError(
                f"a part of it has {longest} tokens, more than the model's positions"
            )
        return tuple(self._piece(p, t) for p, t in zip(parts, encoded, strict=True))

    def _piece(self, document: Document, tokens: list[int]) -> Piece:
        number, self._next_number = self._next_number, self._next_number + 1
        return Piece(number, document, tokens)

    def _split(self, document: Document) -> list[str]:
        from msa.text.splitting import split_text

        # The frame: template, number (a part's may be one digit longer) and title.
        frame = len(self._encoder.tokens(10 * self._next_number, replace(document, text="")))
        room = self._max_tokens - frame - _SPLIT_MARGIN
        if room < self._max_tokens // 4:
            raise _RejectedError(
                f"its title leaves no room for text: {frame} of {self._max_tokens} tokens"
            )
        try:
            return split_text(document.text, room, lambda s: len(self._encoder.prompts.tokenize(s)))
        except InputError as error:
            raise _RejectedError(f"it cannot be split: {error}") from error

    # ---- a window of documents

    def _commit(self) -> None:
        """Encode and store what is pending, durably; then say so."""
        pending = list(self._pending.values())
        pieces = [piece for p in pending for piece in p.pieces]
        if pending:
            written = self._writer.write_all(
                self._encoder.encode_tokens(
                    [(p.number, p.tokens) for p in pieces], self._options.batch_tokens
                )
            )
            # If this fails, the files stay until a writer opens the bank: only the catalog, read
            # again, can tell for sure whether a commit that reported an error is on disk.
            self._catalog.commit(
                written,
                [row for p in pending for row in self._rows(p)],
                replaced=[n for p in pending for n in p.replaces],
                metadata=[(p.document.id, p.metadata) for p in pending if not p.pieces],
            )
        for p in pending:
            if p.replaces or not p.pieces:
                self._counts.updated += 1
            else:
                self._counts.added += 1
        self._counts.parts += len(pieces)
        self._counts.tokens += sum(len(p.tokens) for p in pieces)
        self._pending.clear()
        self._pending_parts.clear()
        self._pending_tokens = self._since_progress = 0
        if self._options.progress is not None:
            counts = self._counts
            self._options.progress(
                AddProgress(
                    counts.documents,
                    counts.added,
                    counts.updated,
                    counts.unchanged,
                    len(counts.failed),
                    counts.tokens,
                    time.perf_counter() - self._start,
                )
            )

    def _rows(self, pending: _Pending) -> list[CatalogRow]:
        size = int(self._encoder.model.config.chunk_size)
        split = len(pending.pieces) > 1
        return [
            CatalogRow(
                piece.number,
                piece.document,
                pending.document.id,
                i + 1 if split else 0,
                len(pending.pieces),
                pending.content_hash,
                pending.metadata,
                len(piece.tokens),
                -(-len(piece.tokens) // size),
            )
            for i, piece in enumerate(pending.pieces)
        ]
