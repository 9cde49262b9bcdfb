"""What an agent can do with the banks, as tools of MCP.

`search` and `fetch` are the pair that ChatGPT reads. In all tools an id is `BANK/NUMBER`: a passage
by its number, which a bank never uses twice.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated, Any

import anyio.to_thread
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError, ToolError
from pydantic import BaseModel, Field

import msa
from msa.memory.store.reports import StoredDocument
from msa.serve.documents import delete_documents, put_document
from msa.serve.errors import ServiceError, invalid, service_error
from msa.serve.keys import READ, WRITE, Principal
from msa.serve.permalinks import stored_document
from msa.types import JSON, Answer, Citation, Document, Event

if TYPE_CHECKING:
    from msa.serve.banks import ServedBank
    from msa.serve.service import Service

FOUND = 8
"""Passages that `search` lists."""

# ---- results


class Found(BaseModel):
    """A passage that was found, to be fetched by its id."""

    id: str
    title: str
    url: str


class SearchResults(BaseModel):
    """Passages, best first."""

    results: list[Found]


class Fetched(BaseModel):
    """A passage in full."""

    id: str
    title: str
    text: str
    url: str
    metadata: dict[str, Any]


class Cited(Found):
    """A passage that the answer rests on, and the round in which it was read."""

    document: str
    round: int


class RoundRead(BaseModel):
    """What one round of reading looked at."""

    round: int
    routed: int = Field(description="Passages that the model attended to.")
    read: list[str] = Field(description="Ids of the passages whose text it read.")


class AskResult(BaseModel):
    """An answer with what it rests on."""

    answer: str
    found: bool = Field(description="False: the memory does not hold the answer.")
    stopped: str
    bank: str
    citations: list[Cited]
    rounds: list[RoundRead]


class AddResult(BaseModel):
    """What became of a document."""

    bank: str
    document: str
    outcome: str = Field(description="added, updated, or unchanged.")
    passages: list[Found] = Field(description="The document, or its parts if it was long.")


class DeleteResult(BaseModel):
    """What was deleted."""

    deleted: list[str] = Field(description="Ids of the documents, as they were added.")


class BankStatus(BaseModel):
    """Figures of one bank."""

    name: str
    documents: int
    passages: int
    tokens: int
    bytes: int
    writable: bool


class Status(BaseModel):
    """What this memory holds."""

    version: str
    banks: list[BankStatus]


# ---- who calls


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a tool works for.

    Attributes:
        principal: the key's.
        url: the address of a passage, by its bank and number.
        bank: the only bank that it sees; None for all that the key may read.
    """

    principal: Principal
    url: Callable[[str, int], str]
    bank: str | None = None


@contextlib.contextmanager
def _told(kind: type[Exception] = ToolError) -> Iterator[None]:
    """Let the client read our errors in one line, and nothing of our failures."""
    try:
        yield
    except Exception as error:
        raise kind(service_error(error).message) from error


# ---- tools


class Tools:
    """The tools, for one service; each checks what its caller may do."""

    def __init__(self, service: Service, caller: Callable[[Context], Caller]) -> None:
        self._service = service
        self._caller = caller

    async def search(self, query: str, context: Context) -> SearchResults:
        """Search the memory for passages on a query; returns their ids, titles and urls."""
        with _told():
            caller = self._caller(context)
            found = [await self._hits(caller, served, query) for served in self._banks(caller)]
            return SearchResults(results=_in_turns(found)[:FOUND])

    async def fetch(self, id: str, context: Context) -> Fetched:
        """Read one passage in full, by its id."""
        with _told():
            caller = self._caller(context)
            served, stored = await self._stored(caller, id)
            document = stored.document
            found = _found(caller, served.name, stored.number, document.title, document.id)
            ours: dict[str, JSON] = {"msa_bank": served.name, "msa_document": document.id}
            if stored.part_of is not None:
                ours["msa_document"] = stored.part_of
                ours["msa_part"] = f"{stored.part} of {stored.num_parts}"
            metadata = {**document.metadata, **ours}
            return Fetched(**found.model_dump(), text=document.text, metadata=metadata)

    async def ask(
        self,
        question: str,
        context: Context,
        bank: Annotated[
            str | None, Field(description="Name of the bank; needed where there are several.")
        ] = None,
        filter: Annotated[
            dict[str, Any] | None,
            Field(
                description="Metadata that documents must have, such as "
                '{"user": "ada", "year": {"gte": 1990}}.'
            ),
        ] = None,
    ) -> AskResult:
        """Answer a question from the memory, with the passages that were read for it."""
        with _told():
            caller = self._caller(context)
            served = self._bank(caller, bank)
            ask = await self._service.asking.start(
                served, question, filter=filter, principal=caller.principal
            )
            async with contextlib.aclosing(ask.events()) as events:
                answer = await _reported(context, served.name, events)
            return _answered(caller, served.name, answer)

    async def status(self, context: Context) -> Status:
        """Say which banks there are and how much they hold."""
        with _told():
            caller = self._caller(context)
            banks = [
                await anyio.to_thread.run_sync(_status, served, caller.principal)
                for served in self._banks(caller)
            ]
            return Status(version=msa.__version__, banks=banks)

    async def add(
        self,
        text: str,
        context: Context,
        id: Annotated[
            str | None,
            Field(description="The document's name; another text under it takes its place."),
        ] = None,
        title: str | None = None,
        metadata: Annotated[
            dict[str, Any] | None, Field(description="To be filtered by, such as who wrote it.")
        ] = None,
        bank: Annotated[
            str | None, Field(description="Name of the bank; needed where there are several.")
        ] = None,
    ) -> AddResult:
        """Remember a text for the next question; the same text twice changes nothing."""
        with _told():
            caller = self._caller(context)
            served = self._bank(caller, bank, WRITE)
            name = f"note-{_digest(text)}" if id is None else id
            document = Document(name, text, title=title, metadata=metadata or {})
            put = await put_document(self._service, served, document)
            passages = [
                _found(caller, served.name, s.number, s.document.title, s.document.id)
                for s in put.stored
            ]
            return AddResult(
                bank=served.name, document=name, outcome=put.outcome, passages=passages
            )

    async def delete(
        self,
        ids: Annotated[
            list[str],
            Field(
                min_length=1,
                max_length=100,
                description="As search names them; a part stands for its whole document.",
            ),
        ],
        context: Context,
    ) -> DeleteResult:
        """Delete documents from the memory for good."""
        with _told():
            caller = self._caller(context)
            wanted: defaultdict[str, list[str]] = defaultdict(list)
            for given in ids:
                served, stored = await self._stored(caller, given, WRITE)
                document = stored.part_of or stored.document.id
                if document not in wanted[served.name]:
                    wanted[served.name].append(document)
            deleted: list[str] = []
            for name, documents in wanted.items():
                served = self._bank(caller, name, WRITE)
                deleted += (await delete_documents(self._service, served, documents)).deleted
            return DeleteResult(deleted=deleted)

    async def passage(self, bank: str, number: str, context: Context) -> str:
        """A passage as text, with its title above it."""
        try:
            with _told(ResourceError):
                caller = self._caller(context)
                _, stored = await self._stored(caller, f"{bank}/{number}")
        except ResourceError as error:
            cause = error.__cause__
            if isinstance(cause, ServiceError) and cause.status in (404, 410):
                raise ResourceNotFoundError(str(error)) from error
            raise
        title = stored.document.title
        return f"{title}\n\n{stored.document.text}" if title else stored.document.text

    def _banks(self, caller: Caller) -> list[ServedBank]:
        registry = self._service.registry
        names = [caller.bank] if caller.bank else registry.names(caller.principal)
        return [registry.get(name, caller.principal, READ) for name in names]

    def _bank(self, caller: Caller, name: str | None, scope: str = READ) -> ServedBank:
        """The bank that is meant.

        Raises:
            ServiceError: 400 if none was named and there are several; 403, 404 of the registry.
        """
        names = [served.name for served in self._banks(caller)]
        if name is None and len(names) != 1:
            listed = ", ".join(names) or "none"
            raise invalid(f"Name a bank with `bank`; there are: {listed}.", "bank")
        if name is not None and caller.bank not in (None, name):
            message = f"This address has the bank {caller.bank!r} and no other."
            raise invalid(message, "bank")
        wanted = names[0] if name is None else name
        return self._service.registry.get(wanted, caller.principal, scope)

    async def _hits(self, caller: Caller, served: ServedBank, query: str) -> list[Found]:
        """What one bank finds; nothing if it holds nothing."""
        if not len(served.bank):
            return []
        hits = await self._service.asking.search(served, query, FOUND, None, caller.principal)
        return [_found(caller, served.name, hit.number, hit.title, hit.id) for hit in hits]

    async def _stored(
        self, caller: Caller, id: str, scope: str = READ
    ) -> tuple[ServedBank, StoredDocument]:
        """A passage by its id.

        Raises:
            ServiceError: 400 for what is no id; 404, 410.
        """
        name, slash, number = id.rpartition("/")
        if not slash or not number.isascii() or not number.isdigit() or len(number) > 18:
            raise invalid(
                f"{id[:80]!r} is no id; give one as search returns it, BANK/NUMBER.", "id"
            )
        served = self._bank(caller, name, scope)
        return served, await anyio.to_thread.run_sync(stored_document, served, int(number))


def _digest(text: str) -> str:
    """The same for the same text, even for one that is no valid Unicode: the bank says so."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


async def _reported(context: Context, bank: str, events: AsyncIterator[Event]) -> Answer:
    """The answer; what happens before it is told to the client as progress."""
    steps = 0
    async for event in events:
        if event.kind == "answer":
            answer: Answer = event.data
            return answer
        if event.kind == "routing":
            message = f"round {event.round}: routing over the memory"
        elif event.kind == "reading":
            message = f"round {event.round}: reading {bank}/{event.data.number}"
        else:
            continue
        steps += 1
        await context.report_progress(steps, message=message)
    raise RuntimeError("a question ended without an answer")


def _found(caller: Caller, bank: str, number: int, title: str | None, id: str) -> Found:
    return Found(id=f"{bank}/{number}", title=title or id, url=caller.url(bank, number))


def _in_turns(found: Iterable[list[Found]]) -> list[Found]:
    """The best of every bank, then the second best: scores of two banks do not compare."""
    return [item for rank in zip_longest(*found) for item in rank if item is not None]


def _answered(caller: Caller, bank: str, answer: Answer) -> AskResult:
    def cited(citation: Citation) -> Cited:
        found = _found(caller, bank, citation.number, citation.title, citation.id)
        if citation.span is not None and found.url.startswith("http"):
            found.url += "?span={}-{}".format(*citation.span)  # opens with the answer highlighted
        return Cited(**found.model_dump(), document=citation.id, round=citation.round)

    rounds = [
        RoundRead(
            round=turn.index,
            routed=len({d.number for layer in turn.routed.values() for d in layer}),
            read=[f"{bank}/{citation.number}" for citation in turn.read],
        )
        for turn in answer.rounds
    ]
    return AskResult(
        answer=answer.text,
        found=answer.stopped != "not_found",
        stopped=answer.stopped,
        bank=bank,
        citations=[cited(citation) for citation in answer.citations],
        rounds=rounds,
    )


def _status(served: ServedBank, holder: Principal) -> BankStatus:
    info = served.bank.info()
    return BankStatus(
        name=served.name,
        documents=info.num_ids,
        passages=info.num_documents,
        tokens=info.num_tokens,
        bytes=info.segment_bytes + info.catalog_bytes,
        writable=not served.bank.read_only and holder.allows(WRITE, served.name),
    )
