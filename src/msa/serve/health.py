"""Is it there, is it ready, what does it count, and what can be asked of it."""

from __future__ import annotations

from importlib.resources import files
from typing import Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

import msa
from msa.serve.banks import shown_model
from msa.serve.errors import RETRY_SECONDS, ServiceError
from msa.serve.keys import ADMIN, principal
from msa.serve.service import ServiceDep

router = APIRouter(tags=["operations"])


class Health(BaseModel):
    """That the process answers."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether questions are answered.

    Attributes:
        status: of the service.
        banks: name -> whether it has been opened; those that the caller may know of.
    """

    status: Literal["loading", "ready", "draining", "failed"]
    banks: dict[str, Literal["loading", "ready"]]


class Version(BaseModel):
    """What answers.

    Attributes:
        version: of this library.
        commit: short, with "+" if files were changed since; None if it cannot be told.
        model: the name by which the model was loaded; None while it is not.
        weights, router: SHA-256 of the model's, as banks note them down.
    """

    version: str
    commit: str | None
    model: str | None
    weights: str | None
    router: str | None


@router.get("/health", include_in_schema=False)
@router.get("/healthz")
async def healthz() -> Health:
    """200 as long as the process answers."""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness}})
async def readyz(service: ServiceDep, request: Request, response: Response) -> Readiness:
    """200 when the model and the banks are loaded, else 503; with a key, its banks by name."""
    if service.state != "ready":
        response.status_code = 503
        response.headers["Retry-After"] = str(RETRY_SECONDS)
    try:
        caller = principal(request)
    except ServiceError:
        return Readiness(status=service.state, banks={})
    return Readiness(status=service.state, banks=service.registry.states(caller))


@router.get("/version")
async def version(service: ServiceDep) -> Version:
    """The version of the library, and the model."""
    checkpoint = service.checkpoint
    fingerprints = service.fingerprints
    return Version(
        version=msa.__version__,
        commit=service.commit,
        model=shown_model(checkpoint.name) if checkpoint else None,
        weights=fingerprints.weights if fingerprints else None,
        router=fingerprints.router if fingerprints else None,
    )


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(service: ServiceDep, request: Request) -> Response:
    """Figures for Prometheus; for a key with the scope `admin` and all banks.

    Where they are public, those of the single banks are left out.
    """
    public = service.settings.metrics_public
    if not public:
        caller = principal(request)
        if not (caller.allows(ADMIN) and caller.sees_all):
            message = "Figures are for keys with the scope 'admin' and all banks."
            raise ServiceError(403, None, "metrics_forbidden", message)
    text = service.metrics.text(with_banks=not public)
    return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/docs", include_in_schema=False)
def docs() -> HTMLResponse:
    """A page that shows /openapi.json."""
    policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'"
    headers = {
        "Content-Security-Policy": f"{policy}; base-uri 'none'; frame-ancestors 'none'",
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(_asset("index.html"), headers=headers)


@router.get("/docs/{name}", include_in_schema=False)
def docs_asset(name: Literal["docs.js", "docs.css"]) -> Response:
    """Script and style of that page."""
    kind = "text/javascript" if name.endswith(".js") else "text/css"
    headers = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    return Response(_asset(name), media_type=kind, headers=headers)


def _asset(name: str) -> str:
    return files("msa.serve").joinpath("api_docs", name).read_text(encoding="utf-8")
