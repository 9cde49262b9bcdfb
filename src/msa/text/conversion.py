"""PDF, HTML and DOCX files to Markdown, by markitdown."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from msa.text.decoding import (
    MAX_DOCUMENT_BYTES,
    BadRecordError,
    decode_html,
    too_long,
    unpacks_to_more_than,
)

MAX_UNPACKED_BYTES = 256 * 2**20
"""What the parts of a DOCX file, which is a zip archive, may hold together when unpacked."""


INSTALL_DOCUMENTS = "pip install 'msa-memory[documents]'"
"""What to type for PDF, HTML and DOCX."""


def convert(path: Path) -> tuple[str | None, str, str | None]:
    """Title and Markdown text of a PDF, HTML or DOCX file, and what had to be guessed."""
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        raise BadRecordError(too_long())
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
        raise BadRecordError(missing) from None
    # Only the converter of this type: among all, a damaged PDF ends up as its bytes in plain text.
    converter = {"PDF": converters.PdfConverter, "DOCX": converters.DocxConverter}.get(
        kind, converters.HtmlConverter
    )
    markitdown = MarkItDown(enable_builtins=False, enable_plugins=False)
    markitdown.register_converter(converter())
    note = None
    try:
        if converter is converters.HtmlConverter:
            page, note = decode_html(path.read_bytes())
            how = StreamInfo(mimetype="text/html", extension=".html", charset="utf-8")
            stream = io.BytesIO(page.encode("utf-8", "replace"))
            result = markitdown.convert_stream(stream, stream_info=how)
        else:
            result = markitdown.convert_local(str(path))
    except (BadRecordError, OSError, MemoryError):
        raise
    except Exception as error:  # whatever a converter's parser stumbles over
        causes: list[BaseException] = [error]
        if isinstance(error, FileConversionException):
            causes += [a.exc_info[1] for a in error.attempts or [] if a.exc_info and a.exc_info[1]]
        if any(isinstance(cause, MissingDependencyException) for cause in causes):
            raise BadRecordError(missing) from None
        cause = causes[-1]
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise BadRecordError(f"this {kind} file cannot be converted: {first}") from None
    return result.title or None, result.text_content, note


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that unpacks to more than fits; what is none, its reader refuses."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile:
        return
    if size > MAX_UNPACKED_BYTES:
        raise BadRecordError(unpacks_to_more_than(MAX_UNPACKED_BYTES))
