"""MCP over HTTP and over stdio, by the official client; and how retrievers reach a served bank."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from msa import Document, MemoryBank
from msa.cli import main
from msa.inference.options import AskOptions
from msa.integrations.searching import ServedBank, ServiceRequestError
from msa.model.checkpoint import Checkpoint
from msa.text.prompts import PromptTemplate

mcp = pytest.importorskip("mcp", reason="needs the extra 'serve'")
httpx2 = pytest.importorskip("httpx2", reason="needs the extra 'serve'")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from mcp.client.streamable_http import streamable_http_client  # noqa: E402

from msa.serve.app import create_app  # noqa: E402
from msa.serve.asking import Ask  # noqa: E402
from msa.serve.settings import ServeSettings  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MODES = ("auto", "legacy")
QUESTION = "Where was Ada born?"
MSA = "from msa.cli.main import main; main()"
PATIENCE = 600  # seconds, for a busy machine
KEYS = {
    "owner": "read,write *",
    "reader": "read *",
    "guest": "read places",
    "writer": "write *",
}
DOCUMENTS = {
    "people": [Document("ada", "Ada was born in Rome.", title="Ada")],
    "places": [Document("rome", "Rome lies on the Tiber.", title="Rome")],
}


class Served(NamedTuple):
    """A service that listens: its address, and what is behind it."""

    url: str
    service: Any

    def client(self, key: str | None, path: str = "/mcp", mode: str = "auto") -> Any:
        """A client of MCP, as a context."""
        return _client(f"{self.url}{path}", key, mode)


@contextlib.asynccontextmanager
async def _client(url: str, key: str | None, mode: str) -> AsyncIterator[Any]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(headers=headers, timeout=PATIENCE) as http:
        transport = streamable_http_client(url, http_client=http)
        async with mcp.Client(transport, mode=mode) as client:
            yield client


@pytest.fixture
def options() -> AskOptions:
    return AskOptions(max_rounds=2, max_new_tokens=6)


@pytest.fixture
def checkpoint(tiny_model, tiny_tokenizer, options) -> Checkpoint:
    return Checkpoint(tiny_model, tiny_tokenizer, PromptTemplate(), options, "tiny")


@pytest.fixture
def settings(tmp_path, checkpoint) -> ServeSettings:
    for name, documents in DOCUMENTS.items():
        with MemoryBank.create(tmp_path / name, checkpoint) as bank:
            bank.add(documents)
    keys = tmp_path / "keys"
    lines = (
        f"{hashlib.sha256(name.encode()).hexdigest()} {name} {rights}\n"
        for name, rights in KEYS.items()
    )
    keys.write_text("".join(lines))
    banks = {name: tmp_path / name for name in DOCUMENTS}
    seconds = {"queue_seconds": PATIENCE, "ask_seconds": PATIENCE}
    return ServeSettings(banks=banks, api_key_file=keys, port=0, **seconds)


@pytest.fixture
def serving(settings, checkpoint):
    """Runs a coroutine function beside a service that listens on a free port."""

    def serving(work: Callable[[Served], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            app = create_app(settings, checkpoint)
            config = uvicorn.Config(app, port=0, ws="none", log_config=None)
            server = uvicorn.Server(config)
            listening = asyncio.create_task(server.serve())
            try:
                while not server.started or app.state.service.state == "loading":
                    assert not listening.done(), listening
                    await asyncio.sleep(0.02)
                port = server.servers[0].sockets[0].getsockname()[1]
                return await work(Served(f"http://127.0.0.1:{port}", app.state.service))
            finally:
                server.should_exit = True
                await listening

        return asyncio.run(run())

    return serving


async def call(client: Any, tool: str, **arguments: Any) -> Any:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    return result.structured_content


@pytest.mark.parametrize("mode", MODES)
def test_tools_over_http_give_permalinks_that_open(serving, mode):
    steps: list[float] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        steps.append(done)

    async def work(served: Served) -> None:
        async with served.client("reader", mode=mode) as client:
            names = {tool.name for tool in (await client.list_tools()).tools}
            assert names == {"search", "fetch", "ask", "status"}
            found = (await call(client, "search", query=QUESTION))["results"]
            assert {item["id"] for item in found} == {"people/1", "places/1"}
            answer = await client.call_tool(
                "ask", {"question": QUESTION, "bank": "people"}, progress_callback=progress
            )
            assert answer.structured_content["citations"][0]["id"] == "people/1"
            assert steps == list(range(1, len(steps) + 1))
            assert steps
        url = next(item["url"] for item in found if item["id"] == "people/1")
        assert url == f"{served.url}/d/people/1"
        async with httpx2.AsyncClient(headers={"Authorization": "Bearer reader"}) as http:
            assert (await http.get(url)).json()["text"] == "Ada was born in Rome."

    serving(work)


@pytest.mark.parametrize("mode", MODES)
def test_an_address_with_a_bank_has_that_bank_alone(serving, mode):
    async def work(served: Served) -> None:
        async with served.client("owner", "/mcp/places", mode) as client:
            found = (await call(client, "search", query=QUESTION))["results"]
            assert [item["id"] for item in found] == ["places/1"]
            added = await call(client, "add", text="The Tiber is long.")
            assert added["passages"][0]["id"] == "places/2"
            assert (await client.call_tool("fetch", {"id": "people/1"})).is_error
            status = await call(client, "status")
            assert [bank["name"] for bank in status["banks"]] == ["places"]

    serving(work)


def test_strangers_and_other_tenants_learn_nothing(serving):
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    accept = {"Accept": "application/json, text/event-stream"}

    async def work(served: Served) -> None:
        async with httpx2.AsyncClient(headers=accept) as http:

            async def post(path: str, key: str | None, **headers: str) -> Any:
                given = {"Authorization": f"Bearer {key}"} if key else {}
                url = f"{served.url}{path}"
                return await http.post(url, json=message, headers={**given, **headers})

            for key in (None, "nobody"):
                refused = await post("/mcp", key)
                assert refused.status_code == 401
                assert refused.json()["error"]["code"] == "invalid_api_key"
                assert refused.headers["www-authenticate"] == "Bearer"
            assert (await post("/mcp", "writer")).status_code == 403
            hidden, missing = await post("/mcp/people", "guest"), await post("/mcp/none", "guest")
            assert hidden.status_code == missing.status_code == 404
            assert hidden.json() == missing.json()
            assert (await post("/mcp", "reader", Host="evil.example")).status_code == 421
            foreign = await post("/mcp", "reader", Origin="https://evil.example")
            assert foreign.status_code == 403
            large = await http.post(
                f"{served.url}/mcp",
                content=b'{"x":"' + b"x" * served.service.settings.max_body_bytes + b'"}',
                headers={"Authorization": "Bearer reader", "Content-Type": "application/json"},
            )
            assert large.status_code == 413

    serving(work)


def test_a_service_that_stops_takes_no_more_calls(serving):
    async def work(served: Served) -> None:
        served.service.state = "draining"
        async with httpx2.AsyncClient(headers={"Authorization": "Bearer reader"}) as http:
            refused = await http.post(f"{served.url}/mcp", json={})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) >= 1

    serving(work)


class TestAClientThatGoes:
    """Its question stops, however it speaks."""

    @pytest.fixture
    def options(self) -> AskOptions:
        return AskOptions(max_rounds=1, max_new_tokens=1500)

    @pytest.mark.parametrize("mode", MODES)
    def test_its_question_stops_before_the_answer(self, serving, monkeypatch, mode):
        pushed: list[str] = []
        push = Ask.push

        def spying(ask: Ask, item: Any) -> None:
            pushed.append(getattr(item, "kind", "error"))
            push(ask, item)

        monkeypatch.setattr(Ask, "push", spying)

        async def work(served: Served) -> None:
            begun = asyncio.Event()

            async def progress(done: float, total: float | None, message: str | None) -> None:
                begun.set()

            async def ask() -> None:
                async with served.client("reader", "/mcp/people", mode) as client:
                    arguments = {"question": QUESTION}
                    await client.call_tool("ask", arguments, progress_callback=progress)

            asking = asyncio.create_task(ask())
            await asyncio.wait_for(begun.wait(), PATIENCE)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            async with asyncio.timeout(PATIENCE):
                while served.service.asking.admission.inside:
                    await asyncio.sleep(0.02)
            assert "routing" in pushed
            assert "answer" not in pushed

        serving(work)


def test_retrievers_find_in_a_served_bank_what_its_engine_finds(serving):
    async def work(served: Served) -> None:
        bank = ServedBank(served.url, "people", api_key="reader")
        found = await asyncio.to_thread(bank.retrieve, QUESTION, 2)
        (engine,) = (one.engine for one in served.service.registry.all() if one.name == "people")
        assert found == engine.retrieve(QUESTION, top_k=2)
        stranger = ServedBank(served.url, "people", api_key="nobody")
        with pytest.raises(ServiceRequestError, match=r"401, This API key is not valid\."):
            await asyncio.to_thread(stranger.retrieve, QUESTION)

    serving(work)


@pytest.fixture
def model_folder(tiny_model, tiny_tokenizer, options, tmp_path) -> Path:
    folder = tmp_path / "model"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    options.save(folder)
    return folder


@pytest.fixture
def command(settings, model_folder):
    """`msa mcp` as a subprocess of a client."""

    def command(*words: str) -> Any:
        banks = [f"--bank={name}={folder}" for name, folder in settings.banks.items()]
        return mcp.StdioServerParameters(
            command=sys.executable,
            args=["-c", MSA, "mcp", *banks, f"--model={model_folder}", *words],
            env={
                name: value
                for name, value in os.environ.items()
                if name.startswith(("MSA_", "OMP_", "PYTHONPATH", "TOKENIZERS_"))
            },
        )

    return command


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_over_stdio_banks_are_read_beside_a_writer(command, settings, mode):
    async def work() -> None:
        async with mcp.Client(command(), mode=mode) as client:
            names = {tool.name for tool in (await client.list_tools()).tools}
            assert names == {"search", "fetch", "ask", "status"}
            with MemoryBank.open(settings.banks["people"]) as writer:  # nobody has its lock
                assert not writer.read_only
            document = await call(client, "fetch", id="people/1")
            assert document["url"] == "msa://people/1"
            answer = await call(client, "ask", question=QUESTION, bank="people")
            assert answer["citations"][0]["id"] == "people/1"

    asyncio.run(work())


@pytest.mark.slow
def test_over_stdio_a_writer_keeps_what_it_was_told(command, settings):
    async def work() -> None:
        words = ("--write", "--public-url", "https://msa.example.org")
        async with mcp.Client(command(*words)) as client:
            added = await call(client, "add", text="Cid paints.", bank="people", id="cid")
            assert added["passages"][0]["url"] == "https://msa.example.org/d/people/2"

    asyncio.run(work())
    with MemoryBank.open(settings.banks["people"], read_only=True) as bank:
        assert bank.get("cid").document.text == "Cid paints."


def test_a_folder_that_is_no_bank_is_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main.main(["mcp", "--bank", f"notes={tmp_path}"])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path) in error


def test_a_name_that_is_none_is_said(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main.main(["mcp", "--bank", f"../notes={tmp_path}"])
    assert stop.value.code == 1
    assert "is no name of a bank" in capsys.readouterr().err


def test_the_text_of_a_tool_is_the_json_of_its_structure(serving):
    async def work(served: Served) -> None:
        async with served.client("reader") as client:
            result = await client.call_tool("fetch", {"id": "people/1"})
            assert json.loads(result.content[0].text) == result.structured_content

    serving(work)
