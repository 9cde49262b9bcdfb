"""One writer at a time: a lock file that says who holds it.

The lock is the kernel's (`flock`), not the file's existence: it ends with the process that holds
it, however that ends, so that there is no stale lock to clean up.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from msa.errors import BankLockedError
from msa.memory.storage import storage_errors


class WriterLock:
    """Held from construction to `release`.

    Raises:
        BankLockedError: another writer holds it; the message names its process, host and since.
        StorageError: the lock file cannot be written.
    """

    def __init__(self, path: Path, bank: Path) -> None:
        doing = f"open bank '{bank}' for writing (to ask only, open it with read_only=True)"
        with storage_errors(doing):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _describe(os.pread(self._descriptor, 4096, 0))
            os.close(self._descriptor)
            raise BankLockedError(
                f"Bank '{bank}' is being written by {holder}; wait until it ends, or open the bank "
                "with read_only=True to ask it meanwhile"
            ) from None
        since = datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        try:
            with storage_errors(doing):
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, text.encode(), 0)
        except BaseException:
            os.close(self._descriptor)
            raise

    def release(self) -> None:
        """Let the next writer in; calling it twice does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _describe(content: bytes) -> str:
    """The holder in words; the file may be empty for a moment while its writer starts."""
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has just started"
