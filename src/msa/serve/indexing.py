"""One index job: files to documents of a bank, in slices that are committed one by one.

Between two slices others may write to the bank. What a slice has brought is noted in the state
folder before other writers, so that a job that is interrupted goes on after what it has
stored, and brings back nothing that was changed or deleted since.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from msa.memory.bank import MemoryBank
from msa.memory.ingest.pipeline import content_hash, printable
from msa.memory.store.origins import Origin, Origins
from msa.serve.file_reader import FileReader
from msa.serve.job_store import OPEN_FILES, FileStatus, Job, JobFile, JobStore, Reason, Step
from msa.text.loaders import LoadedDocument, LoadFailure, common_root, load_documents
from msa.types import Document

SLICE_DOCUMENTS = 64
SLICE_CHARACTERS = 24_000
"""Of a slice, about: who else writes to the bank waits for one slice at most."""
BATCH_TOKENS = 2048
"""Tokens of one batch of the encoder: after each of them questions may go first."""


class Desk:
    """Writers of a bank take turns, in the order in which they came."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next = self._serving = 0

    def ticket(self) -> int:
        """A place in the line, which has to be used: `turn` with it."""
        with self._changed:
            self._next += 1
            return self._next - 1

    @contextlib.contextmanager
    def turn(self, ticket: int | None = None) -> Iterator[None]:
        """The bank for this thread alone, when its turn has come."""
        mine = self.ticket() if ticket is None else ticket
        with self._changed:
            self._changed.wait_for(lambda: self._serving == mine)
        try:
            yield
        finally:
            with self._changed:
                self._serving += 1
                self._changed.notify_all()


@dataclass(slots=True)
class _Slice:
    """Documents that go into the bank together.

    Attributes:
        documents: id -> the document and the position of its file.
        origins: id -> path of its file below the bank's root; for files that lie on this machine.
        step: what came of the rest.
        taken: position -> documents and failures taken from that file.
        ended: positions of the files that this slice is the last of.
        characters: of the texts.
    """

    documents: dict[str, tuple[Document, int]] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    step: Step = field(default_factory=Step)
    taken: dict[int, int] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)
    characters: int = 0

    @property
    def is_full(self) -> bool:
        count = len(self.documents) + len(self.step.reasons)
        return count >= SLICE_DOCUMENTS or self.characters >= SLICE_CHARACTERS


Taken = tuple[int, LoadedDocument | LoadFailure | None]
"""Position of a file, and what it gave; None when it has given all."""


class IndexRun:
    """The work of one index job.

    Args:
        store: the state folder.
        job: the job.
        bank: that it writes to.
        desk: the bank's.
        reader: of what clients sent.
        before_batch: called before each slice, and before each batch by the thread that encodes;
            what it raises ends the run.
        ticket: for the first turn at the desk, if one was taken already.
    """

    def __init__(
        self,
        store: JobStore,
        job: Job,
        bank: MemoryBank,
        desk: Desk,
        *,
        reader: FileReader,
        before_batch: Callable[[], None],
        ticket: int | None = None,
    ) -> None:
        self._store, self._job, self._bank, self._desk = store, job, bank, desk
        self._reader = reader
        self._before_batch = before_batch
        self._ticket = ticket
        if "paths" in job.options:
            store.reset(job.id)  # its files may have changed: it begins again
        self._files = {file.position: file for file in store.files_of(job.id)}
        self._failed = {r.position for r in store.reasons_of(job.id) if not r.ignored}

    def run(self, on_commit: Callable[[], None]) -> None:
        """Store everything; `on_commit` is called after each slice.

        Raises:
            MSAError: the bank or the disk refused; what was committed stays.
        """
        paths = self._job.options.get("paths")
        stream = self._uploads() if paths is None else self._paths([Path(p) for p in paths])
        piece = _Slice()
        try:
            for position, loaded in stream:
                twice = isinstance(loaded, LoadedDocument) and loaded.document.id in piece.documents
                if piece.is_full or twice:
                    self._commit(piece)
                    on_commit()
                    piece = _Slice()
                self._take(piece, position, loaded)
            self._commit(piece)
            on_commit()
        finally:
            if self._ticket is not None:
                with self._desk.turn(self._ticket):
                    self._ticket = None

    # ---- what there is

    def _uploads(self) -> Iterator[Taken]:
        """What the files hold that clients sent, after what was taken before."""
        for file in list(self._files.values()):
            if file.status not in OPEN_FILES:
                continue
            assert file.stored is not None, "an upload that is to be read is on disk"
            path = self._store.uploads / file.stored
            for index, item in enumerate(self._reader.load(path)):
                if index >= file.taken:
                    yield file.position, _renamed(item, path, file)
            yield file.position, None

    def _paths(self, paths: Sequence[Path]) -> Iterator[Taken]:
        """What files and folders of this machine hold; unchanged documents cost nothing."""
        origins = self._bank.catalog.origins
        known = origins.root()
        root = Path(known) if known is not None else common_root(paths)
        if known is None:
            origins.remember_root(str(root.resolve()))
        held_as = _held_as(origins) if origins.has_old() else None
        positions: dict[str, int] = {}
        last: int | None = None
        for loaded in load_documents(paths, root=root, held_as=held_as):
            name = loaded.origin or Path(loaded.source).name
            position = positions.setdefault(name, len(positions))
            if last is not None and last != position:
                yield last, None
            last = position
            if position not in self._files:
                size = _size(root / name)
                self._files[position] = JobFile(position, name, None, None, {}, size)
            yield position, loaded
        if last is not None:
            yield last, None

    # ---- what becomes of it

    def _take(
        self, piece: _Slice, position: int, loaded: LoadedDocument | LoadFailure | None
    ) -> None:
        if loaded is None:
            piece.ended.append(position)
            return
        file = self._files[position]
        piece.taken[position] = piece.taken.get(position, file.taken) + 1
        if isinstance(loaded, LoadFailure):
            source = loaded.source if file.stored else file.name
            piece.step.reasons.append(Reason(position, source, loaded.reason, loaded.ignored))
            return
        document = loaded.document
        piece.documents[document.id] = document, position
        piece.characters += len(document.text)
        if file.stored is None:
            piece.origins[document.id] = loaded.origin

    def _commit(self, piece: _Slice) -> None:
        """Store a slice, and note what became of it before anybody else writes."""
        self._before_batch()  # here, so that nobody at the desk waits for questions along with it
        ticket, self._ticket = self._ticket, None
        with self._desk.turn(ticket):
            stored = dict.fromkeys(piece.taken, 0)
            if piece.documents:
                self._add(piece, stored)
            step = piece.step
            self._failed.update(r.position for r in step.reasons if not r.ignored)
            for position in dict.fromkeys([*piece.taken, *piece.ended]):
                file = self._counted(self._files[position], piece, stored.get(position, 0))
                self._files[position] = step.files[position] = file
            self._store.advance(self._job.id, step)

    def _counted(self, file: JobFile, piece: _Slice, stored: int) -> JobFile:
        """A file after a slice that has stored so many documents of it."""
        documents = file.documents + stored
        status: FileStatus = "running"
        if file.position in piece.ended:
            failed = file.position in self._failed
            status = "done" if documents else "failed" if failed else "skipped"
        taken = piece.taken.get(file.position, file.taken)
        return replace(file, status=status, taken=taken, documents=documents)

    def _add(self, piece: _Slice, stored: dict[int, int]) -> None:
        """Put the documents into the bank; `stored` counts them by file."""
        report = self._bank.add(
            [document for document, _ in piece.documents.values()],
            on_duplicate=self._job.options.get("on_duplicate", "update"),
            batch_tokens=BATCH_TOKENS,
            before_batch=self._before_batch,
        )
        step = piece.step
        step.added, step.updated, step.unchanged, step.tokens = (
            report.added,
            report.updated,
            report.unchanged,
            report.tokens,
        )
        positions = {printable(name): position for name, (_, position) in piece.documents.items()}
        for _, position in piece.documents.values():
            stored[position] += 1
        for name, reason in report.failed:
            position = positions[name]
            stored[position] -= 1
            step.reasons.append(Reason(position, name, reason))
        found = {
            Origin(name, path): content_hash(piece.documents[name][0])
            for name, path in piece.origins.items()
        }
        self._bank.catalog.origins.record(found)


def _renamed(
    loaded: LoadedDocument | LoadFailure, path: Path, file: JobFile
) -> LoadedDocument | LoadFailure:
    """What an upload gave, by the name that the client gave the file.

    Documents of a file under /v1/files are told from those of every other by its id.
    """
    source = loaded.source.replace(str(path), file.name, 1)
    if isinstance(loaded, LoadFailure):
        return replace(loaded, source=source)
    document = loaded.document
    by_file = document.id.startswith(path.name)  # it has no id of its own
    rest = document.id.removeprefix(path.name)
    if file.file is None:
        name = file.name + rest if by_file else rest
    else:
        name = "/".join(filter(None, (file.file, file.name, rest.lstrip(":") if by_file else rest)))
    metadata = {**document.metadata, **file.attributes}
    return replace(loaded, document=replace(document, id=name, metadata=metadata), source=source)


def _held_as(origins: Origins) -> Callable[[str, str, Document | None], bool]:
    """See `msa.text.loaders.HeldAs`."""

    def held_as(path: str, old_id: str, document: Document | None) -> bool:
        return origins.held_as(path, old_id, None if document is None else content_hash(document))

    return held_as


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
