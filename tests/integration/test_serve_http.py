"""`msa serve` as people start it: a process, a port, keys, files to index, a signal to stop."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from serve_process import ServeProcess

for name in ("fastapi", "uvicorn", "pydantic_settings", "prometheus_client", "multipart"):
    pytest.importorskip(name)

SECONDS = 120
FACTS = {
    "watts.txt": "Erik Watts was born in 1912.",
    "lane.txt": "Anna Lane was born in 1950.",
    "moreau.txt": "Paul Moreau was born in 1888.",
}
SECRET = "Secret Agent was born in 1777."
KEYS = {"root-key-1": "root read,write,admin *", "alice-key-1": "alice read notes"}


class Service(ServeProcess):
    """A service of two banks, one of them with files to index, for two keys."""

    def __init__(self, folder: Path) -> None:
        notes = folder / "files"
        notes.mkdir()
        for file, text in FACTS.items():
            (notes / file).write_text(text)
        lines = [f"{hashlib.sha256(k.encode()).hexdigest()} {who}" for k, who in KEYS.items()]
        (folder / "keys").write_text("\n".join(lines))
        banks = ["--bank", f"notes={folder / 'notes'}", "--bank", f"secret={folder / 'secret'}"]
        options = [notes, *banks, "--api-key-file", folder / "keys"]
        shutdown = {"MSA_SHUTDOWN_SECONDS": str(SECONDS)}
        super().__init__(folder, *options, seconds=SECONDS, key="root-key-1", **shutdown)
        self.first_states: list[tuple[int, str]] = []

    def until_ready(self) -> None:
        def ready() -> bool:
            assert self.ask("GET", "/healthz").status == 200
            answer = self.ask("GET", "/readyz")
            self.first_states.append((answer.status, answer.json["status"]))
            return answer.status == 200

        self.until_listening()
        self.until(ready)
        self.until(lambda: self.ask("GET", "/api/banks/notes").json["info"]["num_ids"] == 3)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    service = Service(tmp_path_factory.mktemp("serve"))
    try:
        service.until_ready()
        put = service.ask("PUT", "/api/banks/secret/documents/agent", {"text": SECRET})
        assert put.status in (200, 201), put.text
        yield service
    finally:
        service.end()


def test_it_answers_while_it_loads_and_says_when_it_is_ready(service):
    assert service.first_states[0] == (503, "loading")
    assert service.first_states[-1] == (200, "ready")
    version = service.ask("GET", "/version", key=None)
    assert version.json["model"] == "worlds"


def test_a_question_is_answered_from_the_files_it_was_started_with(service):
    body = {"question": "When was Erik Watts born?"}
    answer = service.ask("POST", "/api/banks/notes/ask", body)
    assert answer.status == 200
    assert answer.json["text"] == "1912"
    assert [c["text"] for c in answer.json["citations"]] == [FACTS["watts.txt"]]
    assert answer.json["rounds"] == []
    traced = service.ask("POST", "/api/banks/notes/ask", {**body, "trace": True})
    assert traced.json["rounds"][0]["routed"]
    both = {"questions": ["When was Erik Watts born?", "When was Anna Lane born?"]}
    answers = service.ask("POST", "/api/banks/notes/ask", both).json["data"]
    assert [answer["text"] for answer in answers] == ["1912", "1950"]
    found = service.ask("POST", "/api/banks/notes/search", {"query": "Anna Lane", "top_k": 1})
    assert [hit["text"] for hit in found.json["data"]] == [FACTS["lane.txt"]]


def test_a_stream_tells_what_happens_and_ends_with_the_answer(service):
    body = {"question": "When was Erik Watts born?", "stream": True}
    stream = service.ask("POST", "/api/banks/notes/ask", body)
    assert stream.headers["content-type"].startswith("text/event-stream")
    events = [frame.split("\n") for frame in stream.text.strip().split("\n\n")]
    kinds = [event[0].removeprefix("event: ") for event in events]
    assert kinds[:2] == ["routing", "reading"]
    assert kinds[-1] == "answer"
    data = [json.loads(event[1].removeprefix("data: ")) for event in events]
    written = [d for kind, d in zip(kinds, data, strict=True) if kind == "token"]
    assert "".join(written) == data[-1]["text"] == "1912"


def test_a_key_learns_nothing_of_the_bank_of_another(service):
    def alice(method, path, body=None):
        return service.ask(method, path, body, key="alice-key-1")

    assert [bank["name"] for bank in alice("GET", "/api/banks").json["data"]] == ["notes"]
    question = {"question": "When was Secret Agent born?"}
    for path in ("/ask", "/search", ""):
        method = "POST" if path else "GET"
        body = (question if path == "/ask" else {"query": "agent"}) if path else None
        hers = alice(method, f"/api/banks/secret{path}", body)
        nobodys = alice(method, f"/api/banks/nothing{path}", body)
        assert hers.status == nobodys.status == 404
        assert hers.text == nobodys.text
    assert alice("GET", "/metrics").status == 403
    put = alice("PUT", "/api/banks/notes/documents/mine", {"text": "Mine."})
    assert (put.status, put.json["error"]["code"]) == (403, "bank_forbidden")
    assert alice("GET", "/api/banks/notes").json["scopes"] == ["read"]
    answer = alice("POST", "/api/banks/notes/ask", question)
    assert "1777" not in answer.text
    for key in (None, "root-key-2"):
        refused = service.ask("GET", "/api/banks", key=key)
        assert (refused.status, refused.json["error"]["code"]) == (401, "invalid_api_key")
    assert 'msa_bank_documents{bank="secret"} 1.0' in service.ask("GET", "/metrics").text


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "invalid_value", "body"),
        ({"question": ""}, "invalid_value", "question"),
        ({"question": "a", "questions": ["b"]}, "invalid_value", "body"),
        ({"question": "a", "colour": 1}, "unsupported_parameter", "colour"),
        ({"question": "a", "options": {"max_rounds": 0}}, "invalid_value", "options.max_rounds"),
        ({"question": "a", "filter": {"year": {"near": 1}}}, "invalid_value", None),
        ({"question": "a", "filter": {"user": "nobody"}}, "empty_bank", None),
        ({"question": "a " * 16_000}, "question_too_long", None),
    ],
)
def test_what_cannot_be_asked_is_named(service, body, code, param):
    refused = service.ask("POST", "/api/banks/notes/ask", body)
    assert refused.status == 400
    error = refused.json["error"]
    assert error["code"] == code
    assert error["param"] == param
    assert str(service.log.parent) not in refused.text


def test_the_model_stops_when_the_client_goes(service):
    stopped = 'msa_asks_total{outcome="stopped"}'
    before = service.metric(stopped)
    questions = {"questions": ["When was Erik Watts born?"] * 64}
    connection = service.send("POST", "/api/banks/notes/ask", questions)
    while not service.metric("msa_queue_depth"):
        time.sleep(0.01)
    connection.close()
    while service.metric("msa_queue_depth"):
        time.sleep(0.01)
    time.sleep(0.5)  # for the step that was under way
    written = service.metric('msa_tokens_total{kind="generated"}')
    assert service.metric(stopped) > before
    time.sleep(0.5)
    assert service.metric('msa_tokens_total{kind="generated"}') == written


def test_the_description_and_its_page_come_from_here(service):
    spec = service.ask("GET", "/openapi.json", key=None).json
    assert "/api/banks/{bank}/ask" in spec["paths"]
    assert "422" not in json.dumps(spec["paths"])
    page = service.ask("GET", "/docs", key=None)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "//" not in re.sub("<!doctype html>", "", page.text)
    for name in ("docs.js", "docs.css"):
        assert service.ask("GET", f"/docs/{name}", key=None).status == 200


def test_it_ends_its_work_before_it_stops_and_leaves_lines_without_texts(service):
    answered = []
    questions = {"questions": ["When was Anna Lane born?"] * 64}  # long enough to look at it
    thread = threading.Thread(
        target=lambda: answered.append(service.ask("POST", "/api/banks/notes/ask", questions))
    )
    thread.start()
    while not service.metric("msa_queue_depth"):
        time.sleep(0.01)
    service.process.send_signal(signal.SIGTERM)
    while service.ask("GET", "/readyz").json["status"] == "ready":
        time.sleep(0.01)
    assert service.ask("GET", "/readyz").json["status"] == "draining"
    refused = service.ask("POST", "/api/banks/notes/ask", {"question": "Who?"})
    assert (refused.status, refused.json["error"]["code"]) == (503, "draining")
    assert int(refused.headers["retry-after"]) > 0
    thread.join(SECONDS)
    assert {answer["text"] for answer in answered[0].json["data"]} == {"1950"}
    assert service.process.wait(SECONDS) == 0
    lines = [json.loads(line) for line in service.text().splitlines() if line.startswith("{")]
    routes = {line["route"] for line in lines if line["message"] == "request"}
    assert {"/api/banks/{bank}/ask", "/healthz", "/metrics"} <= routes
    assert {line["level"] for line in lines} == {"info"}
    for text in ("Erik Watts", "Secret", "1912", *KEYS):
        assert text not in service.text()
