from __future__ import annotations

import asyncio
import hashlib
import json
import re
from dataclasses import replace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("pydantic_settings")
pytest.importorskip("prometheus_client")
pytest.importorskip("multipart")
pytest.importorskip("httpx2")

from starlette.testclient import TestClient

import msa
from msa import Document, MemoryBank
from msa.build import commit
from msa.errors import BankError, BankNotFoundError
from msa.inference.options import AskOptions
from msa.memory.loaded.content_store import CONTENT_READ
from msa.model.checkpoint import Checkpoint
from msa.serve.app import create_app
from msa.serve.banks import BankRegistry
from msa.serve.errors import ServiceError
from msa.serve.keys import ANONYMOUS, Principal
from msa.serve.service import Service
from msa.serve.settings import ServeSettings
from msa.text.prompts import PromptTemplate
from serve_tools import error_of, running

ALICE = Principal("alice", frozenset({"read", "admin"}), ("notes", "alice-*"))


@pytest.fixture(scope="module")
def checkpoint(request):
    model = request.getfixturevalue("tiny_model")
    tokenizer = request.getfixturevalue("tiny_tokenizer")
    return Checkpoint(model, tokenizer, PromptTemplate(), AskOptions(), "tiny")


@pytest.fixture
def registry(tmp_path, checkpoint):
    settings = ServeSettings.load(
        banks={"notes": tmp_path / "notes"}, banks_folder=tmp_path / "made"
    )
    registry = BankRegistry(settings)
    registry.open_all(checkpoint)
    yield registry
    registry.close()


def refusal(function, *given):
    with pytest.raises(ServiceError) as refused:
        function(*given)
    return refused.value.status, refused.value.code


def test_a_bank_that_a_key_may_not_know_of_is_like_one_that_is_not_there(registry):
    registry.create("other", ANONYMOUS)
    assert registry.names(ALICE) == ["notes"]
    assert registry.names(ANONYMOUS) == ["notes", "other"]
    hidden, missing = [], []
    for name, errors in (("other", hidden), ("none", missing)):
        with pytest.raises(ServiceError) as refused:
            registry.get(name, ALICE, "admin")
        errors.append(refused.value.body())
    assert hidden == missing
    assert refusal(registry.get, "notes", ALICE, "write") == (403, "bank_forbidden")
    assert registry.get("notes", ALICE).bank.path.name == "notes"


def test_banks_are_made_where_a_key_may_and_are_there_after_a_restart(registry, checkpoint):
    assert refusal(registry.create, "other", ALICE) == (403, "bank_forbidden")
    assert refusal(registry.create, "../x", ANONYMOUS) == (400, "invalid_value")
    registry.create("alice-1", ALICE).bank.add([Document("a", "text")])
    assert refusal(registry.create, "alice-1", ALICE) == (409, "bank_exists")
    settings = registry._settings
    registry.close()
    again = BankRegistry(settings)
    again.open_all(checkpoint)
    assert len(again.get("alice-1", ALICE).bank) == 1
    again.close()


def test_only_banks_that_were_made_over_the_api_are_removed(registry):
    folder = registry.create("alice-1", ALICE).bank.path
    registry.remove("alice-1", ALICE)
    assert not folder.exists()
    assert refusal(registry.get, "alice-1", ALICE) == (404, "bank_not_found")
    assert refusal(registry.remove, "notes", ALICE) == (403, "bank_forbidden")


def test_no_banks_are_made_without_a_folder_for_them(tmp_path, checkpoint):
    registry = BankRegistry(ServeSettings.load(banks={"notes": tmp_path / "notes"}))
    assert refusal(registry.get, "notes", ANONYMOUS) == (503, "loading")
    registry.open_all(checkpoint)
    assert refusal(registry.create, "x", ANONYMOUS) == (403, "bank_creation_off")
    registry.close()


def test_a_registry_for_reading_leaves_banks_to_their_writer(tmp_path, checkpoint):
    settings = ServeSettings.load(banks={"notes": tmp_path / "notes"})
    with pytest.raises(BankNotFoundError):
        BankRegistry(settings, read_only=True).open_all(checkpoint)
    with MemoryBank.create(tmp_path / "notes", checkpoint):
        reading = BankRegistry(settings, read_only=True)
        reading.open_all(checkpoint)
        assert reading.get("notes", ANONYMOUS).bank.read_only
        assert refusal(reading.get, "notes", ANONYMOUS, "write") == (403, "read_only")
        reading.close()


def test_what_is_no_bank_is_not_made_one(tmp_path, checkpoint):
    (tmp_path / "thesis.txt").write_text("mine")
    registry = BankRegistry(ServeSettings.load(banks={"notes": tmp_path}))
    with pytest.raises(BankError):
        registry.open_all(checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_service_without_an_app_asks_and_closes_its_banks(tmp_path, checkpoint):
    async def run():
        settings = ServeSettings.load(banks={"notes": tmp_path / "notes"})
        before = CONTENT_READ.total
        async with Service.running(settings, checkpoint) as service:
            served = service.registry.get("notes", ANONYMOUS)
            await asyncio.to_thread(served.bank.add, [Document("a", "Ada is here.")])
            answer = await service.asking.answer(served, "Who is here?", principal=ANONYMOUS)
            assert answer.question == "Who is here?"
            (hit,) = await service.asking.search(served, "Ada", 3, None, ANONYMOUS)
            assert hit.id == "a"
            figures = service.metrics.text(with_banks=True).decode()
            assert 'msa_bank_documents{bank="notes"} 1.0' in figures
            read = re.search(r"^msa_content_bytes_read_total (\S+)$", figures, re.MULTILINE)
            assert float(read[1]) == CONTENT_READ.total > before
            assert 'msa_asks_total{outcome="answered"} 1.0' in figures
            assert "notes" not in service.metrics.text(with_banks=False).decode()
        with pytest.raises(BankError, match="closed"):
            served.bank.check_open()

    asyncio.run(run())


def test_pages_of_allowed_origins_may_call_and_others_may_not(tmp_path):
    banks = {"notes": tmp_path / "notes"}
    settings = ServeSettings.load(banks=banks, cors_origins=["https://chat.example"])
    client = TestClient(create_app(settings), base_url="http://localhost")  # nothing is loaded
    wanted = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    for origin, allowed in (("https://chat.example", True), ("https://evil.example", False)):
        headers = {"Origin": origin}
        before = client.options("/api/banks/notes/ask", headers={**headers, **wanted})
        answer = client.get("/healthz", headers=headers)
        assert (before.status_code == 200) == allowed
        for response in (before, answer):
            given = response.headers.get("access-control-allow-origin")
            assert given == (origin if allowed else None)


def test_nothing_is_asked_before_the_banks_are_loaded(tmp_path):
    settings = ServeSettings.load(banks={"notes": tmp_path / "notes"})
    client = TestClient(create_app(settings), base_url="http://localhost")
    assert client.get("/readyz").json() == {"status": "loading", "banks": {"notes": "loading"}}
    version = client.get("/version").json()
    assert version == {
        "version": msa.__version__,
        **dict.fromkeys(("commit", "model", "weights", "router")),
    }
    refused = client.post("/api/banks/notes/ask", json={"question": "Who?"})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "loading"
    assert int(refused.headers["retry-after"]) > 0


def test_readiness_names_to_a_key_the_banks_that_it_may_know_of(tmp_path, checkpoint):
    keys = f"{hashlib.sha256(b'alice-key').hexdigest()} alice read notes\n"
    with running(tmp_path, checkpoint, keys) as client:
        service = client.app.state.service
        service.registry.create("secret", ANONYMOUS)
        asked = [None, "alice-key", "another"]
        headers = [{"Authorization": f"Bearer {key}"} if key else {} for key in asked]
        named = [client.get("/readyz", headers=some).json()["banks"] for some in headers]
        assert named == [{}, {"notes": "ready"}, {}]
        assert service.registry.states(ANONYMOUS) == {"notes": "ready", "secret": "ready"}


def test_the_version_says_which_model_made_the_banks(tmp_path, checkpoint):
    with running(tmp_path, checkpoint) as client:
        version = client.get("/version").json()
        manifest = client.app.state.service.registry.get("notes", ANONYMOUS).bank.manifest
        assert version["model"] == "tiny"
        assert (version["weights"], version["router"]) == (manifest.weights, manifest.router)
        assert version["commit"] == commit()


def test_the_demo_is_given_as_a_batch_takes_it(tmp_path, checkpoint):
    waiting = TestClient(
        create_app(ServeSettings.load(banks={"notes": tmp_path / "b"})), base_url="http://localhost"
    )
    assert error_of(waiting.get("/api/demo")) == (503, "loading")
    with running(tmp_path, replace(checkpoint, name="worlds")) as client:
        demo = client.get("/api/demo").json()
        assert len(demo["questions"]) == 3
        lines = "\n".join(map(json.dumps, demo["documents"][:3]))
        job = client.post("/api/banks/notes/documents:batch?wait_s=60", content=lines).json()
        assert (job["status"], job["added"]) == ("done", 3)
        ids = [row["id"] for row in client.get("/api/banks/notes/documents").json()["data"]]
        assert ids == [document["id"] for document in demo["documents"][:3]]
    with running(tmp_path / "other", checkpoint) as client:
        assert client.get("/api/demo").json()["documents"] != demo["documents"]


def test_a_service_that_cannot_load_says_why(tmp_path):
    def fail():
        raise BankError("no such model")

    async def run():
        settings = ServeSettings.load(banks={"notes": tmp_path / "notes"})
        async with Service.running(settings, fail):
            raise AssertionError("unreachable")

    with pytest.raises(BankError, match="no such model"):
        asyncio.run(run())
