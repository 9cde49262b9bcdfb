"""A replica: what it answers, what it hands on, and that it is never behind. No cluster here."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

for name in ("fastapi", "pydantic_settings", "prometheus_client", "multipart"):
    pytest.importorskip(name, reason="needs the extra 'serve'")
httpx = pytest.importorskip("httpx2", reason="needs the extra 'dev'")

from msa import Document, MemoryBank  # noqa: E402
from msa.errors import WorkerError  # noqa: E402
from msa.inference.options import AskOptions  # noqa: E402
from msa.memory.loaded.loaded_bank import BankSnapshot  # noqa: E402
from msa.model.checkpoint import Checkpoint  # noqa: E402
from msa.serve import replicas  # noqa: E402
from msa.serve.app import create_app  # noqa: E402
from msa.serve.banks import BankState  # noqa: E402
from msa.serve.errors import ServiceError, unavailable  # noqa: E402
from msa.serve.replicas import REPLICA, Replica, Writer  # noqa: E402
from msa.serve.settings import ServeSettings  # noqa: E402
from msa.text.prompts import PromptTemplate  # noqa: E402

SEARCH = {"query": "Who is here?", "top_k": 50}


@pytest.fixture
def checkpoint(tiny_model, tiny_tokenizer) -> Checkpoint:
    options = AskOptions(max_rounds=1, max_new_tokens=4)
    return Checkpoint(tiny_model, tiny_tokenizer, PromptTemplate(), options, "tiny")


@pytest.fixture
def serving(tmp_path, checkpoint):
    """Runs `work(client, writer)` with a replica beside a writer, both in this process."""
    settings = ServeSettings(
        banks={"notes": tmp_path / "notes"},
        banks_folder=tmp_path / "made",
        queue_seconds=600,
        ask_seconds=600,
        max_body_bytes=1024,
    )
    with MemoryBank.create(tmp_path / "notes", checkpoint) as bank:
        bank.add([Document("ada", "Ada is here.")])

    def serving(work, link=lambda writer: writer):
        async def run():
            writer = Writer(lambda: create_app(settings, checkpoint))
            await writer.ready()
            app = create_app(settings, checkpoint, read_only=True)
            replica = Replica(app, link(writer), "replica-1")
            async with app.router.lifespan_context(app):
                while app.state.service.state == "loading":
                    await asyncio.sleep(0.01)
                transport = httpx.ASGITransport(replica)
                async with httpx.AsyncClient(
                    transport=transport, base_url="http://localhost", timeout=600
                ) as client:
                    await work(client, writer)
            await writer.stop()

        asyncio.run(run())

    return serving


async def ids(client, bank="notes") -> set[str]:
    """Ids of the documents that a search finds."""
    response = await client.post(f"/api/banks/{bank}/search", json=SEARCH)
    assert response.status_code == 200, response.text
    assert response.headers[REPLICA] == "replica-1"
    return {hit["id"] for hit in response.json()["data"]}


def test_what_was_written_is_found_and_what_was_deleted_is_not(serving):
    async def work(client, writer):
        assert await ids(client) == {"ada"}
        for number in range(3):
            path = f"/api/banks/notes/documents/bob{number}"
            put = await client.put(path, json={"text": f"Bob {number} is here."})
            assert put.status_code in (200, 201), put.text
            assert await ids(client) == {"ada", f"bob{number}"}
            deleted = await client.delete(path)
            assert deleted.status_code == 200, deleted.text
            assert await ids(client) == {"ada"}

    serving(work)


def test_banks_that_the_writer_makes_and_removes_come_and_go(serving):
    async def work(client, writer):
        for text in ("first", "second"):  # of the same name, and yet another bank
            made = await client.post("/v1/vector_stores", json={"name": "made"})
            assert made.status_code == 200, made.text
            put = await client.put("/api/banks/made/documents/a", json={"text": text})
            assert put.status_code in (200, 201), put.text
            response = await client.post("/api/banks/made/search", json=SEARCH)
            assert [hit["text"] for hit in response.json()["data"]] == [text]
            assert (await client.delete("/v1/vector_stores/made")).status_code == 200
            response = await client.post("/api/banks/made/search", json=SEARCH)
            assert response.status_code == 404
            assert response.json()["error"]["code"] == "bank_not_found"

    serving(work)


def test_a_shard_that_died_is_a_reason_to_ask_again(serving, monkeypatch):
    async def work(client, writer):
        def route(self, *given):
            raise WorkerError("shard 0 of 1 was restarted; ask again")

        monkeypatch.setattr(BankSnapshot, "route", route)
        response = await client.post("/api/banks/notes/search", json=SEARCH)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_away")

    serving(work)


class Link:
    """A writer that is farther than the banks on this disk, or not there."""

    def __init__(self, writer, error=None):
        self._writer, self._error = writer, error

    async def states(self):
        if self._error is not None:
            raise self._error
        states = await self._writer.states()
        return {n: BankState(s.created, s.generation + 1) for n, s in states.items()}

    async def respond(self, scope, body):
        if self._error is not None:
            raise self._error
        async with contextlib.aclosing(self._writer.respond(scope, body)) as messages:
            async for message in messages:
                yield message


def test_a_replica_that_is_behind_does_not_answer(serving, monkeypatch):
    monkeypatch.setattr(replicas, "CATCH_UP_SECONDS", 0.2)

    async def work(client, writer):
        response = await client.post("/api/banks/notes/search", json=SEARCH)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "behind")
        assert int(response.headers["Retry-After"]) > 0

    serving(work, Link)


def test_without_a_writer_nothing_is_answered_but_how_it_is(serving):
    async def work(client, writer):
        for method, path in (("POST", "/api/banks/notes/search"), ("GET", "/api/banks")):
            response = await client.request(method, path, json=SEARCH)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "writer_away")
        assert (await client.get("/healthz")).status_code == 200

    serving(work, lambda writer: Link(writer, unavailable("writer_away", "It died.")))


def test_what_is_handed_on_has_passed_the_gate(serving):
    async def work(client, writer):
        large = await client.put("/api/banks/notes/documents/a", json={"text": "a" * 2000})
        assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
        strange = await client.get("/api/banks", headers={"Host": "evil.example"})
        assert (strange.status_code, strange.json()["error"]["code"]) == (421, "unknown_host")

    serving(work)


def test_a_reader_that_goes_ends_the_work_of_the_writer(serving):
    async def work(client, writer):
        ended = asyncio.Event()

        async def endless(scope, receive, send):
            try:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await receive()
                await receive()
            finally:
                ended.set()

        app, writer._app = writer._app, endless
        messages = writer.respond({"type": "http"}, b"")
        assert (await anext(messages))["type"] == "http.response.start"
        await messages.aclose()
        assert ended.is_set()
        writer._app = app

    serving(work)


def test_an_app_that_fails_fails_here_too(serving):
    async def work(client, writer):
        async def failing(scope, receive, send):
            raise ServiceError(500, None, None, "It broke.")

        app, writer._app = writer._app, failing
        with pytest.raises(ServiceError, match="It broke"):
            [message async for message in writer.respond({"type": "http"}, b"")]
        writer._app = app

    serving(work)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ray"], "msa serve --ray needs Ray Serve"),
        (["--shards", "2"], "--shards (MSA_SHARDS) is for several processes; give --ray"),
        (["--ray", "--replicas", "0"], "--replicas (MSA_REPLICAS): Input should be greater"),
        (["--ray", "--shards", "0"], "--shards (MSA_SHARDS): Input should be greater"),
    ],
)
def test_what_keeps_replicas_from_starting_is_one_line(
    capsys, tmp_path, monkeypatch, options, message
):
    from msa.cli.main import main

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--bank", str(tmp_path / "bank"), "--port", "0", *options])
    assert ended.value.code == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


class SlowRay:
    """Ray Serve on a busy machine: its proxy is late, and comes all the same."""

    def __init__(self):
        self.started = 0

    def start(self, http_options, logging_config):
        self.started += 1
        if self.started == 1:
            raise TimeoutError("HTTP proxies not available after 60s.")

    def ingress(self, build):
        return lambda: build

    def deployment(self, *given, **options):
        return SimpleNamespace(bind=lambda: None)

    def run(self, *given, **options):
        raise TimeoutError("Proxies not available after 60s.")


def test_a_proxy_that_is_late_is_waited_for(monkeypatch):
    pytest.importorskip("ray", reason="needs the extra 'replicas'")
    asked = []

    class Door(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404 if len(asked) == 1 else 200)  # the routes come last
            self.end_headers()

        def log_message(self, *given):
            pass

    with HTTPServer(("127.0.0.1", 0), Door) as door:
        thread = threading.Thread(target=door.serve_forever)
        thread.start()
        settings = ServeSettings(port=door.server_port)
        replicas._start_replicas(SlowRay(), settings)
        door.shutdown()
        thread.join()
    assert asked == ["/healthz"] * 2
    monkeypatch.setattr(replicas, "START_SECONDS", 0.0)
    with pytest.raises(WorkerError, match=f"does not answer at 127.0.0.1, port {settings.port}"):
        replicas._start_replicas(SlowRay(), settings)
