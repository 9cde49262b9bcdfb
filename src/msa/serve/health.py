"""Is it there, is it ready, which version is it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

import msa
from msa.serve.errors import RETRY_SECONDS
from msa.serve.service import ServiceDep

router = APIRouter(tags=["operations"])


@router.get("/healthz")
@router.get("/health", include_in_schema=False)
async def healthz() -> dict[str, str]:
    """200 as long as the process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(service: ServiceDep, response: Response) -> dict[str, str]:
    """200 when model and banks are loaded, else 503."""
    if service.state != "ready":
        response.status_code = 503
        response.headers["Retry-After"] = str(RETRY_SECONDS)
    return {"status": service.state}


@router.get("/version")
async def version(service: ServiceDep) -> dict[str, Any]:
    """The version of the library and the name of the model."""
    checkpoint = service.checkpoint
    return {"version": msa.__version__, "model": checkpoint.name if checkpoint else None}
