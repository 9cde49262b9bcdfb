"""OpenAI's clients against a service with a model, on a port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("pydantic_settings")
pytest.importorskip("prometheus_client")
pytest.importorskip("multipart")
pytest.importorskip("openai")

import httpx2
import openai
import uvicorn

from msa import MemoryBank, load
from msa.demo.material import load_material
from msa.serve.app import create_app
from msa.serve.settings import ServeSettings

MODEL = "msa/notes"
BIRTHPLACE = ("Where was Ursula F. Malic born?", "Katheim", "person-40")
TWO_HOPS = ("Which organisation employed Harriet Grimham's father?", "Ulsen and Eastard Foods")


@contextlib.contextmanager
def running(app):
    """A port on which the app runs, once it is ready."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        port = listener.getsockname()[1]
        try:
            deadline = time.monotonic() + 120
            while (
                not server.started or httpx2.get(f"http://127.0.0.1:{port}/readyz").is_server_error
            ):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield port
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "notes"
    checkpoint = load("worlds")
    with MemoryBank.create(folder, checkpoint) as bank:
        bank.add(load_material("worlds").documents)
    app = create_app(ServeSettings(banks={"notes": folder}), checkpoint)
    with running(app) as port:
        url = f"http://127.0.0.1:{port}/v1"
        options = {"api_key": "none", "base_url": url, "_strict_response_validation": True}
        with openai.OpenAI(**options) as client:
            yield SimpleNamespace(client=client, options=options, port=port)


def complete(client, question, **more):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=MODEL, messages=messages, **more)


def test_the_menu_of_a_chat_shows_the_banks(service):
    assert [model.id for model in service.client.models.list()] == [MODEL]
    assert service.client.models.retrieve(MODEL).owned_by == "msa"


def test_a_chat_is_answered_from_the_bank_and_cites_it(service):
    question, answer, cited = BIRTHPLACE
    completion = complete(service.client, question)
    message = completion.choices[0].message
    assert message.content == answer
    (citation,) = completion.msa["citations"]
    assert citation["id"] == cited
    (annotation,) = message.annotations
    assert annotation.url_citation.url == citation["url"]
    passage = httpx2.get(citation["url"], headers={"Accept": "application/json"}).json()
    ((start, end),) = passage["spans"]
    assert passage["text"][start:end] == answer
    assert completion.usage.total_tokens > completion.usage.completion_tokens > 0


def test_streams_and_the_asynchronous_client_say_the_same(service):
    question, answer, _ = BIRTHPLACE

    async def ask():
        async with openai.AsyncOpenAI(**service.options) as client:

            async def streamed():
                stream = await complete(client, question, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            async def responded():
                return (await client.responses.create(model=MODEL, input=question)).output_text

            return await asyncio.gather(streamed(), responded(), streamed(), responded())

    assert asyncio.run(ask()) == [answer] * 4


def test_every_round_of_two_hops_is_a_file_search(service):
    question, answer = TWO_HOPS
    response = service.client.responses.create(
        model=MODEL,
        input=question,
        tools=[{"type": "file_search", "vector_store_ids": ["notes"], "max_num_results": 3}],
        include=["file_search_call.results"],
        extra_body={"msa": {"trace": True}},
    )
    *searches, message = response.output
    assert response.output_text == answer
    assert len(searches) == len(response.msa["rounds"]) >= 2
    assert [s.type for s in searches] == ["file_search_call"] * len(searches)
    for search, found in zip(searches, response.msa["rounds"], strict=True):
        assert 1 <= len(search.results) <= 3
        assert all(0 <= r.score <= 1 and r.text for r in search.results)
        read = [citation["text"] for citation in found["read"]]
        assert [r.text for r in search.results][: len(read)] == read
    cited = {(a.file_id, a.filename) for a in message.content[0].annotations}
    results = {(r.file_id, r.filename) for s in searches for r in s.results}
    assert cited
    assert cited <= results


def test_a_streamed_response_is_numbered_and_whole(service):
    question, answer = TWO_HOPS
    events = list(service.client.responses.create(model=MODEL, input=question, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == answer


def test_a_follow_up_is_answered_as_the_whole_question_is(service):
    question, answer, _ = BIRTHPLACE
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Who employed her?"},
    ]
    followed = service.client.chat.completions.create(model=MODEL, messages=messages)
    whole = complete(service.client, "Who employed Ursula F. Malic?")
    assert followed.msa["question"] == "Who employed Ursula F. Malic?"
    assert followed.choices[0].message == whole.choices[0].message
    assert followed.msa["citations"] == whole.msa["citations"]


@pytest.mark.parametrize(
    ("question", "msa", "code"),
    [
        ("Where? " * 4000, {}, "question_too_long"),
        ("Where?", {"filter": {"user": "nobody"}}, "empty_bank"),
        ("Where?", {"filter": {"user": {"like": "a"}}}, "invalid_value"),
        ("Where?", {"min_documents_per_round": 9, "max_documents_per_round": 1}, "invalid_value"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_stream_begins(service, question, msa, code):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(service.client, question, stream=stream, extra_body={"msa": msa})
        assert caught.value.code == code


# ---- chat programs, as their own code sends and reads


def lines_of(service, body):
    """The lines of a stream that is asked for without a client of OpenAI's."""
    url = f"http://127.0.0.1:{service.port}/v1/chat/completions"
    with httpx2.stream("POST", url, json=body, timeout=120) as response:
        assert response.headers["content-type"].startswith("text/event-stream"), response.read()
        return list(response.iter_lines())


def read_as_open_webui(lines):
    """Text, sources and usage, by the order of the questions that its stream handler asks."""
    text, sources, usage = "", [], {}
    for line in lines:
        if not line or not line.startswith("data:"):
            assert not line or line.startswith(":"), "another line would be taken for an error"
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return text, sources, usage
        data = json.loads(data)
        assert not data.get("type", "").startswith("response.")
        if "event" in data:
            sources.append(data["event"])
        usage |= data.get("usage") or {}
        if not data.get("choices"):
            assert not data.get("error")
            continue
        delta = data["choices"][0].get("delta", {})
        for annotation in delta.get("annotations") or ():
            cited = annotation["url_citation"]
            source = {"name": cited["title"], "url": cited["url"]}
            sources.append({"type": "source", "data": {"source": source}})
        text += delta.get("content") or ""
    raise AssertionError("the stream has no end")


def test_open_webui_shows_every_source_once_with_its_passage(service):
    question, answer, _ = BIRTHPLACE
    body = {
        "model": MODEL,
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [
            {"role": "system", "content": "You are helpful."},
            {"role": "user", "content": [{"type": "text", "text": question}]},
        ],
        "temperature": 0.0,
        "frequency_penalty": 0.0,
        "msa": {"citations": "open_webui"},  # a custom parameter, which it reads as JSON
    }
    text, sources, usage = read_as_open_webui(lines_of(service, body))
    assert text == f"{answer} [1]"
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    (source,) = sources
    data = source["data"]
    assert source["type"] == "source"
    assert len(data["document"]) == len(data["metadata"]) == len(data["distances"]) == 1
    assert answer in data["document"][0]
    assert not data["metadata"][0]["source"].startswith("http"), "a URL would replace the name"
    assert data["metadata"][0]["source_url"].startswith(f"http://127.0.0.1:{service.port}/d/")
    assert 0 <= data["distances"][0] <= 1
    del body["msa"]  # without the parameter: the annotations, and their titles
    text, sources, _ = read_as_open_webui(lines_of(service, body))
    assert text == answer
    (source,) = sources
    assert source["data"]["source"]["url"].startswith(f"http://127.0.0.1:{service.port}/d/")


def test_open_webui_and_librechat_list_the_banks_and_show_what_is_refused(service):
    url = f"http://127.0.0.1:{service.port}/v1"
    listed = httpx2.get(f"{url}/models?user=1234", headers={"Authorization": "Bearer none"}).json()
    assert [model["id"] for model in listed["data"]] == [MODEL]
    assert all(model.get("name", model["id"]) for model in listed["data"])
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": ""}]}
    refused = httpx2.post(f"{url}/chat/completions", json=body)
    assert refused.status_code == 400
    assert refused.headers["content-type"] == "application/json"
    assert "says nothing" in refused.json()["error"]["message"]


def test_librechat_shows_the_sources_as_links_and_may_send_them_back(service):
    """It reads by LangChain: role and text of the deltas, a reason for the end, the usage."""
    question, answer, _ = BIRTHPLACE
    body = {
        "model": MODEL,
        "stream": True,
        "stream_options": {"include_usage": True},
        "n": 1,
        "user": "1234",
        "messages": [{"role": "user", "content": question}],
        "msa": {"citations": "markdown"},  # of addParams
    }
    data = [line.removeprefix("data: ") for line in lines_of(service, body) if line]
    assert data.pop() == "[DONE]"
    *chunks, last = map(json.loads, data)
    assert last["choices"] == []
    assert set(last["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    text = "".join(delta.get("content") or "" for delta in deltas)
    assert text.startswith(f"{answer} [1]\n\n")
    assert f"](http://127.0.0.1:{service.port}/d/notes/" in text
    assert [
        c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["finish_reason"]
    ] == ["stop"]
    messages = [
        *body["messages"],
        {"role": "assistant", "content": text},
        {"role": "user", "content": "Who employed her?"},
    ]
    followed = service.client.chat.completions.create(model=MODEL, messages=messages)
    assert followed.msa["question"] == "Who employed Ursula F. Malic?"
