"""The folder of what is fetched or made once, and whether the network may be used.

It is `$MSA_HOME`, else `$XDG_CACHE_HOME/msa`, else `~/.cache/msa`. Everything in it can be deleted;
it is fetched or made again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from msa.errors import FetchError

OFFLINE = ("MSA_OFFLINE", "HF_HUB_OFFLINE")
_WRITING = {
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOTDIR")
}


def home() -> Path:
    """The folder; it need not exist."""
    if given := os.environ.get("MSA_HOME"):
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "msa"


def offline() -> str | None:
    """The environment variable that forbids the network; None when it may be used."""
    for name in OFFLINE:
        if os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off"):
            return name
    return None


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in hexadecimal; `progress` gets the bytes of each piece read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            if progress is not None:
                progress(len(piece))
    return digest.hexdigest()


@contextlib.contextmanager
def exclusive(name: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock in the folder, so that one process makes a thing and the others find it made.

    Args:
        name: of the lock.
        waiting: called once when another process holds it.

    Raises:
        FetchError: the folder cannot be written.
    """
    path = home() / "locks" / f"{name}.lock"
    with write_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:  # an OSError too
            waiting()
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """A new folder to fill; it takes the target's name when the block is done, or goes away.

    To be used under the target's lock (`exclusive`): what a killed process has left is removed.

    Raises:
        FetchError: the disk refused.
    """
    with write_errors():
        target.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{target.name}-"
        for left in target.parent.glob(prefix + "*"):
            shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    before = folder.with_name(f"{folder.name}-before")
    try:
        with write_errors():
            yield folder
            folder.chmod(0o755)
            if target.exists():  # unfinished, or damaged; there until the new one is
                target.rename(before)
            try:
                folder.rename(target)
            except OSError:
                if before.exists():
                    before.rename(target)
                raise
    finally:
        for left in (folder, before):
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def write_errors() -> Iterator[None]:
    """Say in one line that the folder cannot be written.

    Raises:
        FetchError: in place of an `OSError` of the disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _WRITING:
            raise
        raise FetchError(
            f"{home()}: cannot be written ({error.strerror}); free space there, or name another "
            "folder: MSA_HOME=FOLDER"
        ) from error
