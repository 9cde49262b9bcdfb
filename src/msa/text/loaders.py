"""Files and folders to documents, one at a time, with a reason for everything left out.

Every file and every record in it yields either a `LoadedDocument` or a `LoadFailure`: nothing is
skipped in silence, and one bad record never hides the next.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, cast

from msa.text.conversion import INSTALL_DOCUMENTS, MAX_UNPACKED_BYTES, convert
from msa.text.decoding import (
    MAX_DOCUMENT_BYTES,
    BadRecordError,
    UnpackedFile,
    decode,
    read_whole,
    too_long,
)
from msa.text.files import (
    CONVERTED_SUFFIXES,
    JSONL_SUFFIXES,
    MARKDOWN_SUFFIXES,
    TABLE_SUFFIXES,
    File,
    LoadFailure,
    common_root,
    os_reason,
    path_below,
    size_of,
    suffix_of,
    total_bytes,
    type_suffix,
    walk,
    why_not_read,
)
from msa.text.normalization import nfc_document
from msa.text.tables import FieldNames, jsonl_records, table_records
from msa.types import JSON, Document

__all__ = [
    "CONVERTED_SUFFIXES",
    "INSTALL_DOCUMENTS",
    "MAX_UNPACKED_BYTES",
    "FieldNames",
    "HeldAs",
    "LoadFailure",
    "LoadedDocument",
    "common_root",
    "load_documents",
    "path_below",
    "total_bytes",
    "type_suffix",
    "why_not_read",
]

MAX_ID_CHARS = 512
"""Longest document id; longer ones are text in the wrong column."""

MAX_TITLE_CHARS = 100
"""A longer first heading or HTML title is shortened, and stays in the text as it is."""


@dataclass(frozen=True, slots=True)
class LoadedDocument:
    """A document and where it came from (`notes/a.jsonl:12`).

    Attributes:
        document: the document, in NFC; its text is not blank, its id not too long.
        source: the path as the caller wrote it, with the line where a file holds several documents.
        origin: the file's path below the root, whatever path was given.
        note: what had to be guessed to read it; None for nothing.
    """

    document: Document
    source: str
    origin: str
    note: str | None = None


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
        for found in walk(Path(path), base):
            if isinstance(found, LoadFailure):
                yield found
                continue
            if found.id in files:
                reason = f"the same file as {files[found.id]}, which was read already"
                yield LoadFailure(found.name, reason, ignored=True)
                if on_bytes is not None:
                    on_bytes(size_of(found.path))
                continue
            files[found.id] = found.name
            for loaded in _load_file(found, fields, on_bytes, held_as, max_unpacked_bytes):
                if isinstance(loaded, LoadedDocument):
                    first = seen.setdefault(loaded.document.id, loaded.source)
                    if first is not loaded.source:
                        yield _second(loaded, first)
                        continue
                yield loaded


def _second(loaded: LoadedDocument, first: str) -> LoadFailure:
    """Why a document whose id came before is left out."""
    name = loaded.document.id
    if name.startswith(loaded.origin + ":"):
        return LoadFailure(loaded.source, f"the same record as {first}", ignored=True)
    reason = f"duplicate id {name!r}, first used by {first}"
    return LoadFailure(loaded.source, reason, origin=loaded.origin)


def _load_file(
    file: File,
    fields: FieldNames,
    on_bytes: Callable[[int], None] | None,
    held_as: HeldAs | None,
    max_unpacked_bytes: int | None,
) -> Iterator[LoadedDocument | LoadFailure]:
    """Everything in one file; errors of the whole file become one failure."""
    suffix, compressed = suffix_of(file.path)
    reported = 0
    try:
        with file.path.open("rb") as raw:
            unpacked = UnpackedFile(raw, max_unpacked_bytes) if compressed else raw
            stream = cast("IO[bytes]", unpacked)
            for loaded in _load_stream(file, stream, suffix, fields, held_as):
                if on_bytes is not None:
                    position = raw.tell()
                    on_bytes(position - reported)
                    reported = position
                yield loaded
    except BadRecordError as error:
        yield LoadFailure(file.name, str(error), origin=file.id)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = f"damaged gzip data, the rest was not read ({error})"
        yield LoadFailure(file.name, reason, origin=file.id)
    except OSError as error:
        yield LoadFailure(file.name, os_reason(error), origin=file.id)
    if on_bytes is not None:
        on_bytes(max(0, size_of(file.path) - reported))


def _load_stream(
    file: File, stream: IO[bytes], suffix: str, fields: FieldNames, held_as: HeldAs | None
) -> Iterator[LoadedDocument | LoadFailure]:
    if suffix in JSONL_SUFFIXES or suffix in TABLE_SUFFIXES:
        records = (
            jsonl_records(stream)
            if suffix in JSONL_SUFFIXES
            else table_records(stream, fields, TABLE_SUFFIXES[suffix])
        )
        for line, record in records:
            source = f"{file.name}:{line}"
            try:
                if isinstance(record, BadRecordError):
                    raise record
                yield LoadedDocument(
                    _document(record, file, line, fields, held_as), source, file.id
                )
            except BadRecordError as error:
                yield LoadFailure(source, str(error), origin=file.id)
        return
    note = None
    if suffix in CONVERTED_SUFFIXES:
        title, text, note = convert(file.path)
        title, text = _fitting_title(title, text)
    else:
        text = decode(read_whole(stream))
        title, text = _heading(text) if suffix in MARKDOWN_SUFFIXES else (None, text)
    held = held_as is not None and file.old_id != file.id and held_as(file.id, file.old_id, None)
    identifier = file.old_id if held else file.id
    document = _checked(Document(id=identifier, text=text, title=title))
    yield LoadedDocument(document, file.name, file.id, note)


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
        raise BadRecordError("the id is empty")
    if len(document.id) > MAX_ID_CHARS:
        raise BadRecordError(
            f"the id has {len(document.id)} characters, at most {MAX_ID_CHARS} fit"
        )
    if not document.text.strip():
        raise BadRecordError("empty document")
    if len(document.content) > MAX_DOCUMENT_BYTES:
        raise BadRecordError(too_long())
    try:  # half a surrogate pair, from JSON escapes or from file names that are not UTF-8
        for value in (document.id, document.title or "", document.text):
            value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecordError("id, title or text holds characters that are not Unicode") from None
    return document


def _document(
    record: Mapping[str, JSON],
    file: File,
    line: int,
    fields: FieldNames,
    held_as: HeldAs | None,
) -> Document:
    """The document of one record; fields other than id, text, title go into the metadata."""
    if fields.text not in record:
        names = ", ".join(map(repr, list(record)[:20])) or "none"
        raise BadRecordError(f"no field {fields.text!r}; its fields are {names}")
    identifier = record.get(fields.id)
    if isinstance(identifier, bool) or not isinstance(identifier, str | int | None):
        raise BadRecordError(f"field {fields.id!r} is {json_kind(identifier)}, expected a string")
    text, title = record[fields.text], record.get(fields.title)
    if not isinstance(text, str):
        raise BadRecordError(f"field {fields.text!r} is {json_kind(text)}, expected a string")
    if not isinstance(title, str | None):
        raise BadRecordError(f"field {fields.title!r} is {json_kind(title)}, expected a string")
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
            raise BadRecordError(f"field {both[0]!r} stands both beside and inside 'metadata'")
        metadata |= nested
    elif nested is not None:
        raise BadRecordError(f"field 'metadata' is {json_kind(nested)}, expected an object")
    try:
        json.dumps(metadata, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecordError("a metadata field holds characters that are not Unicode") from None
    return metadata


def _content_id(document: Document, file: File, line: int, held_as: HeldAs | None) -> str:
    """Id of a record that has none, by what it holds: it stays when lines move."""
    old_id = f"{file.old_id}:{line}"
    if held_as is not None and held_as(file.id, old_id, document):
        return old_id
    held = [document.title, document.text, document.metadata]
    digest = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
    return f"{file.id}:{digest[:16]}"


def json_kind(value: JSON) -> str:
    """A JSON value's type, in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
