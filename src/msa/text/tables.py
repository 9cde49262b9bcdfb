"""Records of tables (CSV, TSV) and of JSON lines, each with its line or why it cannot be used."""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from msa.text.decoding import MAX_DOCUMENT_BYTES, BadRecordError, decode, skip_line, too_long
from msa.types import JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldNames:
    """Which fields of JSONL records and columns of tables hold what; others become metadata."""

    id: str = "id"
    text: str = "text"
    title: str = "title"


Records = Iterator[tuple[int, dict[str, JSON] | BadRecordError]]
"""Line on which each record begins, and the record or why it cannot be used."""


def jsonl_records(stream: IO[bytes]) -> Records:
    """One record for every line that is not blank.

    Raises:
        BadRecordError: there is none.
    """
    line_number, blank = 0, True
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        line_number += 1
        if len(line) > MAX_DOCUMENT_BYTES:
            blank = False
            yield line_number, BadRecordError(too_long())
            skip_line(stream, line)
            continue
        if not line.strip():
            continue
        blank = False
        try:
            yield line_number, _parse_json(decode(line))
        except BadRecordError as error:
            yield line_number, error
    if blank:
        raise BadRecordError("the file is empty")


def _parse_json(line: str) -> dict[str, JSON]:
    def refuse(name: str) -> None:
        raise BadRecordError(f"malformed JSON: {name} is not a JSON value")

    try:
        record = json.loads(line, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise BadRecordError(f"malformed JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError):  # nested or digits beyond what Python parses
        raise BadRecordError("malformed JSON: nested too deeply, or a number is too long") from None
    if not isinstance(record, dict):
        raise BadRecordError(f"expected a JSON object per line, found {type(record).__name__}")
    return record


def table_records(stream: IO[bytes], fields: FieldNames, delimiter: str) -> Records:
    """One record for every row.

    Raises:
        BadRecordError: there is no header, or no row below it.
    """
    rows = _Rows(stream, delimiter)
    first: list[str] | BadRecordError | None = []
    while first == []:  # blank lines above the header
        _, first = rows.next()
    if first is None:
        raise BadRecordError("the file is empty")
    if isinstance(first, BadRecordError):
        raise first
    header = first
    header[0] = header[0].removeprefix("\ufeff")
    if fields.text not in header:
        raise BadRecordError(
            f"no column {fields.text!r} among {', '.join(map(repr, header[:20]))}; name the one "
            "that holds the text (--text-field, or FieldNames(text=...))"
        )
    if len(set(header)) < len(header):
        raise BadRecordError("two columns have the same name")
    empty = True
    while True:
        line, row = rows.next(len(header))
        if row is None:
            break
        if isinstance(row, BadRecordError):
            yield line, row
        elif any("\0" in value for value in row):
            yield line, BadRecordError("binary data, not text")
        elif row:
            record: dict[str, JSON] = {k: v for k, v in zip(header, row, strict=True) if v != ""}
            record.setdefault(fields.text, "")
            yield line, record
        empty = empty and row == []
    if empty:
        raise BadRecordError("the table has a header and no rows")


class _Rows:
    """Rows of a table. A row that cannot be read ends with its line: the next line is a row again.

    So a stray quote, which opens a field that swallows what follows, costs one line.
    """

    def __init__(self, stream: IO[bytes], delimiter: str) -> None:
        self._stream = stream
        self._delimiter = delimiter
        self._line = 0  # the last one that was taken
        self._again: deque[str] = deque()  # lines to be read again

    def next(self, columns: int | None = None) -> tuple[int, list[str] | BadRecordError | None]:
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
                skip_line(self._stream, taken[0].encode("utf-8", "surrogateescape"))
            self._give_back(taken[1:])
            return first, BadRecordError(reason)
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
        return first, BadRecordError(reason)

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
