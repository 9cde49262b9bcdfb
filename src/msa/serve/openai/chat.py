"""/v1/chat/completions: a chat whose last message is a question to a bank."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, JsonValue
from pydantic_core import to_jsonable_python

from msa.serve.asking import Ask, answer_of, while_connected
from msa.serve.links import base_url
from msa.serve.openai.citations import (
    CitedText,
    Source,
    cite,
    open_webui_event,
    sources,
    url_annotation,
)
from msa.serve.openai.requests import (
    Question,
    Role,
    Sampling,
    Strict,
    Text,
    ask_changes,
    bank_of,
    only,
    whole_question,
)
from msa.serve.service import CallerDep, ServiceDep
from msa.serve.streams import EventStream, frame
from msa.types import Answer

router = APIRouter(prefix="/v1", tags=["openai"])
DONE = "data: [DONE]\n\n"


class ChatMessage(Strict):
    """One message; of an answer that a client sends back, only the text is read."""

    role: Role
    content: Text = ""
    name: str | None = None
    refusal: str | None = None
    annotations: list[JsonValue] | None = None
    audio: Any = only()
    function_call: Any = only()
    tool_calls: Any = only([])


class StreamOptions(Strict):
    """What a stream holds: with `include_usage`, a last chunk with token counts."""

    include_usage: bool | None = False
    include_obfuscation: Any = only(False)


class ChatRequest(Sampling):
    """A chat; the last message is the question, those before it make it whole.

    Attributes:
        messages: the conversation.
        max_completion_tokens, max_tokens: of the answer; the first counts.
        seed: makes sampling repeatable.
    """

    messages: list[ChatMessage] = Field(min_length=1)
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1, le=4096)
    max_tokens: int | None = Field(default=None, ge=1, le=4096)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    n: Any = only(1)
    stop: Any = only([])
    logprobs: Any = only(False)
    logit_bias: Any = only({})
    frequency_penalty: Any = only(0)
    presence_penalty: Any = only(0)
    tools: Any = only([])
    tool_choice: Any = only("none", "auto")
    parallel_tool_calls: Any = only(True, False)
    functions: Any = only([])
    function_call: Any = only("none", "auto")
    response_format: Any = only({"type": "text"})
    modalities: Any = only(["text"])
    audio: Any = only()
    prediction: Any = only()
    reasoning_effort: Any = only("none")
    verbosity: Any = only()
    web_search_options: Any = only()


class ChatUsage(BaseModel):
    """Token counts; the prompt's are those of all rounds together, with the texts read."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswer(BaseModel):
    """The message of the model."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    annotations: list[dict[str, Any]]


class ChatChoice(BaseModel):
    """The only choice."""

    index: Literal[0] = 0
    message: ChatAnswer
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(BaseModel):
    """An answer, as OpenAI's clients read it; `msa` holds what they have no words for."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage
    msa: dict[str, Any]


@router.post(
    "/chat/completions",
    response_model=ChatCompletion,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def chat_completions(
    body: ChatRequest, service: ServiceDep, caller: CallerDep, request: Request
) -> Any:
    """Answer the last message from the bank that the model's name says."""
    served = bank_of(body.model, service, caller)
    turns = [(message.role, message.content) for message in body.messages]
    question = Question(
        served,
        whole_question(turns, "messages", body.msa.standalone),
        ask_changes(body, body.max_completion_tokens or body.max_tokens, seed=body.seed),
        body.msa.filter,
    )
    writer = _Writer(body, question, base_url(service.settings, request))
    ask = await question.start(service, caller, request, stream=bool(body.stream))
    if body.stream:
        return EventStream(
            writer.frames(ask), ping_seconds=service.settings.ping_seconds, on_end=ask.stop
        )
    try:
        return writer.completion(await while_connected(request, answer_of(ask)))
    finally:
        ask.stop()


class _Writer:
    """Writes the answer to one request."""

    def __init__(self, body: ChatRequest, question: Question, base: str) -> None:
        self._body = body
        self._question = question
        self._base = base
        self._form = body.msa.citations
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def completion(self, answer: Answer) -> ChatCompletion:
        """The answer as one object."""
        cited, text = self._cited(answer)
        message = ChatAnswer(content=text.text, annotations=self._annotations(text))
        choice = ChatChoice(message=message, finish_reason=_finish_reason(answer))
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._body.model,
            choices=[choice],
            usage=_usage(answer),
            msa=self._extras(answer, cited),
        )

    async def frames(self, ask: Ask) -> AsyncIterator[str]:
        """The answer as chunks."""
        yield self._chunk({"role": "assistant", "content": ""})
        async for event in ask.events():
            if event.kind == "token":
                yield self._chunk({"content": event.data})
            elif event.kind == "answer":
                for last in self._last_frames(event.data):
                    yield last

    def _last_frames(self, answer: Answer) -> list[str]:
        cited, text = self._cited(answer)
        chunks = []
        if self._form == "open_webui":
            chunks += [self._chunk({}, event=open_webui_event(source)) for source in cited]
        if behind := text.text[len(answer.text) :]:
            chunks.append(self._chunk({"content": behind}))
        if annotations := self._annotations(text):
            chunks.append(self._chunk({"annotations": annotations}))
        chunks.append(
            self._chunk({}, finish_reason=_finish_reason(answer), msa=self._extras(answer, cited))
        )
        if self._usage:
            usage = _usage(answer).model_dump()
            chunks.append(frame({**self._head(), "choices": [], "usage": usage}))
        return [*chunks, DONE]

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        usage = {"usage": None} if self._usage else {}
        return frame({**self._head(), "choices": [choice], **usage, **more})

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._body.model,
        }

    def _cited(self, answer: Answer) -> tuple[list[Source], CitedText]:
        cited = sources(answer, self._question.served.name, self._base)
        return cited, cite(answer.text, cited, self._form)

    def _annotations(self, text: CitedText) -> list[dict[str, Any]]:
        if self._form == "open_webui":  # it would show every source twice
            return []
        return [url_annotation(mark) for mark in text.marks]

    def _extras(self, answer: Answer, cited: Sequence[Source]) -> dict[str, Any]:
        return extras(answer, cited, self._body.msa.trace)


def extras(answer: Answer, cited: Sequence[Source], trace: bool) -> dict[str, Any]:
    """The field `msa` of an answer."""
    usage = answer.usage
    found: dict[str, Any] = {
        "question": answer.question,
        "stopped": answer.stopped,
        "citations": [source.as_json() for source in cited],
        "timing": {
            "routing_seconds": usage.routing_seconds,
            "total_seconds": usage.total_seconds,
        },
    }
    if trace:
        found["rounds"] = to_jsonable_python(answer.rounds, inf_nan_mode="null")
    return found


def _finish_reason(answer: Answer) -> Literal["stop", "length"]:
    return "length" if answer.stopped == "max_tokens" else "stop"


def _usage(answer: Answer) -> ChatUsage:
    prompt, written = answer.usage.prompt_tokens, answer.usage.generated_tokens
    return ChatUsage(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written)
