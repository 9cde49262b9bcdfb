"""What requests to chat and responses share: strict fields, text, options, the question."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from msa.serve.ask_changes import RetrievalChanges
from msa.serve.asking import Ask
from msa.serve.banks import ServedBank
from msa.serve.errors import ServiceError, invalid
from msa.serve.keys import Principal
from msa.serve.native import FilterBody
from msa.serve.openai.citations import without_marks
from msa.serve.openai.conversation import Turn, complete_question
from msa.serve.service import Service

MODEL_PREFIX = "msa/"
Role = Literal["system", "developer", "user", "assistant"]
CitationForm = Literal["annotations", "markers", "markdown", "open_webui", "none"]
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def only(*values: JsonValue) -> Any:
    """A field that is known and not supported: null and these values ask for nothing."""
    return Field(default=None, json_schema_extra={"enum": [None, *values]})


class Strict(BaseModel):
    """A request that has no other fields; see `only`."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _check_only(cls, value: Any, info: ValidationInfo) -> Any:
        extra = cls.model_fields[info.field_name or ""].json_schema_extra
        if not isinstance(extra, dict) or "enum" not in extra:
            return value
        allowed = extra["enum"]
        assert isinstance(allowed, list)
        if not any(_is_same(value, one) for one in allowed):
            raise unsupported()
        return value


def unsupported() -> PydanticCustomError:
    """What a field that is not supported is refused with, by its name."""
    return PydanticCustomError("extra_forbidden", "is not supported")


def _is_same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _text(content: Any) -> Any:
    """The text of a message that may come in parts."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    pieces = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("refusal" if kind == "refusal" else "text") if kind else None
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise PydanticCustomError(
                "text_only", "expected text, or parts of type 'text'; this service reads no others"
            )
        pieces.append(text)
    return "\n".join(pieces)


class TextPart(TypedDict):
    """A part of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str


Text = Annotated[str, BeforeValidator(_text, json_schema_input_type=str | list[TextPart] | None)]
"""Text of a message, or a list of parts that are text."""


class MsaOptions(RetrievalChanges, Strict):
    """The field `msa`: what OpenAI has no words for.

    Attributes:
        filter: see `msa.memory.store.filters`.
        citations: the form of the citations, see `msa.serve.openai.citations`.
        trace: answer with every round of the retrieval too.
        standalone: take the last question as it is, without the turns before it.

    The others are those of `RetrievalChanges`.
    """

    filter: FilterBody | None = None
    citations: CitationForm = "annotations"
    trace: bool = False
    standalone: bool = False


class Sampling(Strict):
    """How the answer is written, and what is only carried along.

    Attributes:
        temperature, top_p: by default as the bank's model is set.
        user, safety_identifier, prompt_cache_key, metadata: of the caller's; not looked at.
        msa: see `MsaOptions`.
    """

    model: str = Field(max_length=200)
    stream: bool | None = False
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    service_tier: Any = only("auto", "default")
    store: Any = only(False)
    top_logprobs: Any = only(0)
    moderation: Any = only()
    prompt_cache_options: Any = only()
    prompt_cache_retention: Any = only()
    msa: MsaOptions = MsaOptions()

    @model_validator(mode="before")
    @classmethod
    def _check_unicode(cls, value: Any) -> Any:
        """Half a surrogate pair can be written in JSON, and sent back in nothing."""
        if isinstance(value, dict):
            try:
                json.dumps(value, ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError:
                raise PydanticCustomError("unicode", "is not valid Unicode text") from None
        return value


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of which bank.

    Attributes:
        served: the bank.
        text: the question, whole.
        options: changes of the bank's `AskOptions`.
        filter: which documents may be used.
    """

    served: ServedBank
    text: str
    options: Mapping[str, Any]
    filter: Mapping[str, Any] | None

    async def start(
        self, service: Service, caller: Principal, request: Request, *, stream: bool
    ) -> Ask:
        """The question, running; it must be read or stopped.

        Args:
            service: whose bank is asked.
            caller: who asks.
            request: the question leaves the queue when its client goes.
            stream: whether "token" events are wanted.

        Raises:
            ServiceError: see `AskService.start`.
        """
        return await service.asking.start(
            self.served,
            self.text,
            principal=caller,
            filter=self.filter,
            changes=self.options,
            stream=stream,
            client=request,
        )


def bank_of(model: str, service: Service, caller: Principal) -> ServedBank:
    """The bank that a model's name says.

    Raises:
        ServiceError: 404, there is none of this name for this key; 403, 503.
    """
    name = model.removeprefix(MODEL_PREFIX)
    try:
        if name == model:
            raise ServiceError(404, None, "model_not_found", "")
        return service.registry.get(name, caller)
    except ServiceError as error:
        if error.status != 404:
            raise
        message = "There is no such model; GET /v1/models lists those there are."
        raise ServiceError(404, None, "model_not_found", message, "model") from None


def whole_question(turns: Sequence[tuple[Role, str]], param: str, standalone: bool) -> str:
    """The last message, made whole from those before it.

    System and developer messages are not read: the model takes no instructions.

    Args:
        turns: role and text of every message.
        param: name of the field with the messages.
        standalone: leave the last message as it is.

    Raises:
        ServiceError: 400; the last message is not the user's, or says nothing.
    """
    if not turns or turns[-1][0] != "user":
        raise invalid("The last message must be the user's: it is the question.", param)
    question = turns[-1][1].strip()
    if not question:
        raise invalid("The last message says nothing; ask something.", param)
    if standalone:
        return question
    earlier = [
        Turn(role, without_marks(text) if role == "assistant" else text)
        for role, text in turns[:-1]
        if role in ("user", "assistant")
    ]
    return complete_question(question, earlier)


def ask_changes(body: Sampling, max_new_tokens: int | None, **more: JsonValue) -> dict[str, Any]:
    """What a request changes of the bank's `AskOptions`."""
    sampling = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "max_new_tokens": max_new_tokens,
    }
    asked: list[Mapping[str, Any]] = [
        more,
        sampling,
        body.msa.model_dump(include=set(RetrievalChanges.model_fields)),
    ]  # a later one counts
    return {name: value for some in asked for name, value in some.items() if value is not None}
