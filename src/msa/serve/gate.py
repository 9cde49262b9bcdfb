"""What no route needs to know: strange hosts, pages of strangers, bodies that are too large."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from msa.serve.errors import ServiceError, draining
from msa.serve.settings import ServeSettings

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_UPLOADS = re.compile(r"/v1/files|/api/banks/[^/]+/(jobs|documents:batch)")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?", re.IGNORECASE)


class Gate:
    """Middleware that refuses requests before any route sees them.

    A page of any site can make a browser send requests to this machine. Names that are not known
    are refused, since such a site may let its own name point here; so are requests that change
    something and come from a page of another origin.

    Args:
        app: what the gate protects.
        settings: hosts, origins and limits.
        stopping: tells whether the service takes no new work any more.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, stopping: Callable[[], bool]) -> None:
        self._app = app
        self._settings = settings
        self._stopping = stopping
        self._hosts = settings.known_hosts
        self._origins = {origin.rstrip("/").lower() for origin in settings.cors_origins}
        if settings.public_url is not None:
            parts = urlsplit(settings.public_url)
            self._origins.add(f"{parts.scheme}://{parts.netloc}".lower())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `Gate`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            _check_framing(headers)
            self._check_host(headers)
            self._check_origin(scope["method"], headers)
            if scope["method"] not in SAFE_METHODS and self._stopping():
                raise draining()
            body = self._body(scope["path"], headers, receive)
        except ServiceError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, body.receive, send)

    def _check_host(self, headers: Headers) -> None:
        """Refuse a name that is not ours.

        Raises:
            ServiceError: 421.
        """
        values = headers.getlist("host")
        match = _HOST.fullmatch(values[0]) if len(values) == 1 else None
        if match is None:
            raise ServiceError(400, None, "invalid_host", "Give one Host header with a name.")
        name = match[1].lower()
        if not {"*", name} & self._hosts and not _is_address(name):
            message = (
                "This service is not known by that name; start it with --allowed-host NAME, or "
                "call it by its address."
            )
            raise ServiceError(421, None, "unknown_host", message)

    def _check_origin(self, method: str, headers: Headers) -> None:
        """Refuse to let a page of another origin change something.

        Raises:
            ServiceError: 403.
        """
        origin = headers.get("origin")
        if origin is None or method in SAFE_METHODS:
            return
        own = urlsplit(origin.lower()).netloc == headers.get("host", "").lower()
        if not own and not {"*", origin.lower()} & self._origins:
            message = (
                "Pages of this origin may not do this; start the service with --cors-origin "
                "ORIGIN to let them."
            )
            raise ServiceError(403, None, "origin_forbidden", message)

    def _body(self, path: str, headers: Headers, receive: Receive) -> _Body:
        """The body, limited.

        Raises:
            ServiceError: 413, 400.
        """
        settings = self._settings
        uploads = _UPLOADS.fullmatch(path) is not None
        limit = settings.max_upload_bytes if uploads else settings.max_body_bytes
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise ServiceError(400, None, "invalid_value", "Content-Length is no number.")
        if int(length[:20]) > limit:
            raise _too_large(limit)
        return _Body(receive, limit, settings.body_seconds, each=uploads)


class _Body:
    """Receives a body of at most so many bytes, counted as they come, in so much time.

    Args:
        receive: as the server gives it.
        limit: bytes.
        seconds: for the whole body, or with `each` for every piece of it.
    """

    def __init__(self, receive: Receive, limit: int, seconds: float, *, each: bool) -> None:
        self._receive = receive
        self._left = limit
        self._limit = limit
        self._seconds = seconds
        self._each = each
        self._more = True

    async def receive(self) -> Message:
        """The next piece; without a limit once the body has come.

        Raises:
            ServiceError: 413, 408.
        """
        if not self._more:
            return await self._receive()
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(max(self._seconds, 0)):
                message = await self._receive()
        except TimeoutError:
            self._more = False
            message_ = "The body came too slowly."
            raise ServiceError(408, None, "body_timeout", message_) from None
        if not self._each:
            self._seconds -= loop.time() - started
        self._left -= len(message.get("body", b""))
        self._more = message.get("more_body", False)
        if self._left < 0:
            raise _too_large(self._limit)
        return message


def _check_framing(headers: Headers) -> None:
    """Refuse a request that could end in two places, and the connection with it.

    What follows one of the ends would be taken for the next request of another client by a
    proxy that goes by the other (RFC 9112, 6.1).

    Raises:
        ServiceError: 400.
    """
    lengths, codings = headers.getlist("content-length"), headers.getlist("transfer-encoding")
    if len(lengths) + len(codings) > 1 or any(c.strip().lower() != "chunked" for c in codings):
        message = "Give one Content-Length, or one Transfer-Encoding: chunked, and not both."
        close = {"Connection": "close"}
        raise ServiceError(400, None, "invalid_framing", message, headers=close)


def _too_large(limit: int) -> ServiceError:
    message = f"The body is larger than {limit} bytes, the most that is taken here."
    return ServiceError(413, None, "body_too_large", message, headers={"Connection": "close"})


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
