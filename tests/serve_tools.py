"""A service of the small model over banks in a folder, for tests."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

import msa
from msa.serve.app import create_app
from msa.serve.settings import ServeSettings

FACTS = {
    "ann": "Ann Moreau was born in Lisbon in 1921. She taught chemistry at the harbor school.",
    "bob": "Bob Tanner built the stone bridge over the Tarn in 1902.",
    "cy": "Cyrus Hale kept bees behind the old mill and sold honey on Sundays.",
}


@contextlib.contextmanager
def running(
    folder: Path, checkpoint: Any = None, keys: str | None = None, **given: Any
) -> Iterator[TestClient]:
    """A client of a service with one bank, `notes`, that is ready."""
    if keys is not None:
        given["api_key_file"] = folder / "keys"
        given["api_key_file"].write_text(keys)
    settings = ServeSettings.load(
        **{
            "banks": {"notes": folder / "notes"},
            "banks_folder": folder / "made",
            "queue_seconds": 600,  # on a busy machine
            "ask_seconds": 600,
            **given,
        }
    )
    app = create_app(settings, checkpoint or msa.load("worlds"))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        deadline = time.monotonic() + 60
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline, client.get("/readyz").text
            time.sleep(0.02)
        yield client


def put(client: TestClient, name: str, text: str, bank: str = "notes", **given: Any) -> Any:
    """Store a document; the response."""
    return client.put(f"/api/banks/{bank}/documents/{name}", json={"text": text, **given})


def finished(client: TestClient, job_id: str, seconds: float = 60) -> dict[str, Any]:
    """A job when it has ended."""
    deadline = time.monotonic() + seconds
    while True:
        job = client.get(f"/api/jobs/{job_id}").json()
        if job["status"] in ("done", "failed", "cancelled"):
            return dict(job)
        assert time.monotonic() < deadline, job
        time.sleep(0.02)


def error_of(response: Any) -> tuple[int, str]:
    """Status and code of an error."""
    return response.status_code, response.json()["error"]["code"]
