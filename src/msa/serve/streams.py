"""Server-sent events: frames, signs of life, and an end that stops the model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from msa.serve.errors import ServiceError, service_error

PING = ": ping\n\n"


def frame(data: Any, event: str | None = None) -> str:
    """One event. Text is JSON too; of dataclasses, an object."""
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {to_json(data, inf_nan_mode='null').decode()}\n\n"


def error_frame(error: ServiceError) -> str:
    """An error as the last event, as clients of OpenAI read it."""
    return frame(error.body())


class EventStream(StreamingResponse):
    """A response of server-sent events.

    Args:
        frames: what is sent; an error that it raises is sent as the last frame.
        ping_seconds: a comment is sent whenever nothing else was for so long.
        on_error: makes that last frame.
        on_end: called when the response ends, however it does: at its end, when the client goes
            away, even before anything was sent. For a question, its `stop`.
        headers: of the response, beside its own.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[str] | AsyncIterator[str],
        *,
        ping_seconds: float = 15.0,
        on_error: Callable[[ServiceError], str] = error_frame,
        on_end: Callable[[], None] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        own = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        content = _with_pings(_with_error(frames, on_error), ping_seconds)
        super().__init__(content, headers={**own, **(headers or {})})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._on_end is not None:
                self._on_end()


async def _with_error(
    frames: AsyncIterator[str], on_error: Callable[[ServiceError], str]
) -> AsyncIterator[str]:
    try:
        async for one in frames:
            yield one
    except Exception as error:
        yield on_error(service_error(error))


async def _with_pings(frames: AsyncIterator[str], seconds: float) -> AsyncIterator[str]:
    """The frames; a comment wherever none came for so many seconds."""
    waiting: asyncio.Future[str] | None = None
    try:
        while True:
            if waiting is None:
                waiting = asyncio.ensure_future(anext(frames))
            done, _ = await asyncio.wait({waiting}, timeout=seconds)
            if not done:
                yield PING
                continue
            try:
                one = waiting.result()
            except StopAsyncIteration:
                return
            waiting = None
            yield one
    finally:
        if waiting is not None:
            waiting.cancel()  # and with it what the frames wait for
