"""Routes of jobs: upload, look, follow, cancel; compact and verify."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel

from msa.serve.errors import invalid
from msa.serve.job_store import FINISHED, Job, JobFile, Reason
from msa.serve.jobs import JobBody
from msa.serve.keys import WRITE, Principal
from msa.serve.service import CallerDep, Service, ServiceDep
from msa.serve.uploads import Form, receive_body, receive_form, removed_on_error, unsupported
from msa.types import JSON

router = APIRouter(prefix="/api", tags=["jobs"])
MAX_WAIT_SECONDS = 60.0

OnDuplicate = Annotated[
    Literal["update", "skip"],
    Query(description="For a known id with another text: store the new one, or keep the old."),
]
WaitSeconds = Annotated[
    float,
    Query(ge=0, le=MAX_WAIT_SECONDS, description="Answer when the job has ended, if it does so."),
]
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "files": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                        },
                        "metadata": {
                            "type": "string",
                            "description": "A JSON object: metadata of all documents.",
                        },
                    },
                }
            }
        },
    }
}
_JSONL: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/jsonl": {"schema": {"type": "string"}}},
    }
}
_ENDED: dict[int | str, dict[str, Any]] = {
    200: {"model": JobBody, "description": "It has ended within `wait_s`."}
}


class JobList(BaseModel):
    """Jobs, newest first; without their files."""

    data: list[JobBody]


def _job(job_id: str, service: ServiceDep, caller: CallerDep) -> Job:
    """A job that this key may look at."""
    return service.jobs.find(job_id, caller)


JobDep = Annotated[Job, Depends(_job)]


@router.post("/banks/{bank}/jobs", status_code=202, openapi_extra=_BODY, responses=_ENDED)
async def upload(
    bank: str,
    request: Request,
    response: Response,
    service: ServiceDep,
    caller: CallerDep,
    on_duplicate: OnDuplicate = "update",
    wait_s: WaitSeconds = 0.0,
) -> JobBody:
    """Index files: multipart, field `files`. Each is a document, or holds one a line or row.

    When this answers, the files are on disk and will be indexed, whatever happens to the service.
    """
    served = service.registry.get(bank, caller, WRITE)
    await service.jobs.check_room()
    form = await receive_form(request, service.jobs.store, service.settings)
    with removed_on_error(service.jobs.store, form.files):
        files, reasons = _files_of(form)
        job = await service.jobs.submit(
            served.name, "index", caller, files, reasons, on_duplicate=on_duplicate
        )
    return await _accepted(service, job, wait_s, response)


@router.post(
    "/banks/{bank}/documents:batch", status_code=202, openapi_extra=_JSONL, responses=_ENDED
)
async def add_lines(
    bank: str,
    request: Request,
    response: Response,
    service: ServiceDep,
    caller: CallerDep,
    on_duplicate: OnDuplicate = "update",
    wait_s: WaitSeconds = 0.0,
) -> JobBody:
    """Index documents given as JSONL: id, text, title and metadata of one on each line."""
    served = service.registry.get(bank, caller, WRITE)
    await service.jobs.check_room()
    got = await receive_body(request, service.jobs.store, service.settings, "documents.jsonl")
    files = [JobFile(0, got.name, got.stored, None, {}, got.size)]
    with removed_on_error(service.jobs.store, [got]):
        job = await service.jobs.submit(
            served.name, "index", caller, files, on_duplicate=on_duplicate
        )
    return await _accepted(service, job, wait_s, response)


@router.get("/banks/{bank}/jobs")
async def list_jobs(
    bank: str,
    service: ServiceDep,
    caller: CallerDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> JobList:
    """The newest jobs of a bank."""
    served = service.registry.get(bank, caller)

    def found() -> list[JobBody]:
        jobs = service.jobs.store.jobs(served.name, limit)
        return [service.jobs.describe(job, with_files=False) for job in jobs]

    return JobList(data=await asyncio.to_thread(found))


@router.get("/jobs/{job_id}")
async def get_job(job: JobDep, service: ServiceDep) -> JobBody:
    """How a job stands, with the fate of every file."""
    return await asyncio.to_thread(service.jobs.describe, job)


@router.get("/jobs/{job_id}/events", response_class=EventSourceResponse)
async def follow_job(job: JobDep, service: ServiceDep) -> AsyncIterator[ServerSentEvent]:
    """The job after each change (`progress`), and when it has ended (`done`)."""
    async for body in service.jobs.changes(job.id):
        kind = "done" if body.status in FINISHED else "progress"
        yield ServerSentEvent(event=kind, data=body)


@router.delete("/jobs/{job_id}", status_code=202)
async def cancel_job(job_id: str, service: ServiceDep, caller: CallerDep) -> JobBody:
    """Cancel a job. What it has committed stays in the bank, and its message says how much."""

    def cancel() -> JobBody:
        job = service.jobs.find(job_id, caller, WRITE)
        return service.jobs.describe(service.jobs.cancel(job))

    return await asyncio.to_thread(cancel)


@router.post("/banks/{bank}:compact", status_code=202, responses=_ENDED)
async def compact(
    bank: str,
    response: Response,
    service: ServiceDep,
    caller: CallerDep,
    wait_s: WaitSeconds = 0.0,
) -> JobBody:
    """Drop the latent states of deleted documents, and merge small segments."""
    return await _maintain("compact", bank, service, caller, wait_s, response)


@router.post("/banks/{bank}:verify", status_code=202, responses=_ENDED)
async def verify(
    bank: str,
    response: Response,
    service: ServiceDep,
    caller: CallerDep,
    wait_s: WaitSeconds = 0.0,
) -> JobBody:
    """Read all of the bank and compare it with its checksums."""
    return await _maintain("verify", bank, service, caller, wait_s, response)


async def _maintain(
    kind: str,
    bank: str,
    service: Service,
    caller: Principal,
    wait_s: float,
    response: Response,
) -> JobBody:
    served = service.registry.get(bank, caller, WRITE)
    job = await service.jobs.submit(served.name, kind, caller)
    return await _accepted(service, job, wait_s, response)


async def _accepted(service: Service, job: Job, wait_s: float, response: Response) -> JobBody:
    """202 with where the job is; 200 if it ends in time."""
    response.headers["Location"] = f"/api/jobs/{job.id}"
    ended = await service.jobs.ended(job.id, wait_s) if wait_s else None
    if ended is not None:
        response.status_code = 200
        return ended
    return await asyncio.to_thread(service.jobs.describe, job)


def _files_of(form: Form) -> tuple[list[JobFile], list[Reason]]:
    """The files of an upload, and why some of them are not read.

    Raises:
        ServiceError: 400 without a file or with a field that is not known; 415 if none is read.
    """
    unknown = sorted(set(form.fields) - {"metadata"})
    if unknown:
        raise invalid(
            f"The field {unknown[0]!r} is not known.", unknown[0], "unsupported_parameter"
        )
    if not form.files:
        raise invalid("There is no file; send them as 'files'.", "files", "missing_file")
    refused = [upload.refused for upload in form.files if upload.refused is not None]
    if len(refused) == len(form.files):
        raise unsupported(f"None of these files can be read: {refused[0]}")
    attributes = _metadata(form.fields.get("metadata"))
    files, reasons = [], []
    for position, upload in enumerate(form.files):
        status: Literal["queued", "failed"] = "queued" if upload.refused is None else "failed"
        files.append(
            JobFile(position, upload.name, upload.stored, None, attributes, upload.size, status)
        )
        if upload.refused is not None:
            reasons.append(Reason(position, upload.name, upload.refused))
    return files, reasons


def _metadata(text: str | None) -> dict[str, JSON]:
    """Metadata as a form field.

    Raises:
        ServiceError: 400.
    """
    try:
        found = json.loads(text or "{}")
        if not isinstance(found, dict):
            raise ValueError(f"it is a {type(found).__name__}")
        json.dumps(found, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise invalid(f"The metadata is no JSON object: {error}.", "metadata") from None
    return found
