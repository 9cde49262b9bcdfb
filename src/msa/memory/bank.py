"""MemoryBank: the documents and their latent states, on disk. Durable on return."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from msa.errors import BankError, InputError
from msa.memory.ingest.adoption import adopting
from msa.memory.ingest.encoder import DEFAULT_BATCH_TOKENS, DocumentEncoder
from msa.memory.ingest.pipeline import (
    COMMIT_TOKENS,
    AddOptions,
    IngestPipeline,
    LocalPool,
    OnDuplicate,
    SegmentPool,
    Submit,
    metadata_text,
)
from msa.memory.ingest.splitter import RejectedError
from msa.memory.maintenance import Maintenance
from msa.memory.store.catalog import CATALOG_FILE, Catalog
from msa.memory.store.durable_files import TEMPORARY_SUFFIX, storage_errors, sync_folder
from msa.memory.store.lifetime import ClosedAtExit, Lifetime, NotPickled
from msa.memory.store.manifest import BANK_FILE, Manifest
from msa.memory.store.reports import (
    AddProgress,
    AddReport,
    CompactReport,
    VerifyReport,
)
from msa.memory.store.segments import SegmentWriter
from msa.memory.store.writer_lock import HOLDER_FILE, LOCK_FILE, WriterLock, WriterTurn
from msa.memory.stored_documents import SEGMENTS_FOLDER, StoredDocuments
from msa.model.checkpoint import Checkpoint, parts_of
from msa.text.prompts import PromptTemplate
from msa.types import JSON, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from msa.inference.options import AskOptions
    from msa.model.modeling_msa import MSAForCausalLM

_OUR_FILES = {
    SEGMENTS_FOLDER,
    LOCK_FILE,
    HOLDER_FILE,
    *(CATALOG_FILE + end for end in ("", "-wal", "-shm", "-journal")),
}
_UNFINISHED = f"{BANK_FILE}*{TEMPORARY_SUFFIX}"


class MemoryBank(StoredDocuments, ClosedAtExit, NotPickled):
    """A memory bank in a folder. Make one with `create` or `open`; close it, or use `with`.

    One process may write at a time, any number may read. All methods may be called from several
    threads; those that write take turns. Another process opens the bank itself, whether it was
    forked or not; a bank cannot be pickled. All methods raise `BankError` once the bank is closed,
    and when another bank has taken its place on disk.

    Attributes:
        path: the folder, absolute.
        manifest: what the bank was made with.
        model, tokenizer: for adding and asking; None when opened without.
        ask_options: of the `Checkpoint` that it was opened with; None when opened without one.
        read_only: True when opened for reading.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        catalog: Catalog,
        lock: WriterLock | None,
        model: MSAForCausalLM | None,
        tokenizer: PreTrainedTokenizerBase | None,
        ask_options: AskOptions | None = None,
    ) -> None:
        super().__init__(path, manifest, catalog)
        self.model = model
        self.tokenizer = tokenizer
        self.ask_options = ask_options
        self._lock = lock
        self._turn = WriterTurn(path)
        self._life = Lifetime(f"bank '{path}'", "open it again (MemoryBank.open)")
        self._maintenance = Maintenance(catalog, self.segments_folder, manifest.routing_layers)
        if lock is not None:
            first = catalog.counter("next_segment")
            self._writer = SegmentWriter(self.segments_folder, first, catalog.check_writer)
            self._maintenance.remove(self._maintenance.orphans())

    @classmethod
    def create(
        cls,
        path: str | Path,
        model: MSAForCausalLM | Checkpoint,
        tokenizer: PreTrainedTokenizerBase | None = None,
        template: PromptTemplate | None = None,
        *,
        dtype: torch.dtype | None = None,
        content_dtype: str | None = None,
        max_document_tokens: int | None = None,
    ) -> MemoryBank:
        """A new, empty bank, open for writing.

        Args:
            path: a folder that is not there yet, or empty.
            model: encodes the documents; the bank can be used with no other. A `Checkpoint` brings
                tokenizer and template along.
            tokenizer: the model's.
            template: text format; the released one by default.
            dtype: of the latent states on disk; the model's by default.
            content_dtype: "int8", "fp8" or "int4" for content (pooled keys and values) in fewer
                bits; `dtype` by default. `msa.evaluation.agreement` measures what it changes.
            max_document_tokens: longer documents are split into parts of at most so many tokens;
                by default 512, or the model's positions if those are fewer.

        Raises:
            BankError: there is a bank already, or something else.
            BankLockedError: another process is making a bank there.
            ConfigError: a dtype or max_document_tokens cannot be used.
            StorageError: the folder cannot be written.
            InputError: no model, or one without its tokenizer.
        """
        path = Path(path).resolve()  # once: the bank stays what it is when the process moves
        encoding, tokenizer, template = parts_of(model, tokenizer, template)
        if encoding is None or tokenizer is None:
            raise InputError("a new bank needs the model that encodes its documents; give one")
        manifest = Manifest.for_model(
            encoding,
            tokenizer,
            template or PromptTemplate(),
            dtype,
            max_document_tokens,
            content_dtype,
        )
        _check_free(path)
        with storage_errors(f"make bank '{path}'"):
            path.mkdir(parents=True, exist_ok=True)
        lock = WriterLock(path)
        try:
            _check_free(path)  # another process may have made one before we had the lock
            with storage_errors(f"make bank '{path}'"):
                for leftover in (*path.glob(CATALOG_FILE + "*"), *path.glob(_UNFINISHED)):
                    leftover.unlink()  # of a creation that was interrupted
                (path / SEGMENTS_FOLDER).mkdir(exist_ok=True)
            catalog = Catalog.create(path)
            manifest.save(path)  # last: from here on it is a bank
            with storage_errors(f"make bank '{path}'"):
                sync_folder(path.parent)
        except BaseException:
            lock.release()
            raise
        return cls(path, manifest, catalog, lock, encoding, tokenizer, _ask_options(model))

    @classmethod
    def open(
        cls,
        path: str | Path,
        model: MSAForCausalLM | Checkpoint | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        template: PromptTemplate | None = None,
        *,
        read_only: bool = False,
    ) -> MemoryBank:
        """An existing bank.

        Args:
            path: its folder.
            model, tokenizer: those it was made with, or its `Checkpoint`; needed for adding and
                asking only.
            template: compared with the bank's when given.
            read_only: take no writer's lock and change nothing; for asking beside a writer.

        Raises:
            BankNotFoundError: no bank there.
            BankMismatchError: it was made with another model, tokenizer, template or version.
            BankLockedError: another process is writing to it.
            BankCorruptError: bank.json or the catalog is damaged.
            StorageError: it cannot be opened for writing.
            InputError: a model without its tokenizer, or the reverse.
        """
        path = Path(path).resolve()  # once: the bank stays what it is when the process moves
        manifest = Manifest.load(path)
        asking, tokenizer, template = parts_of(model, tokenizer, template)
        if asking is not None and tokenizer is not None:
            manifest.check(path, asking, tokenizer, template)
        lock = None if read_only else WriterLock(path)
        try:
            catalog = Catalog(path, read_only=read_only)
            return cls(path, manifest, catalog, lock, asking, tokenizer, _ask_options(model))
        except BaseException:
            if lock is not None:
                lock.release()
            raise

    # ---- life

    @property
    def read_only(self) -> bool:
        """True when the bank was opened for reading."""
        return self._lock is None

    def check_open(self) -> None:
        """Refuse when the bank is closed, or was opened by the process that forked this one.

        Raises:
            BankError: one line that says what to do.
        """
        self._life.check()

    def close(self) -> None:
        """Close the bank and let the next writer in; calling it twice does nothing.

        Waits for a thread that is writing. In a forked child it does nothing: the bank is the
        parent's.
        """
        if self._life.is_elsewhere:
            return
        with self._turn:
            if not self._life.ended:
                self._life.end()
                self._lexical.close()
                self.catalog.close()
                if self._lock is not None:
                    self._lock.release()

    def __repr__(self) -> str:
        return f"MemoryBank('{self.path}'{', closed' if self._life.ended else ''})"

    @contextlib.contextmanager
    def _writing(self, doing: str) -> Iterator[None]:
        """One thread at a time; refuses what cannot be written before anything is."""
        self._life.check_process()
        with self._turn:
            self._life.check()
            if self.read_only:
                raise BankError(
                    f"bank '{self.path}' was opened read_only; open it without to {doing}"
                )
            self.catalog.check_writer()
            yield

    def _encoder(
        self, doing: str, before_batch: Callable[[], None] | None = None
    ) -> DocumentEncoder:
        if self.model is None or self.tokenizer is None:
            raise BankError(
                f"bank '{self.path}' was opened without a model; give MemoryBank.open the model "
                f"and tokenizer to {doing}"
            )
        return DocumentEncoder(
            self.model,
            self.tokenizer,
            self.template,
            dtype=self.manifest.torch_dtype,
            packed=self.manifest.packed,
            before_batch=before_batch,
        )

    # ---- writing

    def add(
        self,
        documents: Iterable[Document],
        *,
        on_duplicate: OnDuplicate = "error",
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        commit_tokens: int = COMMIT_TOKENS,
        progress: Callable[[AddProgress], None] | None = None,
        pool: SegmentPool | None = None,
        before_batch: Callable[[], None] | None = None,
    ) -> AddReport:
        """Encode and store documents; each is durable once a progress call has counted it.

        Documents are taken one by one and committed every `commit_tokens`, so an iterator of any
        length can be given. If it raises an error, what it gave is stored, and a note on the error
        says how many; if it or the process is stopped, what was committed stays, and the same
        call with on_duplicate="skip" goes on from there. A document longer than the bank's
        `max_document_tokens` is split into linked parts ("book#1", "book#2", ...), stored together.

        Args:
            documents: to be added. Bad ones (empty, too long, not valid Unicode, ...) are reported
                in `failed`; the others go on.
            on_duplicate: for an id that the bank holds with other content: "error" raises, "skip"
                reports it as failed, "update" replaces it under a new number.
            batch_tokens: tokens encoded at once, padding included.
            commit_tokens: tokens after which a commit is made.
            progress: called after every commit.
            pool: workers that encode, such as `msa.memory.distributed.encoding_pool.EncodingPool`;
                by default this process does.
            before_batch: called before every batch that this process encodes, by the thread that
                does: it may wait to leave the processor to others, and what it raises stops the
                call, as an error of the iterator does.

        Raises:
            DuplicateDocumentError: on_duplicate is "error", and an id is in the bank or came before
                in this call, with other content. What was committed before stays.
            StorageError: the disk refused; what was committed before stays.
            ModelError: the model's states are not finite.
            BankError: the bank is read-only, closed or has no model.
        """
        options = AddOptions(on_duplicate, batch_tokens, commit_tokens, progress)
        if isinstance(documents, Document) or not isinstance(documents, Iterable):
            raise InputError(
                f"add() was given a {type(documents).__name__}: expected several msa.Document "
                "objects, as in bank.add([Document(id='a', text='...')])"
            )
        with self._writing("add documents"):
            return self._add(documents, options, pool, before_batch)

    def _add(
        self,
        documents: Iterable[Document],
        options: AddOptions,
        pool: SegmentPool | None = None,
        before_batch: Callable[[], None] | None = None,
    ) -> AddReport:
        encoder = self._encoder("add documents", before_batch)
        with contextlib.ExitStack() as stack:
            submit: Submit
            if pool is None:
                local = stack.enter_context(contextlib.closing(LocalPool(encoder, self._writer)))
                submit, capacity = local.submit, local.capacity
            else:
                submit, capacity = adopting(pool, self._writer, self.segments_folder), pool.capacity
            limit = self.manifest.max_document_tokens
            pipeline = IngestPipeline(self.catalog, encoder, submit, capacity, limit, options)
            return pipeline.run(documents)

    def update(self, document: Document) -> None:
        """Replace a document's text, title or metadata.

        New text gets a new number, since the number stands in the encoded text; new metadata alone
        keeps it. The change is one commit: a reader sees the old document or the new one.

        Raises:
            DocumentNotFoundError: the bank does not hold the id.
            InputError: the new document cannot be stored; the old one stays.
        """
        if not isinstance(document, Document):
            raise InputError(
                f"update() was given a {type(document).__name__}: expected one msa.Document, as in "
                "bank.update(Document(id='a', text='...'))"
            )
        with self._writing("update documents"):
            self._known_numbers(document.id)
            report = self._add([document], AddOptions("update"))
        if report.failed:
            raise InputError(f"document '{report.failed[0][0]}': {report.failed[0][1]}")

    def set_metadata(self, metadata: Mapping[str, Mapping[str, JSON]]) -> None:
        """Give documents other metadata; in one commit. Texts and numbers stay as they are.

        Args:
            metadata: id, as passed to `add`, -> all of the document's metadata from now on.

        Raises:
            DocumentNotFoundError: the bank does not hold one of them.
            InputError: an id names a part of a split document; or a value is no JSON.
        """
        with self._writing("change metadata"):
            changes = []
            for document_id, values in metadata.items():
                self._known_numbers(document_id)
                try:
                    changes.append((document_id, metadata_text(values)))
                except RejectedError as reason:
                    raise InputError(f"document '{document_id}': {reason}") from None
            if changes:
                self.catalog.commit([], [], metadata=changes)

    def delete(self, ids: str | Iterable[str]) -> int:
        """Delete documents, with all their parts; in one commit, all or none.

        Texts are erased at once; latent states stay on disk, unread, until `compact`.

        Args:
            ids: as passed to `add`.

        Returns:
            How many ids were deleted.

        Raises:
            DocumentNotFoundError: the bank does not hold one of them.
            InputError: an id names a part of a split document, or is no text.
        """
        if not isinstance(ids, Iterable):
            raise InputError(
                f"delete() was given a {type(ids).__name__}: expected an id, or several"
            )
        wanted = dict.fromkeys([ids] if isinstance(ids, str) else ids)
        with self._writing("delete documents"):
            numbers = [n for i in wanted for n in self._known_numbers(i)]
            if numbers:
                self.catalog.delete(numbers)
        return len(wanted)

    def _known_numbers(self, document_id: str) -> tuple[int, ...]:
        known = self.catalog.known(document_id)
        if known.part_of is not None:
            raise InputError(
                f"'{document_id}' is a part of '{known.part_of}', which was split; give that id"
            )
        if not known.numbers:
            raise self._not_found(document_id)
        return known.numbers

    def compact(self) -> CompactReport:
        """Drop the latent states of deleted documents, and merge small segments.

        Group by group: new segment, commit, removal of the old ones; so it needs little room on
        disk and can be killed at any instant. Readers that have the old segments open keep them.

        Raises:
            BankCorruptError: a segment to be rewritten is damaged; it is left as it is.
            StorageError: the disk refused; groups done before stay done.
        """
        with self._writing("compact it"):
            return self._maintenance.compact(self._writer)

    def repair(self) -> int:
        """Encode the documents of damaged segments again from their stored texts.

        They keep their numbers, so nothing else changes. A damaged word index is built again too.

        Returns:
            How many documents were encoded.

        Raises:
            BankError: the bank is read-only, closed or has no model.
        """
        with self._writing("repair it"):
            return self._maintenance.repair(self._writer, self._encoder("repair it"))

    def verify(self) -> VerifyReport:
        """Read everything and compare it with its checksums; repairs nothing.

        Beside a writer, a segment that `compact` replaces meanwhile is not reported.
        """
        return self._maintenance.verify()


def _ask_options(model: MSAForCausalLM | Checkpoint | None) -> AskOptions | None:
    return model.ask_options if isinstance(model, Checkpoint) else None


def _check_free(path: Path) -> None:
    """Refuse to make a bank where there is one, or where something else is."""
    with storage_errors(f"make bank '{path}'"):
        if path.exists() and not path.is_dir():
            raise BankError(f"cannot make a bank at '{path}': it is a file; choose a folder")
        names = {p.name for p in path.iterdir()} if path.exists() else set()
    ours = _OUR_FILES | {n for n in names if fnmatch.fnmatch(n, _UNFINISHED)}
    if BANK_FILE in names:
        raise BankError(f"'{path}' is a memory bank already; open it with MemoryBank.open")
    if names - ours:
        raise BankError(
            f"'{path}' holds other files ({min(names - ours)}); choose a new or an empty folder"
        )
