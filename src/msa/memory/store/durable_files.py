"""Writing files so that they are there after a power cut, and saying so when the disk refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from msa.errors import MSAError, StorageError

TEMPORARY_SUFFIX = ".tmp"
# What file systems say that have no hard links (FAT, some network shares).
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_BINARY = getattr(os, "O_BINARY", 0)  # Windows would change line ends


@contextlib.contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn an `OSError` into one line that says what could not be done.

    Raises:
        StorageError: the operating system refused.
    """
    try:
        yield
    except MSAError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"cannot {doing}: {reason}. The bank is as it was before; "
            "free space or allow writing there, and try again"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder durable (Windows does so by itself)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name; never in place of another file.

    Raises:
        FileExistsError: there is a file of that name; both stay as they are.
        OSError: the disk refused.
    """
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(temporary, path)
    else:
        os.unlink(temporary)


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a new file, durably: it is there complete under its name, or not at all.

    Temporary name, write, fsync, name, fsync of the folder. A failed write leaves no file,
    and a file that was there before stays as it is.

    Raises:
        FileExistsError: there is a file of that name.
        OSError: the disk refused (the caller says what for).
    """
    temporary = path.with_name(
        f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    )
    leftovers = [temporary]
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o644)
        try:
            for piece in pieces:
                rest = memoryview(piece)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        publish(temporary, path)
        leftovers = [path]
        sync_folder(path.parent)
    except BaseException:
        for leftover in leftovers:
            with contextlib.suppress(OSError):
                leftover.unlink()
        raise
