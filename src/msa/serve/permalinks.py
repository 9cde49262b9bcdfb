"""The page of a document, `/d/BANK/NUMBER`: right for ever, since numbers are never used twice."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, JsonValue

from msa.errors import DocumentNotFoundError
from msa.inference.spans import find_span
from msa.memory.store.reports import StoredDocument, part_id
from msa.serve.banks import ServedBank
from msa.serve.errors import ServiceError, invalid
from msa.serve.links import base_url, permalink
from msa.serve.service import CallerDep, ServiceDep, service_of

router = APIRouter(tags=["documents"])
MAX_MARKS = 200
MAX_WORDS = 32
_WORD = re.compile(r"\w+")
_SPAN = re.compile(r"(\d{1,12})-(\d{1,12})")

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5c6670; --paper: #fdfdfb;
  --line: #dfe3e6; --mark: #ffe69a; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #9aa5af; --paper: #14181c;
  --line: #2c343b; --mark: #6b5312; --link: #7db8f5; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.65 ui-serif, Georgia, "Times New Roman", serif; }
main { max-width: 42rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
header, footer, dl { font: 0.875rem/1.5 system-ui, sans-serif; color: var(--soft); }
h1 { margin: 0.25rem 0 1.5rem; font-size: 1.625rem; line-height: 1.25;
  overflow-wrap: anywhere; }
p { white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: var(--mark); color: inherit; border-radius: 0.15em; padding: 0.05em 0.1em;
  scroll-margin: 30vh; }
a { color: var(--link); }
nav { display: flex; gap: 1.5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1rem;
  border-top: 1px solid var(--line); padding-top: 1rem; }
dt { color: var(--soft); } dd { margin: 0; color: var(--ink); overflow-wrap: anywhere; }
"""
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_HASH}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "private, no-cache",
    "Vary": "Accept, Authorization",
}
"""Of every answer: no script runs on the page, and nothing is loaded."""


class Passage(BaseModel):
    """A document, or a part of a long one.

    Attributes:
        bank, url: of it.
        id, number, title, text, metadata, part_of, part, num_parts: see `StoredDocument`.
        spans: what is to be highlighted, as (first character, first after it).
    """

    bank: str
    id: str
    number: int
    title: str | None
    text: str
    metadata: dict[str, JsonValue]
    part_of: str | None
    part: int
    num_parts: int
    url: str
    spans: list[tuple[int, int]]


def address(request: Request, bank: str, number: int) -> str:
    """The permalink of a document, as this request's client reaches it."""
    return permalink(base_url(service_of(request).settings, request), bank, number)


def stored_document(served: ServedBank, number: int) -> StoredDocument:
    """The document with a number.

    Raises:
        ServiceError: 410 if it was deleted or replaced, 404 for a number that was never given.
    """
    try:
        return served.bank.get_number(number)
    except DocumentNotFoundError:
        pass
    if 0 < number < served.bank.catalog.counter("next_number"):
        message = "The document was deleted, or replaced by a new version."
        raise ServiceError(410, None, "document_deleted", message)
    raise ServiceError(404, None, "document_not_found", "No document has ever had this number.")


@router.get(
    "/d/{bank}/{number}",
    response_model=Passage,
    responses={200: {"content": {"text/html": {"schema": {"type": "string"}}}}},
)
async def passage(
    bank: str,
    number: int,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    q: Annotated[str | None, Query(max_length=2000, description="Words to highlight.")] = None,
    span: Annotated[
        str | None, Query(max_length=30, description="Characters to highlight, as in 120-134.")
    ] = None,
) -> Any:
    """A document by its number: HTML for browsers, JSON for others (by the Accept header)."""
    html = "text/html" in request.headers.get("accept", "")
    given = None if span is None else _parsed(span)
    try:
        served = service.registry.get(bank, caller)
        stored = await asyncio.to_thread(stored_document, served, number)
        others = await asyncio.to_thread(_neighbors, served, stored)
    except ServiceError as error:
        if html and error.status in (404, 410):
            return HTMLResponse(_gone_page(error.message), error.status, HEADERS)
        raise
    text = stored.document.text
    spans = list(_spans(text, q, given))
    if html:
        page = _page(served.name, stored, spans, others)
        return HTMLResponse(page, headers=HEADERS)
    body = Passage(
        bank=served.name,
        id=stored.document.id,
        number=stored.number,
        title=stored.document.title,
        text=text,
        metadata=dict(stored.document.metadata),
        part_of=stored.part_of,
        part=stored.part,
        num_parts=stored.num_parts,
        url=address(request, served.name, stored.number),
        spans=spans,
    )
    return Response(body.model_dump_json(), headers=HEADERS, media_type="application/json")


def _neighbors(served: ServedBank, stored: StoredDocument) -> dict[str, int]:
    """The parts before and after a part of a split document: "prev" and "next" to numbers."""
    if stored.part_of is None:
        return {}
    found = {}
    for name, part in (("prev", stored.part - 1), ("next", stored.part + 1)):
        other = served.bank.catalog.by_id(part_id(stored.part_of, part))
        if other is not None:
            found[name] = other.number
    return found


def _parsed(span: str) -> tuple[int, int]:
    """First and last + 1 character of `120-134`.

    Raises:
        ServiceError: 400.
    """
    found = _SPAN.fullmatch(span)
    if found is None or int(found[1]) >= int(found[2]):
        raise invalid("A span is two numbers of characters, such as 120-134.", "span")
    return int(found[1]), int(found[2])


def _spans(text: str, words: str | None, span: tuple[int, int] | None) -> Iterator[tuple[int, int]]:
    """What to highlight, in order and apart: the span, else the words as they stand, else each."""
    if span is not None:
        start, end = span[0], min(span[1], len(text))
        if start < end:
            yield start, end
        return
    if words is None:
        return
    phrase = find_span(text, words, "")
    if phrase is not None:
        yield phrase
        return
    wanted = {word.casefold() for word in _WORD.findall(words)[:MAX_WORDS]}
    count = 0
    for found in _WORD.finditer(text):
        if found[0].casefold() in wanted:
            yield found.span()
            count += 1
            if count == MAX_MARKS:
                return


def _page(
    bank: str,
    stored: StoredDocument,
    spans: Sequence[tuple[int, int]],
    others: dict[str, int],
) -> str:
    document = stored.document
    title = document.title or stored.part_of or document.id
    place = f"{escape(bank)} · document {stored.number}"
    if stored.part_of is not None:
        place += f" · part {stored.part} of {stored.num_parts}"
    names = {"prev": "← previous part", "next": "next part →"}
    links = " ".join(
        f'<a rel="{name}" href="{number}">{names[name]}</a>' for name, number in others.items()
    )
    facts = {"id": document.id, **document.metadata}
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
    return _html(
        title,
        f"<header>{place}</header><h1>{escape(title)}</h1>"
        f"<p>{_marked(document.text, spans)}</p><footer><nav>{links}</nav></footer>"
        f"<dl>{rows}</dl>",
    )


def _marked(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text as HTML; the first mark is `#answer`, so that a link can lead there."""
    pieces: list[str] = []
    last = 0
    for start, end in spans:
        name = "" if pieces else ' id="answer"'
        pieces += [escape(text[last:start]), f"<mark{name}>{escape(text[start:end])}</mark>"]
        last = end
    return "".join([*pieces, escape(text[last:])])


def _gone_page(message: str) -> str:
    return _html("Not here", f"<h1>Not here</h1><p>{escape(message)}</p>")


def _html(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>"
    )
