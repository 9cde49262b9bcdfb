"""A server that is killed while it takes uploads: what it has acknowledged is there, once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("pydantic_settings")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")
pytest.importorskip("httpx2")

import httpx2

KILLS = int(os.environ.get("MSA_TEST_KILLS", "2"))
FILES = 4  # of each upload: three texts and a JSONL file
RECORDS = 40

SERVER = """
import sys
import uvicorn
from msa.serve.app import create_app
from msa.serve.settings import ServeSettings

folder = sys.argv[1]
app = create_app(ServeSettings.load(banks={"notes": folder + "/notes"}))

class Server(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        print(self.servers[0].sockets[0].getsockname()[1], flush=True)

Server(uvicorn.Config(app, port=0, log_level="error")).run()
"""


class Service:
    """A server process over one bank."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", SERVER, str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        port = int(self.process.stdout.readline())
        self.http = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        deadline = time.monotonic() + 120
        while self.http.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def kill(self) -> None:
        """End it as a power cut does; the client stays open, for threads that still use it."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def close(self) -> None:
        """Close the client, once nobody uses it."""
        self.http.close()

    def idle(self) -> None:
        """Wait until nothing is left to do."""
        deadline = time.monotonic() + 180
        while any(
            job["status"] in ("queued", "running")
            for job in self.http.get("/api/banks/notes/jobs?limit=100").json()["data"]
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def ids(self) -> list[str]:
        """Ids of all documents."""
        found, after = [], 0
        while after is not None:
            page = self.http.get(f"/api/banks/notes/documents?limit=100&after={after}").json()
            found += [row["id"] for row in page["data"]]
            after = page["next"]
        return found


def texts(run: int, count: int) -> list[tuple[str, bytes]]:
    """Files of an upload; their names say of which."""
    files = [
        (f"{run}-{count}-{i}.txt", f"Note {i} of upload {count} in run {run}.".encode())
        for i in range(FILES - 1)
    ]
    records = [{"text": f"Line {i} of upload {count} in run {run}."} for i in range(RECORDS)]
    return [*files, (f"{run}-{count}.jsonl", "\n".join(map(json.dumps, records)).encode())]


def upload_until_it_dies(service: Service, run: int, acknowledged: list[tuple[int, int]]) -> None:
    """Send one upload after the other, and note those that were acknowledged."""
    count = 0
    while True:
        files = [("files", pair) for pair in texts(run, count)]
        try:
            response = service.http.post("/api/banks/notes/jobs", files=files)
        except httpx2.HTTPError:
            return
        if response.status_code == 429:
            time.sleep(0.05)
            continue
        assert response.status_code == 202, response.text
        acknowledged.append((run, count))
        count += 1


def test_what_was_acknowledged_survives_being_killed_and_is_there_once(tmp_path):
    """Set MSA_TEST_KILLS for more than 2 kills."""
    acknowledged: list[tuple[int, int]] = []
    deleted: set[str] = set()
    pause = random.Random(0)
    for run in range(KILLS):
        service = Service(tmp_path)
        before = len(acknowledged)
        client = threading.Thread(target=upload_until_it_dies, args=(service, run, acknowledged))
        client.start()
        deadline = time.monotonic() + 60
        while len(acknowledged) == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(pause.uniform(0.0, 0.8))
        held = [name for name in service.ids() if name not in deleted]
        if held:
            gone = service.http.delete(f"/api/banks/notes/documents/{held[0].replace(':', '%3A')}")
            assert gone.status_code == 200, gone.text
            deleted.add(held[0])
        service.kill()
        client.join(60)
        assert not client.is_alive()
        service.close()
    service = Service(tmp_path)
    service.idle()
    ids = service.ids()
    job = service.http.post("/api/banks/notes:verify?wait_s=60").json()
    service.kill()
    service.close()
    assert job["result"]["problems"] == []
    assert len(ids) == len(set(ids))
    assert deleted.isdisjoint(ids), "what was deleted has come back"
    for run, count in acknowledged:
        names = [name for name, _ in texts(run, count)]
        for name in names[:-1]:
            assert name in ids or name in deleted
        lines = [name for name in (*ids, *deleted) if name.startswith(names[-1] + ":")]
        assert len(lines) == RECORDS
    assert not list((tmp_path / "notes.serve/uploads").iterdir())
