from __future__ import annotations

import asyncio
import json
import logging

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("pydantic_settings")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx2")

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict
from starlette.testclient import TestClient

from msa.errors import (
    BankError,
    DocumentNotFoundError,
    DuplicateDocumentError,
    EmptyBankError,
    InputError,
    QuestionTooLongError,
    StorageError,
)
from msa.serve.errors import add_handlers, service_error
from msa.serve.gate import Gate
from msa.serve.metrics import Metrics
from msa.serve.request_log import JsonLines, RequestLog
from msa.serve.settings import ServeSettings


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    count: int


def make_client(**given):
    given = {"max_body_bytes": 2000, "max_upload_bytes": 5000, **given}
    app = FastAPI()
    add_handlers(app)

    @app.post("/json")
    async def take(body: Body):
        return body.count

    @app.post("/v1/files")
    async def upload(request: Request):
        return len(await request.body())

    @app.get("/items/{name}")
    async def item(name: str):
        raise KeyError(f"secret {name}")

    app.state.stopping = False
    settings = ServeSettings.load(**given)
    app.add_middleware(Gate, settings=settings, stopping=lambda: app.state.stopping)
    app.state.metrics = Metrics()
    app.add_middleware(RequestLog, metrics=app.state.metrics)
    return TestClient(app, base_url="http://localhost")


@pytest.fixture
def client():
    return make_client()


def error_of(response):
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.status_code, response.json()["error"]["code"]


def test_names_of_other_hosts_are_refused_and_addresses_are_not(client):
    def ask(host):
        return client.post("/json", json={"count": 1}, headers={"host": host})

    assert error_of(ask("evil.example")) == (421, "unknown_host")
    assert error_of(ask("localhost.evil.example:8000")) == (421, "unknown_host")
    assert error_of(ask("a b")) == (400, "invalid_host")
    for host in ("localhost:8000", "127.0.0.1", "192.168.1.2:80", "[::1]:8000", "LOCALHOST"):
        assert ask(host).json() == 1
    wide = make_client(allowed_hosts=["msa.example"])
    assert wide.post("/json", json={"count": 1}, headers={"host": "MSA.example"}).json() == 1


def test_pages_of_other_origins_change_nothing():
    client = make_client(cors_origins=["https://chat.example"], public_url="https://msa.example/x")

    def ask(origin):
        return client.post("/json", json={"count": 1}, headers={"origin": origin})

    for origin in ("https://evil.example", "null", "http://localhost:1"):
        assert error_of(ask(origin)) == (403, "origin_forbidden")
    for origin in ("http://localhost", "https://chat.example", "https://msa.example"):
        assert ask(origin).json() == 1


def test_no_new_work_is_taken_when_the_service_is_stopping(client):
    client.app.state.stopping = True
    assert error_of(client.post("/json", json={"count": 1})) == (503, "draining")
    assert error_of(client.get("/none")) == (404, "unknown_url")


def test_bodies_are_counted_while_they_come(client):
    def pieces(count):
        yield from [b"x" * 1000] * count

    assert error_of(client.post("/json", content=b"x" * 2001)) == (413, "body_too_large")
    assert error_of(client.post("/json", content=pieces(3))) == (413, "body_too_large")
    assert client.post("/v1/files", content=pieces(5)).json() == 5000
    assert error_of(client.post("/v1/files", content=pieces(6))) == (413, "body_too_large")
    wrong = client.post("/json", content=b"", headers={"content-length": "-1"})
    assert error_of(wrong) == (400, "invalid_value")


def test_a_body_that_comes_too_slowly_is_given_up():
    async def run():
        sent = []

        async def receive():
            await asyncio.sleep(10)

        async def send(message):
            sent.append(message)

        settings = ServeSettings.load(body_seconds=0.05)
        app = make_client().app
        app.user_middleware.clear()
        app.add_middleware(Gate, settings=settings, stopping=lambda: False)
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/json",
            "raw_path": b"/json",
            "query_string": b"",
            "headers": headers,
            "root_path": "",
        }
        await app(scope, receive, send)
        return sent

    sent = asyncio.run(run())
    assert sent[0]["status"] == 408


def test_what_is_wrong_with_a_body_is_named_without_repeating_it(client):
    unknown = client.post("/json", json={"count": 1, "colour": "secret"})
    assert error_of(unknown) == (400, "unsupported_parameter")
    assert unknown.json()["error"]["param"] == "colour"
    wrong = client.post("/json", json={"count": "secret"})
    assert error_of(wrong) == (400, "invalid_value")
    assert wrong.json()["error"]["param"] == "count"
    assert "secret" not in unknown.text + wrong.text
    broken = client.post("/json", content=b"{", headers={"content-type": "application/json"})
    assert error_of(broken) == (400, "invalid_json")
    assert error_of(client.get("/none")) == (404, "unknown_url")
    assert error_of(client.get("/json")) == (405, "method_not_allowed")


def test_a_fault_is_told_and_logged_without_its_message(client, caplog):
    with caplog.at_level(logging.INFO, "msa.serve"):
        response = client.get("/items/my-id", headers={"X-Request-Id": "abc-1"})
    assert error_of(response) == (500, "internal_error")
    assert response.headers["x-request-id"] == "abc-1"
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert [line["message"] for line in lines] == ["failure", "request"]
    assert lines[0]["error"] == "KeyError"
    assert lines[1]["route"] == "/items/{name}"
    assert lines[1]["status"] == 500
    assert lines[1]["request_id"] == "abc-1"
    assert "secret" not in json.dumps(lines)
    assert "my-id" not in json.dumps(lines[1])


def test_an_id_that_is_no_id_is_replaced(client):
    for given in ("a b", "x" * 129, '"'):
        answered = client.get("/none", headers={"X-Request-Id": given}).headers["x-request-id"]
        assert len(answered) == 32


def test_counters_name_routes_not_addresses(client):
    client.get("/items/secret")
    client.get("/elsewhere/secret")
    text = client.app.state.metrics.text(with_banks=True).decode()
    assert 'msa_requests_total{code="500",route="/items/{name}"} 1.0' in text
    assert 'route="unmatched"' in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InputError("the question is empty"), 400, "invalid_value"),
        (QuestionTooLongError("it needs 9 positions"), 400, "question_too_long"),
        (EmptyBankError("Bank '/srv/x' holds no documents"), 400, "empty_bank"),
        (DocumentNotFoundError("bank '/srv/x' holds none"), 404, "document_not_found"),
        (DuplicateDocumentError("'a' is there"), 409, "duplicate_document"),
        (StorageError("/srv/x: full"), 507, "disk_full"),
        (BankError("bank '/srv/x' is closed"), 500, "internal_error"),
        (RuntimeError("/srv/x"), 500, "internal_error"),
    ],
)
def test_errors_of_the_library_are_told_without_folders_of_this_machine(error, status, code):
    told = service_error(error)
    assert (told.status, told.code) == (status, code)
    assert "/srv" not in told.message
    assert (told.headers or {}).get("x-should-retry") == ("false" if status == 409 else None)
