"""What the retrievers search with: an engine in this process, or a bank that `msa serve` serves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from msa.errors import InputError, MSAError
from msa.types import JSON, Hit

OURS = ("msa_id", "msa_number", "msa_title", "msa_score")
"""Metadata that `described` adds."""


class ServiceRequestError(MSAError):
    """A served bank could not be searched; the message is the service's own."""


class Searcher(Protocol):
    """Finds documents for a question. `msa.MemoryEngine` is one."""

    def retrieve(
        self, question: str, top_k: int = ..., filter: Mapping[str, JSON] | None = ...
    ) -> list[Hit]:
        """At most `top_k` documents, best first."""
        ...


class ServedBank:
    """A bank of a running `msa serve`, searched over its native API.

    Example::

        bank = ServedBank("http://127.0.0.1:8000", "notes", api_key="...")
        hits = bank.retrieve("Who designed the harbor?", top_k=4)
    """

    def __init__(
        self, url: str, bank: str, *, api_key: str | None = None, timeout: float = 120.0
    ) -> None:
        """Say where the bank is; nothing is sent yet.

        Args:
            url: of the service, without a path, as in "http://127.0.0.1:8000".
            bank: name of the bank there.
            api_key: a key with scope `read` for it; none where the service needs none.
            timeout: seconds that one search may take.

        Raises:
            InputError: the URL is not one of http.
        """
        if not url.startswith(("http://", "https://")):
            raise InputError(f"url is {url!r}; give one as in 'http://127.0.0.1:8000'")
        self._url = f"{url.rstrip('/')}/api/banks/{quote(bank, safe='')}/search"
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout

    def retrieve(
        self, question: str, top_k: int = 16, filter: Mapping[str, JSON] | None = None
    ) -> list[Hit]:
        """At most `top_k` documents for the question, best first.

        Raises:
            ServiceRequestError: the service cannot be reached, or refused; its message says why.
        """
        body = {"query": question, "top_k": top_k, "filter": filter}
        request = Request(self._url, json.dumps(body).encode(), self._headers)
        try:
            with urlopen(request, timeout=self._timeout) as reply:
                found = json.load(reply)
        except HTTPError as error:
            raise ServiceRequestError(f"{self._url}: {_reason(error)}") from error
        except (URLError, TimeoutError, ValueError) as error:
            raise ServiceRequestError(f"{self._url}: {error}") from error
        return [_hit(item) for item in found["data"]]


def _reason(error: HTTPError) -> str:
    """The service's own message, if the answer is its."""
    with error:
        try:
            return f"{error.code}, {json.load(error)['error']['message']}"
        except (ValueError, KeyError, TypeError):
            return f"{error.code} {error.reason}"


def _hit(item: Mapping[str, Any]) -> Hit:
    return Hit(
        id=item["id"],
        number=item["number"],
        score=item["score"],
        layer_scores={int(layer): score for layer, score in item["layer_scores"].items()},
        title=item["title"],
        text=item["text"],
        metadata=item["metadata"],
    )


def described(hit: Hit) -> dict[str, JSON]:
    """A hit's metadata for a framework's document: the caller's own, and where it comes from.

    Ours have the prefix `msa_`, so that they hide none of the caller's.
    """
    ours = zip(OURS, (hit.id, hit.number, hit.title, hit.score), strict=True)
    return {**hit.metadata, **dict(ours)}
