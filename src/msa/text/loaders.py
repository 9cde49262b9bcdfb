"""Files and folders to documents, one at a time, with a reason for everything left out.

Every file and every record in it yields either a `LoadedDocument` or a `LoadFailure`: nothing is
skipped in silence, and one bad record never hides the next.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import re
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, cast

from msa.text.normalization import nfc, nfc_document
from msa.types import JSON, Document

MAX_ID_CHARS = 512
"""Longest document id; longer ones are text in the wrong column."""

MAX_TITLE_CHARS = 100
"""A longer first heading or HTML title is shortened, and stays in the text as it is."""

MAX_DOCUMENT_BYTES = 64 * 2**20
"""Longest single text (about 16 million tokens); a file of one text is read into memory whole."""

TEXT_SUFFIXES = frozenset({".txt", ".text"})
MARKDOWN_SUFFIXES = frozenset({".md", ".markdown"})
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
CONVERTED_SUFFIXES = frozenset({".pdf", ".html", ".htm", ".docx"})
COMPRESSIBLE_SUFFIXES = TEXT_SUFFIXES | MARKDOWN_SUFFIXES | JSONL_SUFFIXES | set(TABLE_SUFFIXES)

MAX_UNPACKED_BYTES = 256 * 2**20
"""What the parts of a DOCX file, which is a zip archive, may hold together when unpacked."""

INSTALL_DOCUMENTS = "pip install 'msa-memory[documents]'"
"""What to type for PDF, HTML and DOCX."""


@dataclass(frozen=True, slots=True)
class LoadedDocument:
    """A document and where it came from (`notes/a.jsonl:12`).

    Attributes:
        document: the document, in NFC; its text is not blank, its id not too long.
        source: the path as given, with the line where a file holds several documents.
        origin: the file's path below the root, whatever path was given.
        note: what had to be guessed to read it; None for nothing.
    """

    document: Document
    source: str
    origin: str
    note: str | None = None


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """Something that gave no document, and why.

    Attributes:
        source: the path as given, with the line where it is known.
        reason: one line, saying what to do where something can be done.
        ignored: True for what a folder happened to hold (hidden files, other file types, copies of
            a record); False for what was asked for and could not be used.
        origin: path below the root of the file or folder that it is about.
    """

    source: str
    reason: str
    ignored: bool = False
    origin: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldNames:
    """Which fields of JSONL records and columns of tables hold what; others become metadata."""

    id: str = "id"
    text: str = "text"
    title: str = "title"


@dataclass(frozen=True, slots=True)
class _File:
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


class _BadRecord(Exception):  # noqa: N818 - never leaves this file
    """Why one record or file cannot be used."""


HeldAs = Callable[[str, str, Document | None], bool]
"""Whether a bank holds a file's document under an id of an earlier version: (path of the file below
the root, that id, the document if it must be the same)."""


def load_documents(
    paths: Sequence[str | Path],
    *,
    root: str | Path | None = None,
    fields: FieldNames | None = None,
    on_bytes: Callable[[int], None] | None = None,
    held_as: HeldAs | None = None,
    max_unpacked_bytes: int | None = None,
) -> Iterator[LoadedDocument | LoadFailure]:
    """Documents of files and folders, in a fixed order, read as they are asked for.

    Folders are walked recursively in sorted order. A text, Markdown, PDF, HTML or DOCX file is one
    document, whose id is its path below the root (posix; `../` leads out of it), however it was
    given: links are followed to the file, unless that has no type of its own. JSONL records and
    table rows are one document each; without an id theirs is `FILE:HASH`, by their content. `.gz`
    is read for text, Markdown, JSONL and tables.

    Args:
        paths: files and folders.
        root: a folder; by default the one that holds all paths (`common_root`).
        fields: names of the fields that hold id, text and title in JSONL and tables.
        on_bytes: called with the number of bytes read from disk since the last call; they add up
            to `total_bytes(paths)` if all files can be read.
        held_as: see `HeldAs`; nothing by default.
        max_unpacked_bytes: of a `.gz` file, what lies beyond is a failure; no bound by default,
            for files that one made oneself.

    Yields:
        A `LoadedDocument` or `LoadFailure` for every record; of two documents with the same id,
        the second is a failure.
    """
    fields = fields or FieldNames()
    base = os.path.realpath(common_root(paths) if root is None else root)
    seen: dict[str, str] = {}
    files: dict[str, str] = {}
    for path in paths:
        for found in _walk(Path(path), base):
            if isinstance(found, LoadFailure):
                yield found
                continue
            if found.id in files:
                reason = f"the same file as {files[found.id]}, which was read already"
                yield LoadFailure(found.name, reason, ignored=True)
                if on_bytes is not None:
                    on_bytes(_size(found.path))
                continue
            files[found.id] = found.name
            for loaded in _load_file(found, fields, on_bytes, held_as, max_unpacked_bytes):
                if isinstance(loaded, LoadedDocument):
                    first = seen.setdefault(loaded.document.id, loaded.source)
                    if first is not loaded.source:
                        yield _second(loaded, first)
                        continue
                yield loaded


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
    files = (found for path in paths for found in _walk(Path(path), "") if isinstance(found, _File))
    return sum(_size(file.path) for file in files)


def _second(loaded: LoadedDocument, first: str) -> LoadFailure:
    """Why a document whose id came before is left out."""
    name = loaded.document.id
    if name.startswith(loaded.origin + ":"):
        return LoadFailure(loaded.source, f"the same record as {first}", ignored=True)
    reason = f"duplicate id {name!r}, first used by {first}"
    return LoadFailure(loaded.source, reason, origin=loaded.origin)


# Which files


def _walk(path: Path, root: str) -> Iterator[_File | LoadFailure]:
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
            yield _known(_File(path, str(path), identity, nfc(path.name)), given=True)
        else:
            yield LoadFailure(str(path), _why_no_file(path), origin=_below(root, _resolved(path)))
    except OSError as error:
        yield LoadFailure(str(path), _os_reason(error), origin=_below(root, _resolved(path)))


def _why_no_file(path: Path) -> str:
    if path.exists():
        return "not a regular file or folder"
    if path.is_symlink():
        return "a link to a file that does not exist"
    return "no such file or folder"


def _walk_folder(given: Path, root: str) -> Iterator[_File | LoadFailure]:
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
            yield LoadFailure(str(path), _os_reason(error), origin=_below(root, real))
            continue
        todo += [(Path(e.path), os.path.join(real, e.name), e) for e in inside]


def _look_at(
    entry: os.DirEntry[str], path: Path, real: str, given: Path, root: str
) -> _File | LoadFailure | None:
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
    return _known(_File(path, str(path), identity, old_id), given=False)


def _resolved(path: Path) -> str:
    """Where a file or folder really is. A link to a file without its type is a name of its own:
    stores of blobs are linked to so.
    """
    real = os.path.realpath(path)
    if (
        os.path.islink(path)
        and not os.path.isdir(real)
        and _suffixes(Path(real)) != _suffixes(path)
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


def _suffixes(path: Path) -> tuple[str, bool]:
    """Type suffix in lower case, and whether `.gz` follows it."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        return (suffixes[-2] if len(suffixes) > 1 else ""), True
    return (suffixes[-1] if suffixes else ""), False


def _known(file: _File, *, given: bool) -> _File | LoadFailure:
    """The file, or why its type is not read."""
    reason = why_not_read(file.path)
    return file if reason is None else LoadFailure(file.name, reason, ignored=not given)


def why_not_read(path: str | Path) -> str | None:
    """Why a file of this name is not read, in a few words; None if its type is read."""
    suffix, compressed = _suffixes(Path(path))
    known = COMPRESSIBLE_SUFFIXES if compressed else COMPRESSIBLE_SUFFIXES | CONVERTED_SUFFIXES
    if suffix in known:
        return None
    shown = type_suffix(path) or "(none)"
    types = "txt, md, jsonl, csv, tsv (also .gz), pdf, html, docx"
    return f"file type {shown} is not one of {types}"


def type_suffix(path: str | Path) -> str:
    """By what the type of a file is told: ".md", ".jsonl.gz"; in lower case, empty for none."""
    suffix, compressed = _suffixes(Path(path))
    return suffix + ".gz" if compressed else suffix


# What is in them


def _load_file(
    file: _File,
    fields: FieldNames,
    on_bytes: Callable[[int], None] | None,
    held_as: HeldAs | None,
    max_unpacked_bytes: int | None,
) -> Iterator[LoadedDocument | LoadFailure]:
    """Everything in one file; errors of the whole file become one failure."""
    suffix, compressed = _suffixes(file.path)
    reported = 0
    try:
        with file.path.open("rb") as raw:
            unpacked = _Unpacked(raw, max_unpacked_bytes) if compressed else raw
            stream = cast("IO[bytes]", unpacked)
            for loaded in _load_stream(file, stream, suffix, fields, held_as):
                if on_bytes is not None:
                    position = raw.tell()
                    on_bytes(position - reported)
                    reported = position
                yield loaded
    except _BadRecord as error:
        yield LoadFailure(file.name, str(error), origin=file.id)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = f"damaged gzip data, the rest was not read ({error})"
        yield LoadFailure(file.name, reason, origin=file.id)
    except OSError as error:
        yield LoadFailure(file.name, _os_reason(error), origin=file.id)
    if on_bytes is not None:
        on_bytes(max(0, _size(file.path) - reported))


class _Unpacked(gzip.GzipFile):
    """What a gzip file holds, up to so many bytes: a small file can unpack to any length."""

    def __init__(self, packed: IO[bytes], limit: int | None) -> None:
        super().__init__(fileobj=packed)
        self._limit = self._left = limit

    def read(self, size: int | None = -1) -> bytes:
        return self._counted(super().read(size))

    def readline(self, size: int | None = -1) -> bytes:
        return self._counted(super().readline(size))

    def _counted(self, data: bytes) -> bytes:
        if self._left is not None and self._limit is not None:
            self._left -= len(data)
            if self._left < 0:
                raise _BadRecord(_unpacks_to_more_than(self._limit))
        return data


def _unpacks_to_more_than(limit: int) -> str:
    return f"it unpacks to more than {limit / 2**20:,.0f} MiB; cut it into several files"


def _load_stream(
    file: _File, stream: IO[bytes], suffix: str, fields: FieldNames, held_as: HeldAs | None
) -> Iterator[LoadedDocument | LoadFailure]:
    if suffix in JSONL_SUFFIXES or suffix in TABLE_SUFFIXES:
        records = (
            _jsonl_records(stream)
            if suffix in JSONL_SUFFIXES
            else _table_records(stream, fields, TABLE_SUFFIXES[suffix])
        )
        for line, record in records:
            source = f"{file.name}:{line}"
            try:
                if isinstance(record, _BadRecord):
                    raise record
                yield LoadedDocument(
                    _document(record, file, line, fields, held_as), source, file.id
                )
            except _BadRecord as error:
                yield LoadFailure(source, str(error), origin=file.id)
        return
    note = None
    if suffix in CONVERTED_SUFFIXES:
        title, text, note = _convert(file.path)
        title, text = _fitting_title(title, text)
    else:
        text = _decode(_read_whole(stream))
        title, text = _heading(text) if suffix in MARKDOWN_SUFFIXES else (None, text)
    held = held_as is not None and file.old_id != file.id and held_as(file.id, file.old_id, None)
    identifier = file.old_id if held else file.id
    document = _checked(Document(id=identifier, text=text, title=title))
    yield LoadedDocument(document, file.name, file.id, note)


def _read_whole(stream: IO[bytes]) -> bytes:
    data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise _BadRecord(_too_long())
    return data


def _too_long() -> str:
    return f"longer than {MAX_DOCUMENT_BYTES // 2**20} MiB in one text; cut it into several"


def _decode(data: bytes) -> str:
    """UTF-8 text, without a byte order mark."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _BadRecord("UTF-16 text; convert it to UTF-8 first")
    if b"\0" in data:
        raise _BadRecord("binary data, not text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _BadRecord(
            f"not valid UTF-8 at byte {error.start}; convert it to UTF-8 first"
        ) from None


_HEADING = re.compile(r"#[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*\r?$")


def _heading(text: str) -> tuple[str | None, str]:
    """The title of a Markdown text that begins with a first-level heading, and the rest."""
    first, _, rest = text.lstrip().partition("\n")
    found = _HEADING.match(first)
    if not found or not found[1] or not rest.strip():
        return None, text
    short = _shortened(found[1])
    return short, rest if short == found[1] else text


def _fitting_title(title: str | None, text: str) -> tuple[str | None, str]:
    """A title of bounded length, and the text, which begins with the whole title if it was cut."""
    title = " ".join((title or "").split())
    short = _shortened(title)
    return short or None, text if short == title else f"# {title}\n\n{text}"


def _shortened(title: str) -> str:
    """A title that leaves room for text in every part of its document."""
    if len(title) <= MAX_TITLE_CHARS and len(title.encode(errors="replace")) <= 2 * MAX_TITLE_CHARS:
        return title
    cut = title[:MAX_TITLE_CHARS].encode(errors="replace")[: 2 * MAX_TITLE_CHARS]
    words = cut.decode(errors="ignore").rsplit(maxsplit=1)
    return words[0].strip() + "…"


def _checked(document: Document) -> Document:
    """The document in NFC, if a bank can hold it."""
    document = nfc_document(document)
    if not document.id.strip():
        raise _BadRecord("the id is empty")
    if len(document.id) > MAX_ID_CHARS:
        raise _BadRecord(f"the id has {len(document.id)} characters, at most {MAX_ID_CHARS} fit")
    if not document.text.strip():
        raise _BadRecord("empty document")
    if len(document.content) > MAX_DOCUMENT_BYTES:
        raise _BadRecord(_too_long())
    try:  # half a surrogate pair, from JSON escapes or from file names that are not UTF-8
        for value in (document.id, document.title or "", document.text):
            value.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRecord("id, title or text holds characters that are not Unicode") from None
    return document


_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CHARSET = re.compile(
    rb"<meta[^>]{1,400}?charset\s*=\s*[\"']?\s*([\w.:-]+)"
    rb"|<\?xml[^>]{1,200}?encoding=[\"']([\w.:-]+)",
    re.IGNORECASE,
)
_CHARSET_BYTES = 4096  # from the beginning of a page, in which its charset must be given


def _decode_html(data: bytes) -> tuple[str, str | None]:
    """The text of a page, and a note when its charset had to be guessed."""
    for bom, name in _BOMS:
        if data.startswith(bom):
            return _decode_as(data.removeprefix(codecs.BOM_UTF8), name), None
    found = _CHARSET.search(data[:_CHARSET_BYTES])
    given = (found[1] or found[2]).decode("ascii", "replace") if found else None
    if given is not None:
        name = _codec(given)
        if name == "utf-8" or data.isascii():
            return _decode_as(data, name), None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        pass
    else:
        wrong = f"its charset is said to be {given}, but it is UTF-8: read so"
        return text, None if given is None else wrong
    if given is not None:
        return _decode_as(data, name), None
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        raise _BadRecord("no charset is given and it is not UTF-8; convert it to UTF-8") from None
    note = "no charset is given and it is not UTF-8: read as windows-1252, as browsers do; check it"
    return text, note


def _codec(charset: str) -> str:
    """Python's name for a charset, by the rules of HTML."""
    try:
        name = codecs.lookup(charset).name
        b"".decode(name)
    except LookupError:
        raise _BadRecord(f"its charset {charset!r} is not known; convert it to UTF-8") from None
    if name in ("ascii", "iso8859-1"):
        return "cp1252"
    return "utf-8" if name.startswith(("utf-16", "utf-32")) else name


def _decode_as(data: bytes, name: str) -> str:
    try:
        return data.decode(name)
    except (UnicodeDecodeError, ValueError) as error:
        where = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
        raise _BadRecord(f"not valid {name.upper()}{where}; convert it to UTF-8 first") from None


def _convert(path: Path) -> tuple[str | None, str, str | None]:
    """Title and Markdown text of a PDF, HTML or DOCX file, and what had to be guessed."""
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        raise _BadRecord(_too_long())
    kind = path.suffix[1:].upper()
    if kind == "DOCX":
        _check_archive(path)
    missing = f"{kind} needs the extra 'documents'; install it: {INSTALL_DOCUMENTS}"
    try:
        from markitdown import (
            FileConversionException,
            MarkItDown,
            MissingDependencyException,
            StreamInfo,
            converters,
        )
    except ImportError:
        raise _BadRecord(missing) from None
    # Only the converter of this type: among all, a damaged PDF ends up as its bytes in plain text.
    converter = {"PDF": converters.PdfConverter, "DOCX": converters.DocxConverter}.get(
        kind, converters.HtmlConverter
    )
    markitdown = MarkItDown(enable_builtins=False, enable_plugins=False)
    markitdown.register_converter(converter())
    note = None
    try:
        if converter is converters.HtmlConverter:
            page, note = _decode_html(path.read_bytes())
            how = StreamInfo(mimetype="text/html", extension=".html", charset="utf-8")
            stream = io.BytesIO(page.encode("utf-8", "replace"))
            result = markitdown.convert_stream(stream, stream_info=how)
        else:
            result = markitdown.convert_local(str(path))
    except (_BadRecord, OSError, MemoryError):
        raise
    except Exception as error:  # whatever a converter's parser stumbles over
        causes: list[BaseException] = [error]
        if isinstance(error, FileConversionException):
            causes += [a.exc_info[1] for a in error.attempts or [] if a.exc_info and a.exc_info[1]]
        if any(isinstance(cause, MissingDependencyException) for cause in causes):
            raise _BadRecord(missing) from None
        cause = causes[-1]
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise _BadRecord(f"this {kind} file cannot be converted: {first}") from None
    return result.title or None, result.text_content, note


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that unpacks to more than fits; what is none, its reader refuses."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile:
        return
    if size > MAX_UNPACKED_BYTES:
        raise _BadRecord(_unpacks_to_more_than(MAX_UNPACKED_BYTES))


# Records


Records = Iterator[tuple[int, dict[str, JSON] | _BadRecord]]
"""Line on which each record begins, and the record or why it cannot be used."""


def _jsonl_records(stream: IO[bytes]) -> Records:
    line_number, blank = 0, True
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        line_number += 1
        if len(line) > MAX_DOCUMENT_BYTES:
            blank = False
            yield line_number, _BadRecord(_too_long())
            _skip_line(stream, line)
            continue
        if not line.strip():
            continue
        blank = False
        try:
            yield line_number, _parse_json(_decode(line))
        except _BadRecord as error:
            yield line_number, error
    if blank:
        raise _BadRecord("the file is empty")


def _skip_line(stream: IO[bytes], begun: bytes) -> None:
    """Read to the end of a line of which this is the beginning."""
    while begun and not begun.endswith(b"\n"):
        begun = stream.readline(MAX_DOCUMENT_BYTES)


def _parse_json(line: str) -> dict[str, JSON]:
    def refuse(name: str) -> None:
        raise _BadRecord(f"malformed JSON: {name} is not a JSON value")

    try:
        record = json.loads(line, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise _BadRecord(f"malformed JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError):  # nested or digits beyond what Python parses
        raise _BadRecord("malformed JSON: nested too deeply, or a number is too long") from None
    if not isinstance(record, dict):
        raise _BadRecord(f"expected a JSON object per line, found {type(record).__name__}")
    return record


def _table_records(stream: IO[bytes], fields: FieldNames, delimiter: str) -> Records:
    rows = _Rows(stream, delimiter)
    first: list[str] | _BadRecord | None = []
    while first == []:  # blank lines above the header
        _, first = rows.next()
    if first is None:
        raise _BadRecord("the file is empty")
    if isinstance(first, _BadRecord):
        raise first
    header = first
    header[0] = header[0].removeprefix("\ufeff")
    if fields.text not in header:
        raise _BadRecord(
            f"no column {fields.text!r} among {', '.join(map(repr, header[:20]))}; name the one "
            "that holds the text (--text-field, or FieldNames(text=...))"
        )
    if len(set(header)) < len(header):
        raise _BadRecord("two columns have the same name")
    empty = True
    while True:
        line, row = rows.next(len(header))
        if row is None:
            break
        if isinstance(row, _BadRecord):
            yield line, row
        elif any("\0" in value for value in row):
            yield line, _BadRecord("binary data, not text")
        elif row:
            record: dict[str, JSON] = {k: v for k, v in zip(header, row, strict=True) if v != ""}
            record.setdefault(fields.text, "")
            yield line, record
        empty = empty and row == []
    if empty:
        raise _BadRecord("the table has a header and no rows")


class _Rows:
    """Rows of a table. A row that cannot be read ends with its line: the next line is a row again.

    So a stray quote, which opens a field that swallows what follows, costs one line.
    """

    def __init__(self, stream: IO[bytes], delimiter: str) -> None:
        self._stream = stream
        self._delimiter = delimiter
        self._line = 0  # the last one that was taken
        self._again: deque[str] = deque()  # lines to be read again

    def next(self, columns: int | None = None) -> tuple[int, list[str] | _BadRecord | None]:
        """The line on which a row begins, and its values; none for a blank one, None at the end.

        Args:
            columns: how many values it must have.
        """
        first = self._line + 1
        taken: list[str] = []
        try:
            row = self._parse(self._take(taken))
        except csv.Error as error:
            reason = f"malformed row: {error}"
            if len(taken) > 1:
                reason = (
                    f"malformed row: a quote opened on line {first} goes wrong on line "
                    f"{self._line} ({error}); line {first} was left out, the next ones were read "
                    "without it"
                )
            if len(taken[0]) > MAX_DOCUMENT_BYTES:
                _skip_line(self._stream, taken[0].encode("utf-8", "surrogateescape"))
            self._give_back(taken[1:])
            return first, _BadRecord(reason)
        if row is None or not row or columns in (None, len(row)):
            return first, row
        reason = f"{len(row)} values for {columns} columns"
        if len(taken) > 1:
            if self._are_rows(taken[1:], columns):
                self._give_back(taken[1:])
                last = first + len(taken) - 1
                reason += (
                    f" on lines {first} to {last}: a stray quote? Line {first} was left out, the "
                    "next ones were read without it"
                )
            else:
                reason += f" on lines {first} to {self._line}"
        return first, _BadRecord(reason)

    def _take(self, taken: list[str]) -> Iterator[str]:
        """Lines one by one; they are put into `taken`."""
        while True:
            if self._again:
                line = self._again.popleft()
            else:
                # Bytes that are not UTF-8 become surrogates, and `_checked` refuses just their row.
                data = self._stream.readline(MAX_DOCUMENT_BYTES + 1)
                line = data.decode("utf-8", "surrogateescape")
            if not line:
                return
            self._line += 1
            taken.append(line)
            yield line

    def _give_back(self, lines: Sequence[str]) -> None:
        self._again.extendleft(reversed(lines))
        self._line -= len(lines)

    def _are_rows(self, lines: Sequence[str], columns: int | None) -> bool:
        """True if every line is a row by itself."""
        try:
            return all(len(self._parse(iter([line])) or ()) == columns for line in lines)
        except csv.Error:
            return False

    def _parse(self, lines: Iterator[str]) -> list[str] | None:
        """One row; None at the end. The limit of a field, a setting of the process, is put back."""
        limit = csv.field_size_limit(MAX_DOCUMENT_BYTES)
        try:
            row: list[str] | None = next(
                csv.reader(lines, delimiter=self._delimiter, strict=True), None
            )
            return row
        finally:
            csv.field_size_limit(limit)


def _document(
    record: Mapping[str, JSON],
    file: _File,
    line: int,
    fields: FieldNames,
    held_as: HeldAs | None,
) -> Document:
    """The document of one record; fields other than id, text, title go into the metadata."""
    if fields.text not in record:
        names = ", ".join(map(repr, list(record)[:20])) or "none"
        raise _BadRecord(f"no field {fields.text!r}; its fields are {names}")
    identifier = record.get(fields.id)
    if isinstance(identifier, bool) or not isinstance(identifier, str | int | None):
        raise _BadRecord(f"field {fields.id!r} is {_kind(identifier)}, expected a string")
    text, title = record[fields.text], record.get(fields.title)
    if not isinstance(text, str):
        raise _BadRecord(f"field {fields.text!r} is {_kind(text)}, expected a string")
    if not isinstance(title, str | None):
        raise _BadRecord(f"field {fields.title!r} is {_kind(title)}, expected a string")
    metadata = _metadata(record, fields)
    name = "-" if identifier is None else str(identifier)
    document = _checked(Document(id=name, text=text, title=title or None, metadata=metadata))
    if identifier is not None:
        return document
    return _checked(replace(document, id=_content_id(document, file, line, held_as)))


def _metadata(record: Mapping[str, JSON], fields: FieldNames) -> dict[str, JSON]:
    """What a record holds beside id, text and title."""
    metadata = {k: v for k, v in record.items() if k not in (fields.id, fields.text, fields.title)}
    nested = metadata.pop("metadata", None)
    if isinstance(nested, dict):
        if both := sorted(nested.keys() & metadata.keys()):
            raise _BadRecord(f"field {both[0]!r} stands both beside and inside 'metadata'")
        metadata |= nested
    elif nested is not None:
        raise _BadRecord(f"field 'metadata' is {_kind(nested)}, expected an object")
    try:
        json.dumps(metadata, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRecord("a metadata field holds characters that are not Unicode") from None
    return metadata


def _content_id(document: Document, file: _File, line: int, held_as: HeldAs | None) -> str:
    """Id of a record that has none, by what it holds: it stays when lines move."""
    old_id = f"{file.old_id}:{line}"
    if held_as is not None and held_as(file.id, old_id, document):
        return old_id
    held = [document.title, document.text, document.metadata]
    digest = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
    return f"{file.id}:{digest[:16]}"


def _kind(value: JSON) -> str:
    """A JSON value's type, in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def _os_reason(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
