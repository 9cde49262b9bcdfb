"""Jobs and uploaded files on disk: a SQLite file, and the uploads beside it.

What the SQLite file does not name does not exist: an upload counts from the transaction that names
it, which is durable before the client is told; what a killed process leaves beside it is removed.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from msa.errors import BankLockedError
from msa.memory.store.database import guard
from msa.memory.store.durable_files import storage_errors, sync_folder
from msa.types import JSON

Status = Literal["queued", "running", "done", "failed", "cancelled"]
FINISHED: tuple[Status, ...] = ("done", "failed", "cancelled")
FileStatus = Literal["queued", "running", "done", "failed", "skipped", "cancelled"]
OPEN_FILES: tuple[FileStatus, ...] = ("queued", "running")
MAX_REASONS = 1000
"""Reasons that are kept of one job; all of them are counted."""
KEPT_JOBS = 1000
"""Finished jobs that are remembered."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, bank TEXT NOT NULL, kind TEXT NOT NULL, owner TEXT NOT NULL,
    status TEXT NOT NULL, options TEXT NOT NULL, created REAL NOT NULL, started REAL, ended REAL,
    added INTEGER NOT NULL DEFAULT 0, updated INTEGER NOT NULL DEFAULT 0,
    unchanged INTEGER NOT NULL DEFAULT 0, rejected INTEGER NOT NULL DEFAULT 0,
    tokens INTEGER NOT NULL DEFAULT 0, message TEXT, result TEXT);
CREATE INDEX IF NOT EXISTS jobs_status ON jobs (status);
CREATE TABLE IF NOT EXISTS job_files (
    job TEXT NOT NULL, position INTEGER NOT NULL, name TEXT NOT NULL, stored TEXT, file TEXT,
    attributes TEXT NOT NULL, size INTEGER NOT NULL, status TEXT NOT NULL,
    taken INTEGER NOT NULL DEFAULT 0, documents INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (job, position)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reasons (
    job TEXT NOT NULL, position INTEGER NOT NULL, source TEXT NOT NULL, reason TEXT NOT NULL,
    ignored INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS reasons_job ON reasons (job, position);
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, name TEXT NOT NULL, purpose TEXT NOT NULL,
    size INTEGER NOT NULL, created REAL NOT NULL, stored TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS attachments (
    bank TEXT NOT NULL, file TEXT NOT NULL, job TEXT NOT NULL, position INTEGER NOT NULL,
    created REAL NOT NULL, attributes TEXT NOT NULL, PRIMARY KEY (bank, file));
CREATE TABLE IF NOT EXISTS stores (bank TEXT PRIMARY KEY, metadata TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it is stored.

    Attributes:
        id, bank, kind, owner: whose it is; `owner` is the name of a key.
        status: see `Status`.
        options: how to do it, by its kind.
        created, started, ended: seconds since 1970.
        added, updated, unchanged: documents, see `AddReport`.
        rejected: documents, records and files that were not stored.
        tokens: encoded.
        message: why it failed, or what a cancelled one has left.
        result: of a job that gives one.
    """

    id: str
    bank: str
    kind: str
    owner: str
    status: Status
    options: Mapping[str, Any]
    created: float
    started: float | None
    ended: float | None
    added: int
    updated: int
    unchanged: int
    rejected: int
    tokens: int
    message: str | None
    result: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class JobFile:
    """A file of a job.

    Attributes:
        position: in the job, from 0.
        name: as the client named it.
        stored: name of the upload that holds it; None for a file that lies elsewhere.
        file: its id under /v1/files; None for one that was uploaded for this job alone.
        attributes: metadata that all its documents get.
        size: in bytes.
        status: its fate.
        taken: documents and failures of it that the bank has been given.
        documents: of it that the bank holds.
    """

    position: int
    name: str
    stored: str | None
    file: str | None
    attributes: Mapping[str, JSON]
    size: int
    status: FileStatus = "queued"
    taken: int = 0
    documents: int = 0


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something was not stored.

    Attributes:
        position: of the file.
        source: the file's name, with the line where it holds several documents.
        reason: one line.
        ignored: it was left out on purpose (a copy, another type of file in a folder).
    """

    position: int
    source: str
    reason: str
    ignored: bool = False


@dataclass(slots=True)
class Step:
    """What one commit of a job has brought."""

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    tokens: int = 0
    files: dict[int, JobFile] = field(default_factory=dict)
    reasons: list[Reason] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file under /v1/files; `stored` is the name of its upload."""

    id: str
    owner: str
    name: str
    purpose: str
    size: int
    created: float
    stored: str


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file in a vector store, with the fate that its job gives it."""

    bank: str
    file: str
    job: str
    position: int
    created: float
    attributes: Mapping[str, JSON]
    name: str
    size: int
    status: FileStatus
    reason: str | None


class JobStore:
    """The state folder of a service, which one process holds at a time.

    All methods may be called from several threads; every change is durable on return.

    Args:
        folder: made if it is not there.

    Attributes:
        uploads: the folder of what clients sent.

    Raises:
        BankLockedError: another process uses the folder.
        StorageError: it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.uploads = folder / "uploads"
        with storage_errors(f"make the state folder '{folder}'"):
            self.uploads.mkdir(parents=True, exist_ok=True)
        self._owned = FileLock(folder / "lock", thread_local=False)
        try:
            self._owned.acquire(timeout=0)
        except Timeout:
            raise BankLockedError(
                f"the state folder '{folder}' is used by another service; give each its own "
                "(--state-folder DIR)"
            ) from None
        self._path = folder / "jobs.sqlite"
        self._lock = threading.Lock()
        with guard(self._path, "open"):
            self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA)
        self._remove_orphans()

    def close(self) -> None:
        """Let the next process in."""
        with self._lock:
            self._db.close()
        self._owned.release()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """One durable transaction, or no change at all."""
        with self._lock, guard(self._path, "write to"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        with self._lock, guard(self._path, "read"):
            return self._db.execute(query, values).fetchall()

    # ---- uploads

    def new_upload(self, suffix: str) -> Path:
        """A path for what a client sends: a random name, and the type of the file."""
        return self.uploads / f"{secrets.token_hex(16)}{suffix}"

    def remove_uploads(self, names: Iterable[str]) -> None:
        """Remove uploads that nothing names any more."""
        for name in names:
            (self.uploads / name).unlink(missing_ok=True)

    def _remove_orphans(self) -> None:
        query = "SELECT stored FROM files UNION SELECT stored FROM job_files WHERE stored NOT NULL"
        named = {row[0] for row in self._rows(query)}
        self.remove_uploads({path.name for path in self.uploads.iterdir()} - named)

    # ---- jobs

    def add_job(
        self,
        bank: str,
        kind: str,
        owner: str,
        options: Mapping[str, Any],
        files: Sequence[JobFile] = (),
        reasons: Sequence[Reason] = (),
    ) -> Job:
        """A new job, queued; its uploads are durable from here on."""
        prefix = "vsfb" if kind == "file_batch" else "job"
        job_id, now = f"{prefix}_{secrets.token_hex(12)}", time.time()
        sync_folder(self.uploads)
        with self._changing() as db:
            db.execute(
                "INSERT INTO jobs (id, bank, kind, owner, status, options, created) "
                "VALUES (?, ?, ?, ?, 'queued', ?, ?)",
                (job_id, bank, kind, owner, json.dumps(dict(options)), now),
            )
            _write_files(db, job_id, files)
            _write_reasons(db, job_id, reasons)
            db.executemany(
                "INSERT OR REPLACE INTO attachments VALUES (?, ?, ?, ?, ?, ?)",
                (
                    (bank, f.file, job_id, f.position, now, json.dumps(dict(f.attributes)))
                    for f in files
                    if f.file is not None
                ),
            )
            _forget_old(db)
        found = self.job(job_id)
        assert found is not None
        return found

    def job(self, job_id: str) -> Job | None:
        """A job by its id."""
        rows = self._rows("SELECT * FROM jobs WHERE id = ?", job_id)
        return _job(rows[0]) if rows else None

    def jobs(self, bank: str, limit: int) -> list[Job]:
        """The newest jobs of a bank, newest first."""
        query = "SELECT * FROM jobs WHERE bank = ? ORDER BY rowid DESC LIMIT ?"
        return [_job(row) for row in self._rows(query, bank, limit)]

    def unfinished(self) -> list[Job]:
        """Jobs that are to be done, in their order; one that was interrupted is the first."""
        query = (
            "SELECT * FROM jobs WHERE status IN ('running', 'queued') "
            "ORDER BY status = 'queued', rowid"
        )
        return [_job(row) for row in self._rows(query)]

    def counts(self) -> dict[str, int]:
        """Status -> number of jobs."""
        return dict(map(tuple, self._rows("SELECT status, COUNT(*) FROM jobs GROUP BY status")))

    def files_of(self, job_id: str) -> list[JobFile]:
        """The files of a job, in order."""
        rows = self._rows("SELECT * FROM job_files WHERE job = ? ORDER BY position", job_id)
        return [_job_file(row) for row in rows]

    def reasons_of(self, job_id: str) -> list[Reason]:
        """What a job could not store, in order; at most `MAX_REASONS`."""
        query = "SELECT * FROM reasons WHERE job = ? ORDER BY position, rowid LIMIT ?"
        return [
            Reason(row["position"], row["source"], row["reason"], bool(row["ignored"]))
            for row in self._rows(query, job_id, MAX_REASONS)
        ]

    def begin(self, job_id: str) -> None:
        """The job runs."""
        with self._changing() as db:
            query = "UPDATE jobs SET status = 'running', started = COALESCE(started, ?) "
            db.execute(query + "WHERE id = ? AND status = 'queued'", (time.time(), job_id))

    def reset(self, job_id: str) -> None:
        """The job begins from the start, as if it had done nothing."""
        with self._changing() as db:
            db.execute("DELETE FROM job_files WHERE job = ?", (job_id,))
            db.execute("DELETE FROM reasons WHERE job = ?", (job_id,))
            db.execute(
                "UPDATE jobs SET added = 0, updated = 0, unchanged = 0, rejected = 0, tokens = 0 "
                "WHERE id = ?",
                (job_id,),
            )

    def advance(self, job_id: str, step: Step) -> None:
        """What the bank holds now, as the job knows it."""
        with self._changing() as db:
            _write_files(db, job_id, step.files.values())
            _write_reasons(db, job_id, step.reasons)
            db.execute(
                "UPDATE jobs SET added = added + ?, updated = updated + ?, "
                "unchanged = unchanged + ?, tokens = tokens + ? WHERE id = ?",
                (step.added, step.updated, step.unchanged, step.tokens, job_id),
            )

    def finish(
        self,
        job_id: str,
        status: Status,
        message: str | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> None:
        """The job has ended; files that it did not come to share its fate."""
        with self._changing() as db:
            db.execute(
                "UPDATE jobs SET status = ?, message = ?, result = ?, ended = ? WHERE id = ?",
                (
                    status,
                    message,
                    None if result is None else json.dumps(dict(result)),
                    time.time(),
                    job_id,
                ),
            )
            db.execute(
                "UPDATE job_files SET status = ? WHERE job = ? AND status IN (?, ?)",
                (status, job_id, *OPEN_FILES),
            )
            uploads = db.execute(
                "SELECT stored FROM job_files WHERE job = ? AND file IS NULL AND stored NOT NULL",
                (job_id,),
            ).fetchall()
            db.execute(
                "UPDATE job_files SET stored = NULL WHERE job = ? AND file IS NULL", (job_id,)
            )
        self.remove_uploads(row[0] for row in uploads)

    # ---- files

    def add_file(self, owner: str, name: str, purpose: str, size: int, stored: str) -> StoredFile:
        """A new file under /v1/files; durable from here on."""
        file_id = f"file-{secrets.token_hex(12)}"
        file = StoredFile(file_id, owner, name, purpose, size, time.time(), stored)
        sync_folder(self.uploads)
        with self._changing() as db:
            values = [getattr(file, f.name) for f in fields(StoredFile)]
            db.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        return file

    def file(self, file_id: str, owner: str) -> StoredFile | None:
        """A caller's file; that of another is not there."""
        rows = self._rows("SELECT * FROM files WHERE id = ? AND owner = ?", file_id, owner)
        return StoredFile(*rows[0]) if rows else None

    def files(self, owner: str) -> list[StoredFile]:
        """All files of a caller, oldest first."""
        rows = self._rows("SELECT * FROM files WHERE owner = ? ORDER BY rowid", owner)
        return [StoredFile(*row) for row in rows]

    def remove_file(self, file: StoredFile) -> None:
        """Forget a file; documents that were made of it stay in their banks."""
        with self._changing() as db:
            db.execute("DELETE FROM files WHERE id = ?", (file.id,))
        self.remove_uploads([file.stored])

    # ---- vector stores

    def attachments(self, bank: str, job: str | None = None) -> list[Attachment]:
        """Files in a vector store, oldest first; only those of one job if it is given."""
        query = "a.bank = ? AND (? IS NULL OR a.job = ?) ORDER BY a.rowid"
        return self._attachments(query, bank, job, job)

    def attachment(self, bank: str, file_id: str) -> Attachment | None:
        """One file of a vector store."""
        found = self._attachments("a.bank = ? AND a.file = ?", bank, file_id)
        return found[0] if found else None

    def _attachments(self, where: str, *values: object) -> list[Attachment]:
        rows = self._rows(
            "SELECT a.bank, a.file, a.job, a.position, a.created, a.attributes, f.name, f.size, "
            "f.status, (SELECT reason FROM reasons r WHERE r.job = a.job AND r.position = "
            "a.position ORDER BY r.rowid LIMIT 1) FROM attachments a JOIN job_files f "
            f"ON f.job = a.job AND f.position = a.position WHERE {where}",
            *values,
        )
        names = [field.name for field in fields(Attachment)]
        found = (dict(zip(names, row, strict=True)) for row in rows)
        return [
            Attachment(**{**values, "attributes": json.loads(values["attributes"])})
            for values in found
        ]

    def set_attributes(self, bank: str, file_id: str, attributes: Mapping[str, JSON]) -> None:
        """Other attributes of a file in a vector store."""
        with self._changing() as db:
            query = "UPDATE attachments SET attributes = ? WHERE bank = ? AND file = ?"
            db.execute(query, (json.dumps(dict(attributes)), bank, file_id))

    def detach(self, bank: str, file_id: str) -> None:
        """The file is in the vector store no more."""
        with self._changing() as db:
            db.execute("DELETE FROM attachments WHERE bank = ? AND file = ?", (bank, file_id))

    def store_metadata(self, bank: str) -> dict[str, str]:
        """What a client has said of a vector store."""
        rows = self._rows("SELECT metadata FROM stores WHERE bank = ?", bank)
        return dict(json.loads(rows[0][0])) if rows else {}

    def set_store_metadata(self, bank: str, metadata: Mapping[str, str]) -> None:
        """What a client says of a vector store."""
        with self._changing() as db:
            values = (bank, json.dumps(dict(metadata)))
            db.execute("INSERT OR REPLACE INTO stores VALUES (?, ?)", values)

    def forget_bank(self, bank: str) -> None:
        """The bank is gone: so are its vector store and its finished jobs."""
        with self._changing() as db:
            for table in ("attachments", "stores"):
                db.execute(f"DELETE FROM {table} WHERE bank = ?", (bank,))
            ended = "SELECT id FROM jobs WHERE bank = ? AND status NOT IN ('queued', 'running')"
            _forget(db, [row[0] for row in db.execute(ended, (bank,))])


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    for name in ("options", "result"):
        values[name] = None if values[name] is None else json.loads(values[name])
    return Job(**values)


def _job_file(row: sqlite3.Row) -> JobFile:
    values = {name: row[name] for name in row.keys() if name != "job"}  # noqa: SIM118
    return JobFile(**{**values, "attributes": json.loads(values["attributes"])})


def _write_files(db: sqlite3.Connection, job_id: str, files: Iterable[JobFile]) -> None:
    db.executemany(
        "INSERT OR REPLACE INTO job_files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            (
                job_id,
                *(f.position, f.name, f.stored, f.file, json.dumps(dict(f.attributes)), f.size),
                *(f.status, f.taken, f.documents),
            )
            for f in files
        ),
    )


def _write_reasons(db: sqlite3.Connection, job_id: str, reasons: Sequence[Reason]) -> None:
    (kept,) = db.execute("SELECT COUNT(*) FROM reasons WHERE job = ?", (job_id,)).fetchone()
    db.executemany(
        "INSERT INTO reasons VALUES (?, ?, ?, ?, ?)",
        (
            (job_id, r.position, r.source, r.reason, r.ignored)
            for r in reasons[: max(0, MAX_REASONS - kept)]
        ),
    )
    rejected = sum(not r.ignored for r in reasons)
    db.execute("UPDATE jobs SET rejected = rejected + ? WHERE id = ?", (rejected, job_id))


def _forget_old(db: sqlite3.Connection) -> None:
    """Forget the oldest finished jobs, but for those that tell the fate of an attached file."""
    old = db.execute(
        "SELECT id FROM jobs WHERE status NOT IN ('queued', 'running') AND id NOT IN "
        "(SELECT job FROM attachments) ORDER BY rowid DESC LIMIT -1 OFFSET ?",
        (KEPT_JOBS,),
    ).fetchall()
    _forget(db, [row[0] for row in old])


def _forget(db: sqlite3.Connection, job_ids: Sequence[str]) -> None:
    for job_id in job_ids:
        db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
        db.execute("DELETE FROM job_files WHERE job = ?", (job_id,))
        db.execute("DELETE FROM reasons WHERE job = ?", (job_id,))
