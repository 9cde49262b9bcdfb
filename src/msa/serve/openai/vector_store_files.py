"""`/v1/vector_stores/{id}/files` and `/file_batches`: files on their way into a bank, and in it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from msa.memory.bank import MemoryBank
from msa.serve.banks import ServedBank
from msa.serve.documents import delete_documents
from msa.serve.errors import ServiceError, conflict, invalid
from msa.serve.job_store import OPEN_FILES, Attachment, FileStatus, Job, JobFile
from msa.serve.keys import WRITE, Principal
from msa.serve.native import Body
from msa.serve.openai.files import own_file
from msa.serve.openai.filters import missing
from msa.serve.openai.pages import Listable, Order, Page, page_of
from msa.serve.service import CallerDep, Service, ServiceDep

router = APIRouter(prefix="/v1/vector_stores/{vector_store_id}", tags=["openai"])
MAX_PAGE = 100
MAX_BATCH = 2000
POLL_MS = 500
CANCEL_SECONDS = 30.0

Status = Literal["in_progress", "completed", "cancelled", "failed"]
_STATUS: dict[str, Status] = {
    "queued": "in_progress",
    "running": "in_progress",
    "done": "completed",
    "failed": "failed",
    "skipped": "failed",
    "cancelled": "cancelled",
}
Attributes = Annotated[
    dict[
        Annotated[str, Field(max_length=64)],
        Annotated[str, Field(max_length=512)] | bool | int | FiniteFloat,
    ],
    Field(max_length=16),
]


class ChunkingStrategy(Body):
    """How long texts are cut; a bank always does it in its own way."""

    type: str
    static: dict[str, Any] | None = None


class FileCounts(BaseModel):
    """Files by their fate."""

    in_progress: int
    completed: int
    failed: int
    cancelled: int
    total: int


class LastError(BaseModel):
    """Why a file was not stored."""

    code: Literal["server_error", "unsupported_file", "invalid_file"]
    message: str


class StaticChunking(BaseModel):
    """Tokens of a part of a long text; parts do not overlap."""

    max_chunk_size_tokens: int
    chunk_overlap_tokens: int = 0


class ChunkingUsed(BaseModel):
    """How long texts were cut."""

    type: Literal["static"] = "static"
    static: StaticChunking


class VectorStoreFile(Listable):
    """A file in a vector store."""

    object: Literal["vector_store.file"] = "vector_store.file"
    vector_store_id: str
    created_at: int
    status: Status
    last_error: LastError | None
    usage_bytes: int
    attributes: dict[str, Any]
    chunking_strategy: ChunkingUsed


class VectorStoreFileList(Page[VectorStoreFile]):
    """A page of files in a vector store."""


class VectorStoreFileDeleted(BaseModel):
    """A file that is in the vector store no more."""

    id: str
    object: Literal["vector_store.file.deleted"] = "vector_store.file.deleted"
    deleted: bool = True


class FileText(BaseModel):
    """A piece of a file's text, as it was stored."""

    type: Literal["text"] = "text"
    text: str


class FileContent(BaseModel):
    """All text of a file."""

    object: Literal["vector_store.file_content.page"] = "vector_store.file_content.page"
    data: list[FileText]
    has_more: bool = False
    next_page: None = None


class FileBatch(BaseModel):
    """Files that were put into a vector store together."""

    id: str
    object: Literal["vector_store.files_batch"] = "vector_store.files_batch"
    created_at: int
    vector_store_id: str
    status: Status
    file_counts: FileCounts


class AttachInput(Body):
    """A file to put into the vector store."""

    file_id: str
    attributes: Attributes | None = None
    chunking_strategy: ChunkingStrategy | None = None


class AttributesInput(Body):
    """Other attributes of a file."""

    attributes: Attributes | None


class BatchInput(Body):
    """Files to put into the vector store: with one set of attributes, or each with its own."""

    file_ids: Annotated[list[str], Field(min_length=1, max_length=MAX_BATCH)] | None = None
    files: Annotated[list[AttachInput], Field(min_length=1, max_length=MAX_BATCH)] | None = None
    attributes: Attributes | None = None
    chunking_strategy: ChunkingStrategy | None = None


class _ListQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    after: str | None = None
    before: str | None = None
    filter: Status | None = None
    limit: int = Field(default=20, ge=1, le=MAX_PAGE)
    order: Order = "desc"


ListQuery = Annotated[_ListQuery, Query()]


async def _store(vector_store_id: str, service: ServiceDep, caller: CallerDep) -> ServedBank:
    """A bank that this key may read."""
    return service.registry.get(vector_store_id, caller)


async def _writable_store(
    vector_store_id: str, service: ServiceDep, caller: CallerDep
) -> ServedBank:
    """A bank that this key may write to."""
    return service.registry.get(vector_store_id, caller, WRITE)


StoreDep = Annotated[ServedBank, Depends(_store)]
WritableStoreDep = Annotated[ServedBank, Depends(_writable_store)]


# ---- files


@router.post("/files")
async def attach(
    served: WritableStoreDep, given: AttachInput, service: ServiceDep, caller: CallerDep
) -> VectorStoreFile:
    """Put a file into a vector store; poll it until it is completed."""
    check_chunking(given.chunking_strategy)
    wanted = [(given.file_id, given.attributes or {})]
    await submit_files(service, served, caller, wanted, "index", "file_id")
    return await asyncio.to_thread(_attached, service, served, given.file_id)


@router.get("/files")
async def list_files(
    served: StoreDep, query: ListQuery, service: ServiceDep
) -> VectorStoreFileList:
    """Files that came into the vector store through /v1/files."""
    attached = await asyncio.to_thread(service.jobs.store.attachments, served.name)
    return _list(served, attached, query)


@router.get("/files/{file_id}")
async def retrieve(
    served: StoreDep,
    file_id: str,
    response: Response,
    service: ServiceDep,
) -> VectorStoreFile:
    """A file of a vector store, and how it stands."""
    found = await asyncio.to_thread(_attached, service, served, file_id)
    _say_when_to_poll(response, found.status)
    return found


@router.post("/files/{file_id}")
async def set_attributes(
    served: WritableStoreDep,
    file_id: str,
    given: AttributesInput,
    service: ServiceDep,
) -> VectorStoreFile:
    """Give a file other attributes; nothing is encoded again."""
    known = await asyncio.to_thread(_find, service, served, file_id)
    _check_settled(known)
    attributes = given.attributes or {}

    def change() -> VectorStoreFile:
        ids = served.bank.catalog.sources(f"{file_id}/")
        served.bank.set_metadata(
            {name: _changed(served.bank, name, known.attributes, attributes) for name in ids}
        )
        service.jobs.store.set_attributes(served.name, file_id, attributes)
        return _attached(service, served, file_id)

    return await service.jobs.write(served.name, change)


@router.delete("/files/{file_id}")
async def detach(
    served: WritableStoreDep, file_id: str, service: ServiceDep
) -> VectorStoreFileDeleted:
    """Take a file out of a vector store, with all its documents; the file itself stays."""
    known = await asyncio.to_thread(_find, service, served, file_id)
    job = await asyncio.to_thread(service.jobs.store.job, known.job)
    if known.status in OPEN_FILES and job is not None and job.kind == "index":
        await asyncio.to_thread(service.jobs.cancel, job)
        await service.jobs.ended(job.id, CANCEL_SECONDS)
        known = await asyncio.to_thread(_find, service, served, file_id)
    _check_settled(known)
    ids = await asyncio.to_thread(served.bank.catalog.sources, f"{file_id}/")
    await delete_documents(service, served, ids)
    await asyncio.to_thread(service.jobs.store.detach, served.name, file_id)
    return VectorStoreFileDeleted(id=file_id)


@router.get("/files/{file_id}/content")
async def content(served: StoreDep, file_id: str, service: ServiceDep) -> FileContent:
    """The text of a file as it was stored: its documents, and their parts, in order."""

    def texts() -> list[FileText]:
        _find(service, served, file_id)
        ids = served.bank.catalog.sources(f"{file_id}/")
        parts = [part for name in ids for part in served.bank.catalog.by_source(name)]
        parts.sort(key=lambda part: part.number)
        return [FileText(text=part.document.text) for part in parts]

    return FileContent(data=await asyncio.to_thread(texts))


# ---- batches


@router.post("/file_batches")
async def create_batch(
    served: WritableStoreDep, given: BatchInput, service: ServiceDep, caller: CallerDep
) -> FileBatch:
    """Put several files into a vector store; poll the batch until none is in progress."""
    wanted = _wanted(given)
    param = "files" if given.files else "file_ids"
    job = await submit_files(service, served, caller, wanted, "file_batch", param)
    return await asyncio.to_thread(_batch, service, job)


@router.get("/file_batches/{batch_id}")
async def retrieve_batch(
    served: StoreDep,
    batch_id: str,
    response: Response,
    service: ServiceDep,
) -> FileBatch:
    """How a batch stands."""
    job = await asyncio.to_thread(_find_batch, service, served, batch_id)
    batch = await asyncio.to_thread(_batch, service, job)
    _say_when_to_poll(response, batch.status)
    return batch


@router.post("/file_batches/{batch_id}/cancel")
async def cancel_batch(served: WritableStoreDep, batch_id: str, service: ServiceDep) -> FileBatch:
    """Cancel a batch; what was stored before stays."""
    job = await asyncio.to_thread(_find_batch, service, served, batch_id)
    await asyncio.to_thread(service.jobs.cancel, job)
    await service.jobs.ended(job.id, CANCEL_SECONDS)
    job = await asyncio.to_thread(_find_batch, service, served, batch_id)
    return await asyncio.to_thread(_batch, service, job)


@router.get("/file_batches/{batch_id}/files")
async def list_batch_files(
    served: StoreDep,
    batch_id: str,
    query: ListQuery,
    service: ServiceDep,
) -> VectorStoreFileList:
    """The files of a batch."""
    job = await asyncio.to_thread(_find_batch, service, served, batch_id)
    attached = await asyncio.to_thread(service.jobs.store.attachments, served.name, job.id)
    return _list(served, attached, query)


# ---- shared


async def submit_files(
    service: Service,
    served: ServedBank,
    caller: Principal,
    wanted: Sequence[tuple[str, Mapping[str, Any]]],
    kind: str,
    param: str,
) -> Job:
    """A job that puts files into a bank, each with its attributes.

    Raises:
        ServiceError: 404 for a file that this key does not have; 400 for one that is named twice.
    """

    def files() -> list[JobFile]:
        found = [(own_file(service, caller, name, param), attr) for name, attr in wanted]
        if len({file.id for file, _ in found}) < len(found):
            raise invalid("A file is named twice.", param)
        return [
            JobFile(i, file.name, file.stored, file.id, attributes, file.size)
            for i, (file, attributes) in enumerate(found)
        ]

    todo = await asyncio.to_thread(files)
    return await service.jobs.submit(served.name, kind, caller, todo)


def check_chunking(given: ChunkingStrategy | None) -> None:
    """Refuse a way of cutting texts that is not the bank's.

    Raises:
        ServiceError: 400.
    """
    if given is not None and given.type != "auto":
        message = "A bank cuts long texts in its own way; leave chunking_strategy out, or 'auto'."
        raise invalid(message, "chunking_strategy", "unsupported_parameter")


def counts_of(files: Sequence[Attachment | JobFile]) -> FileCounts:
    """Files by their fate."""
    found = [_STATUS[file.status] for file in files]
    return FileCounts(
        in_progress=found.count("in_progress"),
        completed=found.count("completed"),
        failed=found.count("failed"),
        cancelled=found.count("cancelled"),
        total=len(found),
    )


def _wanted(given: BatchInput) -> list[tuple[str, Mapping[str, Any]]]:
    """The files of a batch, each with its attributes.

    Raises:
        ServiceError: 400.
    """
    if given.file_ids is not None and given.files is not None:
        raise invalid("Give file_ids or files, not both.", "files")
    check_chunking(given.chunking_strategy)
    if given.file_ids is not None:
        return [(name, given.attributes or {}) for name in given.file_ids]
    if given.files is None:
        raise missing("file_ids")
    for name in ("attributes", "chunking_strategy"):
        if getattr(given, name) is not None:
            raise invalid(f"With files, each has its own {name}.", name)
    for file in given.files:
        check_chunking(file.chunking_strategy)
    return [(file.file_id, file.attributes or {}) for file in given.files]


def _find(service: Service, served: ServedBank, file_id: str) -> Attachment:
    found = service.jobs.store.attachment(served.name, file_id)
    if found is None:
        message = "This vector store has no such file."
        raise ServiceError(404, None, "file_not_found", message, "file_id")
    return found


def _check_settled(file: Attachment) -> None:
    """Refuse to change a file whose batch is still at work.

    Raises:
        ServiceError: 409.
    """
    if file.status in OPEN_FILES:
        message = "The file is being indexed; wait until it is completed, or cancel its batch."
        raise conflict("file_in_progress", message, "file_id")


def _attached(service: Service, served: ServedBank, file_id: str) -> VectorStoreFile:
    return _object(served, _find(service, served, file_id))


def _object(served: ServedBank, file: Attachment) -> VectorStoreFile:
    most = served.bank.manifest.max_document_tokens
    return VectorStoreFile(
        id=file.file,
        vector_store_id=served.name,
        created_at=int(file.created),
        status=_STATUS[file.status],
        last_error=_last_error(file.status, file.reason),
        usage_bytes=file.size,
        attributes=dict(file.attributes),
        chunking_strategy=ChunkingUsed(static=StaticChunking(max_chunk_size_tokens=most)),
    )


def _last_error(status: FileStatus, reason: str | None) -> LastError | None:
    if _STATUS[status] != "failed":
        return None
    if reason is None:
        return LastError(code="server_error", message="The job failed before it came to this file.")
    unsupported = reason.startswith("file type") or "needs the extra" in reason
    return LastError(code="unsupported_file" if unsupported else "invalid_file", message=reason)


def _list(
    served: ServedBank, files: Sequence[Attachment], query: _ListQuery
) -> VectorStoreFileList:
    wanted = [f for f in files if query.filter in (None, _STATUS[f.status])]
    page, has_more = page_of(
        wanted,
        lambda file: file.file,
        limit=query.limit,
        order=query.order,
        after=query.after,
        before=query.before,
    )
    return VectorStoreFileList.of([_object(served, file) for file in page], has_more)


def _find_batch(service: Service, served: ServedBank, batch_id: str) -> Job:
    job = service.jobs.store.job(batch_id)
    if job is None or job.bank != served.name or job.kind != "file_batch":
        message = "This vector store has no such batch."
        raise ServiceError(404, None, "batch_not_found", message, "batch_id")
    return job


def _batch(service: Service, job: Job) -> FileBatch:
    files = service.jobs.store.files_of(job.id)
    return FileBatch(
        id=job.id,
        created_at=int(job.created),
        vector_store_id=job.bank,
        status=_STATUS[job.status],
        file_counts=counts_of(files),
    )


def _say_when_to_poll(response: Response, status: Status) -> None:
    if status == "in_progress":
        response.headers["openai-poll-after-ms"] = str(POLL_MS)


def _changed(
    bank: MemoryBank, name: str, old: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, Any]:
    """Metadata of a document whose file has other attributes: what it brought itself stays."""
    metadata = bank.catalog.by_source(name)[0].document.metadata
    return {**{k: v for k, v in metadata.items() if k not in old}, **new}
