"""The page at `/`: a few files, sent with headers that let a browser run nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from fastapi import APIRouter, Request
from fastapi.responses import Response

from msa.serve.errors import ServiceError

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
        "object-src 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every HTML page of the service, and of what it loads."""

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FOREVER = "public, max-age=31536000, immutable"
_ASK_FIRST = "no-cache"

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True, slots=True)
class _Site:
    """The files of the page.

    Attributes:
        version: a hash of all of them. It stands in their address, before the name, so that
            modules that import each other by relative names are all of one version.
        index: the page itself.
        assets: name -> what the page loads.
    """

    version: str
    index: bytes
    assets: dict[str, bytes]


@cache
def _site() -> _Site:
    folder = resources.files("msa.serve") / "static"
    entries = sorted((e for e in folder.iterdir() if e.is_file()), key=lambda entry: entry.name)
    files = {entry.name: entry.read_bytes() for entry in entries}
    whole = hashlib.sha256()
    for name in files:
        whole.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(files[name]).digest())
    version = whole.hexdigest()[:16]
    index = files.pop("index.html").replace(b"{version}", version.encode())
    return _Site(version, index, files)


def asset_url(name: str) -> str:
    """Address of a file that the page loads, relative to `/`; other pages may use them too."""
    site = _site()
    if name not in site.assets:
        raise KeyError(f"{name!r} is no file of the page; there are: {', '.join(site.assets)}")
    return f"static/{site.version}/{name}"


@router.api_route("/", methods=["GET", "HEAD"])
def index(request: Request) -> Response:
    """The page; asked for again on every visit, and sent only if it has changed."""
    return _sent(request, _site().index, ".html", _ASK_FIRST)


@router.api_route("/static/{version}/{name}", methods=["GET", "HEAD"])
def asset(request: Request, version: str, name: str) -> Response:
    """A file that the page loads; its address changes with it, so that it is kept for ever.

    Raises:
        ServiceError: 404, there is no such file, or it is of another version.
    """
    site = _site()
    if version != site.version or name not in site.assets:
        raise ServiceError(404, None, "unknown_url", "There is no such file; load the page again.")
    return _sent(request, site.assets[name], name[name.rindex(".") :], _FOREVER)


def _sent(request: Request, body: bytes, suffix: str, cache_control: str) -> Response:
    """A file, or 304 to who has it already."""
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**SECURITY_HEADERS, "Cache-Control": cache_control, "ETag": etag}
    held = request.headers.get("if-none-match", "")
    if etag in (tag.strip().removeprefix("W/") for tag in held.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type=_TYPES[suffix])
