"""Documents of a bank, one by one: put, get, list, delete."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Query, Request, Response
from pydantic import BaseModel, Field, JsonValue

from msa.errors import LexicalIndexError
from msa.memory.bank import MemoryBank
from msa.memory.store.catalog import Known
from msa.memory.store.reports import StoredDocument
from msa.serve.banks import ServedBank
from msa.serve.errors import ServiceError, invalid
from msa.serve.keys import WRITE
from msa.serve.native import Body
from msa.serve.permalinks import address
from msa.serve.service import CallerDep, Service, ServiceDep
from msa.types import Document

router = APIRouter(prefix="/api/banks/{bank}", tags=["documents"])
MAX_PAGE = 100
MAX_DELETED = 10_000
SNIPPET = 280

DocumentId = Annotated[str, Path(max_length=512, description="As the caller likes; no part's.")]
Outcome = Literal["added", "updated", "unchanged"]
IfMatch = Annotated[str | None, Header(description="Only if the document is still this one.")]
IfNoneMatch = Annotated[
    str | None, Header(description="`*`: only if there is none. An ETag: only if it has changed.")
]


class DocumentInput(Body):
    """A document to store.

    Attributes:
        text: what is remembered.
        title: shown, and remembered in front of the text.
        metadata: JSON values of the caller's own; returned, and filtered on.
    """

    text: str = Field(min_length=1, pattern=r"\S")
    title: str | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


class Part(BaseModel):
    """A piece of a document that the model knows.

    Attributes:
        id, number, num_tokens: see `StoredDocument`.
        url: permalink.
    """

    id: str
    number: int
    num_tokens: int
    url: str


class DocumentBody(BaseModel):
    """A document as it is stored.

    Attributes:
        id, title, text, metadata: as sent. A long text is stored in parts, and given back with a
            line break where they meet.
        etag: changes when any of these does.
        parts: itself, or its parts.
    """

    id: str
    title: str | None
    text: str
    metadata: dict[str, JsonValue]
    etag: str
    parts: list[Part]


class PutBody(BaseModel):
    """What a PUT has done.

    Attributes:
        id: of the document.
        outcome: unchanged ones cost nothing.
        etag: of what is stored now.
        parts: what the model knows of it.
    """

    id: str
    outcome: Outcome
    etag: str
    parts: list[Part]


class Row(BaseModel):
    """A line of a list: a document, or a part of a long one.

    Attributes:
        id, number, title, metadata, num_tokens, part_of, part, num_parts: see `StoredDocument`.
        snippet: how the text begins.
        characters: length of the text.
        url: permalink.
    """

    id: str
    number: int
    title: str | None
    snippet: str
    characters: int
    metadata: dict[str, JsonValue]
    num_tokens: int
    part_of: str | None
    part: int
    num_parts: int
    url: str


class Page(BaseModel):
    """A page of a list.

    Attributes:
        data: in the order in which they were added; for `q` the best first.
        has_more: whether there are more.
        next: what to give as `after` for them.
    """

    data: list[Row]
    has_more: bool
    next: int | None


class DeleteInput(Body):
    """Ids to delete."""

    ids: list[str] = Field(min_length=1, max_length=MAX_DELETED)


class DeleteBody(BaseModel):
    """How many were deleted, and which were not there."""

    deleted: int
    missing: list[str]


@dataclass(frozen=True, slots=True)
class PutResult:
    """What `put_document` has done.

    Attributes:
        outcome: see `PutBody`.
        etag: of what is stored now.
        stored: the document, or its parts.
    """

    outcome: Outcome
    etag: str
    stored: Sequence[StoredDocument]


@dataclass(frozen=True, slots=True)
class DeleteResult:
    """Ids that were deleted, and those that were not there."""

    deleted: Sequence[str]
    missing: Sequence[str]


async def put_document(
    service: Service,
    served: ServedBank,
    document: Document,
    *,
    if_match: str | None = None,
    if_none_match: str | None = None,
) -> PutResult:
    """Store a document; durable on return. What is stored already costs nothing.

    Args:
        service: for its turn at the bank.
        served: the bank.
        document: as it is to be.
        if_match, if_none_match: as the headers of HTTP.

    Raises:
        ServiceError: 400 for what cannot be stored; 412 if a condition is not met.
        MSAError: the disk refused.
    """

    def put() -> PutResult:
        bank = served.bank
        _check_conditions(bank, document.id, if_match, if_none_match)
        report = bank.add([document], on_duplicate="update", before_batch=take_turn)
        if report.failed:
            raise invalid(f"The document cannot be stored: {report.failed[0][1]}.", "text")
        outcome: Outcome = "added" if report.added else "updated" if report.updated else "unchanged"
        return PutResult(outcome, _etag(bank, document.id) or "", bank.parts(document.id))

    def take_turn() -> None:
        service.turns.encode()

    return await service.jobs.write(served.name, put)


async def delete_documents(
    service: Service, served: ServedBank, ids: Sequence[str]
) -> DeleteResult:
    """Delete documents with all their parts, in one commit; those that are not there are named.

    Raises:
        ServiceError: 400 for the id of a part.
        MSAError: the disk refused.
    """

    def delete() -> DeleteResult:
        bank = served.bank
        known = {name: bank.catalog.known(name) for name in dict.fromkeys(ids)}
        for name, found in known.items():
            if found.part_of is not None:
                message = f"{name!r} is a part of {found.part_of!r}; delete that."
                raise invalid(message, "ids", "document_part")
        there = [name for name, found in known.items() if found.numbers]
        bank.delete(there)
        return DeleteResult(there, [name for name, found in known.items() if not found.numbers])

    return await service.jobs.write(served.name, delete)


@router.put(
    "/documents/{document_id:path}", response_model=PutBody, responses={201: {"model": PutBody}}
)
async def put(
    bank: str,
    document_id: DocumentId,
    given: DocumentInput,
    request: Request,
    response: Response,
    service: ServiceDep,
    caller: CallerDep,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> PutBody:
    """Store a document under an id of the caller's; the same again changes and costs nothing."""
    served = service.registry.get(bank, caller, WRITE)
    document = Document(document_id, given.text, given.title, given.metadata)
    result = await put_document(
        service, served, document, if_match=if_match, if_none_match=if_none_match
    )
    response.headers["ETag"] = f'"{result.etag}"'
    response.status_code = 201 if result.outcome == "added" else 200
    return PutBody(
        id=document_id,
        outcome=result.outcome,
        etag=result.etag,
        parts=_parts(result.stored, served.name, request),
    )


@router.get(
    "/documents/{document_id:path}",
    response_model=DocumentBody,
    responses={304: {"description": "The client has it."}},
)
async def get(
    bank: str,
    document_id: DocumentId,
    request: Request,
    response: Response,
    service: ServiceDep,
    caller: CallerDep,
    if_none_match: IfNoneMatch = None,
) -> Any:
    """A document as it is stored, or a part of one; 304 if the client has it."""
    served = service.registry.get(bank, caller)

    def find() -> tuple[str | None, Sequence[StoredDocument]]:
        stored = served.bank.catalog.by_source(document_id)
        part = None if stored else served.bank.catalog.by_id(document_id)
        if part is not None:
            return _etag(served.bank, part.part_of or part.document.id), [part]
        return _etag(served.bank, document_id), stored

    etag, stored = await asyncio.to_thread(find)
    if etag is None or not stored:
        raise _not_found()
    headers = {"ETag": f'"{etag}"', "Cache-Control": "private, no-cache"}
    if if_none_match is not None and _matches(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    response.headers.update(headers)
    first = stored[0].document
    return DocumentBody(
        id=(stored[0].part_of or first.id) if len(stored) > 1 else first.id,
        title=first.title,
        text="\n".join(part.document.text for part in stored),
        metadata=dict(first.metadata),
        etag=etag,
        parts=_parts(stored, served.name, request),
    )


@router.delete("/documents/{document_id:path}", response_model=DeleteBody)
async def delete(
    bank: str, document_id: DocumentId, service: ServiceDep, caller: CallerDep
) -> DeleteBody:
    """Delete a document; its text is erased at once. 404 if there is none (any more)."""
    served = service.registry.get(bank, caller, WRITE)
    result = await delete_documents(service, served, [document_id])
    if result.missing:
        raise _not_found()
    return DeleteBody(deleted=1, missing=[])


@router.post("/documents:delete", response_model=DeleteBody)
async def delete_many(
    bank: str, given: DeleteInput, service: ServiceDep, caller: CallerDep
) -> DeleteBody:
    """Delete several documents in one commit."""
    served = service.registry.get(bank, caller, WRITE)
    result = await delete_documents(service, served, given.ids)
    return DeleteBody(deleted=len(result.deleted), missing=list(result.missing))


@router.get("/documents", response_model=Page)
async def list_documents(
    bank: str,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    after: Annotated[int, Query(ge=0, lt=2**63, description="`next` of the page before.")] = 0,
    filter: Annotated[str | None, Query(description="A filter as JSON.")] = None,
    q: Annotated[str | None, Query(max_length=1000, description="Words to look for.")] = None,
) -> Page:
    """Documents in the order in which they were added, or the best for some words."""
    served = service.registry.get(bank, caller)
    conditions = None if filter is None else _filter(filter)
    if q is not None and after:
        raise invalid("A list for 'q' has one page; leave 'after' out.", "after")

    def find() -> list[StoredDocument]:
        if q is not None:
            (hits,) = _word_search(served.bank, q, limit, conditions)
            found = served.bank.get_many(number for number, _ in hits)
            return [found[number] for number, _ in hits if number in found]
        if conditions is None:
            return served.bank.documents(limit + 1, after=after)
        passing = [n for n in served.bank.catalog.passing(conditions) if n > after]
        return list(served.bank.get_many(passing[: limit + 1]).values())

    stored = await asyncio.to_thread(find)
    page, has_more = stored[:limit], len(stored) > limit
    rows = [_row(document, served.name, request) for document in page]
    return Page(data=rows, has_more=has_more, next=page[-1].number if has_more else None)


def _word_search(
    bank: MemoryBank, words: str, limit: int, conditions: dict[str, Any] | None
) -> list[list[tuple[int, float]]]:
    """See `MemoryBank.lexical_search`.

    Raises:
        ServiceError: 400 for a bank that cannot be searched by words.
    """
    try:
        return bank.lexical_search([words], limit, filter=conditions)
    except LexicalIndexError:
        raise invalid("This bank cannot be searched by words.", "q") from None


def _row(stored: StoredDocument, bank: str, request: Request) -> Row:
    document = stored.document
    return Row(
        id=document.id,
        number=stored.number,
        title=document.title,
        snippet=document.text[:SNIPPET],
        characters=len(document.text),
        metadata=dict(document.metadata),
        num_tokens=stored.num_tokens,
        part_of=stored.part_of,
        part=stored.part,
        num_parts=stored.num_parts,
        url=address(request, bank, stored.number),
    )


def _parts(stored: Sequence[StoredDocument], bank: str, request: Request) -> list[Part]:
    return [
        Part(
            id=part.document.id,
            number=part.number,
            num_tokens=part.num_tokens,
            url=address(request, bank, part.number),
        )
        for part in stored
    ]


def _etag(bank: MemoryBank, document_id: str) -> str | None:
    """A hash of what is stored under an id; None if nothing is."""
    known: Known = bank.catalog.known(document_id)
    if not known.numbers:
        return None
    return hashlib.sha256(known.content_hash + known.metadata.encode()).hexdigest()[:32]


def _check_conditions(
    bank: MemoryBank, document_id: str, if_match: str | None, if_none_match: str | None
) -> None:
    """Meet the conditions of a PUT.

    Raises:
        ServiceError: 412.
    """
    if if_match is None and if_none_match is None:
        return
    etag = _etag(bank, document_id)
    if if_match is not None and not (etag and _matches(if_match, etag)):
        raise _precondition("If-Match", "The document is not the one that was expected.")
    if if_none_match is not None and etag and _matches(if_none_match, etag):
        raise _precondition("If-None-Match", "There is a document under this id.")


def _precondition(header: str, message: str) -> ServiceError:
    return ServiceError(412, "conflict_error", "precondition_failed", message, header)


def _matches(header: str, etag: str) -> bool:
    """Whether a list of ETags names this one."""
    given = {value.strip().removeprefix("W/").strip('"') for value in header.split(",")}
    return "*" in given or etag in given


def _filter(text: str) -> dict[str, Any]:
    """A filter of a query string.

    Raises:
        ServiceError: 400.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise invalid("The filter is no JSON.", "filter") from None
    if not isinstance(found, dict):
        raise invalid("The filter is no JSON object.", "filter")
    return found


def _not_found() -> ServiceError:
    return ServiceError(404, None, "document_not_found", "The bank holds no such document.")
