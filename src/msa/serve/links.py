"""Addresses that stay right for ever: numbers of documents are never used twice."""

from __future__ import annotations

from starlette.requests import HTTPConnection

from msa.serve.settings import ServeSettings


def base_url(settings: ServeSettings, request: HTTPConnection | None = None) -> str:
    """How addresses of this service begin, without a slash at the end.

    Args:
        settings: `public_url` is it, if it is given.
        request: else how this request called the service; without one, where it listens.
    """
    if settings.public_url is not None:
        return settings.public_url
    if request is not None:
        return str(request.base_url).rstrip("/")
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}"


def permalink(base: str, bank: str, number: int) -> str:
    """Where a document is shown."""
    return f"{base}/d/{bank}/{number}"
