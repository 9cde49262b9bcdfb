"""Writing files so that they are there after a power cut, and saying so when the disk refuses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from msa.errors import MSAError, StorageError

TEMPORARY_SUFFIX = ".tmp"


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
    """Make renames and removals in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a whole file, durably: it is there complete under its name, or not at all.

    Temporary name, write, fsync, rename, fsync of the folder. A failed write leaves nothing.

    Raises:
        OSError: the disk refused (the caller says what for).
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            for piece in pieces:
                rest = memoryview(piece)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        for leftover in (temporary, path):
            with contextlib.suppress(OSError):
                leftover.unlink()
        raise
