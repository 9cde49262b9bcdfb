"""`/v1/vector_stores`: a bank is a vector store, and its id is the bank's name."""

from __future__ import annotations

import asyncio
import secrets
from itertools import chain
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from msa.serve.banks import ServedBank
from msa.serve.errors import invalid
from msa.serve.job_store import Attachment
from msa.serve.keys import ADMIN
from msa.serve.native import Body
from msa.serve.openai.file_ids import cited_file
from msa.serve.openai.filters import bank_filter
from msa.serve.openai.pages import Listable, Order, Page, page_of
from msa.serve.openai.vector_store_files import (
    ChunkingStrategy,
    FileCounts,
    StoreDep,
    WritableStoreDep,
    check_chunking,
    counts_of,
    submit_files,
)
from msa.serve.service import CallerDep, Service, ServiceDep
from msa.types import Hit

router = APIRouter(prefix="/v1/vector_stores", tags=["openai"])
MAX_PAGE = 100
MAX_QUERIES = 16

Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=64)],
        Annotated[str, Field(max_length=512)],
    ],
    Field(max_length=16),
]


class VectorStore(Listable):
    """A bank, as OpenAI's clients know it; `file_counts` has the files put into it over /v1."""

    object: Literal["vector_store"] = "vector_store"
    created_at: int
    name: str
    status: Literal["in_progress", "completed"]
    usage_bytes: int
    file_counts: FileCounts
    metadata: dict[str, str]
    last_active_at: int
    expires_after: None = None
    expires_at: None = None


class VectorStoreList(Page[VectorStore]):
    """A page of vector stores."""


class VectorStoreDeleted(BaseModel):
    """A vector store that is gone."""

    id: str
    object: Literal["vector_store.deleted"] = "vector_store.deleted"
    deleted: bool = True


class CreateInput(Body):
    """A new vector store; its name is that of the bank."""

    name: str | None = None
    file_ids: list[str] = Field(default=[], max_length=2000)
    metadata: Metadata | None = None
    chunking_strategy: ChunkingStrategy | None = None
    expires_after: dict[str, Any] | None = None


class UpdateInput(Body):
    """Other metadata of a vector store."""

    name: str | None = None
    metadata: Metadata | None = None
    expires_after: dict[str, Any] | None = None


class RankingOptions(Body):
    """How results are ranked; there is one ranker."""

    ranker: Literal["auto", "none", "default-2024-11-15"] = "auto"
    score_threshold: float = Field(default=0.0, ge=0, le=1)


class SearchInput(Body):
    """A search."""

    query: str | Annotated[list[str], Field(min_length=1, max_length=MAX_QUERIES)]
    max_num_results: int = Field(default=10, ge=1, le=50)
    filters: dict[str, Any] | None = None
    ranking_options: RankingOptions | None = None
    rewrite_query: bool = Field(default=False, description="Queries are never rewritten.")


class TextContent(BaseModel):
    """Text of a result."""

    type: Literal["text"] = "text"
    text: str


class SearchResult(BaseModel):
    """A document that was found; its score lies between 0 and 1."""

    file_id: str
    filename: str
    score: float
    attributes: dict[str, Any]
    content: list[TextContent]


class SearchPage(BaseModel):
    """What was found, best first."""

    object: Literal["vector_store.search_results.page"] = "vector_store.search_results.page"
    search_query: list[str]
    data: list[SearchResult]
    has_more: bool = False
    next_page: None = None


@router.get("")
async def list_stores(
    service: ServiceDep,
    caller: CallerDep,
    after: str | None = None,
    before: str | None = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
    order: Order = "desc",
) -> VectorStoreList:
    """The banks of this key, by their age."""
    served = [service.registry.get(name, caller) for name in service.registry.names(caller)]
    served.sort(key=lambda bank: bank.created_at)
    page, has_more = page_of(
        served, lambda s: s.name, limit=limit, order=order, after=after, before=before
    )
    data = await asyncio.to_thread(lambda: [_object(service, bank) for bank in page])
    return VectorStoreList.of(data, has_more)


@router.post("")
async def create(given: CreateInput, service: ServiceDep, caller: CallerDep) -> VectorStore:
    """A new, empty bank; with `file_ids` they are indexed into it."""
    _refuse(given.expires_after, "expires_after")
    check_chunking(given.chunking_strategy)
    name = given.name if given.name is not None else f"vs-{secrets.token_hex(8)}"
    served = await asyncio.to_thread(service.registry.create, name, caller)
    if given.metadata:
        await asyncio.to_thread(service.jobs.store.set_store_metadata, name, given.metadata)
    if given.file_ids:
        wanted: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in given.file_ids]
        await submit_files(service, served, caller, wanted, "file_batch", "file_ids")
    return await asyncio.to_thread(_object, service, served)


@router.get("/{vector_store_id}")
async def retrieve(served: StoreDep, service: ServiceDep) -> VectorStore:
    """A bank as a vector store."""
    return await asyncio.to_thread(_object, service, served)


@router.post("/{vector_store_id}")
async def update(served: WritableStoreDep, given: UpdateInput, service: ServiceDep) -> VectorStore:
    """Change the metadata of a vector store; a bank keeps its name."""
    _refuse(given.expires_after, "expires_after")
    if given.name not in (None, served.name):
        raise invalid("A vector store keeps its name.", "name", "unsupported_parameter")
    if given.metadata is not None:
        await asyncio.to_thread(service.jobs.store.set_store_metadata, served.name, given.metadata)
    return await asyncio.to_thread(_object, service, served)


@router.delete("/{vector_store_id}")
async def delete(
    vector_store_id: str, service: ServiceDep, caller: CallerDep
) -> VectorStoreDeleted:
    """Delete a bank with all its documents; only one that was made over the API."""
    service.registry.get(vector_store_id, caller, ADMIN)
    await service.remove_bank(vector_store_id, caller)
    return VectorStoreDeleted(id=vector_store_id)


@router.post("/{vector_store_id}/search")
async def search(
    served: StoreDep,
    given: SearchInput,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
) -> SearchPage:
    """The documents that the model routes to for a query, or for several."""
    queries = [given.query] if isinstance(given.query, str) else given.query
    conditions = None if given.filters is None else bank_filter(given.filters)
    results = await service.asking.searches(
        served, queries, given.max_num_results, conditions, caller, client=request
    )
    found: dict[int, Hit] = {}
    for hit in chain.from_iterable(results):
        known = found.get(hit.number)
        if known is None or known.score < hit.score:
            found[hit.number] = hit
    least = 0.0 if given.ranking_options is None else given.ranking_options.score_threshold
    best = sorted(found.values(), key=lambda hit: (-hit.score, hit.number))
    kept = [hit for hit in best if hit.score >= least][: given.max_num_results]
    return SearchPage(search_query=queries, data=[_result(served.name, hit) for hit in kept])


def _result(bank: str, hit: Hit) -> SearchResult:
    cited = cited_file(bank, hit.id, hit.number, hit.title)
    return SearchResult(
        file_id=cited.file_id,
        filename=cited.filename,
        score=min(max(hit.score, 0.0), 1.0),
        attributes=dict(hit.metadata),
        content=[TextContent(text=hit.text)],
    )


def _object(service: Service, served: ServedBank) -> VectorStore:
    store = service.jobs.store
    attached: list[Attachment] = store.attachments(served.name)
    counts = counts_of(attached)
    info = served.bank.info()
    return VectorStore(
        id=served.name,
        created_at=served.created_at,
        name=served.name,
        status="in_progress" if counts.in_progress else "completed",
        usage_bytes=info.segment_bytes + info.catalog_bytes,
        file_counts=counts,
        metadata=store.store_metadata(served.name),
        last_active_at=max([served.created_at, *(int(a.created) for a in attached)]),
    )


def _refuse(value: object, param: str) -> None:
    """Refuse a field that is not supported.

    Raises:
        ServiceError: 400.
    """
    if value is not None:
        raise invalid(f"{param} is not supported here.", param, "unsupported_parameter")
