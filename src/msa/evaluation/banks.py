"""Memory banks of what is asked about, each made once: one per haystack, and copies of it.

A copy shares the files of its latent states with the haystack's bank, so that what a task adds to
it (documents that one question alone may see) or changes in it costs no second encoding of the
rest. An unfinished bank is continued; an unfinished copy is made again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from msa.errors import InputError
from msa.evaluation.question_sets import hash_of
from msa.evaluation.retrieval import Progress
from msa.evaluation.systems import bank_documents
from msa.evaluation.tasks.base import Change
from msa.memory.bank import MemoryBank
from msa.memory.ingest.encoder import DEFAULT_BATCH_TOKENS
from msa.memory.ingest.pipeline import OnDuplicate
from msa.memory.stored_documents import SEGMENTS_FOLDER
from msa.model.checkpoint import Checkpoint
from msa.model.identity import model_fingerprints
from msa.types import Document


class HaystackBanks:
    """Banks in a folder, by a hash of what is in them and of the model.

    Args:
        folder: of the banks.
        checkpoint: encodes the documents.
        batch_tokens: encoded at once.
        progress: makes a function that is told what is done, from a name of the work and its unit.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        *,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        progress: Callable[[str, str], Progress] | None = None,
    ) -> None:
        self._folder = folder
        self._checkpoint = checkpoint
        self._batch_tokens = batch_tokens
        self._progress = progress
        found = model_fingerprints(checkpoint.model)
        self._model = hashlib.sha256(f"{found.states} {found.router}".encode()).hexdigest()[:16]

    def bank(self, documents: Sequence[Document], owned: Sequence[Document] = ()) -> Path:
        """Folder of a bank of these documents.

        Args:
            documents: the haystack.
            owned: documents that are some question's own; they go into a copy.
        """
        folder = self._named(hash_of(documents))
        if not self._is_whole(folder, len(documents)):
            exists = (folder / "bank.json").is_file()
            make = MemoryBank.open if exists else MemoryBank.create
            with make(folder, self._checkpoint) as bank:
                self._add(bank, bank_documents(documents), len(documents))
        if not owned:
            return folder
        ids = {document.id for document in owned}
        with self._copied(folder, "own", hash_of(owned)) as (copy, bank):
            if bank is not None:
                self._add(bank, bank_documents(owned, ids), len(owned))
        return copy

    def changed(self, folder: Path, changes: Sequence[Change], owned: Collection[str] = ()) -> Path:
        """Folder of a copy of a bank in which documents were added, replaced and deleted.

        Args:
            folder: of a bank, of `bank`.
            changes: in their order.
            owned: ids of documents that are some question's own.
        """
        if not changes:
            return folder
        with self._copied(folder, "changed", hash_of(changes)) as (copy, bank):
            if bank is not None:
                if len({change.id for change in changes}) == len(changes):
                    changes = sorted(changes, key=_deletes)  # fewer commits, and all the same
                for deletes, group in groupby(changes, _deletes):
                    if deletes:
                        bank.delete(change.id for change in group)
                    else:
                        documents = [change.document for change in group if change.document]
                        self._add(bank, bank_documents(documents, owned), len(documents), "update")
        return copy

    @staticmethod
    def _is_whole(folder: Path, count: int) -> bool:
        """Whether a bank holds so many documents; looked at without keeping others from it."""
        if not (folder / "bank.json").is_file():
            return False
        with MemoryBank.open(folder, read_only=True) as bank:
            return bank.info().num_ids >= count

    def _named(self, *parts: str) -> Path:
        return self._folder / "-".join([*parts, self._model])

    @contextmanager
    def _copied(self, folder: Path, *parts: str) -> Iterator[tuple[Path, MemoryBank | None]]:
        """A copy, and its bank to be changed if it has just been made."""
        copy = folder.with_name("-".join([folder.name, *parts]))
        if (copy / "bank.json").is_file():
            yield copy, None
            return
        partial = copy.with_name(copy.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        copy_bank(folder, partial)
        with MemoryBank.open(partial, self._checkpoint) as bank:
            yield copy, bank
        partial.rename(copy)

    def _add(
        self,
        bank: MemoryBank,
        documents: Iterable[Document],
        count: int,
        on_duplicate: OnDuplicate = "skip",
    ) -> None:
        tell = self._tell("indexing", "documents")
        report = bank.add(
            documents,
            on_duplicate=on_duplicate,
            batch_tokens=self._batch_tokens,
            progress=lambda state: tell(state.documents, count),
        )
        if report.failed:
            name, reason = report.failed[0]
            raise InputError(
                f"{len(report.failed)} documents cannot be stored, the first is {name!r}: {reason}"
            )

    def _tell(self, work: str, unit: str) -> Progress:
        return (lambda done, whole: None) if self._progress is None else self._progress(work, unit)


def _deletes(change: Change) -> bool:
    return change.document is None


def copy_bank(folder: Path, target: Path) -> None:
    """Copy a bank that is not written to; files of latent states are linked where links are."""
    for path in sorted(folder.rglob("*")):
        place = target / path.relative_to(folder)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.name == SEGMENTS_FOLDER:  # never written to again
            try:
                os.link(path, place)
                continue
            except OSError:  # another file system, or one without links
                pass
        shutil.copy2(path, place)
