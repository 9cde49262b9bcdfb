"""Jobs: work on a bank that outlives the request that asks for it, and the process too."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from msa.serve.banks import BankRegistry, ServedBank
from msa.serve.errors import ServiceError, log_failure, service_error, unavailable
from msa.serve.fairness import Turns, aside
from msa.serve.file_reader import FileReader
from msa.serve.indexing import Desk, IndexRun
from msa.serve.job_store import (
    FINISHED,
    OPEN_FILES,
    FileStatus,
    Job,
    JobFile,
    JobStore,
    Reason,
    Status,
)
from msa.serve.keys import Principal
from msa.serve.limits import too_many
from msa.serve.settings import ServeSettings
from msa.text.loaders import MAX_UNPACKED_BYTES

RETRY_SECONDS = 5.0
WRITERS = 8
MAX_WRITES = 64
"""Writes of single documents that wait for their turn."""
MAINTENANCE = ("compact", "verify")
T = TypeVar("T")


class FileFate(BaseModel):
    """What becomes of a file.

    Attributes:
        file: its name.
        status: of this file.
        documents: that the bank holds of it.
        bytes: its size.
        reason: why it, or the first of what it holds, was not stored.
    """

    file: str
    status: FileStatus
    documents: int
    bytes: int
    reason: str | None


class FileReason(BaseModel):
    """Something that was not stored: the file, with the line if it holds several documents."""

    file: str
    reason: str


class JobBody(BaseModel):
    """A job, as clients see it.

    Attributes:
        id, bank, kind: "index", "file_batch", "compact" or "verify".
        status: how it stands.
        done, total: files that have met their fate, of all.
        added, updated, unchanged: documents; `rejected` counts what was not stored.
        tokens: encoded.
        failed, skipped: what was not stored, and what was left out on purpose; the first 1000.
        files: every file with its fate; null in events and lists.
        eta_s: seconds that are left, as far as can be told.
        created_at, ended_at: seconds since 1970.
        message: why it failed, or what a cancelled job has left in the bank.
        result: of compact and verify.
    """

    id: str
    bank: str
    kind: str
    status: Status
    done: int
    total: int
    added: int
    updated: int
    unchanged: int
    rejected: int
    tokens: int
    failed: list[FileReason]
    skipped: list[FileReason]
    files: list[FileFate] | None
    eta_s: float | None
    created_at: int
    ended_at: int | None
    message: str | None
    result: dict[str, Any] | None


class JobCancelled(Exception):  # noqa: N818 - never leaves this file
    """The client wants the job no more."""


class JobInterrupted(Exception):  # noqa: N818 - never leaves this file
    """The service stops; the job goes on when it starts again."""


class Jobs:
    """The jobs of a service: one thread does them, one after the other.

    Its methods may be called from several threads. Those that are coroutines do not block.

    Args:
        settings: where the state lies, and how many jobs may wait.
        registry: the banks.
        turns: who has the processor.
    """

    def __init__(self, settings: ServeSettings, registry: BankRegistry, turns: Turns) -> None:
        self._settings, self._registry, self._turns = settings, registry, turns
        self._store: JobStore | None = None
        self._writers = ThreadPoolExecutor(WRITERS, "msa-write")
        self._writes = 0
        self._desks: dict[str, Desk] = {}
        self._changed = threading.Condition()
        self._watchers: set[_Watcher] = set()
        self._cancelled: set[str] = set()
        self._running: Job | None = None
        self._ticket: int | None = None  # of the job that was interrupted
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="msa-jobs", daemon=True)

    @property
    def store(self) -> JobStore:
        """The state folder.

        Raises:
            ServiceError: 503 before `start`.
        """
        if self._store is None:
            raise unavailable("loading", "The model and the banks are being loaded.")
        return self._store

    async def start(self) -> None:
        """Open the state folder, when the banks are open, and go on with what was left.

        Raises:
            BankLockedError: another service uses the state folder.
            StorageError: it cannot be written.
        """
        await asyncio.to_thread(self._start)

    def _start(self) -> None:
        """Open, and let the thread begin.

        A job that was interrupted may have stored more than it has noted: it has the first turn at
        its bank, before any client can change what it is about to look at again.
        """
        self._store = JobStore(state_folder(self._settings))
        first = self._first()
        if first is not None and first.status == "running" and first.kind not in MAINTENANCE:
            self._running, self._ticket = first, self.desk(first.bank).ticket()
        self._thread.start()

    async def stop(self) -> None:
        """Stop at the next batch; what was committed stays, and the rest is done after a start."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._tell_watchers()
        await asyncio.to_thread(self._writers.shutdown)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)
        if self._store is not None:
            self._store.close()

    def desk(self, bank: str) -> Desk:
        """Where those who write to a bank wait for their turn."""
        with self._changed:
            return self._desks.setdefault(bank, Desk())

    async def write(self, bank: str, function: Callable[[], T]) -> T:
        """What a function gives that writes to a bank, called when it is its turn.

        Raises:
            ServiceError: 429 when too many writes wait; 503 when the service stops.
        """
        self._check_running()
        if self._writes >= MAX_WRITES:
            raise too_many("queue_full", "Too many writes are waiting.", RETRY_SECONDS)

        def at_desk() -> T:
            with self.desk(bank).turn():
                return function()

        self._writes += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._writers, aside, at_desk)
        finally:
            self._writes -= 1

    def _check_running(self) -> None:
        """Refuse new work when the service stops.

        Raises:
            ServiceError: 503.
        """
        if self._stopping:
            raise unavailable("draining", "The service is stopping.")

    # ---- asking for work

    async def check_room(self) -> None:
        """Refuse when too many jobs wait; to be called before an upload is read.

        Raises:
            ServiceError: 429, or 503 when the service stops.
        """
        self._check_running()
        if len(await asyncio.to_thread(self._todo)) > self._settings.max_encode_jobs:
            raise too_many("queue_full", "Too many jobs are waiting.", RETRY_SECONDS)

    async def submit(
        self,
        bank: str,
        kind: str,
        principal: Principal,
        files: Sequence[JobFile] = (),
        reasons: Sequence[Reason] = (),
        **options: Any,
    ) -> Job:
        """A new job; it will be done, whatever happens to this process from here on.

        Args:
            bank: its name.
            kind: "index", "file_batch", "compact" or "verify".
            principal: who asks.
            files: with names of uploads.
            reasons: for files that were refused at once.
            **options: of the kind: `on_duplicate`, `paths`.

        Raises:
            ServiceError: see `check_room`.
        """
        await self.check_room()
        job = await asyncio.to_thread(
            self.store.add_job, bank, kind, principal.name, options, files, reasons
        )
        with self._changed:
            self._changed.notify_all()
        return job

    async def index_paths(self, bank: str, paths: Sequence[Path], principal: Principal) -> JobBody:
        """Index files and folders of this machine; unchanged documents cost nothing.

        Raises:
            ServiceError: see `BankRegistry.get` and `check_room`.
        """
        self._registry.get(bank, principal, "write")
        given = [str(path.resolve()) for path in paths]
        for job in await asyncio.to_thread(self._todo):
            if job.bank == bank and job.options.get("paths") == given:
                break  # asked for before a restart
        else:
            job = await self.submit(bank, "index", principal, paths=given)
        return await asyncio.to_thread(self.describe, job)

    # ---- looking at it

    def find(self, job_id: str, principal: Principal, scope: str = "read") -> Job:
        """A job, for a caller who may know of its bank.

        Raises:
            ServiceError: 404; 403 if the key lacks the scope.
        """
        job = self.store.job(job_id)
        if job is None or not principal.knows(job.bank):
            raise ServiceError(404, None, "job_not_found", "There is no such job.")
        if not principal.allows(scope, job.bank):
            message = f"This key may not do this: it lacks the scope '{scope}'."
            raise ServiceError(403, None, "bank_forbidden", message)
        return job

    def counts(self) -> dict[str, int]:
        """Status -> number of jobs that are remembered."""
        return {} if self._store is None or self._stopping else self._store.counts()

    def describe(self, job: Job, *, with_files: bool = True) -> JobBody:
        """A job as clients see it."""
        files, reasons = self.store.files_of(job.id), self.store.reasons_of(job.id)
        first: dict[int, str] = {}
        for reason in reasons:
            first.setdefault(reason.position, reason.reason)
        fates = [
            FileFate(
                file=f.name,
                status=f.status,
                documents=f.documents,
                bytes=f.size,
                reason=first.get(f.position),
            )
            for f in files
        ]
        values = {name: getattr(job, name) for name in JobBody.model_fields if hasattr(job, name)}
        return JobBody(
            **values,
            done=sum(f.status not in OPEN_FILES for f in files),
            total=len(files),
            failed=[FileReason(file=r.source, reason=r.reason) for r in reasons if not r.ignored],
            skipped=[FileReason(file=r.source, reason=r.reason) for r in reasons if r.ignored],
            files=fates if with_files else None,
            eta_s=_seconds_left(job, files),
            created_at=int(job.created),
            ended_at=None if job.ended is None else int(job.ended),
        )

    async def changes(self, job_id: str) -> AsyncIterator[JobBody]:
        """The job now and after each change, until it has ended or the service stops."""
        with self._watching() as changed:
            while True:
                changed.clear()
                job = await asyncio.to_thread(self._described, job_id)
                if job is None:
                    return
                yield job
                if job.status in FINISHED or self._stopping:
                    return
                await changed.wait()

    async def ended(self, job_id: str, seconds: float) -> JobBody | None:
        """The job when it has ended; None if it takes longer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async for job in self.changes(job_id):
                    if job.status in FINISHED:
                        return await asyncio.to_thread(self._described, job_id, with_files=True)
        return None

    def _described(self, job_id: str, with_files: bool = False) -> JobBody | None:
        job = self.store.job(job_id)
        return None if job is None else self.describe(job, with_files=with_files)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[asyncio.Event]:
        watcher = _Watcher()
        with self._changed:
            self._watchers.add(watcher)
        try:
            yield watcher.event
        finally:
            with self._changed:
                self._watchers.discard(watcher)

    def _tell_watchers(self) -> None:
        with self._changed:
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher.tell()

    # ---- ending it

    def cancel(self, job: Job) -> Job:
        """End a job. What it has committed stays; a running one stops at its next batch."""
        with self._changed:
            now = self.store.job(job.id) or job
            if self._running is not None and self._running.id == job.id:
                self._cancelled.add(job.id)
            elif now.status not in FINISHED:
                self.store.finish(job.id, "cancelled", self._what_is_left(job))
        self._tell_watchers()
        return self.store.job(job.id) or job

    def forget_bank(self, bank: str) -> None:
        """The bank is about to be removed: end its jobs and forget what was said of it."""
        for job in self.store.unfinished():
            if job.bank == bank:
                self.cancel(job)
        with self._changed:
            self._changed.wait_for(lambda: self._running is None or self._running.bank != bank)
        self.store.forget_bank(bank)

    # ---- doing it

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                aside(partial(self._do, job))
            except Exception as error:  # not even its end could be noted: is the disk full?
                log_failure(error)
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping, RETRY_SECONDS)
            finally:
                self._give_up_ticket(job.bank)
                with self._changed:
                    self._running = None
                    self._cancelled.discard(job.id)
                    self._changed.notify_all()
                self._tell_watchers()
        if self._running is not None:
            self._give_up_ticket(self._running.bank)

    def _give_up_ticket(self, bank: str) -> None:
        """Let the next one go to the desk, if the run of an interrupted job has not done so."""
        if self._ticket is not None:
            ticket, self._ticket = self._ticket, None
            with self.desk(bank).turn(ticket):
                pass

    def _next(self) -> Job | None:
        """The job to do next, when there is one; None when the service stops."""
        with self._changed:
            while not self._stopping:
                self._running = self._running or self._first()
                if self._running is not None:
                    return self._running
                self._changed.wait()
        return None

    def _first(self) -> Job | None:
        """The job to do next, if there is one."""
        return next(iter(self._todo()), None)

    def _todo(self) -> list[Job]:
        """Jobs that run or wait, of banks that are served."""
        served = {bank.name for bank in self._registry.all()}
        return [job for job in self.store.unfinished() if job.bank in served]

    def _do(self, job: Job) -> None:
        """Do a job, and say how it ended."""
        try:
            self.store.begin(job.id)
            self._tell_watchers()
            served = next(bank for bank in self._registry.all() if bank.name == job.bank)
            if job.kind in MAINTENANCE:
                self.store.finish(job.id, "done", result=self._maintain(job, served))
            else:
                self._index(job, served)
                self.store.finish(job.id, "done")
        except JobInterrupted:
            return
        except JobCancelled:
            self.store.finish(job.id, "cancelled", self._what_is_left(job))
        except Exception as error:
            self.store.finish(job.id, "failed", service_error(error).message)

    def _index(self, job: Job, served: ServedBank) -> None:
        reader = FileReader(
            self._settings.parse_seconds, MAX_UNPACKED_BYTES, lambda: self._check(job.id)
        )
        with contextlib.closing(reader):
            run = IndexRun(
                self.store,
                job,
                served.bank,
                self.desk(job.bank),
                reader=reader,
                before_batch=lambda: self._before_batch(job.id),
                ticket=self._ticket,
            )
            self._ticket = None
            run.run(self._tell_watchers)

    def _maintain(self, job: Job, served: ServedBank) -> dict[str, Any]:
        with self.desk(job.bank).turn():
            self._check(job.id)
            report = served.bank.compact() if job.kind == "compact" else served.bank.verify()
        text = json.dumps(asdict(report))
        here = json.dumps(str(served.bank.path))[1:-1]  # clients do not see our folders
        return dict(json.loads(text.replace(here, served.name)))

    def _before_batch(self, job_id: str) -> None:
        self._check(job_id)
        self._turns.encode()

    def _check(self, job_id: str) -> None:
        if self._stopping:
            raise JobInterrupted
        if job_id in self._cancelled:
            raise JobCancelled

    def _what_is_left(self, job: Job) -> str:
        """What a cancelled job has stored, in a sentence."""
        now = self.store.job(job.id) or job
        stored = now.added + now.updated
        return (
            f"Cancelled. {stored} documents were stored before and stay in the bank; "
            "documents:delete removes them."
            if stored
            else "Cancelled before anything was stored."
        )


class _Watcher:
    """A listener on an event loop that is told of changes."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.event = asyncio.Event()

    def tell(self) -> None:
        """Called from any thread."""
        with contextlib.suppress(RuntimeError):  # its loop has been closed
            self._loop.call_soon_threadsafe(self.event.set)


def state_folder(settings: ServeSettings) -> Path:
    """Where jobs and uploads lie: as the settings say, or beside the first bank."""
    if settings.state_folder is not None:
        return settings.state_folder
    for folder in settings.banks.values():
        path = folder.resolve()
        return path.with_name(f"{path.name}.serve")
    return (settings.banks_folder or Path()) / ".serve"


def _seconds_left(job: Job, files: Sequence[JobFile]) -> float | None:
    """By the bytes of the files that are done; None while that cannot be told."""
    if job.status != "running" or job.started is None:
        return None
    done = sum(f.size for f in files if f.status not in OPEN_FILES)
    left = sum(f.size for f in files if f.status in OPEN_FILES)
    return round((time.time() - job.started) * left / done, 1) if done else None
