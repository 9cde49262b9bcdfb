"""A real service keeps to its own /openapi.json, whatever is sent to it.

Schemathesis draws requests from the description, right and wrong ones. MSA_SCHEMA_EXAMPLES says how
many for each operation and kind. What deletes, and streams that do not end, are tried apart.
"""

from __future__ import annotations

import contextlib
import os
import time
from types import SimpleNamespace

import pytest

from measuring.service import BANK, Service
from measuring.serving import multipart

for name in ("fastapi", "uvicorn", "mcp", "pydantic_settings", "prometheus_client"):
    pytest.importorskip(name)
schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis.errors import Unsatisfiable  # noqa: E402
from schemathesis.checks import load_all_checks, not_a_server_error  # noqa: E402
from schemathesis.config import CacheConfig  # noqa: E402
from schemathesis.generation import GenerationMode  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

pytestmark = pytest.mark.slow
EXAMPLES = int(os.environ.get("MSA_SCHEMA_EXAMPLES", "3"))
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
FOLLOWS = "/api/jobs/{job_id}/events"
SECONDS = 60
MOST_SHOWN = 3


@schemathesis.serializer("application/jsonl")
def as_lines(context, value):
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """A service with something of everything, its description, and the ids of what there is."""
    folder = tmp_path_factory.mktemp("schema")
    environment = {"MSA_BANKS_FOLDER": str(folder / "made"), "MSA_ASK_SECONDS": "30"}
    with Service(folder, {BANK: folder / BANK}, "worlds", environment=environment) as service:
        schema = schemathesis.openapi.from_url(
            f"http://127.0.0.1:{service.port}/openapi.json",
            config=schemathesis.Config(cache=CacheConfig(enabled=False)),
        )
        load_all_checks()
        yield SimpleNamespace(service=service, schema=schema, ids=ids_of(service))


def ids_of(service: Service) -> dict[str, str]:
    stored = service.put("watts", "Erik Watts was born in 1912.")
    job = service.index([{"id": "lane", "text": "Anna Lane was born in 1950."}])
    service.finished(job)
    file = upload(service)
    files = {"file_ids": [file]}
    path = f"/v1/vector_stores/{BANK}/file_batches"
    batch = service.request("POST", path, files).json["id"]
    while service.request("GET", f"{path}/{batch}").json["status"] == "in_progress":
        time.sleep(0.05)
    return {
        "bank": BANK,
        "vector_store_id": BANK,
        "model": f"msa/{BANK}",
        "model_id": f"msa/{BANK}",
        "document_id": "watts",
        "number": str(stored.json["parts"][0]["number"]),
        "job_id": job,
        "batch_id": batch,
        "file_id": file,
    }


def upload(service: Service) -> str:
    files = [("moreau.txt", b"Paul Moreau was born in 1888.")]
    kind, body = multipart(files, "file", purpose="assistants")
    reply = service.request("POST", "/v1/files", body, kind=kind)
    assert reply.status == 200, reply.body
    return str(reply.json["id"])


def tried(api, operations, *, known: bool) -> list[str]:
    """What is wrong with the responses to drawn requests; with ids of what there is, if known."""
    wrong: list[str] = []
    for operation in operations:
        names = {p.name for p in operation.path_parameters}
        ids = {name: value for name, value in api.ids.items() if known and name in names}
        if known and not ids:
            continue
        for mode in GenerationMode:
            case_of = operation.as_strategy(generation_mode=mode, path_parameters=ids or None)
            for failure in drawn(api, case_of):
                wrong.append(f"{operation.label} ({mode.value}): {failure}")
    return wrong


def drawn(api, case_of) -> list[str]:
    """Failures of one operation: the first few."""
    failures: list[str] = []

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=case_of)
    def try_one(case):
        if len(failures) < MOST_SHOWN:
            failures.extend(checked(api, case))

    with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with it: no parameters
        try_one()
    api.service.check_alive()
    return failures


def checked(api, case) -> list[str]:
    base = f"http://127.0.0.1:{api.service.port}"
    response = case.call(base_url=base, timeout=SECONDS)
    with contextlib.suppress(AttributeError):
        response.encoding = "utf-8"
    try:
        case.validate_response(response, checks=CHECKS)
    except AssertionError as error:
        return [str(error)]
    except BaseExceptionGroup as group:
        return [f"{group}; " + "; ".join(map(repr, group.exceptions))]
    return []


def operations_of(api, *methods: str):
    found = [result.ok() for result in api.schema.get_all_operations()]
    return [o for o in found if o.method.upper() in methods and o.path != FOLLOWS]


@pytest.mark.parametrize("known", [False, True], ids=["drawn ids", "ids of what is there"])
def test_what_reads_keeps_to_the_schema(api, known):
    wrong = tried(api, operations_of(api, "GET", "HEAD"), known=known)
    assert wrong == []


@pytest.mark.parametrize("known", [False, True], ids=["drawn ids", "ids of what is there"])
def test_what_changes_keeps_to_the_schema(api, known):
    wrong = tried(api, operations_of(api, "POST", "PUT", "PATCH"), known=known)
    assert wrong == []
    assert api.service.failures() == []


def test_what_deletes_keeps_to_the_schema(api):
    """With drawn ids, which are of nothing; then of what is made for it."""
    assert tried(api, operations_of(api, "DELETE"), known=False) == []
    service = api.service
    service.put("short-lived", "Nobody was born in 1900.")
    made = service.request("POST", "/v1/vector_stores", {"name": "short-lived"})
    assert made.status == 200, made.body
    file = upload(service)
    attached = service.request("POST", f"/v1/vector_stores/{BANK}/files", {"file_id": file})
    assert attached.status == 200, attached.body
    job = service.index([{"id": "lane", "text": "Anna Lane was born in 1950."}])
    service.finished(job)
    ids = {
        **api.ids,
        "document_id": "short-lived",
        "file_id": file,
        "job_id": job,
    }
    order = {"/v1/vector_stores/{vector_store_id}/files/{file_id}": 0, "/v1/files/{file_id}": 1}
    deleting = sorted(operations_of(api, "DELETE"), key=lambda o: order.get(o.path, 2))
    wrong, statuses = [], {}
    for operation in deleting:
        own = dict(ids)
        if operation.path == "/v1/vector_stores/{vector_store_id}":
            own["vector_store_id"] = made.json["id"]
        names = {p.name for p in operation.path_parameters}
        case = operation.Case(path_parameters={n: own[n] for n in names})
        response = case.call(base_url=f"http://127.0.0.1:{service.port}", timeout=SECONDS)
        statuses[operation.label] = response.status_code
        wrong += checked(api, operation.Case(path_parameters={n: own[n] for n in names}))
        try:
            case.validate_response(response, checks=CHECKS)
        except (AssertionError, BaseExceptionGroup) as error:
            wrong.append(f"{operation.label}: {error}")
    assert wrong == []
    assert set(statuses.values()) <= {200, 202}, statuses


def test_streams_end_and_are_what_the_schema_says(api):
    service = api.service
    events = service.request("GET", f"/api/jobs/{api.ids['job_id']}/events", seconds=SECONDS)
    assert events.status == 200
    assert events.headers["content-type"].startswith("text/event-stream")
    assert b"event: done" in events.body
    question = "When was Erik Watts born?"
    chat = {"model": f"msa/{BANK}", "messages": [{"role": "user", "content": question}]}
    for path, body, end in (
        ("/api/banks/{bank}/ask", {"question": question}, b"event: answer"),
        ("/v1/chat/completions", chat, b"data: [DONE]"),
        ("/v1/responses", {"model": f"msa/{BANK}", "input": question}, b"response.completed"),
    ):
        real = path.replace("{bank}", BANK)
        reply = service.request("POST", real, {**body, "stream": True}, seconds=SECONDS)
        assert reply.status == 200, reply.body
        kind = reply.headers["content-type"]
        assert kind.startswith("text/event-stream")
        described = api.schema[path]["POST"].definition.raw["responses"]["200"]["content"]
        assert "text/event-stream" in described, path
        assert end in reply.body
