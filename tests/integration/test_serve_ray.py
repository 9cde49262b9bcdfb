"""`msa serve --ray`: two replicas and a writer, as people start them, on this machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from msa import MemoryBank
from serve_process import ServeProcess

for name in ("fastapi", "uvicorn", "pydantic_settings", "prometheus_client", "multipart"):
    pytest.importorskip(name, reason="needs the extra 'serve'")
pytest.importorskip("ray.serve", reason="needs the extra 'replicas'", exc_type=ImportError)

SECONDS = 1200  # to start several processes with a model, on a busy machine
PATIENCE_OF_RAY = {  # with its own proxy
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "600",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "600",
}
CLIENTS = 3
ROUNDS = 3
READS = 4  # after every write, side by side


class Service(ServeProcess):
    """Two replicas and a writer, of a bank with a file to index."""

    def __init__(self, folder: Path) -> None:
        notes = folder / "files"
        notes.mkdir()
        (notes / "watts.txt").write_text("Erik Watts was born in 1912.")
        self.bank = folder / "bank"
        options = [notes, "--bank", f"notes={self.bank}", "--ray"]
        settings = {"MSA_SHARDS": "1", "MSA_REPLICAS": "2", **PATIENCE_OF_RAY}
        super().__init__(folder, *options, seconds=SECONDS, **settings)


@pytest.fixture(scope="module")
def service(one_ray, tmp_path_factory):
    service = Service(tmp_path_factory.mktemp("replicas"))
    try:
        service.until_listening()
        yield service
    finally:
        service.end()


def test_every_replica_knows_what_its_client_wrote_before(service):
    """Several clients write and read at once; no read is older than its own client's last write."""
    seen: Counter[str] = Counter()

    def found() -> set[str]:
        body = {"query": "Who was born?", "top_k": 64}
        response = service.ask("POST", "/api/banks/notes/search", body)
        while response.status == 503:  # a busy replica has not seen the latest writes in time
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


def process_of(root: int, title: str) -> int:
    """Id of the process below another one whose title begins so."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            titles[int(folder.name)] = (folder / "cmdline").read_text()
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(") ")[2][2:].split()[0]
            )
    found = []
    for pid, told in titles.items():
        above = pid
        while above not in (root, 0):
            above = parents.get(above, 0)
        if above == root and told.startswith(title):
            found.append(pid)
    (pid,) = found
    return pid


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find a process")
def test_a_writer_that_is_killed_comes_back_with_all_it_has_acknowledged(service):
    documents = "/api/banks/notes/documents"
    kept = service.ask("PUT", f"{documents}/kept", {"text": "Ida Kept was born in 1931."})
    assert kept.status == 201, kept.text
    os.kill(process_of(service.process.pid, "ray::Writer"), signal.SIGKILL)
    statuses = Counter()

    def written() -> bool:
        put = service.ask("PUT", f"{documents}/next", {"text": "Ivo Next was born in 1932."})
        statuses[put.status] += 1
        if put.status == 503:
            assert int(put.headers["Retry-After"]) > 0
        return put.status in (200, 201)

    service.until(written)
    assert set(statuses) <= {200, 201, 503}
    found = service.ask("POST", "/api/banks/notes/search", {"query": "Who was born?", "top_k": 64})
    assert found.status == 200, found.text
    assert {"kept", "next"} <= {hit["id"] for hit in found.json["data"]}
    assert service.ask("GET", f"{documents}/kept").json["text"] == "Ida Kept was born in 1931."
    answer = service.ask("POST", "/api/banks/notes/ask", {"question": "When was Ivo Next born?"})
    assert answer.status == 200, answer.text
    for name in ("kept", "next"):
        assert service.ask("DELETE", f"{documents}/{name}").status == 200


def test_it_ends_when_told_to_and_leaves_the_bank_to_the_next_writer(service):
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(SECONDS) == 0, service.text()
    with MemoryBank.open(service.bank) as bank:
        assert "client0-0" not in bank
        assert len(bank) == 1
