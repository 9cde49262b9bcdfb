"""Files and folders to documents, one at a time, with a reason for everything left out.

Every file and every record in it yields either a `LoadedDocument` or a `LoadFailure`: nothing is
skipped in silence, and one bad record never hides the next.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from msa.types import JSON, Document

MAX_ID_CHARS = 512
"""Longest document id; longer ones are text in the wrong column."""

MAX_DOCUMENT_BYTES = 64 * 2**20
"""Longest single text (about 16 million tokens); a file of one text is read into memory whole."""

TEXT_SUFFIXES = frozenset({".txt", ".text"})
MARKDOWN_SUFFIXES = frozenset({".md", ".markdown"})
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
CONVERTED_SUFFIXES = frozenset({".pdf", ".html", ".htm", ".docx"})
COMPRESSIBLE_SUFFIXES = TEXT_SUFFIXES | MARKDOWN_SUFFIXES | JSONL_SUFFIXES | set(TABLE_SUFFIXES)

INSTALL_DOCUMENTS = "pip install 'msa-memory[documents]'"
"""What to type for PDF, HTML and DOCX."""


@dataclass(frozen=True, slots=True)
class LoadedDocument:
    """A document and where it came from (`notes/a.jsonl:12`).

    Attributes:
        document: the document; its text is not blank, its id not too long.
        source: the path as given, with the line where a file holds several documents.
        markdown: the text is Markdown, for `split_text`.
    """

    document: Document
    source: str
    markdown: bool = False


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """Something that gave no document, and why.

    Attributes:
        source: the path as given, with the line where it is known.
        reason: one line, saying what to do where something can be done.
        ignored: True for what a folder happened to hold (hidden files, other file types); False
            for what was asked for and could not be used.
    """

    source: str
    reason: str
    ignored: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldNames:
    """Which fields of JSONL records and columns of tables hold what; others become metadata."""

    id: str = "id"
    text: str = "text"
    title: str = "title"


@dataclass(frozen=True, slots=True)
class _File:
    """A file to read: where it lies, how people know it, and the id it gives."""

    path: Path
    name: str
    id: str


class _BadRecord(Exception):  # noqa: N818 - never leaves this file
    """Why one record or file cannot be used."""


def load_documents(
    paths: Sequence[str | Path],
    *,
    fields: FieldNames | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[LoadedDocument | LoadFailure]:
    """Documents of files and folders, in a fixed order, read as they are asked for.

    Folders are walked recursively in sorted order. A text, Markdown, PDF, HTML or DOCX file is one
    document, whose id is its path below the folder given (posix), or its name if the file itself
    was given. JSONL records and table rows are one document each; without an id theirs is
    `FILE:LINE`. `.gz` is read for text, Markdown, JSONL and tables.

    Args:
        paths: files and folders.
        fields: names of the fields that hold id, text and title in JSONL and tables.
        on_bytes: called with the number of bytes read from disk since the last call; they add up
            to `total_bytes(paths)` if all files can be read.

    Yields:
        A `LoadedDocument` or `LoadFailure` for every record; of two documents with the same id,
        the second is a failure.
    """
    fields = fields or FieldNames()
    seen: dict[str, str] = {}
    for path in paths:
        for found in _walk(Path(path)):
            if isinstance(found, LoadFailure):
                yield found
                continue
            for loaded in _load_file(found, fields, on_bytes):
                if isinstance(loaded, LoadedDocument):
                    first = seen.setdefault(loaded.document.id, loaded.source)
                    if first is not loaded.source:  # not `!=`: a file may be given twice
                        reason = f"duplicate id {loaded.document.id!r}, first used by {first}"
                        yield LoadFailure(loaded.source, reason)
                        continue
                yield loaded


def total_bytes(paths: Sequence[str | Path]) -> int:
    """Bytes on disk of all files that `load_documents` would read; for a progress bar."""
    files = (found for path in paths for found in _walk(Path(path)) if isinstance(found, _File))
    return sum(file.path.stat().st_size for file in files)


# Which files


def _walk(path: Path) -> Iterator[_File | LoadFailure]:
    """Files of one path given by the caller, sorted, and what was left out."""
    try:
        if path.is_dir():
            empty = True
            for found in _walk_folder(path, path):
                empty = False
                yield found
            if empty:
                yield LoadFailure(str(path), "the folder holds no files")
        elif path.is_file():
            yield _known(_File(path, str(path), path.name), given=True)
        elif path.exists():
            yield LoadFailure(str(path), "not a regular file or folder")
        elif path.is_symlink():
            yield LoadFailure(str(path), "a link to a file that does not exist")
        else:
            yield LoadFailure(str(path), "no such file or folder")
    except OSError as error:
        yield LoadFailure(str(path), _os_reason(error))


def _walk_folder(root: Path, folder: Path) -> Iterator[_File | LoadFailure]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield LoadFailure(str(folder), _os_reason(error))
        return
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            kind = "folder" if entry.is_dir(follow_symlinks=False) else "file"
            yield LoadFailure(str(path), f"hidden {kind}", ignored=True)
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk_folder(root, path)
        elif entry.is_dir():
            yield LoadFailure(str(path), "a link to a folder is not followed", ignored=True)
        elif not path.is_file():
            yield LoadFailure(str(path), "not a regular file")
        else:
            yield _known(_File(path, str(path), path.relative_to(root).as_posix()), given=False)


def _suffixes(path: Path) -> tuple[str, bool]:
    """Type suffix in lower case, and whether `.gz` follows it."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        return (suffixes[-2] if len(suffixes) > 1 else ""), True
    return (suffixes[-1] if suffixes else ""), False


def _known(file: _File, *, given: bool) -> _File | LoadFailure:
    """The file, or why its type is not read."""
    suffix, compressed = _suffixes(file.path)
    known = COMPRESSIBLE_SUFFIXES if compressed else COMPRESSIBLE_SUFFIXES | CONVERTED_SUFFIXES
    if suffix in known:
        return file
    shown = (suffix + ".gz" if compressed else suffix) or "(none)"
    types = "txt, md, jsonl, csv, tsv (also .gz), pdf, html, docx"
    return LoadFailure(file.name, f"file type {shown} is not one of {types}", ignored=not given)


# What is in them


def _load_file(
    file: _File, fields: FieldNames, on_bytes: Callable[[int], None] | None
) -> Iterator[LoadedDocument | LoadFailure]:
    """Everything in one file; errors of the whole file become one failure."""
    suffix, compressed = _suffixes(file.path)
    reported = 0
    try:
        with file.path.open("rb") as raw:
            stream = cast("IO[bytes]", gzip.GzipFile(fileobj=raw) if compressed else raw)
            for loaded in _load_stream(file, stream, suffix, fields):
                if on_bytes is not None:
                    position = raw.tell()
                    on_bytes(position - reported)
                    reported = position
                yield loaded
    except _BadRecord as error:
        yield LoadFailure(file.name, str(error))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield LoadFailure(file.name, f"damaged gzip data, the rest was not read ({error})")
    except OSError as error:
        yield LoadFailure(file.name, _os_reason(error))
    if on_bytes is not None:
        on_bytes(max(0, _size(file.path) - reported))


def _load_stream(
    file: _File, stream: IO[bytes], suffix: str, fields: FieldNames
) -> Iterator[LoadedDocument | LoadFailure]:
    if suffix in JSONL_SUFFIXES:
        yield from _load_jsonl(file, stream, fields)
    elif suffix in TABLE_SUFFIXES:
        yield from _load_table(file, stream, fields, TABLE_SUFFIXES[suffix])
    elif suffix in CONVERTED_SUFFIXES:
        title, text = _convert(file.path)
        document = _checked(Document(id=file.id, text=text, title=title))
        yield LoadedDocument(document, file.name, markdown=True)
    else:
        text = _decode(_read_whole(stream))
        markdown = suffix in MARKDOWN_SUFFIXES
        heading, text = _heading(text) if markdown else (None, text)
        document = _checked(Document(id=file.id, text=text, title=heading))
        yield LoadedDocument(document, file.name, markdown=markdown)


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


def _heading(text: str) -> tuple[str | None, str]:
    """The title of a Markdown text that begins with a first-level heading, and the rest."""
    first, _, rest = text.lstrip().partition("\n")
    if first.startswith("# ") and rest.strip():
        return first[2:].strip().rstrip("#").strip() or None, rest
    return None, text


def _checked(document: Document) -> Document:
    """The document, if a bank can hold it."""
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


def _convert(path: Path) -> tuple[str | None, str]:
    """Title and Markdown text of a PDF, HTML or DOCX file."""
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        raise _BadRecord(_too_long())
    kind = path.suffix[1:].upper()
    missing = f"{kind} needs the extra 'documents'; install it: {INSTALL_DOCUMENTS}"
    try:
        from markitdown import (
            FileConversionException,
            MarkItDown,
            MarkItDownException,
            MissingDependencyException,
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
    try:
        result = markitdown.convert_local(str(path))
    except MarkItDownException as error:
        causes: list[BaseException] = [error]
        if isinstance(error, FileConversionException):
            causes += [a.exc_info[1] for a in error.attempts or [] if a.exc_info and a.exc_info[1]]
        if any(isinstance(cause, MissingDependencyException) for cause in causes):
            raise _BadRecord(missing) from None
        cause = causes[-1]
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise _BadRecord(f"this {kind} file cannot be converted: {first}") from None
    return result.title or None, result.text_content


# Records


def _load_jsonl(
    file: _File, stream: IO[bytes], fields: FieldNames
) -> Iterator[LoadedDocument | LoadFailure]:
    line_number, blank = 0, True
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        line_number += 1
        source = f"{file.name}:{line_number}"
        if len(line) > MAX_DOCUMENT_BYTES:
            blank = False
            yield LoadFailure(source, _too_long())
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_DOCUMENT_BYTES)
            continue
        if not line.strip():
            continue
        blank = False
        try:
            record = _parse_json(_decode(line))
            yield LoadedDocument(_document(record, f"{file.id}:{line_number}", fields), source)
        except _BadRecord as error:
            yield LoadFailure(source, str(error))
    if blank:
        yield LoadFailure(file.name, "the file is empty")


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


def _load_table(
    file: _File, stream: IO[bytes], fields: FieldNames, delimiter: str
) -> Iterator[LoadedDocument | LoadFailure]:
    # Bytes that are not UTF-8 come through as surrogates, and `_checked` refuses just their row.
    pieces = iter(lambda: stream.readline(MAX_DOCUMENT_BYTES + 1), b"")
    lines = (piece.decode("utf-8", "surrogateescape") for piece in pieces)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while (header := _next_row(reader)) == []:
        pass  # blank lines above the header
    if header is None:
        raise _BadRecord("the file is empty")
    header[0] = header[0].removeprefix("\ufeff")
    if fields.text not in header:
        raise _BadRecord(
            f"no column {fields.text!r} among {', '.join(map(repr, header[:20]))}; "
            "name the one that holds the text"
        )
    if len(set(header)) < len(header):
        raise _BadRecord("two columns have the same name")
    empty = True
    while True:
        line_number = reader.line_num + 1
        source = f"{file.name}:{line_number}"
        try:
            row = _next_row(reader)
            if row is None:
                break
            if not row:
                continue
            empty = False
            if len(row) != len(header):
                raise _BadRecord(f"{len(row)} values for {len(header)} columns")
            values: dict[str, JSON] = {k: v for k, v in zip(header, row, strict=True) if v != ""}
            values.setdefault(fields.text, "")
            if any("\0" in value for value in row):
                raise _BadRecord("binary data, not text")
            yield LoadedDocument(_document(values, f"{file.id}:{line_number}", fields), source)
        except _BadRecord as error:
            empty = False
            yield LoadFailure(source, str(error))
    if empty:
        yield LoadFailure(file.name, "the table has a header and no rows")


def _next_row(reader: Any) -> list[str] | None:
    """The next row of a csv reader, which may hold long texts; None at the end.

    The limit of a field is a setting of the whole process, so it is put back.
    """
    limit = csv.field_size_limit(MAX_DOCUMENT_BYTES)
    try:
        row: list[str] | None = next(reader, None)
        return row
    except csv.Error as error:
        raise _BadRecord(f"malformed row: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _document(record: Mapping[str, JSON], default_id: str, fields: FieldNames) -> Document:
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
    identifier = default_id if identifier is None else str(identifier)
    return _checked(Document(id=identifier, text=text, title=title or None, metadata=metadata))


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
