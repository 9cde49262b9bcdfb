"""`/v1/files`: files that wait to be put into a vector store."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel

from msa.serve.errors import ServiceError, invalid
from msa.serve.job_store import StoredFile
from msa.serve.keys import WRITE, Principal
from msa.serve.openai.file_ids import cited_file, document_number
from msa.serve.openai.filters import missing
from msa.serve.openai.pages import Listable, Order, Page, page_of
from msa.serve.permalinks import stored_document
from msa.serve.service import CallerDep, Service, ServiceDep
from msa.serve.uploads import receive_form, removed_on_error, unsupported

router = APIRouter(prefix="/v1/files", tags=["openai"])
MAX_PAGE = 10_000
PURPOSES = ("assistants", "user_data")

_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                    },
                }
            }
        },
    }
}


class FileObject(Listable):
    """A file, as OpenAI's clients know it."""

    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(Page[FileObject]):
    """A page of files."""


class FileDeleted(BaseModel):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


@router.post("", openapi_extra=_BODY)
async def create(request: Request, service: ServiceDep, caller: CallerDep) -> FileObject:
    """Upload a file; only the key that did so sees it."""
    _check_scope(caller)
    await service.jobs.check_room()
    form = await receive_form(request, service.jobs.store, service.settings)
    with removed_on_error(service.jobs.store, form.files):
        purpose = _checked(form.fields, len(form.files))
        upload = form.files[0]
        if upload.stored is None:
            raise unsupported(f"{upload.name!r} cannot be read: {upload.refused}")
        name = upload.name.rpartition("/")[2].replace("#", "_")
        stored = await asyncio.to_thread(
            service.jobs.store.add_file, caller.name, name, purpose, upload.size, upload.stored
        )
    return _object(stored)


@router.get("")
async def list_files(
    service: ServiceDep,
    caller: CallerDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
    order: Order = "desc",
    purpose: str | None = None,
) -> FileList:
    """The files of this key."""
    files = await asyncio.to_thread(service.jobs.store.files, caller.name)
    wanted = [file for file in files if purpose in (None, file.purpose)]
    page, has_more = page_of(wanted, lambda f: f.id, limit=limit, order=order, after=after)
    return FileList.of([_object(file) for file in page], has_more)


@router.get("/{file_id}")
async def retrieve(file_id: str, service: ServiceDep, caller: CallerDep) -> FileObject:
    """A file; or a document of a bank that an answer cites as a file of its own."""
    if (place := document_number(file_id)) is not None:
        return (await asyncio.to_thread(_document, service, caller, *place))[0]
    return _object(await asyncio.to_thread(own_file, service, caller, file_id))


@router.get(
    "/{file_id}/content",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}, "text/plain": {}}}},
)
async def content(file_id: str, service: ServiceDep, caller: CallerDep) -> Response:
    """What a file holds, as it was sent; of a document, its text."""
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, no-cache"}
    if (place := document_number(file_id)) is not None:
        _, text = await asyncio.to_thread(_document, service, caller, *place)
        return Response(text, headers=headers, media_type="text/plain; charset=utf-8")
    file = await asyncio.to_thread(own_file, service, caller, file_id)
    path = service.jobs.store.uploads / file.stored
    kind = "application/octet-stream"
    return FileResponse(path, headers=headers, media_type=kind, filename=file.name)


@router.delete("/{file_id}")
async def delete(file_id: str, service: ServiceDep, caller: CallerDep) -> FileDeleted:
    """Delete a file; documents that were made of it stay in their vector stores."""
    _check_scope(caller)
    file = await asyncio.to_thread(own_file, service, caller, file_id)
    await asyncio.to_thread(service.jobs.store.remove_file, file)
    return FileDeleted(id=file.id)


def own_file(
    service: Service, caller: Principal, file_id: str, param: str | None = None
) -> StoredFile:
    """A file of this key.

    Raises:
        ServiceError: 404; there is none, or it is another's.
    """
    file = service.jobs.store.file(file_id, caller.name)
    if file is None:
        raise ServiceError(404, None, "file_not_found", "There is no such file.", param)
    return file


def _document(
    service: Service, caller: Principal, bank: str, number: int
) -> tuple[FileObject, str]:
    """A document as a file, and its text."""
    served = service.registry.get(bank, caller)
    stored = stored_document(served, number)
    document = stored.document
    cited = cited_file(bank, document.id, number, document.title)
    file = FileObject(
        id=f"doc-{bank}-{number}",
        bytes=len(document.text.encode()),
        created_at=served.created_at,
        filename=cited.filename,
        purpose="assistants",
    )
    return file, document.text


def _checked(fields: dict[str, str], count: int) -> str:
    """The purpose, if the form of a new file can be met.

    Raises:
        ServiceError: 400.
    """
    for name in sorted(set(fields) - {"purpose"}):
        param = name.partition("[")[0]
        raise invalid(f"{param} is not supported here.", param, "unsupported_parameter")
    if "purpose" not in fields:
        raise missing("purpose")
    if fields["purpose"] not in PURPOSES:
        raise invalid(f"The purpose is one of {', '.join(PURPOSES)}.", "purpose")
    if count != 1:
        raise invalid(f"The request holds {count} files; expected one as 'file'.", "file")
    return fields["purpose"]


def _check_scope(caller: Principal) -> None:
    """Refuse a key that may write nowhere.

    Raises:
        ServiceError: 403.
    """
    if not caller.allows(WRITE):
        message = "This key may not do this: it lacks the scope 'write'."
        raise ServiceError(403, None, "insufficient_scope", message)


def _object(file: StoredFile) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.size,
        created_at=int(file.created),
        filename=file.name,
        purpose=file.purpose,
    )
