"""One JSON line a request, with its id, and without texts, keys or names of documents."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from msa.serve.errors import CLIENT_GONE, service_error
from msa.serve.metrics import Metrics

_log = logging.getLogger("msa.serve")
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
REQUEST_ID = "X-Request-Id"


class JsonLines(logging.Formatter):
    """Log records as JSON; of errors their class, since their messages may hold texts."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
        return json.dumps(line)


def log_to_stderr() -> None:
    """Let the service, its web server and all libraries write JSON lines to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("msa.serve").setLevel(logging.INFO)


class RequestLog:
    """Middleware, around all other: ids, log lines, counters, and a body for what went wrong.

    A request's own `X-Request-Id` is kept if it has up to 128 letters, digits, '.', '_' or '-'.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `RequestLog`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), CLIENT_GONE

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            told = service_error(error)
            if status == CLIENT_GONE:  # nothing was sent
                await told.response()(scope, receive, send_with_id)
        finally:
            self._write(scope, request_id, status, time.perf_counter() - started)

    def _write(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = route_of(scope)
        self._metrics.requests.labels(route, str(status)).inc()
        principal = scope.get("state", {}).get("principal")
        fields = {
            "request_id": request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            "key": principal.name if principal is not None else None,
        }
        _log.info("request", extra={"fields": fields})


def route_of(scope: Scope) -> str:
    """The pattern of the route that answered; never the path itself, which holds names."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) and path else "unmatched"
