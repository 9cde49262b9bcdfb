"""One connection to a SQLite file: transactions, reading beside a writer, errors in one line."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from msa.errors import BankCorruptError, BankError, StorageError
from msa.memory.store.lifetime import Lifetime, NotPickled

BUSY_SECONDS = 30.0
# What lies in the database's folder and is never written again: another one is another bank.
WRITTEN_ONCE = "bank.json"


class Database(NotPickled):
    """An open database. All methods may be called from several threads, which take turns.

    That the bank of this name is still the one that was opened is looked at before every
    transaction: by the file, by `WRITTEN_ONCE` beside it, and by the generation, which never falls.

    Args:
        path: the file, in WAL mode.
        read_only: never write, not even to recover.

    Attributes:
        path, read_only: of the caller.
        connection: used under `transaction` or `reading` only.

    Raises:
        BankCorruptError: the file is no bank's database.
        StorageError: it cannot be read.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self._lock = threading.RLock()
        self._life = Lifetime(f"bank '{path.parent}'", "open it again (MemoryBank.open)")
        self._generation = 0
        with self.guard("open"):
            self._file = _identity(path)
            self._beside = _identity(path.with_name(WRITTEN_ONCE), written_once=True)
            self.connection, self._frozen = self._connect()

    def _connect(self) -> tuple[sqlite3.Connection, tuple[int, int] | None]:
        """A connection, and the file's time and size when it cannot see changes."""
        if not self.read_only:
            connection = self._connect_to("rw")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")  # a deleted text is gone from the file
            return connection, None
        try:
            return self._connect_to("ro"), None
        except sqlite3.OperationalError as error:
            # In a folder that we may not write to, SQLite can read along with a writer but cannot
            # make the shared-memory file itself; when no writer runs there is nothing to share.
            if error.sqlite_errorcode & 0xFF not in (
                sqlite3.SQLITE_CANTOPEN,
                sqlite3.SQLITE_READONLY,
            ):
                raise
            stat = self.path.stat()
            return self._connect_to("ro&immutable=1"), (stat.st_mtime_ns, stat.st_size)

    def _connect_to(self, mode: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=BUSY_SECONDS,
        )
        connection.execute("SELECT value FROM counters").fetchall()
        return connection

    def close(self) -> None:
        """Close the database; a writer folds its log into it. In a forked child it does nothing."""
        if self._life.is_elsewhere:
            return
        with self._lock:
            self._life.end()
            self.connection.close()

    def guard(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """See `guard`."""
        return guard(self.path, doing)

    @contextlib.contextmanager
    def transaction(self, doing: str) -> Iterator[sqlite3.Connection]:
        """One durable transaction, or no change at all."""
        with self.alone(doing):
            try:
                self.connection.execute("BEGIN IMMEDIATE")
                self._check_generation(doing)
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                self._end_left_over()
                raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Several queries that see one state of the database."""
        with self.alone("read"):
            self._follow()
            try:
                self.connection.execute("BEGIN")
                self._check_generation("read")
                yield self.connection
            finally:
                self._end_left_over()

    @contextlib.contextmanager
    def alone(self, doing: str) -> Iterator[sqlite3.Connection]:
        """The connection for this thread, with no transaction open.

        Raises:
            BankError: after `close`, in a forked child, or when the bank is not the one that was
                opened.
        """
        self._life.check_process()
        with self._lock, self.guard(doing):
            self._life.check()
            self._check_place(doing)
            self._end_left_over()
            yield self.connection

    def _check_place(self, doing: str) -> None:
        """Refuse when the files of this name are others than those that were opened."""
        beside = _identity(self.path.with_name(WRITTEN_ONCE), written_once=True)
        if self._beside is None:  # a bank that is being made gets this file last
            self._beside = beside
        if _identity(self.path) != self._file or beside != self._beside:
            raise BankError(
                f"cannot {doing} {self.path}: the bank was moved, removed or replaced after it "
                "was opened; open it again where it is now"
            )

    def _check_generation(self, doing: str) -> None:
        """Refuse when an older state was copied over the file; in a transaction."""
        query = "SELECT value FROM counters WHERE name = 'generation'"
        row = self.connection.execute(query).fetchone()
        generation = row[0] if row else 0
        if generation < self._generation:
            raise BankError(
                f"cannot {doing} {self.path}: it was replaced by an older state (generation "
                f"{generation}, {self._generation} was read before); open the bank again"
            )
        self._generation = generation

    def _end_left_over(self) -> None:
        """Roll back the transaction that is open, if one is.

        Ctrl-C can come right after any statement: no caller can be sure to end its transaction.
        """
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")

    def _follow(self) -> None:
        """An immutable connection sees no changes: open it again when the file has some."""
        if self._frozen is None:
            return
        stat = self.path.stat()
        wal = self.path.with_name(self.path.name + "-wal")
        if self._frozen != (stat.st_mtime_ns, stat.st_size) or wal.exists():
            old = self.connection
            self.connection, self._frozen = self._connect()  # if it fails, the old one still serves
            old.close()


def _identity(path: Path, *, written_once: bool = False) -> tuple[int, ...] | None:
    """What tells a file from another of its name; None if there is none.

    A file that is written once is told from another that was copied over it, too.
    """
    try:
        stat = path.stat()
    except OSError:
        return None
    file = stat.st_dev, stat.st_ino
    return (*file, stat.st_size, stat.st_mtime_ns) if written_once else file


@contextlib.contextmanager
def guard(path: Path, doing: str) -> Iterator[None]:
    """SQLite's errors as ours, by their code.

    Raises:
        StorageError: the disk is full, read-only or refuses.
        BankCorruptError: the file is damaged.
        BankError: anything else.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", None) or 0
        if code & 0xFF in (
            sqlite3.SQLITE_FULL,
            sqlite3.SQLITE_READONLY,
            sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_PERM,
        ):
            raise StorageError(
                f"cannot {doing} {path}: {error}. The bank is as it was before; free space or "
                "allow writing there, and try again"
            ) from error
        if code == sqlite3.SQLITE_CORRUPT_VTAB:
            raise BankCorruptError(
                f"the word index in {path} is damaged ({error}); 'msa bank repair {path.parent}' "
                "builds it again from the texts"
            ) from error
        if code & 0xFF in (
            sqlite3.SQLITE_CORRUPT,
            sqlite3.SQLITE_NOTADB,
        ) or "no such table" in str(error):
            raise BankCorruptError(
                f"{path} is damaged ({error}); restore it from a copy, or remove the bank and "
                "index again"
            ) from error
        raise BankError(f"cannot {doing} {path}: {error}") from error
