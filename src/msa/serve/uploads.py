"""Files that clients send: read piece by piece to disk, and counted while they are read."""

from __future__ import annotations

import asyncio
import contextlib
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from msa.memory.store.durable_files import storage_errors
from msa.serve.errors import CLIENT_GONE, ServiceError, invalid
from msa.serve.job_store import JobStore
from msa.serve.settings import ServeSettings
from msa.text.loaders import type_suffix, why_not_read
from msa.text.normalization import nfc

MAX_FILES = 2000
MAX_FIELDS = 32
MAX_FIELD_BYTES = 64 * 1024
MAX_NAME = 255
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Upload:
    """A file as it came.

    Attributes:
        name: by the client, cleaned: a relative path without dots and control characters.
        stored: name in the folder of uploads; None for a type that is not read.
        size: in bytes.
        refused: why it is not read.
    """

    name: str
    stored: str | None
    size: int
    refused: str | None = None


@dataclass(slots=True)
class Form:
    """What a multipart request held; the files of the field `file` or `files`."""

    files: list[Upload] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)


async def receive_form(request: Request, store: JobStore, settings: ServeSettings) -> Form:
    """The files and fields of a multipart request; the files are on disk, durably.

    Raises:
        ServiceError: 400 for what is no such request, 413 for a file that is too large.
        StorageError: the disk refused. In every case nothing is kept.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise invalid("The body has to be multipart/form-data with a boundary.", "file")
    reader = _FormReader(store, boundary, settings.max_file_bytes)
    return await _receive(request, reader.feed, reader.finish, reader.discard)


async def receive_body(
    request: Request, store: JobStore, settings: ServeSettings, name: str
) -> Upload:
    """The whole body as one file of this name; on disk, durably.

    Raises:
        ServiceError: see `receive_form`.
    """
    part = _FilePart(name, store.new_upload(type_suffix(name)), settings.max_file_bytes)

    def finish() -> Upload:
        part.close()
        return part.upload

    return await _receive(request, part.write, finish, part.discard)


@contextlib.contextmanager
def removed_on_error(store: JobStore, uploads: Iterable[Upload]) -> Iterator[None]:
    """Remove uploads from the disk if what they were sent for is refused."""
    try:
        yield
    except BaseException:
        store.remove_uploads(u.stored for u in uploads if u.stored is not None)
        raise


async def _receive(
    request: Request,
    feed: Callable[[bytes], None],
    finish: Callable[[], T],
    discard: Callable[[], None],
) -> T:
    """Feed the pieces of a body to a reader that writes to disk, in worker threads.

    How large the body may be, and how slow, is seen to by `msa.serve.gate`.
    """
    try:
        with storage_errors("keep an upload"):
            async for piece in request.stream():
                await run_in_threadpool(feed, piece)
            return await run_in_threadpool(finish)
    except ClientDisconnect:
        await run_in_threadpool(discard)
        message = "The client went away before all was sent."
        raise ServiceError(CLIENT_GONE, None, "client_gone", message) from None
    except BaseException:
        await asyncio.shield(run_in_threadpool(discard))
        raise


def clean_name(name: str) -> str:
    """A file name by a client as a relative path: no dots, drives or control characters.

    Raises:
        ServiceError: 400 if nothing is left, or it is too long.
    """
    parts = nfc(name).replace("\\", "/").split("/")
    clean = "/".join(part for part in parts if part.strip() and part not in (".", ".."))
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in clean):
        raise invalid("The file name holds control characters.", "file")
    if not clean or len(clean) > MAX_NAME:
        raise invalid(
            f"The file name has {len(clean)} characters; expected 1 to {MAX_NAME}.", "file"
        )
    return clean


def unsupported(message: str) -> ServiceError:
    """415: no file of this request is of a type that is read."""
    return ServiceError(415, None, "unsupported_file", f"{message}.", "file")


def _too_large(message: str) -> ServiceError:
    return ServiceError(413, None, "request_too_large", message)


class _FilePart:
    """A file that is being written."""

    def __init__(self, name: str, path: Path, limit: int) -> None:
        self._name, self._path, self._limit = name, path, limit
        self._size = 0
        self._file: IO[bytes] | None = None

    def write(self, piece: bytes) -> None:
        """One more piece.

        Raises:
            ServiceError: 413.
        """
        self._size += len(piece)
        if self._size > self._limit:
            raise _too_large(f"A file has more than {self._limit} bytes.")
        if self._file is None:
            self._file = open(  # noqa: SIM115 - closed by close() or discard()
                self._path, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)
            )
        self._file.write(piece)

    def close(self) -> None:
        """The file is complete: make it durable."""
        self.write(b"")  # an empty file is one too
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Leave nothing behind."""
        if self._file is not None:
            self._file.close()
        self._path.unlink(missing_ok=True)

    @property
    def upload(self) -> Upload:
        return Upload(self._name, self._path.name, self._size)


class _FormReader:
    """Parses a multipart body; its files go to disk as they come.

    Source: the callbacks follow Starlette's MultiPartParser, which keeps no account of the size of
    files.
    """

    def __init__(self, store: JobStore, boundary: bytes, max_file_bytes: int) -> None:
        self._store, self._max_file_bytes = store, max_file_bytes
        self._form = Form()
        self._parts: list[_FilePart] = []
        self._header: tuple[bytearray, bytearray] = bytearray(), bytearray()
        self._disposition = b""
        self._field: tuple[str, bytearray] | None = None
        self._file: _FilePart | None = None
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_header_field": lambda d, a, z: self._on_header(0, d[a:z]),
                "on_header_value": lambda d, a, z: self._on_header(1, d[a:z]),
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_end": self._on_end,
            },
        )

    def feed(self, piece: bytes) -> None:
        """One more piece of the body.

        Raises:
            ServiceError: 400, 413.
        """
        try:
            self._parser.write(piece)
        except FormParserError:
            raise invalid("The body is not valid multipart/form-data.", "file") from None

    def finish(self) -> Form:
        """The form, when the body has ended.

        Raises:
            ServiceError: 400 if it ended too soon.
        """
        if not self._ended:
            raise invalid("The multipart body ends before its last boundary.", "file")
        return self._form

    def discard(self) -> None:
        """Leave nothing behind."""
        for part in self._parts:
            part.discard()

    def _on_part_begin(self) -> None:
        self._disposition = b""
        self._header = bytearray(), bytearray()
        self._field = self._file = None

    def _on_header(self, which: int, data: bytes) -> None:
        self._header[which].extend(data)

    def _on_header_end(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = bytearray(), bytearray()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise invalid("A part has no name in its Content-Disposition.", "file")
        field_name = _decoded(options[b"name"])
        if b"filename" in options:
            self._begin_file(field_name, clean_name(_decoded(options[b"filename"])))
        elif len(self._form.fields) >= MAX_FIELDS:
            raise invalid(f"There are more than {MAX_FIELDS} fields.")
        else:
            self._field = field_name, bytearray()

    def _begin_file(self, field_name: str, name: str) -> None:
        if field_name not in ("file", "files", "file[]", "files[]"):
            raise invalid(f"A file came as {field_name!r}; expected 'file' or 'files'.", "file")
        if len(self._form.files) + (self._file is not None) >= MAX_FILES:
            raise invalid(f"There are more than {MAX_FILES} files.", "file")
        refused = why_not_read(name)
        if refused is None and any(name == upload.name for upload in self._form.files):
            refused = "another file of this request has the same name"
        if refused is not None:
            self._form.files.append(Upload(name, None, 0, refused))
            return
        path = self._store.new_upload(type_suffix(name))
        self._file = _FilePart(name, path, self._max_file_bytes)
        self._parts.append(self._file)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(data[start:end])
        elif self._field is not None:
            _, value = self._field
            value.extend(data[start:end])
            if len(value) > MAX_FIELD_BYTES:
                raise _too_large(f"The field has more than {MAX_FIELD_BYTES} bytes.")

    def _on_part_end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._form.files.append(self._file.upload)
        elif self._field is not None:
            name, value = self._field
            self._form.fields[name] = _decoded(bytes(value))
        self._field = self._file = None

    def _on_end(self) -> None:
        self._ended = True


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")
