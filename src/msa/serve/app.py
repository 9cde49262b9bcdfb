"""The app: routes, middleware, and the life of the service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware

import msa
from msa.serve import documents, health, job_routes, native, page, permalinks
from msa.serve.errors import ErrorBody, add_handlers
from msa.serve.gate import Gate
from msa.serve.mcp_server import serve_mcp
from msa.serve.openai import chat, files, models, responses, vector_store_files, vector_stores
from msa.serve.request_log import REQUEST_ID, RequestLog
from msa.serve.service import Service
from msa.serve.settings import ServeSettings

if TYPE_CHECKING:
    from msa.model.checkpoint import Checkpoint

ROUTERS: tuple[APIRouter, ...] = (
    health.router,
    native.router,
    documents.router,
    job_routes.router,
    permalinks.router,
    files.router,
    vector_stores.router,
    vector_store_files.router,
    models.router,
    chat.router,
    responses.router,
    models.absent,
    page.router,
)
"""The routes, in the order in which they are looked up."""

PARTS: tuple[Callable[[FastAPI], AbstractAsyncContextManager[None]], ...] = (serve_mcp,)
"""What has a life of its own beside the service: entered before it is loaded, left when it has
been closed. May add routes and mounts to the app when it is called."""


def create_app(
    settings: ServeSettings,
    checkpoint: Checkpoint | Callable[[], Checkpoint] | None = None,
    paths: Sequence[Path] = (),
    *,
    read_only: bool = False,
) -> FastAPI:
    """The app of one service; `app.state.service` is there at once, loaded once it runs.

    Args:
        settings: how it runs.
        checkpoint, paths, read_only: see `Service`.

    Raises:
        ConfigError: the key file cannot be used.
    """
    service = Service(settings, checkpoint, paths, read_only=read_only)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for part in parts:
                await stack.enter_async_context(part)
            loading = asyncio.create_task(service.load())
            try:
                yield
            finally:
                await loading
                await service.drain()
                await service.close()

    app = FastAPI(
        title="MSA",
        summary="Ask a memory of documents.",
        version=msa.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    app.state.service = service
    add_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    parts = [part(app) for part in PARTS]
    _add_middleware(app, service)
    return app


def _add_middleware(app: FastAPI, service: Service) -> None:
    """The outermost comes last."""
    settings = service.settings
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "Retry-After", "Location", "ETag"],
        )
    app.add_middleware(
        Gate, settings=settings, stopping=lambda: service.state in ("draining", "failed")
    )
    app.add_middleware(RequestLog, metrics=service.metrics)
