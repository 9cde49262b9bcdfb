"""`msa serve --ray`: two replicas and a writer, as people start them, on this machine."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from msa import MemoryBank

for name in ("fastapi", "uvicorn", "pydantic_settings", "prometheus_client", "multipart"):
    pytest.importorskip(name, reason="needs the extra 'serve'")
pytest.importorskip("ray.serve", reason="needs the extra 'replicas'", exc_type=ImportError)

SECONDS = 400  # to start several processes with a model, on a busy machine
COMMAND = "import sys; from msa.cli.main import main; main(sys.argv[1:])"
CLIENTS = 3
ROUNDS = 3
READS = 4  # after every write, side by side


class Service:
    """A running `msa serve --ray`."""

    def __init__(self, folder: Path) -> None:
        notes = folder / "files"
        notes.mkdir()
        (notes / "watts.txt").write_text("Erik Watts was born in 1912.")
        self.bank, self.log = folder / "bank", folder / "log"
        options = ["--bank", f"notes={self.bank}", "--port", "0", "--model", "worlds"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, "serve", notes, *options, "--ray"],
                stderr=log,
                env={**os.environ, "MSA_SHARDS": "1", "MSA_REPLICAS": "2"},
            )
        self.port = 0

    def until_ready(self) -> None:
        address = r"Serving at http://127\.0\.0\.1:(\d+)"
        self.port = int(self.until(lambda: re.search(address, self.log.read_text()))[1])

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def until(self, found):
        deadline = time.monotonic() + SECONDS
        while not (result := found()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)
        return result

    def ask(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        headers = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return SimpleNamespace(
            status=response.status,
            headers=response.headers,
            text=text,
            json=json.loads(text) if is_json else None,
        )


@pytest.fixture(scope="module")
def service(one_ray, tmp_path_factory):
    service = Service(tmp_path_factory.mktemp("replicas"))
    try:
        service.until_ready()
        yield service
    finally:
        service.end()


def test_every_replica_knows_what_its_client_wrote_before(service):
    """Several clients write and read at once; no read is older than its own client's last write."""
    seen: Counter[str] = Counter()

    def found() -> set[str]:
        body = {"query": "Who was born?", "top_k": 64}
        response = service.ask("POST", "/api/banks/notes/search", body)
        assert response.status == 200, response.text
        seen[response.headers["MSA-Replica"]] += 1
        return {hit["id"] for hit in response.json["data"]}

    def client(number: int) -> None:
        with ThreadPoolExecutor(READS) as readers:
            for turn in range(ROUNDS):
                name = f"client{number}-{turn}"
                path, text = f"/api/banks/notes/documents/{name}", f"{name} was born in 1950."
                put = service.ask("PUT", path, {"text": text})
                assert put.status == 201, put.text
                for ids in [reader.result() for reader in _reads(readers, found)]:
                    assert name in ids
                assert service.ask("DELETE", path).status == 200
                for ids in [reader.result() for reader in _reads(readers, found)]:
                    assert name not in ids

    with ThreadPoolExecutor(CLIENTS) as clients:
        for done in [clients.submit(client, number) for number in range(CLIENTS)]:
            done.result()
    assert len(seen) == 2, seen
    assert seen.total() == CLIENTS * ROUNDS * 2 * READS


def _reads(readers, found):
    """Reads that run side by side."""
    return [readers.submit(found) for _ in range(READS)]


def test_the_whole_app_is_there(service):
    """A job of the writer, an answer of a replica, a stream, and who does what is not seen."""
    jobs = service.ask("GET", "/api/banks/notes/jobs").json["data"]
    assert service.until(
        lambda: service.ask("GET", f"/api/jobs/{jobs[0]['id']}").json["status"] == "done"
    )
    question = {"question": "When was Erik Watts born?"}
    answer = service.ask("POST", "/api/banks/notes/ask", question)
    assert answer.status == 200, answer.text
    assert answer.json["text"] == "1912"
    stream = service.ask("POST", "/api/banks/notes/ask", {**question, "stream": True})
    events = re.findall(r"^event: (\w+)$", stream.text, re.MULTILINE)
    assert (events[0], events[-1]) == ("routing", "answer")
    chat = {"model": "msa/notes", "messages": [{"role": "user", "content": question["question"]}]}
    completion = service.ask("POST", "/v1/chat/completions", chat)
    assert "1912" in completion.json["choices"][0]["message"]["content"]
    assert [m["id"] for m in service.ask("GET", "/v1/models").json["data"]] == ["msa/notes"]
    assert service.ask("GET", "/readyz").json["status"] == "ready"
    ids = completion.headers.get_all("X-Request-Id")
    assert len(ids) == 1
    missing = service.ask("POST", "/api/banks/none/ask", question)
    assert (missing.status, missing.json["error"]["code"]) == (404, "bank_not_found")


def test_it_ends_when_told_to_and_leaves_the_bank_to_the_next_writer(service):
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(SECONDS) == 0, service.log.read_text()
    with MemoryBank.open(service.bank) as bank:
        assert "client0-0" not in bank
        assert len(bank) == 1
