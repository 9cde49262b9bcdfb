"""One writer at a time: a lock, and beside it a file that says who holds it.

The lock is the operating system's (by filelock), not a file's existence: it ends with the process
that holds it, however that ends, so that there is no stale lock to clean up.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from msa.errors import BankError, BankLockedError
from msa.memory.store.durable_files import storage_errors

LOCK_FILE = "writer.lock"
HOLDER_FILE = "writer.json"


class WriterLock:
    """Held from construction to `release`, and by no forked child.

    Args:
        bank: the bank's folder.

    Raises:
        BankLockedError: another writer holds it; the message names its process, host and since.
        StorageError: the lock file cannot be written.
    """

    def __init__(self, bank: Path) -> None:
        self._lock = FileLock(bank / LOCK_FILE, thread_local=False)
        holder = bank / HOLDER_FILE
        doing = f"open bank '{bank}' for writing (to ask only, open it with read_only=True)"
        with storage_errors(doing):
            try:
                self._lock.acquire(timeout=0)
            except Timeout:  # an OSError too
                raise BankLockedError(_refusal(bank, holder)) from None
        since = datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        try:
            with storage_errors(doing):
                holder.write_text(text)
        except BaseException:
            self._lock.release()
            raise

    def release(self) -> None:
        """Let the next writer in; calling it twice does nothing."""
        self._lock.release()


class WriterTurn:
    """Threads of one process that write to a bank take turns; an object with `with`.

    Raises:
        BankError: this thread has the turn already: the documents given to `add`, or its progress
            function, write to the bank themselves.
    """

    def __init__(self, bank: Path) -> None:
        self._bank = bank
        self._lock = threading.Lock()
        self._thread: int | None = None

    def __enter__(self) -> None:
        if self._thread == threading.get_ident():
            raise BankError(
                f"bank '{self._bank}' is being written by this very thread: what gives add() its "
                "documents, or is told its progress, cannot change the bank; do so before or after"
            )
        self._lock.acquire()
        self._thread = threading.get_ident()

    def __exit__(self, *error: object) -> None:
        self._thread = None
        self._lock.release()


def _refusal(bank: Path, holder: Path) -> str:
    """Who holds the lock, and what to do; the file may be empty while its writer starts."""
    who = "a process that has just started"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads(holder.read_bytes())
        pid, host, since = told["pid"], told["host"], told["since"]
        if (pid, host) == (os.getpid(), socket.gethostname()):
            return (
                f"Bank '{bank}' has been open for writing in this very process since {since}; use "
                "that MemoryBank or close it first, or open the bank with read_only=True"
            )
        who = f"process {pid} on {host} since {since}"
    return (
        f"Bank '{bank}' is being written by {who}; wait until it ends (meanwhile the bank can be "
        "asked: 'msa ask', or read_only=True)"
    )
