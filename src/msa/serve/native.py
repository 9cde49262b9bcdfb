"""The native API of questions: what OpenAI's has no words for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from typing import Annotated, Any, Self

from fastapi import APIRouter, Path, Request
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from msa.memory.store.filters import MAX_TEXT
from msa.serve.ask_changes import RetrievalChanges, Whole
from msa.serve.asking import Ask
from msa.serve.banks import ServedBank, shown_model
from msa.serve.errors import ServiceError, unavailable
from msa.serve.keys import SCOPES, Principal
from msa.serve.service import CallerDep, ServiceDep
from msa.serve.settings import BANK_NAME
from msa.serve.streams import EventStream, frame
from msa.types import Answer

router = APIRouter(prefix="/api", tags=["banks"])

MOST_QUESTIONS = 64
Question = Annotated[str, Field(min_length=1, max_length=32_768, pattern=r"\S")]
BankPath = Annotated[str, Path(pattern=f"^{BANK_NAME.pattern}$", description="Name of a bank.")]


MOST_NESTED = 32
"""Objects and lists within each other, in a filter."""


def _sound(conditions: dict[str, Any]) -> dict[str, Any]:
    """Conditions that can be stored and compared; what they mean is checked by the bank."""
    level: list[Any] = [conditions]
    for _ in range(MOST_NESTED):
        deeper: list[Any] = []
        for value in level:
            if isinstance(value, str):
                value.encode()  # a lone surrogate is a ValueError
            elif isinstance(value, dict):
                deeper += [*value, *value.values()]
            elif isinstance(value, list):
                deeper += value
        if not deeper:
            return conditions
        level = deeper
    raise ValueError(f"is nested more than {MOST_NESTED} times")


_ANYTHING: dict[str, Any] = {}
_LIMIT = {"anyOf": [{"type": "number"}, {"type": "string", "maxLength": MAX_TEXT}]}
_OPERATORS = {
    **dict.fromkeys(("eq", "ne"), _ANYTHING),
    **dict.fromkeys(("gt", "gte", "lt", "lte"), _LIMIT),
    **{name: {"type": "array"} for name in ("in", "nin")},
}
_SCALAR_OR_OPERATORS = [
    {"type": ["string", "number", "boolean", "null"]},
    {"type": "object", "properties": _OPERATORS, "additionalProperties": False, "minProperties": 1},
]
_CONDITION = {"anyOf": [*_SCALAR_OR_OPERATORS, {"type": "array"}]}
_PARTS = {"type": "array", "items": {"type": "object", "additionalProperties": _CONDITION}}
_FILTER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {name: {"anyOf": [*_SCALAR_OR_OPERATORS, _PARTS]} for name in ("and", "or")},
    "additionalProperties": _CONDITION,
    "description": "Conditions on the metadata of documents; those of 'and' and 'or' nest.",
}
FilterBody = Annotated[
    dict[str, Any], AfterValidator(_sound), WithJsonSchema(_FILTER_SCHEMA, mode="validation")
]
"""Conditions on the metadata of documents; see `msa.memory.store.filters`."""


class Body(BaseModel):
    """Base of bodies: a field that is not known, or of another type, is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class AskChanges(Body, RetrievalChanges):
    """How a question is asked, where it differs from the model's own way; see `AskOptions`."""

    max_new_tokens: Annotated[Whole, Field(ge=1, le=4096)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0.001, le=1)] | None = None
    seed: Annotated[Whole, Field(ge=0, lt=2**53)] | None = None

    def given(self) -> dict[str, Any]:
        """The fields that are to differ."""
        return self.model_dump(exclude_none=True)


class AskBody(Body):
    """One question, or several.

    Attributes:
        question: one.
        questions: or up to 64, answered together; not with `stream`.
        filter: conditions on the metadata of documents, such as {"year": {"gte": 1990}}.
        options: how it is asked.
        trace: tell what every round routed to, too.
        stream: server-sent events, as things happen.
        deadline_s: seconds after which it is given up; the service has a limit of its own.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {
                    "required": ["question"],
                    "not": {"required": ["questions"]},
                    "properties": {"question": {"type": "string"}},
                },
                {
                    "required": ["questions"],
                    "not": {"required": ["question"]},
                    "properties": {"questions": {"type": "array"}, "stream": {"const": False}},
                },
            ]
        }
    )

    question: Question | None = None
    questions: list[Question] | None = Field(None, min_length=1, max_length=MOST_QUESTIONS)
    filter: FilterBody | None = None
    options: AskChanges = AskChanges()
    trace: bool = False
    stream: bool = False
    deadline_s: float | None = Field(None, ge=1, le=3600)

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.question is None) == (self.questions is None):
            raise ValueError("give either question or questions")
        if self.stream and self.questions is not None:
            raise ValueError("several questions cannot be streamed; give one, or leave stream out")
        return self


class Answers(BaseModel):
    """The answers to several questions, in their order."""

    data: list[Answer]


class SearchBody(Body):
    """What to look for.

    Attributes:
        query: in words.
        top_k: documents, at most.
        filter: conditions on the metadata of documents.
    """

    query: Question
    top_k: Whole = Field(10, ge=1, le=100)
    filter: FilterBody | None = None


class Found(BaseModel):
    """A document that was found; see `msa.types.Hit`."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    number: int
    score: float
    layer_scores: dict[int, float]
    title: str | None
    text: str
    metadata: dict[str, Any]


class Hits(BaseModel):
    """Documents, best first."""

    data: list[Found]


class BankSummary(BaseModel):
    """A bank in a list.

    Attributes:
        name: of the bank.
        num_ids: documents as they were given.
        generation: grows with every change.
    """

    name: str
    num_ids: int
    generation: int


class BankList(BaseModel):
    """The banks of a key."""

    data: list[BankSummary]


class BankDetail(BaseModel):
    """All about a bank.

    Attributes:
        name: of the bank.
        info: its figures.
        plan: what of it lies where, in bytes.
        scopes: what this key may do with it.
    """

    name: str
    info: dict[str, Any]
    plan: dict[str, Any]
    scopes: list[str]


class DemoDocument(BaseModel):
    """A document of the demo."""

    id: str
    title: str | None
    text: str


class Demo(BaseModel):
    """What one can look around with.

    Attributes:
        documents: that suit the model; made for `documents:batch`.
        questions: that they answer, the last one with several of them.
    """

    documents: list[DemoDocument]
    questions: list[str]


@router.get("/demo")
def get_demo(service: ServiceDep, caller: CallerDep) -> Demo:
    """Documents that ship with the package, and questions for them; no bank has to hold them."""
    from msa.demo.material import load_material  # which brings what it is checked with

    checkpoint = service.checkpoint
    if checkpoint is None:
        raise unavailable("loading", "The model and the banks are being loaded.")
    material = load_material("worlds" if checkpoint.name == "worlds" else "real")
    documents = [DemoDocument(id=d.id, title=d.title, text=d.text) for d in material.documents]
    asked = [step for step in material.steps if step.kind == "ask" and step.answers]
    of_one = [step.question for step in asked if len(step.cited) == 1]
    of_several = [step.question for step in asked if len(step.cited) > 1]
    return Demo(documents=documents, questions=[*of_one[:2], *of_several[:1]])


@router.get("/banks")
def list_banks(service: ServiceDep, caller: CallerDep) -> BankList:
    """The banks that this key may read."""
    found = []
    for name in service.registry.names(caller):
        info = service.registry.get(name, caller).bank.info()
        found.append(BankSummary(name=name, num_ids=info.num_ids, generation=info.generation))
    return BankList(data=found)


@router.get("/banks/{bank}")
def get_bank(bank: BankPath, service: ServiceDep, caller: CallerDep) -> BankDetail:
    """Figures of a bank, and what it takes."""
    return _detail(service.registry.get(bank, caller), caller)


@router.post("/banks/{bank}/search")
async def search(
    bank: BankPath, body: SearchBody, service: ServiceDep, caller: CallerDep, request: Request
) -> Hits:
    """The documents that the model routes to; no answer is written."""
    served = service.registry.get(bank, caller)
    hits = await service.asking.search(
        served, body.query, body.top_k, body.filter, caller, client=request
    )
    return Hits(data=[Found.model_validate(hit) for hit in hits])


@router.post(
    "/banks/{bank}/ask",
    response_model=Answer | Answers,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def ask(
    bank: BankPath, body: AskBody, service: ServiceDep, caller: CallerDep, request: Request
) -> Any:
    """The answer to a question, with the documents that were read for it.

    A stream has the events `routing`, `reading` and `token` as they happen, and ends with `answer`
    or `error`.
    """
    served = service.registry.get(bank, caller)
    how: dict[str, Any] = {
        "principal": caller,
        "filter": body.filter,
        "changes": body.options.given(),
        "deadline_s": body.deadline_s,
        "client": request,
    }
    if body.questions is not None:
        answers = await service.asking.answers(served, body.questions, **how)
        return Answers(data=[_shown(answer, body.trace) for answer in answers])
    assert body.question is not None
    if not body.stream:
        answer = await service.asking.answer(served, body.question, **how)
        return _shown(answer, body.trace)
    running = await service.asking.start(served, body.question, **how)
    return EventStream(
        _frames(running, trace=body.trace),
        ping_seconds=service.settings.ping_seconds,
        on_error=_error_frame,
        on_end=running.stop,
    )


async def _frames(running: Ask, *, trace: bool) -> AsyncIterator[str]:
    async for event in running.events():
        data = _shown(event.data, trace) if event.kind == "answer" else event.data
        yield frame(data, event.kind)


def _error_frame(error: ServiceError) -> str:
    return frame(error.body(), "error")


def _shown(answer: Answer, trace: bool) -> Answer:
    return answer if trace else replace(answer, rounds=())


def _detail(served: ServedBank, caller: Principal) -> BankDetail:
    """What clients may know; folders of this machine are left out."""
    plan = served.plan
    info = asdict(served.bank.info())
    del info["path"]
    totals = {"memory_bytes": plan.memory_bytes, "device_bytes": plan.device_bytes}
    return BankDetail(
        name=served.name,
        info=info | {"model": shown_model(info["model"])},
        plan={k: v for k, v in asdict(plan).items() if k != "bank"} | totals,
        scopes=[scope for scope in SCOPES if caller.allows(scope, served.name)],
    )
