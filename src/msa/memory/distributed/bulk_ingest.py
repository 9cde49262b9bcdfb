"""Encoding in many processes, storing in one: a large corpus into one bank.

One process holds the bank and its `Coordinator`: it decides what becomes of each document, gives
the numbers and commits. Every process encodes with a `BulkEncoder`, and writes its own segments to
the bank's folder, which all of them see. For a window of documents it

1. *claims* them: the coordinator knows what is stored and what is on its way elsewhere, and says
   which are to be encoded, under which numbers (they stand in the encoded text);
2. encodes them and writes the latent states durably, into a folder of its own;
3. hands the rows over: the coordinator puts the files into place and commits all of it in one
   transaction.

What is not committed does not exist. A process that dies leaves nothing but files that the next
writer removes. How the processes talk is not decided here: `msa.memory.distributed.torchrun_ingest`
does it over sockets for torchrun, `examples/ray_index.py` over Ray.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from msa.errors import InputError, RankError, StorageError
from msa.memory.bank import SEGMENTS_FOLDER, MemoryBank
from msa.memory.ingest.encoder import DEFAULT_BATCH_TOKENS, DocumentEncoder
from msa.memory.ingest.pipeline import (
    COMMIT_DOCUMENTS,
    COMMIT_TOKENS,
    AddOptions,
    DocumentKey,
    IdRegistry,
    OnDuplicate,
    PendingWrite,
    WriteDecision,
    printable,
)
from msa.memory.ingest.splitter import DocumentSplitter, RejectedError
from msa.memory.store.durable_files import storage_errors
from msa.memory.store.manifest import Manifest
from msa.memory.store.records import EncodedBatch, WrittenFile
from msa.memory.store.reports import AddProgress, AddReport
from msa.memory.store.segments import SegmentWriter
from msa.text.normalization import nfc_document
from msa.text.prompts import PromptTemplate
from msa.types import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from msa.model.modeling_msa import MSAForCausalLM

# Documents are claimed together, so that a question to another host costs little; few enough that
# the texts held are no more than what a commit holds anyhow.
CLAIM_DOCUMENTS = 256
CHARACTERS_PER_TOKEN = 4
FOLDER_PREFIX = "incoming-"


@dataclass(frozen=True, slots=True)
class Assignment:
    """The coordinator's answer: store this document.

    Attributes:
        verdict: what becomes of it.
        number: for a document in one piece; the parts of a split one get others.
    """

    verdict: WriteDecision
    number: int


@dataclass(slots=True)
class Window:
    """What a worker hands over in one commit, and how the documents ended that it took for it.

    Attributes:
        documents: taken, in whatever way they ended.
        unchanged: stored before as given.
        failed: (id, reason).
        pending: to be stored.
        files: their latent states, on disk.
    """

    documents: int = 0
    unchanged: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    pending: list[PendingWrite] = field(default_factory=list)
    files: list[WrittenFile] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens to be encoded."""
        return sum(p.num_tokens for p in self.pending)


class Desk(Protocol):
    """What a worker asks of the coordinator, over whatever lies between them.

    Every method names the worker that asks. See `Coordinator`, which has the same ones.
    """

    def join(self, worker: str) -> str:
        """A folder for the worker."""
        ...

    def claim(self, worker: str, claims: Sequence[DocumentKey]) -> list[Assignment | str | None]:
        """What becomes of documents."""
        ...

    def claim_parts(self, worker: str, parts: Sequence[Sequence[str]]) -> list[int | str]:
        """Numbers for the parts of split documents."""
        ...

    def commit(self, worker: str, window: Window) -> None:
        """Store a window."""
        ...


class Coordinator:
    """Decides, numbers and commits for all workers. Its methods may be called from any thread.

    Args:
        bank: open for writing.
        on_duplicate: see `MemoryBank.add`.
        progress: called after every commit, by the thread that commits.
    """

    def __init__(
        self,
        bank: MemoryBank,
        *,
        on_duplicate: OnDuplicate = "error",
        progress: Callable[[AddProgress], None] | None = None,
    ) -> None:
        AddOptions(on_duplicate)  # checks it
        self._bank = bank
        self._register = IdRegistry(bank.catalog, on_duplicate)
        self._chunk_size = bank.manifest.chunk_size
        self._progress = progress
        self._run = uuid.uuid4().hex[:8]
        self._folders: list[Path] = []
        self._claimed: dict[str, set[str]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._start = time.perf_counter()
        self._counts = {"added": 0, "updated": 0, "unchanged": 0, "parts": 0, "tokens": 0}
        self._failed: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """One worker at a time, and none once this is closed."""
        with self._lock:
            if self._closed:
                raise RankError("the bank is not open for this run any more")
            yield

    def close(self) -> None:
        """Refuse everything from now on and remove the workers' folders; then close the bank."""
        with self._lock:
            self._closed = True
            for folder in self._folders:
                with contextlib.suppress(OSError):  # what is left in it, the next writer removes
                    folder.rmdir()

    def join(self, worker: str) -> str:
        """A new folder below the bank's `segments`, for this worker alone: its name.

        A worker of this name that joined before is gone: what it had claimed is free again.

        Raises:
            StorageError: the folder cannot be made.
        """
        with self._working():
            for document_id in self._claimed.pop(worker, ()):
                self._register.give_up(document_id)
            self._claimed[worker] = set()
            # Never a name of another run, whose workers may outlive it for a moment.
            name = f"{FOLDER_PREFIX}{self._run}-{len(self._folders)}"
            folder = self._bank.segments_folder / name
            with storage_errors(f"make {folder}"):
                folder.mkdir()
            self._folders.append(folder)
            return name

    def claim(self, worker: str, claims: Sequence[DocumentKey]) -> list[Assignment | str | None]:
        """What becomes of documents, one answer for each.

        Returns:
            An assignment; the reason why it cannot be stored; or None: it is stored as given.

        Raises:
            DuplicateDocumentError: as `MemoryBank.add` raises it.
        """
        answers: list[Assignment | str | None] = []
        with self._working():
            for claim in claims:
                try:
                    verdict = self._register.claim(claim)
                except RejectedError as reason:
                    answers.append(str(reason))
                    continue
                if verdict is None:
                    answers.append(None)
                    continue
                self._claimed[worker].add(claim.id)
                number = self._register.take(1 if verdict.encode else 0)
                answers.append(Assignment(verdict, number))
        return answers

    def claim_parts(self, worker: str, parts: Sequence[Sequence[str]]) -> list[int | str]:
        """Numbers for the parts of documents that had to be split.

        Args:
            worker: who asks.
            parts: for every document the ids of its parts.

        Returns:
            For every document the first of its numbers, which lie in a row; or why it cannot be
            stored.
        """
        answers: list[int | str] = []
        with self._working():
            for ids in parts:
                try:
                    self._register.claim_parts(ids)
                    answers.append(self._register.take(len(ids)))
                except RejectedError as reason:
                    answers.append(str(reason))
        return answers

    def commit(self, worker: str, window: Window) -> None:
        """Store a window: one transaction, durable on return.

        Raises:
            StorageError: a file is missing or cut short, or the disk refused; nothing of the window
                is stored.
        """
        pending = window.pending
        with self._working():
            if pending:
                self._bank.adopt(
                    window.files,
                    [row for p in pending for row in p.rows(self._chunk_size)],
                    replaced=[n for p in pending for n in p.verdict.replaces],
                    metadata=[(p.claim.id, p.claim.metadata) for p in pending if not p.pieces],
                )
            self._register.settle(pending)
            # A window holds all that its worker has claimed: what is not stored has failed.
            for document_id in self._claimed[worker]:
                self._register.give_up(document_id)
            self._claimed[worker].clear()
            counts = self._counts
            counts["added"] += sum(p.is_new for p in pending)
            counts["updated"] += sum(not p.is_new for p in pending)
            counts["unchanged"] += window.unchanged
            counts["parts"] += sum(len(p.pieces) for p in pending)
            counts["tokens"] += window.num_tokens
            self._failed += [(printable(i), reason) for i, reason in window.failed]
            if self._progress is not None:
                self._progress(self._so_far())

    def _so_far(self) -> AddProgress:
        counts, failed = self._counts, len(self._failed)
        ended = counts["added"] + counts["updated"] + counts["unchanged"] + failed
        return AddProgress(
            ended,
            counts["added"],
            counts["updated"],
            counts["unchanged"],
            failed,
            counts["tokens"],
            time.perf_counter() - self._start,
        )

    def finish(self) -> AddReport:
        """Count what the workers did, when all are done; failures in no fixed order.

        Raises:
            RankError: documents were claimed by a worker that never handed them over.
        """
        with self._lock:
            if self._register.under_way:
                raise RankError(
                    f"{self._register.under_way} documents were claimed by a worker that ended "
                    "before it stored them; run the same again to encode them"
                )
            counts = self._counts
            return AddReport(
                counts["added"],
                counts["updated"],
                counts["unchanged"],
                tuple(self._failed),
                counts["parts"],
                counts["tokens"],
                time.perf_counter() - self._start,
            )


class BulkEncoder:
    """Encodes documents for a bank that another process holds.

    Args:
        path: the bank's folder, as this process sees it.
        model, tokenizer: those the bank was made with.
        desk: the coordinator, or what stands for it here.
        worker: a name that no other worker has; the same one after a restart.
        template: compared with the bank's when given.
        batch_tokens, commit_tokens: see `MemoryBank.add`.
        alive: called between batches; may raise to end the work.

    Raises:
        BankNotFoundError: no bank there.
        BankMismatchError: it was made with another model, tokenizer or template.
        StorageError: the folder made for this worker is not there: another file system.
    """

    def __init__(
        self,
        path: str | Path,
        model: MSAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        desk: Desk,
        worker: str,
        *,
        template: PromptTemplate | None = None,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        commit_tokens: int = COMMIT_TOKENS,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        options = AddOptions(batch_tokens=batch_tokens, commit_tokens=commit_tokens)  # checks them
        self._desk, self._worker, self._alive, self._options = desk, worker, alive, options
        name = desk.join(worker)
        manifest = Manifest.load(Path(path))
        manifest.check(Path(path), model, tokenizer, template)
        folder = Path(path) / SEGMENTS_FOLDER / name
        if not folder.is_dir():
            raise StorageError(
                f"{folder} was made for this process and is not there: the bank must lie on a file "
                "system that all hosts share, under the same path"
            )
        self._encoder = DocumentEncoder(
            model,
            tokenizer,
            manifest.prompt_template,
            dtype=manifest.torch_dtype,
            packed=manifest.packed,
        )
        self._cutter = DocumentSplitter(self._encoder, manifest.max_document_tokens)
        self._writer = SegmentWriter(folder, 1)
        self._window = Window()
        self._gathered: list[tuple[DocumentKey, Document]] = []
        self._characters = 0

    def add(self, documents: Iterable[Document]) -> None:
        """Take documents; all of them are stored and counted on return.

        Raises:
            DuplicateDocumentError: as `MemoryBank.add` raises it.
            StorageError: the disk refused; what was committed before stays.
            ModelError: the model's states are not finite.
            InputError: something in the stream is no `Document`.
        """
        room = self._options.commit_tokens * CHARACTERS_PER_TOKEN
        for document in documents:
            self._gather(document)
            if len(self._gathered) >= CLAIM_DOCUMENTS or self._characters >= room:
                self._claim()
            full = self._window.num_tokens >= self._options.commit_tokens
            if full or self._window.documents >= COMMIT_DOCUMENTS:
                self._commit()
        self._commit()

    def _gather(self, document: Document) -> None:
        """Check a document and put it with those to be claimed."""
        if not isinstance(document, Document):
            raise InputError(
                f"a {type(document).__name__} was given: expected msa.Document objects, "
                "as Document(id='a', text='...')"
            )
        document = nfc_document(document)
        self._window.documents += 1
        try:
            self._gathered.append((DocumentKey.of(document), document))
        except RejectedError as reason:
            self._window.failed.append((printable(document.id), str(reason)))
            return
        self._characters += len(document.text)

    def _claim(self) -> None:
        """Ask what becomes of the gathered documents, and cut those that are to be encoded."""
        gathered, self._gathered, self._characters = self._gathered, [], 0
        if not gathered:
            return
        answers = self._desk.claim(self._worker, [claim for claim, _ in gathered])
        split: list[tuple[DocumentKey, WriteDecision, list[Document]]] = []
        for (claim, document), answer in zip(gathered, answers, strict=True):
            if answer is None:
                self._window.unchanged += 1
            elif isinstance(answer, str):
                self._window.failed.append((claim.id, answer))
            elif not answer.verdict.encode:
                self._window.pending.append(PendingWrite(claim, answer.verdict))
            else:
                try:
                    pieces = self._cutter.cut(document, answer.number)
                except RejectedError as reason:
                    self._window.failed.append((claim.id, str(reason)))
                    continue
                if len(pieces) > 1:
                    split.append((claim, answer.verdict, [p.document for p in pieces]))
                else:
                    self._window.pending.append(PendingWrite(claim, answer.verdict, pieces))
            self._alive()
        if split:
            self._claim_parts(split)

    def _claim_parts(
        self, split: Sequence[tuple[DocumentKey, WriteDecision, list[Document]]]
    ) -> None:
        """Number the parts of documents that had to be split."""
        wanted = [[part.id for part in parts] for _, _, parts in split]
        answers = self._desk.claim_parts(self._worker, wanted)
        for (claim, verdict, parts), answer in zip(split, answers, strict=True):
            try:
                if isinstance(answer, str):
                    raise RejectedError(answer)
                pieces = self._cutter.number(parts, answer)
            except RejectedError as reason:
                self._window.failed.append((claim.id, str(reason)))
            else:
                self._window.pending.append(PendingWrite(claim, verdict, pieces))

    def _commit(self) -> None:
        """Encode what was claimed, write it and hand it over."""
        self._claim()  # so that a window holds all that was taken
        window, self._window = self._window, Window()
        if not window.documents:
            return
        pieces = [(piece.number, piece.tokens) for p in window.pending for piece in p.pieces]
        batches = self._encoder.encode_tokens(pieces, self._options.batch_tokens)
        for entry, numbers in self._writer.write_all(self._with_alive(batches)):
            name = f"{self._writer.folder.name}/{entry.name}"
            window.files.append(WrittenFile(name, entry, numbers))
        self._desk.commit(self._worker, window)

    def _with_alive(self, batches: Iterable[EncodedBatch]) -> Iterator[EncodedBatch]:
        for batch in batches:
            self._alive()
            yield batch
