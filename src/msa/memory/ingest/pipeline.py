"""One call of `MemoryBank.add`: check, split, encode, commit, count.

Documents are taken from the caller one by one and committed in windows of bounded size, so memory
stays flat for any number of them. A document and all its parts are in one commit. Windows are
encoded by a `SegmentPool`: one thread of this process, or workers
(`msa.memory.distributed.encoding_pool`); they are committed in their order.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, Protocol

from msa.errors import DuplicateDocumentError, InputError
from msa.memory.ingest.encoder import DEFAULT_BATCH_TOKENS, DocumentEncoder
from msa.memory.ingest.splitter import DocumentSplitter, RejectedError, TokenizedDocument
from msa.memory.store.catalog import Catalog, CatalogRow
from msa.memory.store.records import EncodedBatch, SegmentEntry, WrittenFile
from msa.memory.store.reports import AddProgress, AddReport
from msa.memory.store.segments import SegmentWriter
from msa.text.normalization import nfc_document
from msa.types import JSON, Document

OnDuplicate = Literal["error", "skip", "update"]
Written = list[tuple[SegmentEntry, tuple[int, ...]]]
"""Segments, each with the numbers of its documents."""

MAX_ID_CHARACTERS = 512
MAX_TEXT_CHARACTERS = 50_000_000
# A commit waits for three fsyncs; this much work makes that small, and is what a crash costs.
COMMIT_TOKENS = 65_536
COMMIT_DOCUMENTS = 4_096


@dataclass(frozen=True, slots=True)
class AddOptions:
    """How to add.

    Attributes:
        on_duplicate: what to do with a document whose id is in the bank with other content:
            "error" raises, "skip" reports it as failed, "update" replaces it. A document that is
            in the bank with this content is unchanged in all three.
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
class DocumentKey:
    """What a document is known by, to decide what becomes of it.

    Attributes:
        id: the caller's.
        content_hash, metadata: to compare with what is stored; the metadata is JSON text.
    """

    id: str
    content_hash: bytes
    metadata: str

    @classmethod
    def of(cls, document: Document) -> DocumentKey:
        """Check a document.

        Raises:
            RejectedError: it cannot be stored, whatever the bank holds.
        """
        metadata = check_document(document)
        return cls(document.id, content_hash(document), metadata)


@dataclass(frozen=True, slots=True)
class WriteDecision:
    """A document is to be stored.

    Attributes:
        encode: False when only its metadata changes.
        replaces: numbers of the documents stored under its id until now.
    """

    encode: bool = True
    replaces: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PendingWrite:
    """A document given by the caller that the next commit stores.

    Attributes:
        key: what it is known by.
        decision: what becomes of it.
        pieces: itself or its parts; none when only its metadata changes.
    """

    key: DocumentKey
    decision: WriteDecision
    pieces: tuple[TokenizedDocument, ...] = ()

    @property
    def is_new(self) -> bool:
        """True when nothing was stored under its id."""
        return self.decision.encode and not self.decision.replaces

    @property
    def part_ids(self) -> list[str]:
        """Ids of its parts; none for a whole document."""
        return [p.document.id for p in self.pieces] if len(self.pieces) > 1 else []

    @property
    def num_tokens(self) -> int:
        """Tokens to be encoded."""
        return sum(len(p.tokens) for p in self.pieces)

    def rows(self, chunk_size: int) -> list[CatalogRow]:
        """What the catalog is to hold of it."""
        split = len(self.pieces) > 1
        return [
            CatalogRow(
                piece.number,
                piece.document,
                self.key.id,
                i + 1 if split else 0,
                len(self.pieces),
                self.key.content_hash,
                self.key.metadata,
                len(piece.tokens),
                -(-len(piece.tokens) // chunk_size),
            )
            for i, piece in enumerate(self.pieces)
        ]


@dataclass(slots=True)
class _Counts:
    documents: int = 0
    added: int = 0
    updated: int = 0
    unchanged: int = 0
    parts: int = 0
    tokens: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)

    @property
    def stored(self) -> int:
        return self.added + self.updated


def content_hash(document: Document) -> bytes:
    """SHA-256 of what is encoded of a document: its title and text."""
    text = json.dumps([document.title, document.text], ensure_ascii=True)
    return hashlib.sha256(text.encode()).digest()


def check_document(document: Document) -> str:
    """Check what the caller gave.

    Returns:
        The metadata as JSON text.

    Raises:
        RejectedError: the reason.
    """
    for name, value in (
        ("id", document.id),
        ("text", document.text),
        ("title", "" if document.title is None else document.title),
    ):
        if not isinstance(value, str):
            raise RejectedError(f"its {name} is {type(value).__name__}; expected text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RejectedError(
                f"its {name} is not valid Unicode: lone surrogate U+{ord(value[error.start]):04X} "
                f"at character {error.start}; was it read with the wrong encoding?"
            ) from None
    if not document.id.strip():
        raise RejectedError("its id is empty")
    if len(document.id) > MAX_ID_CHARACTERS:
        raise RejectedError(
            f"its id has {len(document.id)} characters; at most {MAX_ID_CHARACTERS} are allowed"
        )
    if not document.text.strip():
        raise RejectedError("its text is empty")
    if len(document.text) > MAX_TEXT_CHARACTERS:
        raise RejectedError(
            f"its text has {len(document.text)} characters; at most {MAX_TEXT_CHARACTERS} are "
            "allowed; give it in several documents"
        )
    return metadata_text(document.metadata)


def metadata_text(metadata: Mapping[str, JSON]) -> str:
    """Metadata as the JSON text that is stored.

    Raises:
        RejectedError: it holds what is no JSON.
    """
    try:
        text = json.dumps(dict(metadata), ensure_ascii=False, sort_keys=True, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RejectedError(f"its metadata cannot be written as JSON: {error}") from None
    return text


def printable(document_id: object) -> str:
    """An id that can be shown, whatever it is: of bounded length, valid Unicode."""
    text = str(document_id)
    text = text if len(text) <= 80 else text[:77] + "..."
    return text.encode(errors="backslashreplace").decode()


class IdRegistry:
    """Decides what becomes of a document, by what is stored and what is on its way; gives numbers.

    There is one for all documents that are added in one call.

    Args:
        catalog: of the bank.
        on_duplicate: see `AddOptions`.
    """

    def __init__(self, catalog: Catalog, on_duplicate: OnDuplicate) -> None:
        self._catalog = catalog
        self._on_duplicate = on_duplicate
        self._first_number = self._next_number = catalog.counter("next_number")
        self._under_way: dict[str, DocumentKey] = {}
        self._parts: set[str] = set()
        self._stored = 0

    @property
    def next_number(self) -> int:
        """The number that `take` gives next."""
        return self._next_number

    @property
    def under_way(self) -> int:
        """How many documents are on their way."""
        return len(self._under_way)

    def take(self, count: int) -> int:
        """The first of so many numbers in a row; none is ever given twice."""
        self._next_number += count
        return self._next_number - count

    def lookup_or_reserve(self, key: DocumentKey) -> WriteDecision | None:
        """What to do with a document; None when it is stored unchanged.

        With a decision the document is on its way until `mark_stored` or `release`.

        Raises:
            RejectedError: it cannot be stored.
            DuplicateDocumentError: its id holds other content, and on_duplicate is "error".
        """
        waiting = self._under_way.get(key.id)
        decision = WriteDecision()
        if waiting is not None:
            known_as, twice = (waiting.content_hash, waiting.metadata), True
        else:
            known = self._catalog.known(key.id)
            if known.part_of is not None or key.id in self._parts:
                raise RejectedError(
                    "its id names a part of a document that was split; choose another"
                )
            if not known.numbers:
                self._under_way[key.id] = key
                return decision
            known_as = (known.content_hash, known.metadata)
            twice = known.numbers[0] >= self._first_number
            # Numbers stand in the encoded text: new text, new number. Metadata is not encoded.
            same_text = known.content_hash == key.content_hash
            decision = WriteDecision(False) if same_text else WriteDecision(True, known.numbers)
        if known_as == (key.content_hash, key.metadata):
            return None
        self._check_duplicate(key.id, twice)
        self._under_way[key.id] = key
        return decision

    def _check_duplicate(self, document_id: str, twice: bool) -> None:
        """Other content is stored, or was given in this call, under the document's id."""
        where = "was given twice in this call" if twice else "is in the bank"
        if self._on_duplicate == "error":
            raise DuplicateDocumentError(
                f"document '{printable(document_id)}' {where} with other content; use "
                "on_duplicate='update' (msa bank add --update) to replace what the bank holds, or "
                f"'skip' to keep it ({self._stored} documents of this call were stored before)"
            )
        if twice:
            raise RejectedError("its id was given twice in this call with different content")
        if self._on_duplicate == "skip":
            raise RejectedError(
                "the bank holds other content under its id; use on_duplicate='update' (msa index "
                "without --skip) to replace it"
            )

    def reserve_parts(self, part_ids: Sequence[str]) -> None:
        """Put the parts of a document that is on its way beside it.

        Raises:
            RejectedError: the id of one of them belongs to another document.
        """
        for part in part_ids:
            if self._catalog.known(part).numbers or part in self._under_way:
                raise RejectedError(
                    f"it must be split, and its part '{part}' has the id of another document"
                )
        self._parts.update(part_ids)

    def mark_stored(self, pending: Iterable[PendingWrite]) -> None:
        """These documents are stored."""
        for p in pending:
            self.release(p.key.id, p.part_ids)
            self._stored += 1

    def release(self, document_id: str, part_ids: Iterable[str] = ()) -> None:
        """The document is not on its way any more."""
        self._under_way.pop(document_id, None)
        self._parts.difference_update(part_ids)


@dataclass(slots=True)
class WriteBatch:
    """Documents that go into the bank together, and counts of the others among them."""

    pending: list[PendingWrite] = field(default_factory=list)
    num_tokens: int = 0
    documents: int = 0
    unchanged: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)

    @property
    def pieces(self) -> list[TokenizedDocument]:
        """What is encoded."""
        return [piece for p in self.pending for piece in p.pieces]


Submit = Callable[[Sequence[tuple[int, Sequence[int]]], int], Callable[[], Written]]
"""Begins to encode and write documents, given as (number, tokens), in batches of so many tokens;
the result waits for their segments."""


class SegmentPool(Protocol):
    """Workers that encode windows of documents and write their segments into files of their own."""

    @property
    def capacity(self) -> int:
        """Windows that are best on their way at once."""
        ...

    def submit(
        self, pieces: Sequence[tuple[int, Sequence[int]]], batch_tokens: int
    ) -> Callable[[], Sequence[WrittenFile]]:
        """Begin with documents, given as (number, tokens); the result waits for their files."""
        ...


class LocalPool:
    """One thread, so that the next window is read, split and tokenized meanwhile."""

    capacity = 1

    def __init__(self, encoder: DocumentEncoder, writer: SegmentWriter) -> None:
        self._encoder, self._writer = encoder, writer
        self._pool = ThreadPoolExecutor(1, "msa-ingest")
        self._stopped = threading.Event()

    def submit(
        self, pieces: Sequence[tuple[int, Sequence[int]]], batch_tokens: int
    ) -> Callable[[], Written]:
        """See `Submit`."""
        batches = self._encoder.encode_tokens(pieces, batch_tokens)
        return self._pool.submit(self._writer.write_all, self._until_stopped(batches)).result

    def _until_stopped(self, batches: Iterator[EncodedBatch]) -> Iterator[EncodedBatch]:
        for batch in batches:
            if self._stopped.is_set():  # no caller waits for it any more
                raise CancelledError
            yield batch

    def close(self) -> None:
        """Stop; a window on its way is dropped."""
        self._stopped.set()
        self._pool.shutdown()


class IngestPipeline:
    """One call of `add`; see `MemoryBank.add`.

    Args:
        catalog: of the bank.
        encoder: counts the tokens.
        submit: has a window encoded and written.
        capacity: windows that are best on their way at once.
        max_document_tokens: longer documents are split.
        options: how to add.
    """

    def __init__(
        self,
        catalog: Catalog,
        encoder: DocumentEncoder,
        submit: Submit,
        capacity: int,
        max_document_tokens: int,
        options: AddOptions,
    ) -> None:
        self._catalog = catalog
        self._submit, self._capacity = submit, capacity
        self._splitter = DocumentSplitter(encoder, max_document_tokens)
        self._chunk_size = int(encoder.model.config.chunk_size)
        self._options = options
        self._ids = IdRegistry(catalog, options.on_duplicate)
        self._window = WriteBatch()
        self._running: deque[tuple[WriteBatch, Callable[[], Written]]] = deque()
        self._counts = _Counts()
        self._start = time.perf_counter()

    def run(self, documents: Iterable[Document]) -> AddReport:
        """Take all documents; the report counts each of them once.

        While windows are encoded and written, the next is read, split and tokenized.
        """
        try:
            self._take_all(documents)
        except Exception:
            self._finish()  # what is being written goes into the bank
            raise
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

    def _take_all(self, documents: Iterable[Document]) -> None:
        for document in self._from_caller(documents):
            try:
                self._take(document)
            except DuplicateDocumentError:
                self._finish()
                self._take(document)  # raises it again, and counts what is stored by now
            if (
                self._window.num_tokens >= self._options.commit_tokens
                or self._window.documents >= COMMIT_DOCUMENTS
            ):
                self._finish(self._capacity - 1)
                self._begin()
        self._store_taken()

    def _from_caller(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents in NFC; if the caller fails, what was taken before is stored."""
        try:
            for document in documents:
                if not isinstance(document, Document):
                    raise InputError(
                        f"add() was given a {type(document).__name__}: expected msa.Document "
                        "objects, as in bank.add([Document(id='a', text='...')])"
                    )
                yield nfc_document(document)
        except Exception as error:
            self._store_taken()
            counts = self._counts
            error.add_note(
                f"{counts.documents} documents were taken before that; this call has stored "
                f"{counts.stored} of them, and {counts.unchanged} were in the bank already"
            )
            raise

    def _store_taken(self) -> None:
        """Put into the bank all that was taken from the caller."""
        self._begin()
        self._finish()

    # ---- one document

    def _take(self, document: Document) -> None:
        window = self._window
        window.documents += 1
        try:
            pending = self._prepare(document)
        except RejectedError as reason:
            window.failed.append((printable(document.id), str(reason)))
            return
        if pending is None:
            window.unchanged += 1
            return
        window.pending.append(pending)
        window.num_tokens += pending.num_tokens

    def _prepare(self, document: Document) -> PendingWrite | None:
        """What to store for a document; None when it is stored unchanged."""
        key = DocumentKey.of(document)
        decision = self._ids.lookup_or_reserve(key)
        if decision is None:
            return None
        if not decision.encode:
            return PendingWrite(key, decision)
        try:
            pieces = self._splitter.cut(document, self._ids.next_number)
            pending = PendingWrite(key, decision, pieces)
            self._ids.reserve_parts(pending.part_ids)
        except RejectedError:
            self._ids.release(key.id)
            raise
        self._ids.take(len(pieces))
        return pending

    # ---- windows of documents

    def _begin(self) -> None:
        """Have the window encoded and written, and begin another."""
        window, self._window = self._window, WriteBatch()
        if window.pending:
            pieces = [(p.number, p.tokens) for p in window.pieces]
            self._running.append((window, self._submit(pieces, self._options.batch_tokens)))
        elif window.documents:
            self._running.append((window, list))

    def _finish(self, left: int = 0) -> None:
        """Commit the windows on their way, oldest first, but for so many."""
        while len(self._running) > left:
            window, result = self._running.popleft()
            self._store(window, result())

    def _store(self, window: WriteBatch, written: Written) -> None:
        """Commit what was written, durably; then say so."""
        pending = window.pending
        if pending:
            # If this fails, the files stay until a writer opens the bank: only the catalog, read
            # again, can tell for sure whether a commit that reported an error is on disk.
            self._catalog.commit(
                written,
                [row for p in pending for row in p.rows(self._chunk_size)],
                replaced=[n for p in pending for n in p.decision.replaces],
                metadata=[(p.key.id, p.key.metadata) for p in pending if not p.pieces],
            )
        counts = self._counts
        for p in pending:
            if p.is_new:
                counts.added += 1
            else:
                counts.updated += 1
        counts.documents += window.documents
        counts.unchanged += window.unchanged
        counts.failed += window.failed
        counts.parts += len(window.pieces)
        counts.tokens += window.num_tokens
        self._ids.mark_stored(pending)
        if self._options.progress is not None:
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
