"""What OpenAI's clients call a file: ids and names for the documents of a bank.

A document that came through /v1/files has an id that begins with its file's: `FILE/NAME`, or
`FILE/NAME/RECORD` for a record of it. Every other document is a file of its own, `doc-BANK-NUMBER`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FROM_FILE = re.compile(r"(file-[0-9a-f]{24})/([^/]+)")
_DOCUMENT = re.compile(r"doc-(.+)-(\d{1,18})")
_PART = re.compile(r"#\d+$")


@dataclass(frozen=True, slots=True)
class CitedFile:
    """The file that a document came from; `filename` is what people see."""

    file_id: str
    filename: str


def cited_file(bank: str, document_id: str, number: int, title: str | None = None) -> CitedFile:
    """The file of a document.

    Args:
        bank: its name.
        document_id: of the document, or of a part of a long one.
        number: of the document.
        title: the filename of a document that came through no file, if it has one.
    """
    found = _FROM_FILE.match(document_id)
    if found is not None:
        return CitedFile(found[1], _PART.sub("", found[2]))
    return CitedFile(f"doc-{bank}-{number}", title or document_id)


def document_number(file_id: str) -> tuple[str, int] | None:
    """Bank and number of a document that is a file of its own; None for any other id."""
    found = _DOCUMENT.fullmatch(file_id)
    return None if found is None else (found[1], int(found[2]))
