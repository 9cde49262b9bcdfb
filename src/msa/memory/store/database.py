"""One connection to a SQLite file: transactions, reading beside a writer, errors in one line."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from msa.errors import BankCorruptError, BankError, StorageError

BUSY_SECONDS = 30.0


class Database:
    """An open database. All methods may be called from several threads, which take turns.

    Args:
        path: the file, in WAL mode.
        read_only: never write, not even to recover.

    Attributes:
        path, read_only: as given.
        connection: used under `transaction` or `reading` only.

    Raises:
        BankCorruptError: the file is no bank's database.
        StorageError: it cannot be read.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self._lock = threading.RLock()
        self._pid = os.getpid()
        with self.guard("open"):
            self._file = _identity(path)
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
        """Close the database; a writer folds its log into it."""
        with self._lock:
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
                yield self.connection
            finally:
                self._end_left_over()

    @contextlib.contextmanager
    def alone(self, doing: str) -> Iterator[sqlite3.Connection]:
        """The connection for this thread, with no transaction open.

        Raises:
            BankError: in a forked child, or when the file is not the one that was opened.
        """
        if os.getpid() != self._pid:  # before the lock, which a thread of the parent may have held
            raise BankError(
                f"cannot {doing} {self.path}: it was opened by process {self._pid}, which forked "
                "this one; open the bank again in this process"
            )
        with self._lock, self.guard(doing):
            if _identity(self.path) != self._file:
                raise BankError(
                    f"cannot {doing} {self.path}: the bank was moved, removed or replaced after it "
                    "was opened; open it again where it is now"
                )
            self._end_left_over()
            yield self.connection

    def _end_left_over(self) -> None:
        """Give up the transaction that is open, if one is.

        Ctrl-C can come right after any statement, so that nobody can be sure to end what he began.
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


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from another of its name; None if there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


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
