"""Files and folders to the files that are read, in a fixed order, with a reason for the others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from msa.text.normalization import nfc

TEXT_SUFFIXES = frozenset({".txt", ".text"})
MARKDOWN_SUFFIXES = frozenset({".md", ".markdown"})
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
CONVERTED_SUFFIXES = frozenset({".pdf", ".html", ".htm", ".docx"})
COMPRESSIBLE_SUFFIXES = TEXT_SUFFIXES | MARKDOWN_SUFFIXES | JSONL_SUFFIXES | set(TABLE_SUFFIXES)


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """Something that gave no document, and why.

    Attributes:
        source: the path as the caller wrote it, with the line where it is known.
        reason: one line, saying what to do where something can be done.
        ignored: True for what a folder happened to hold (hidden files, other file types, copies of
            a record); False for what was asked for and could not be used.
        origin: path below the root of the file or folder that it is about.
    """

    source: str
    reason: str
    ignored: bool = False
    origin: str | None = None


@dataclass(frozen=True, slots=True)
class File:
    """A file to read.

    Attributes:
        path, name: where it lies, and as people typed it.
        id: its path below the root.
        old_id: its id in banks that remember no root: its path below the folder that was given.
    """

    path: Path
    name: str
    id: str
    old_id: str


def common_root(paths: Sequence[str | Path]) -> Path:
    """The innermost folder that holds all of these files and folders; a single folder is its own.

    Paths that do not exist count only if none does.
    """
    there = [path for path in paths if os.path.exists(path)] or list(paths)
    resolved = [os.path.realpath(path) for path in there]
    folders = [path if os.path.isdir(path) else os.path.dirname(path) for path in resolved]
    try:
        return Path(os.path.commonpath(folders))
    except ValueError:  # on different drives
        return Path(folders[0])


def path_below(root: str | Path, path: str | Path) -> str:
    """What a file or folder is known by: its resolved path, as it leads there from the root."""
    return _below(os.path.realpath(root), _resolved(Path(path)))


def total_bytes(paths: Sequence[str | Path]) -> int:
    """Bytes on disk of all files that `load_documents` would read; for a progress bar."""
    files = (found for path in paths for found in walk(Path(path), "") if isinstance(found, File))
    return sum(size_of(file.path) for file in files)


def walk(path: Path, root: str) -> Iterator[File | LoadFailure]:
    """Files of one path given by the caller, sorted, and what was left out."""
    try:
        if path.is_dir():
            empty = True
            for found in _walk_folder(path, root):
                empty = False
                yield found
            if empty:
                yield LoadFailure(str(path), "the folder holds no files")
        elif path.is_file():
            identity = _below(root, _resolved(path))
            yield _known(File(path, str(path), identity, nfc(path.name)), given=True)
        else:
            yield LoadFailure(str(path), _why_no_file(path), origin=_below(root, _resolved(path)))
    except OSError as error:
        yield LoadFailure(str(path), os_reason(error), origin=_below(root, _resolved(path)))


def _why_no_file(path: Path) -> str:
    if path.exists():
        return "not a regular file or folder"
    if path.is_symlink():
        return "a link to a file that does not exist"
    return "no such file or folder"


def _walk_folder(given: Path, root: str) -> Iterator[File | LoadFailure]:
    """Everything below a folder; what cannot be looked at is a failure, and the rest goes on."""
    todo: list[tuple[Path, str, os.DirEntry[str] | None]] = [(given, os.path.realpath(given), None)]
    while todo:
        path, real, entry = todo.pop()
        try:
            found = None if entry is None else _look_at(entry, path, real, given, root)
            if found is not None:
                yield found
                continue
            with os.scandir(path) as entries:
                inside = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            yield LoadFailure(str(path), os_reason(error), origin=_below(root, real))
            continue
        todo += [(Path(e.path), os.path.join(real, e.name), e) for e in inside]


def _look_at(
    entry: os.DirEntry[str], path: Path, real: str, given: Path, root: str
) -> File | LoadFailure | None:
    """The file that an entry of a folder is, or why it is none; None for a folder to walk.

    Raises:
        OSError: it cannot be looked at.
    """
    if entry.name.startswith("."):
        kind = "folder" if entry.is_dir(follow_symlinks=False) else "file"
        return LoadFailure(str(path), f"hidden {kind}", ignored=True)
    if entry.is_dir(follow_symlinks=False):
        return None
    if entry.is_dir():
        return LoadFailure(str(path), "a link to a folder is not followed", ignored=True)
    identity = _below(root, _resolved(path) if entry.is_symlink() else real)
    if not entry.is_file():
        return LoadFailure(str(path), "not a regular file", origin=identity)
    old_id = nfc(path.relative_to(given).as_posix())
    return _known(File(path, str(path), identity, old_id), given=False)


def _resolved(path: Path) -> str:
    """Where a file or folder really is. A link to a file without its type is a name of its own:
    stores of blobs are linked to so.
    """
    real = os.path.realpath(path)
    if (
        os.path.islink(path)
        and not os.path.isdir(real)
        and suffix_of(Path(real)) != suffix_of(path)
    ):
        return os.path.join(os.path.realpath(path.parent), path.name)
    return real


def _below(root: str, path: str) -> str:
    """A resolved path as it leads there from the root, with slashes, in NFC."""
    try:
        way = os.path.relpath(path, root) if root else path
    except ValueError:  # on another drive
        way = path
    return nfc(Path(way).as_posix())


def suffix_of(path: Path) -> tuple[str, bool]:
    """Type suffix in lower case, and whether `.gz` follows it."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        return (suffixes[-2] if len(suffixes) > 1 else ""), True
    return (suffixes[-1] if suffixes else ""), False


def _known(file: File, *, given: bool) -> File | LoadFailure:
    """The file, or why its type is not read."""
    reason = why_not_read(file.path)
    return file if reason is None else LoadFailure(file.name, reason, ignored=not given)


def why_not_read(path: str | Path) -> str | None:
    """Why a file of this name is not read, in a few words; None if its type is read."""
    suffix, compressed = suffix_of(Path(path))
    known = COMPRESSIBLE_SUFFIXES if compressed else COMPRESSIBLE_SUFFIXES | CONVERTED_SUFFIXES
    if suffix in known:
        return None
    shown = type_suffix(path) or "(none)"
    types = "txt, md, jsonl, csv, tsv (also .gz), pdf, html, docx"
    return f"file type {shown} is not one of {types}"


def type_suffix(path: str | Path) -> str:
    """By what the type of a file is told: ".md", ".jsonl.gz"; in lower case, empty for none."""
    suffix, compressed = suffix_of(Path(path))
    return suffix + ".gz" if compressed else suffix


def os_reason(error: OSError) -> str:
    """Why a file or folder is not read, in the words of the system."""
    return f"cannot be read: {error.strerror or error}"


def size_of(path: Path) -> int:
    """Bytes of a file; 0 for one that is gone."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
