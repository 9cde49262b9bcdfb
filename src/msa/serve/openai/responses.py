"""/v1/responses: a question to a bank, with every round of the retrieval as a file search."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field, JsonValue

from msa.memory.bank import MemoryBank
from msa.serve.asking import Ask, while_connected
from msa.serve.errors import ServiceError, invalid
from msa.serve.links import base_url
from msa.serve.openai.chat import DONE, extras
from msa.serve.openai.citations import CitedText, cite, file_annotation, sources
from msa.serve.openai.file_ids import cited_file
from msa.serve.openai.filters import bank_filter
from msa.serve.openai.requests import (
    Question,
    Role,
    Sampling,
    Strict,
    Text,
    ask_changes,
    bank_of,
    only,
    unsupported,
    whole_question,
)
from msa.serve.service import CallerDep, ServiceDep
from msa.serve.streams import EventStream, frame
from msa.types import Answer, Citation, Round

router = APIRouter(prefix="/v1", tags=["openai"])
RESULTS = 10
"""Results that a file search lists unless the tool says otherwise."""
_OWN_ITEMS = ("file_search_call", "reasoning")


class RankingOptions(Strict):
    """Which results are listed."""

    ranker: Any = only("auto", "default-2024-11-15", "default_2024_08_21")
    score_threshold: float = Field(default=0.0, ge=0, le=1)


class FileSearch(Strict):
    """What is searched, and what of it is listed.

    Attributes:
        vector_store_ids: the bank that the model's name says, and no other.
        max_num_results: of those that a round found, how many are listed.
        filters: which documents may be used.
    """

    type: Literal["file_search"]
    vector_store_ids: list[str] = Field(min_length=1, max_length=1)
    max_num_results: int = Field(default=RESULTS, ge=1, le=50)
    filters: dict[str, Any] | None = None
    ranking_options: RankingOptions | None = None


class InputMessage(Strict):
    """One message; of an answer that a client sends back, only the text is read."""

    type: Literal["message"] = "message"
    role: Role
    content: Text
    id: str | None = None
    status: str | None = None
    phase: str | None = None


def _messages(given: Any) -> Any:
    """Input as a list of messages, without the searches of answers that are sent back."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        return given
    for item in given:
        kind = item.get("type", "message") if isinstance(item, Mapping) else "message"
        if kind not in ("message", *_OWN_ITEMS):
            raise unsupported()
    return [i for i in given if not (isinstance(i, Mapping) and i.get("type") in _OWN_ITEMS)]


class ResponseRequest(Sampling):
    """A question, or a conversation whose last message is one.

    Attributes:
        input: text, or messages.
        instructions: echoed and not read: the model takes none.
        max_output_tokens: of the answer.
        max_tool_calls: rounds in which the model may read.
        tools: one `file_search`, or none.
    """

    input: Annotated[
        list[InputMessage],
        BeforeValidator(_messages, json_schema_input_type=str | list[InputMessage]),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=4096)
    max_tool_calls: int | None = Field(default=None, ge=1, le=16)
    tools: list[FileSearch] | None = Field(default=None, max_length=1)
    tool_choice: Any = only("auto", "required", {"type": "file_search"})
    include: list[Literal["file_search_call.results"]] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Any = only("disabled")
    text: Any = only({}, {"format": {"type": "text"}})
    reasoning: Any = only({}, {"effort": None}, {"effort": "none"})
    previous_response_id: Any = only()
    conversation: Any = only()
    background: Any = only(False)
    background_options: Any = only()
    prompt: Any = only()
    context_management: Any = only([])
    access_programs: Any = only()
    image: Any = only()
    stream_options: Any = only({}, {"include_obfuscation": False})
    frequency_penalty: Any = only(0)
    presence_penalty: Any = only(0)


class ResponseBody(BaseModel):
    """A response, with the fields of Open Responses; `msa` holds what it has no words for."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, str] | None = None
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    temperature: float
    top_p: float
    tools: list[dict[str, Any]]
    tool_choice: Any
    text: dict[str, Any] = {"format": {"type": "text"}}
    reasoning: dict[str, Any] | None = None
    truncation: Literal["disabled"] = "disabled"
    top_logprobs: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    background: Literal[False] = False
    msa: dict[str, Any] | None = None


@router.post(
    "/responses",
    response_model=ResponseBody,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def create_response(
    body: ResponseRequest, service: ServiceDep, caller: CallerDep, request: Request
) -> Any:
    """Answer a question from the bank that the model's name says; nothing is stored."""
    served = bank_of(body.model, service, caller)
    if body.msa.citations == "open_webui":
        raise invalid("This form is for chats.", "msa.citations")
    tool = _tool(body, served.name)
    turns = [(message.role, message.content) for message in body.input]
    question = Question(
        served,
        whole_question(turns, "input", body.msa.standalone),
        ask_changes(body, body.max_output_tokens, max_rounds=body.max_tool_calls),
        _filter(body, tool),
    )
    response = _Response(body, tool, question, base_url(service.settings, request))
    ask = await question.start(service, caller, request, stream=bool(body.stream))
    if body.stream:
        return EventStream(
            response.frames(ask),
            ping_seconds=service.settings.ping_seconds,
            on_error=response.failure,
            on_end=ask.stop,
        )
    try:
        return await while_connected(request, response.whole(ask))
    finally:
        ask.stop()


def _tool(body: ResponseRequest, bank: str) -> FileSearch:
    """The file search that was asked for, or the one that is done anyway.

    Raises:
        ServiceError: 400, it is of another bank than the model.
    """
    if not body.tools:
        return FileSearch(type="file_search", vector_store_ids=[bank])
    tool = body.tools[0]
    if tool.vector_store_ids != [bank]:
        message = f"The model {body.model} searches the vector store '{bank}' and no other."
        raise invalid(message, "tools.0.vector_store_ids")
    return tool


def _filter(body: ResponseRequest, tool: FileSearch) -> dict[str, Any] | None:
    """What both the tool's filters and `msa.filter` let through."""
    filters = [] if tool.filters is None else [bank_filter(tool.filters, "tools.0.filters")]
    if body.msa.filter is not None:
        filters.append(body.msa.filter)
    return {"and": filters} if len(filters) > 1 else next(iter(filters), None)


class _Response:
    """One response as it comes about: its items, and the events that tell of them."""

    def __init__(
        self, body: ResponseRequest, tool: FileSearch, question: Question, base: str
    ) -> None:
        self._body = body
        self._tool = tool
        self._question = question
        self._base = base
        self._sequence = 0
        self._round: Round | None = None  # of the search that is going on
        self._read: list[Citation] = []  # in that round
        self._message = ""  # its id, once it has begun
        self._resource = self._begun()

    def _begun(self) -> ResponseBody:
        body, engine = self._body, self._question.served.engine.options
        return ResponseBody(
            id=_new_id("resp"),
            created_at=int(time.time()),
            status="in_progress",
            model=body.model,
            output=[],
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            max_tool_calls=body.max_tool_calls,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            prompt_cache_key=body.prompt_cache_key,
            safety_identifier=body.safety_identifier,
            user=body.user,
            temperature=engine.temperature if body.temperature is None else body.temperature,
            top_p=engine.top_p if body.top_p is None else body.top_p,
            tools=[self._tool.model_dump(exclude_none=True)],
            tool_choice=body.tool_choice or "auto",
        )

    async def whole(self, ask: Ask) -> ResponseBody:
        """The response when it is done."""
        async for _ in self.frames(ask):
            pass
        return self._resource

    async def frames(self, ask: Ask) -> AsyncIterator[str]:
        """The response as events."""
        yield self._event("response.created", response=self._snapshot())
        yield self._event("response.in_progress", response=self._snapshot())
        async for event in ask.events():
            if event.kind in ("routing", "token", "answer"):
                for one in await self._search_ended():
                    yield one
            if event.kind == "routing":
                for one in self._search_begins(event.data):
                    yield one
            elif event.kind == "reading":
                self._read.append(event.data)
            elif event.kind == "token":
                for one in self._text(event.data):
                    yield one
            else:
                for one in self._ended(event.data):
                    yield one
        yield DONE

    def failure(self, error: ServiceError) -> str:
        """The last events of a response that failed: what it came to, and the error."""
        detail = error.body()["error"]
        self._resource.status = "failed"
        for item in self._resource.output[-1:]:
            item["status"] = "incomplete" if item["status"] == "in_progress" else item["status"]
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self._resource.error = {"code": code, "message": detail["message"]}
        failed = self._event("response.failed", response=self._snapshot())
        return failed + self._event("error", error=detail, **_without_type(detail))

    # ---- searches

    def _search_begins(self, found: Round) -> list[str]:
        self._round, self._read = found, []
        item = {
            "id": _new_id("fs"),
            "type": "file_search_call",
            "status": "in_progress",
            "queries": [self._question.text],
            "results": None,
        }
        added = self._add(item)
        return [
            added,
            self._item_event("response.file_search_call.in_progress"),
            self._item_event("response.file_search_call.searching"),
        ]

    async def _search_ended(self) -> list[str]:
        """Events of the end of the search that is going on, if one is."""
        if self._round is None:
            return []
        item = self._resource.output[-1]
        item["status"] = "completed"
        if self._body.include:
            bank = self._question.served.bank
            item["results"] = await asyncio.to_thread(self._results, bank, self._round)
        self._round = None
        return [self._item_event("response.file_search_call.completed"), self._item_done()]

    def _results(self, bank: MemoryBank, found: Round) -> list[dict[str, Any]]:
        """What a round found: what was read first, then by score."""
        threshold = self._tool.ranking_options.score_threshold if self._tool.ranking_options else 0
        read = [citation.number for citation in self._read]
        ranked = sorted(found.ranked, key=lambda d: (d.number not in read, -d.prior))
        listed = [d for d in ranked if d.prior >= threshold][: self._tool.max_num_results]
        stored = bank.get_many([d.number for d in listed])
        results = []
        for ranking in listed:
            if ranking.number not in stored:  # deleted meanwhile
                continue
            document = stored[ranking.number].document
            name = self._question.served.name
            file = cited_file(name, document.id, ranking.number, document.title)
            results.append(
                {
                    "file_id": file.file_id,
                    "filename": file.filename,
                    "score": min(1.0, ranking.prior),
                    "text": document.text,
                    "attributes": _attributes(document.metadata),
                }
            )
        return results

    # ---- the message

    def _text(self, piece: str) -> list[str]:
        """Events of a piece of the answer; the message begins with the first."""
        begin = [] if self._message else self._message_begins()
        content = self._resource.output[-1]["content"][0]
        content["text"] += piece
        place = {"item_id": self._message, "content_index": 0}
        delta = self._item_event("response.output_text.delta", **place, delta=piece, logprobs=[])
        return [*begin, delta]

    def _message_begins(self) -> list[str]:
        self._message = _new_id("msg")
        item: dict[str, Any] = {
            "id": self._message,
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        added = self._add(item)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        begun = self._item_event("response.content_part.added", content_index=0, part=dict(part))
        item["content"] = [part]
        return [added, begun]

    def _ended(self, answer: Answer) -> list[str]:
        """The events after the answer's text."""
        cited = sources(answer, self._question.served.name, self._base)
        text = cite(answer.text, cited, self._body.msa.citations)
        written = self._resource.output[-1]["content"][0]["text"] if self._message else ""
        events = []
        if not self._message or text.text != written:
            events += self._text(text.text.removeprefix(written))
        events += self._annotated(text)
        status: Literal["completed", "incomplete"] = "completed"
        if answer.stopped == "max_tokens":
            status = "incomplete"
            self._resource.incomplete_details = {"reason": "max_output_tokens"}
        else:
            self._resource.completed_at = int(time.time())
        item = self._resource.output[-1]
        content = item["content"][0]
        item["status"] = self._resource.status = status
        self._resource.usage = _usage(answer)
        self._resource.msa = extras(answer, cited, self._body.msa.trace)
        place = {"content_index": 0}
        return [
            *events,
            self._item_event(
                "response.output_text.done", **place, text=content["text"], logprobs=[]
            ),
            self._item_event("response.content_part.done", **place, part=content),
            self._item_done(),
            self._event(f"response.{status}", response=self._snapshot()),
        ]

    def _annotated(self, text: CitedText) -> list[str]:
        annotations = [file_annotation(mark) for mark in text.marks]
        self._resource.output[-1]["content"][0]["annotations"] = annotations
        return [
            self._item_event(
                "response.output_text.annotation.added",
                content_index=0,
                annotation_index=i,
                annotation=annotation,
            )
            for i, annotation in enumerate(annotations)
        ]

    # ---- events

    def _add(self, item: dict[str, Any]) -> str:
        self._resource.output.append(item)
        index = len(self._resource.output) - 1
        return self._event("response.output_item.added", output_index=index, item=item)

    def _item_done(self) -> str:
        """The event that ends the last item."""
        index = len(self._resource.output) - 1
        item = self._resource.output[-1]
        return self._event("response.output_item.done", output_index=index, item=item)

    def _item_event(self, kind: str, **more: Any) -> str:
        """An event of the last item."""
        index = len(self._resource.output) - 1
        place = {"item_id": self._resource.output[-1]["id"], "output_index": index}
        return self._event(kind, **{**place, **more})

    def _event(self, kind: str, **data: Any) -> str:
        event = {"type": kind, "sequence_number": self._sequence, **data}
        self._sequence += 1
        return frame(event, kind)

    def _snapshot(self) -> dict[str, Any]:
        return self._resource.model_dump()


def _without_type(detail: Mapping[str, Any]) -> dict[str, Any]:
    """Code, message and param: they stand in the event itself too."""
    return {name: value for name, value in detail.items() if name != "type"}


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _attributes(metadata: Mapping[str, JsonValue]) -> dict[str, str | float | bool]:
    """Metadata as OpenAI's clients know it: 16 short texts, numbers and truth values at most."""
    found: dict[str, str | float | bool] = {}
    for key, value in metadata.items():
        if isinstance(value, str | int | float) and len(key) <= 64 and len(found) < 16:
            found[key] = value[:512] if isinstance(value, str) else value
    return found


def _usage(answer: Answer) -> dict[str, Any]:
    read, written = answer.usage.prompt_tokens, answer.usage.generated_tokens
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + written,
    }
