"""One form for texts that look the same: Unicode's NFC.

"é" can be one character or two, and files, keyboards and systems differ in which they give. What
comes into a bank (ids, titles, texts), what is asked and what filters compare is brought to NFC.
"""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from typing import Any

from msa.types import Document


def nfc(text: str) -> str:
    """The text in NFC; the same object when it is in NFC already."""
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def spellings(text: str) -> tuple[str, ...]:
    """The forms in which a text may have been stored, NFC first.

    Banks of earlier versions hold ids as they were given.
    """
    return tuple(dict.fromkeys((nfc(text), text, unicodedata.normalize("NFD", text))))


def nfc_document(document: Document) -> Document:
    """A document whose id, title and text are in NFC; what is no text is left for others to refuse.

    The metadata stays as it is: filters compare it in NFC.
    """
    given: dict[str, Any] = {
        "id": document.id,
        "title": document.title,
        "text": document.text,
    }
    changed: dict[str, Any] = {
        k: nfc(v) for k, v in given.items() if isinstance(v, str) and nfc(v) is not v
    }
    return replace(document, **changed) if changed else document
