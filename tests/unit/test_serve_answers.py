"""Models, chat completions and responses, read by OpenAI's own client, strictly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("pydantic_settings")
pytest.importorskip("prometheus_client")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import httpx2
import openai
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from msa.inference.options import AskOptions
from msa.serve.errors import ServiceError, add_handlers, unavailable
from msa.serve.keys import Keys
from msa.serve.openai import chat, models, responses
from msa.serve.settings import ServeSettings
from msa.types import Answer, Citation, Document, Event, RankedDocument, Round, Usage

ROME = Document("rome", "Rome lies on the Tiber.", metadata={"user": "a", "year": 2, "of": {}})
ADA = Citation("ada", 3, "Ada", "Ada was born in Rome.", 1, (16, 20))
BOB = Citation("bob", 7, None, "Bob is Ada's son.", 2)
RANKED = (
    RankedDocument("rome", 4, 2.0, 0.5, (2,), None),
    RankedDocument("ada", 3, 1.5, 0.3, (2,), None),
    RankedDocument("gone", 9, 1.0, 0.2, (2,), None),
)
ROUNDS = (Round(1, {2: ()}, (ADA,), RANKED), Round(2, {2: ()}, (BOB,)), Round(3, {2: ()}, ()))
MODEL = "msa/notes"
ASK = [{"role": "user", "content": "Where was Ada born?"}]
TOOL = {"type": "file_search", "vector_store_ids": ["notes"]}


def answer_to(question, stopped="answered"):
    return Answer(question, "In Rome.", (ADA, BOB), ROUNDS, Usage(90, 5, 0.1, 0.5), stopped)


class Ask:
    """A question that is answered at once, goes on for ever, or fails behind its first token."""

    def __init__(self, question, stopped):
        self.question, self.stopped = question, stopped
        self.is_stopped = threading.Event()

    def stop(self):
        self.is_stopped.set()

    async def events(self):
        try:
            async for event in self._events():
                yield event
        finally:
            self.stop()

    async def _events(self):
        for found, read in zip(ROUNDS, (ADA, BOB, None), strict=True):
            yield Event("routing", found.index, Round(found.index, found.routed, (), found.ranked))
            if read is not None:
                yield Event("reading", found.index, read)
        yield Event("token", 3, "In")
        if "fail" in self.question:
            raise unavailable("draining", "The service is stopping.")
        while "for ever" in self.question:
            await asyncio.sleep(0.01)
            yield Event("token", 3, " ever")
        yield Event("token", 3, " Rome.")
        yield Event("answer", 3, answer_to(self.question, self.stopped))


class Asking:
    def __init__(self):
        self.calls, self.asks, self.stopped = [], [], "answered"

    async def start(self, served, question, **options):
        if "wait" in question:
            raise ServiceError(429, None, "queue_full", "Too many.", headers={"Retry-After": "1"})
        self.calls.append((served.name, question, options))
        self.asks.append(Ask(question, self.stopped))
        return self.asks[-1]

    async def answer(self, served, question, **options):
        ask = await self.start(served, question, **options)
        return [event async for event in ask.events()][-1].data


class Registry:
    loaded = True

    def __init__(self):
        bank = SimpleNamespace(get_many=self.get_many)
        engine = SimpleNamespace(options=AskOptions())
        self.bank = SimpleNamespace(name="notes", created_at=17, bank=bank, engine=engine)

    def names(self, principal):
        return ["notes"]

    def get(self, name, principal, scope="read"):
        if name != "notes":
            raise ServiceError(404, None, "bank_not_found", "There is no such bank.")
        return self.bank

    @staticmethod
    def get_many(numbers):
        stored = {3: Document(ADA.id, ADA.text, ADA.title), 4: ROME}
        return {n: SimpleNamespace(document=stored[n]) for n in numbers if n in stored}


@pytest.fixture
def asking():
    return Asking()


@pytest.fixture
def app(asking):
    app = FastAPI()
    app.state.service = SimpleNamespace(
        settings=ServeSettings(), keys=Keys(None), registry=Registry(), asking=asking
    )
    add_handlers(app)
    for router in (models.router, chat.router, responses.router, models.absent):
        app.include_router(router)
    return app


@pytest.fixture
def client(app):
    """OpenAI's client; an answer of another shape than it expects is an error."""
    with (
        TestClient(app) as transport,
        openai.OpenAI(
            api_key="none",
            base_url="http://testserver/v1",
            http_client=transport,
            max_retries=0,
            _strict_response_validation=True,
        ) as client,
    ):
        yield client


def complete(client, messages=ASK, **more):
    return client.chat.completions.create(model=MODEL, messages=messages, **more)


def respond(client, given="Where was Ada born?", **more):
    return client.responses.create(model=MODEL, input=given, **more)


# ---- models


def test_every_bank_is_a_model(client):
    (model,) = client.models.list().data
    assert (model.id, model.created, model.owned_by) == (MODEL, 17, "msa")
    assert client.models.retrieve(MODEL) == model


@pytest.mark.parametrize("name", ["msa/other", "notes", "gpt-4o"])
def test_another_model_is_not_found(client, name):
    for ask in (
        lambda: client.models.retrieve(name),
        lambda: client.chat.completions.create(model=name, messages=ASK),
        lambda: client.responses.create(model=name, input="Where?"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_what_is_not_here_says_so_in_one_sentence(client):
    for ask in (
        lambda: client.embeddings.create(model=MODEL, input="text"),
        lambda: client.completions.create(model=MODEL, prompt="text"),
        lambda: client.get("/assistants", cast_to=object),
        lambda: client.post("/threads/t/runs", cast_to=object, body={}),
        lambda: client.responses.retrieve("resp_1"),
        lambda: client.chat.completions.retrieve("chatcmpl-1"),
        lambda: client.conversations.create(),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "not_supported"
        assert caught.value.body["message"].endswith(".")


# ---- chat


def test_a_chat_is_answered_with_citations_and_usage(client, asking):
    completion = complete(client)
    (choice,) = completion.choices
    assert choice.message.content == "In Rome."
    assert choice.finish_reason == "stop"
    assert completion.model == MODEL
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (90, 5)
    first, second = (a.url_citation for a in choice.message.annotations)
    assert (first.title, first.url) == ("Ada", "http://testserver/d/notes/3?span=16-20")
    assert (first.start_index, first.end_index) == (0, 8)
    assert second.url == "http://testserver/d/notes/7"
    assert completion.msa["stopped"] == "answered"
    assert [c["id"] for c in completion.msa["citations"]] == ["ada", "bob"]
    assert "rounds" not in completion.msa
    ((bank, question, options),) = asking.calls
    assert (bank, question) == ("notes", "Where was Ada born?")
    assert options["filter"] is None
    assert options["changes"] == {}


def test_a_streamed_chat_is_the_same(client):
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "In Rome."
    whole = complete(client)
    (annotations,) = [d.annotations for d in deltas if getattr(d, "annotations", None)]
    assert annotations == [a.model_dump() for a in whole.choices[0].message.annotations]
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        "stop"
    ]
    assert chunks[-2].msa == whole.msa
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_is_streamed_only_when_it_is_asked_for(client):
    assert all(chunk.usage is None and chunk.choices for chunk in complete(client, stream=True))


def test_the_client_collects_a_stream(client):
    with client.chat.completions.stream(model=MODEL, messages=ASK) as stream:
        assert stream.get_final_completion().choices[0].message.content == "In Rome."


def test_options_reach_the_question(client, asking):
    extra = {"filter": {"user": "a"}, "max_rounds": 2, "prior_weight": 0.5, "trace": True}
    completion = complete(
        client,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        max_completion_tokens=9,
        max_tokens=5,
        user="me",
        metadata={"a": "b"},
        extra_body={"msa": extra},
    )
    assert asking.calls[0][2]["filter"] == {"user": "a"}
    assert asking.calls[0][2]["changes"] == {
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "max_new_tokens": 9,
        "max_rounds": 2,
        "prior_weight": 0.5,
    }
    assert [r["index"] for r in completion.msa["rounds"]] == [1, 2, 3]


def test_a_cut_answer_says_so(client, asking):
    asking.stopped = "max_tokens"
    assert complete(client).choices[0].finish_reason == "length"
    response = respond(client)
    assert (response.status, response.completed_at) == ("incomplete", None)
    assert response.incomplete_details.reason == "max_output_tokens"
    *_, last = respond(client, stream=True)
    assert last.type == "response.incomplete"


@pytest.mark.parametrize("stopped", ["not_found", "max_rounds", "max_positions"])
def test_an_answer_that_ends_otherwise_is_whole(client, asking, stopped):
    asking.stopped = stopped
    completion = complete(client)
    assert completion.choices[0].finish_reason == "stop"
    assert completion.msa["stopped"] == stopped


@pytest.mark.parametrize(
    ("form", "text", "annotated"),
    [
        ("annotations", "In Rome.", 2),
        ("markers", "In Rome. [1][2]", 2),
        ("open_webui", "In Rome. [1][2]", 0),
        ("none", "In Rome.", 0),
    ],
)
def test_citations_come_in_the_form_that_was_asked_for(client, form, text, annotated):
    body = {"msa": {"citations": form}}
    message = complete(client, extra_body=body).choices[0].message
    assert message.content == text
    assert len(message.annotations) == annotated
    chunks = list(complete(client, stream=True, extra_body=body))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
    events = [c.event["data"]["document"] for c in chunks if getattr(c, "event", None)]
    assert events == ([[ADA.text], [BOB.text]] if form == "open_webui" else [])


def test_markdown_lists_the_sources(client):
    message = complete(client, extra_body={"msa": {"citations": "markdown"}}).choices[0].message
    assert message.content.endswith("- [2] [bob](http://testserver/d/notes/7)")


def test_earlier_turns_make_the_question_whole(client, asking):
    messages = [
        {"role": "system", "content": "Anna Smith is nobody; answer in French."},
        *ASK,
        {"role": "assistant", "content": "In Rome. [1][2]", "annotations": [], "refusal": None},
        {"role": "user", "content": [{"type": "text", "text": "When did she leave?"}]},
    ]
    assert complete(client, messages).msa["question"] == "When did Ada leave?"
    complete(client, messages, extra_body={"msa": {"standalone": True}})
    assert asking.calls[1][1] == "When did she leave?"
    respond(client, [m for m in messages if "refusal" not in m])
    assert asking.calls[2][1] == "When did Ada leave?"


NOT_SUPPORTED = {
    "n": 2,
    "stop": ["."],
    "logprobs": True,
    "top_logprobs": 3,
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "response_format": {"type": "json_object"},
    "modalities": ["text", "audio"],
    "frequency_penalty": 1.0,
    "logit_bias": {"5": 1},
    "store": True,
    "reasoning_effort": "high",
    "service_tier": "flex",
    "web_search_options": {},
}


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_what_a_chat_does_not_support_is_refused_by_name(client, asking, name):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **{name: NOT_SUPPORTED[name]})
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", name)
    assert asking.calls == []


def test_what_asks_for_nothing_is_no_error(client):
    neutral = {
        "n": 1,
        "stop": None,
        "logprobs": False,
        "tools": [],
        "response_format": {"type": "text"},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "store": False,
    }
    assert complete(client, **neutral).choices[0].message.content == "In Rome."


IMAGE = {"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content"),
        ({"messages": [*ASK, {"role": "assistant", "content": "In Rome."}]}, "messages"),
        ({"messages": [{"role": "user", "content": "  "}]}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role"),
        ({"extra_body": {"unheard_of": 1}}, "unheard_of"),
        ({"extra_body": {"msa": {"slack": 0.5}}}, "msa.slack"),
        ({"extra_body": {"msa": {"citations": "footnotes"}}}, "msa.citations"),
        ({"extra_body": {"msa": {"max_rounds": 0}}}, "msa.max_rounds"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, None),
    ],
)
def test_what_cannot_be_asked_is_refused_with_its_name(client, asking, body, param):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **body)
    assert caught.value.param == (param or "stream_options.include_obfuscation")
    assert asking.calls == []


# ---- responses


def test_every_round_is_a_file_search(client):
    response = respond(client)
    *searches, message = response.output
    assert [item.type for item in response.output] == ["file_search_call"] * 3 + ["message"]
    assert all(s.status == "completed" and s.results is None for s in searches)
    assert searches[0].queries == ["Where was Ada born?"]
    assert response.output_text == "In Rome."
    first, second = message.content[0].annotations
    assert (first.type, first.filename, first.index) == ("file_citation", "Ada", 8)
    assert (second.file_id, second.filename) == ("doc-notes-7", "bob")
    assert response.status == "completed"
    assert response.completed_at >= response.created_at
    assert (response.usage.input_tokens, response.usage.output_tokens) == (90, 5)
    assert response.msa["stopped"] == "answered"
    assert response.tools[0].vector_store_ids == ["notes"]
    assert (response.store, response.background) == (False, False)


def test_results_are_listed_when_they_are_asked_for(client):
    include = ["file_search_call.results"]
    first = respond(client, tools=[TOOL], include=include).output[0].results
    assert [(r.file_id, r.filename, r.score, r.text) for r in first] == [
        ("doc-notes-3", "Ada", 0.3, ADA.text),  # what was read comes first
        ("doc-notes-4", "rome", 0.5, ROME.text),  # and what was deleted meanwhile does not
    ]
    assert first[1].attributes == {"user": "a", "year": 2}
    few = {**TOOL, "max_num_results": 1}
    assert len(respond(client, tools=[few], include=include).output[0].results) == 1
    good = {**TOOL, "ranking_options": {"score_threshold": 0.4}}
    (only,) = respond(client, tools=[good], include=include).output[0].results
    assert only.filename == "rome"


SEARCH = [
    "response.output_item.added",
    "response.file_search_call.in_progress",
    "response.file_search_call.searching",
    "response.file_search_call.completed",
    "response.output_item.done",
]


def test_the_events_of_a_response_come_in_order(client):
    events = list(respond(client, stream=True))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        *SEARCH * 3,
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.annotation.added",
        "response.output_text.annotation.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    added = [e.output_index for e in events if e.type == "response.output_item.added"]
    assert added == [0, 1, 2, 3]
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == "In Rome."
    items = [e.item for e in events if e.type == "response.output_item.done"]
    assert items == events[-1].response.output
    assert events[0].response.status == "in_progress"
    assert events[0].response.output == []


def test_the_client_collects_a_streamed_response(client):
    with client.responses.stream(model=MODEL, input="Where was Ada born?") as stream:
        final = stream.get_final_response()
    assert final.output_text == "In Rome."
    whole = respond(client)
    assert [i.type for i in final.output] == [i.type for i in whole.output]
    annotations = final.output[-1].content[0].annotations
    assert annotations == whole.output[-1].content[0].annotations


def test_the_tool_filters_and_limits(client, asking):
    tool = {**TOOL, "filters": {"type": "eq", "key": "user", "value": "a"}}
    extra = {"msa": {"filter": {"year": 2}}}
    respond(client, tools=[tool], max_tool_calls=2, max_output_tokens=7, extra_body=extra)
    assert asking.calls[0][2]["filter"] == {"and": [{"user": {"eq": "a"}}, {"year": 2}]}
    assert asking.calls[0][2]["changes"] == {"max_rounds": 2, "max_new_tokens": 7}


def test_output_that_a_client_sends_back_is_taken(client, asking):
    first = respond(client)
    items = [item.model_dump(exclude_none=True) for item in first.output]
    again = [{"role": "user", "content": "Where was Ada born?"}, *items]
    respond(client, [*again, {"role": "user", "content": "Why?"}])
    assert asking.calls[1][1] == "Why was Ada born?"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"tool_choice": "none"}, "tool_choice"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"text": {"format": {"type": "json_object"}}}, "text"),
        ({"include": ["reasoning.encrypted_content"]}, "include.0"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{**TOOL, "vector_store_ids": ["other"]}]}, "tools.0.vector_store_ids"),
        ({"tools": [{**TOOL, "filters": {"type": "like"}}]}, "tools.0.filters.type"),
        ({"tools": [{**TOOL, "max_num_results": 51}]}, "tools.0.max_num_results"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"given": [{"type": "function_call_output", "output": "1", "call_id": "c"}]}, "input"),
        ({"given": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"given": [{"role": "robot", "content": "Where?"}]}, "input.0.role"),
        ({"given": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content"),
        ({"given": []}, "input"),
        ({"given": ""}, "input"),
        ({"extra_body": {"msa": {"citations": "open_webui"}}}, "msa.citations"),
    ],
)
def test_what_a_response_does_not_support_is_refused_by_name(client, asking, body, param):
    with pytest.raises(openai.BadRequestError) as caught:
        respond(client, **body)
    assert caught.value.param == param
    assert asking.calls == []


# ---- errors


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_stream_has_its_status(client, stream):
    for ask in (
        lambda: complete(client, [{"role": "user", "content": "wait"}], stream=stream),
        lambda: respond(client, "wait", stream=stream),
    ):
        with pytest.raises(openai.RateLimitError) as caught:
            ask()
        assert caught.value.code == "queue_full"
        assert caught.value.response.headers["retry-after"] == "1"


FAIL = {"role": "user", "content": "fail"}


def read_to_error(stream):
    pieces = []
    try:
        for piece in stream:
            pieces.append(piece)
    except openai.APIError as error:
        return pieces, error
    raise AssertionError("the stream ended without an error")


def test_an_error_in_a_stream_reaches_the_client(client, asking):
    chunks, error = read_to_error(complete(client, [FAIL], stream=True))
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "In"]
    assert error.body["code"] == "draining"
    events, error = read_to_error(respond(client, "fail", stream=True))
    assert "The service is stopping" in str(error)
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
    assert [item.status for item in events[-1].response.output] == ["completed"] * 3 + [
        "incomplete"
    ]
    assert all(ask.is_stopped.is_set() for ask in asking.asks)


def test_a_stream_ends_with_done_and_only_if_it_is_whole(app):
    with TestClient(app) as client:
        for path, field in (("chat/completions", "messages"), ("responses", "input")):
            for question, end in (("Where?", "data: [DONE]\n\n"), ("fail", None)):
                body = {"model": MODEL, field: [{"role": "user", "content": question}]}
                text = client.post(f"/v1/{path}", json={**body, "stream": True}).text
                assert text.endswith(end or "}\n\n")
                last = text.rstrip().splitlines()[-1].removeprefix("data: ")
                assert end or json.loads(last)["error"]["code"] == "draining"


JSON = {"Content-Type": "application/json"}


def test_half_a_character_is_refused(app):
    with TestClient(app) as client:
        for path, body in (
            ("chat/completions", '{"model": "msa/notes", "user": "\\ud800", "messages": []}'),
            ("responses", '{"model": "msa/notes", "input": "Where?", "metadata": {"\\udfff": ""}}'),
        ):
            answer = client.post(f"/v1/{path}", content=body, headers=JSON)
            assert answer.status_code == 400
            assert "not valid Unicode" in answer.json()["error"]["message"]


# ---- other transports


def test_the_asynchronous_client_is_answered_too(app):
    async def ask():
        transport = httpx2.ASGITransport(app=app)
        async with (
            httpx2.AsyncClient(transport=transport) as http,
            openai.AsyncOpenAI(
                api_key="none",
                base_url="http://testserver/v1",
                http_client=http,
                _strict_response_validation=True,
            ) as client,
        ):
            whole = await complete(client)
            stream = await complete(client, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            response = await respond(client)
            events = [event.type async for event in await respond(client, stream=True)]
        return whole.choices[0].message.content, "".join(pieces), response.output_text, events[-1]

    assert asyncio.run(ask()) == ("In Rome.", "In Rome.", "In Rome.", "response.completed")


@contextlib.contextmanager
def served(app):
    """The app on a port of its own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def test_the_model_stops_when_the_client_goes(app, asking):
    question = "Go on for ever."
    with (
        served(app) as port,
        openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1") as client,
    ):
        for ask in (
            lambda: complete(client, [{"role": "user", "content": question}], stream=True),
            lambda: respond(client, question, stream=True),
        ):
            stream = ask()
            for _ in range(4):
                next(stream)
            assert not asking.asks[-1].is_stopped.is_set()
            stream.close()
            assert asking.asks[-1].is_stopped.wait(10)
        with pytest.raises(openai.APITimeoutError):
            respond(client.with_options(timeout=0.5, max_retries=0), question)
        assert asking.asks[-1].is_stopped.wait(10)


def test_the_schema_names_what_is_not_supported(app):
    properties = app.openapi()["components"]["schemas"]["ChatRequest"]["properties"]
    assert properties["n"]["enum"] == [None, 1]
    assert not re.search(r'"/v1/embeddings"', json.dumps(app.openapi()["paths"]))
