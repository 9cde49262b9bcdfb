"""Bytes to text: UTF-8 that is checked, the charsets of pages, and gzip files up to a bound."""

from __future__ import annotations

import codecs
import gzip
import re
from typing import IO

MAX_DOCUMENT_BYTES = 64 * 2**20
"""Longest single text (about 16 million tokens); a file of one text is read into memory whole."""


class BadRecordError(Exception):
    """Why one record or file cannot be used; a loader makes a `LoadFailure` of it."""


class UnpackedFile(gzip.GzipFile):
    """What a gzip file holds, up to so many bytes: a small file can unpack to any length."""

    def __init__(self, packed: IO[bytes], limit: int | None) -> None:
        super().__init__(fileobj=packed)
        self._limit = self._left = limit

    def read(self, size: int | None = -1) -> bytes:
        """So many bytes, or all. A `BadRecordError` when they lead beyond the limit."""
        return self._counted(super().read(size))

    def readline(self, size: int | None = -1) -> bytes:
        """A line, or so many bytes of it. A `BadRecordError` as in `read`."""
        return self._counted(super().readline(size))

    def _counted(self, data: bytes) -> bytes:
        if self._left is not None and self._limit is not None:
            self._left -= len(data)
            if self._left < 0:
                raise BadRecordError(unpacks_to_more_than(self._limit))
        return data


def unpacks_to_more_than(limit: int) -> str:
    """Why a packed file is not read on."""
    return f"it unpacks to more than {limit / 2**20:,.0f} MiB; cut it into several files"


def read_whole(stream: IO[bytes]) -> bytes:
    """All bytes, if they fit in one text."""
    data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise BadRecordError(too_long())
    return data


def too_long() -> str:
    """Why a text is not read."""
    return f"longer than {MAX_DOCUMENT_BYTES // 2**20} MiB in one text; cut it into several"


def decode(data: bytes) -> str:
    """UTF-8 text, without a byte order mark."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadRecordError("UTF-16 text; convert it to UTF-8 first")
    if b"\0" in data:
        raise BadRecordError("binary data, not text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecordError(
            f"not valid UTF-8 at byte {error.start}; convert it to UTF-8 first"
        ) from None


def skip_line(stream: IO[bytes], begun: bytes) -> None:
    """Read to the end of a line of which this is the beginning."""
    while begun and not begun.endswith(b"\n"):
        begun = stream.readline(MAX_DOCUMENT_BYTES)


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


def decode_html(data: bytes) -> tuple[str, str | None]:
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
        raise BadRecordError(
            "no charset is given and it is not UTF-8; convert it to UTF-8"
        ) from None
    note = "no charset is given and it is not UTF-8: read as windows-1252, as browsers do; check it"
    return text, note


def _codec(charset: str) -> str:
    """Python's name for a charset, by the rules of HTML."""
    try:
        name = codecs.lookup(charset).name
        b"".decode(name)
    except LookupError:
        raise BadRecordError(f"its charset {charset!r} is not known; convert it to UTF-8") from None
    if name in ("ascii", "iso8859-1"):
        return "cp1252"
    return "utf-8" if name.startswith(("utf-16", "utf-32")) else name


def _decode_as(data: bytes, name: str) -> str:
    try:
        return data.decode(name)
    except (UnicodeDecodeError, ValueError) as error:
        where = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
        raise BadRecordError(
            f"not valid {name.upper()}{where}; convert it to UTF-8 first"
        ) from None
