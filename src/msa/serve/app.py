"""The app: routes, middleware, and the life of the service behind them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI

import msa
from msa.serve import health, native
from msa.serve.errors import ErrorBody, add_handlers
from msa.serve.service import Service
from msa.serve.settings import ServeSettings

if TYPE_CHECKING:
    from msa.model.checkpoint import Checkpoint

ROUTERS: tuple[APIRouter, ...] = (
    health.router,
    native.router,
)
"""The routes, in the order in which they are looked up."""

PARTS: tuple[Callable[[FastAPI], AbstractAsyncContextManager[None]], ...] = ()
"""What has a life of its own beside the service: entered before it is loaded, left when it has
been closed. May add routes and mounts to the app when it is called."""


def create_app(settings: ServeSettings, checkpoint: Checkpoint | None = None) -> FastAPI:
    """The app of one service; `app.state.service` is there at once, loaded once it runs.

    Args:
        settings: how it runs.
        checkpoint: the model, if it is loaded already.

    Raises:
        ConfigError: the key file cannot be used.
    """
    service = Service(settings, checkpoint)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for part in parts:
                await stack.enter_async_context(part)
            loading = asyncio.create_task(service.load())
            try:
                yield
            finally:
                await service.drain()
                await loading
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
    return app
