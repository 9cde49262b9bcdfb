"""Jobs over HTTP: uploads, the fate of every file, cancelling, and going on after a stop."""

from __future__ import annotations

import gzip
import io
import json
import threading
import zipfile

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("pydantic_settings")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")
pytest.importorskip("httpx2")

import msa
from msa.errors import BankLockedError, StorageError
from msa.memory.bank import MemoryBank
from msa.serve import indexing
from msa.serve.errors import ServiceError
from msa.serve.fairness import Turns
from msa.serve.indexing import Desk
from msa.serve.job_store import JobFile, JobStore
from msa.serve.uploads import clean_name
from serve_tools import FACTS, error_of, finished, put, running

JOBS = "/api/banks/notes/jobs"


@pytest.fixture(scope="module")
def checkpoint():
    return msa.load("worlds")


@pytest.fixture(scope="module")
def client(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("service")
    given = {"max_file_bytes": 20_000, "max_upload_bytes": 60_000}
    with running(folder, checkpoint, **given) as client:
        yield client


def upload(client, *files, url=JOBS, **given):
    return client.post(url, files=[("files", pair) for pair in files], **given)


def uploads_of(client):
    return {path.name for path in client.app.state.service.jobs.store.uploads.iterdir()}


def jsonl(*records):
    return "\n".join(map(json.dumps, records)).encode()


def test_every_file_of_an_upload_has_its_fate(client):
    response = upload(
        client,
        ("a.md", b"# Tide\n\nThe tide tables hang in the harbor office."),
        ("b.txt", b"\xff\xfe\x00"),
        ("c.exe", b"MZ"),
        (
            "d.jsonl",
            jsonl({"id": "d1", "text": "Salt is white."}, {"id": "d2"}, {"text": "No id."}),
        ),
        ("e/f.txt", b"A path below a folder."),
        data={"metadata": '{"user": "ann"}'},
    )
    assert response.status_code == 202
    assert response.headers["location"] == f"/api/jobs/{response.json()['id']}"
    job = finished(client, response.json()["id"])
    assert {f["file"]: (f["status"], f["documents"]) for f in job["files"]} == {
        "a.md": ("done", 1),
        "b.txt": ("failed", 0),
        "c.exe": ("failed", 0),
        "d.jsonl": ("done", 2),
        "e/f.txt": ("done", 1),
    }
    reasons = {r["file"]: r["reason"] for r in job["failed"]}
    assert set(reasons) == {"b.txt", "c.exe", "d.jsonl:2"}
    assert "UTF-16" in reasons["b.txt"]
    assert "file type .exe" in reasons["c.exe"]
    assert (job["status"], job["done"], job["total"]) == ("done", 5, 5)
    assert (job["added"], job["rejected"]) == (4, 3)
    tide = client.get("/api/banks/notes/documents/a.md").json()
    assert (tide["title"], tide["metadata"]) == ("Tide", {"user": "ann"})
    assert client.get("/api/banks/notes/documents/e%2Ff.txt").status_code == 200
    assert uploads_of(client) == set()


def test_the_same_upload_again_is_unchanged_and_skip_keeps_what_is_there(client):
    finished(client, upload(client, ("s.txt", b"Seven swans.")).json()["id"])
    again = finished(client, upload(client, ("s.txt", b"Seven swans.")).json()["id"])
    assert (again["added"], again["unchanged"], again["tokens"]) == (0, 1, 0)
    kept = upload(client, ("s.txt", b"Eight swans."), url=f"{JOBS}?on_duplicate=skip").json()
    assert finished(client, kept["id"])["files"][0]["status"] == "failed"
    assert client.get("/api/banks/notes/documents/s.txt").json()["text"] == "Seven swans."
    finished(client, upload(client, ("s.txt", b"Eight swans.")).json()["id"])
    assert client.get("/api/banks/notes/documents/s.txt").json()["text"] == "Eight swans."


def test_what_cannot_be_taken_leaves_nothing_on_disk(client):
    assert error_of(upload(client, ("a.exe", b"x"), ("b", b"y"))) == (415, "unsupported_file")
    assert error_of(upload(client, ("a.txt", b"x" * 20_001)))[0] == 413
    many = [(f"{i}.txt", b"x" * 15_000) for i in range(5)]
    assert error_of(upload(client, *many))[0] == 413
    assert (
        error_of(client.post(JOBS, content=b"x", headers={"Content-Type": "text/plain"}))[0] == 400
    )
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    torn = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhalf'
    assert error_of(client.post(JOBS, content=torn, headers=headers)) == (400, "invalid_value")
    assert error_of(client.post(JOBS, content=b"nonsense", headers=headers))[0] == 400
    assert error_of(client.post(JOBS, data={"metadata": "{}"}, files=[]))[0] == 400
    wrong = upload(client, ("a.txt", b"x"), data={"metadata": "[1]"})
    assert error_of(wrong) == (400, "invalid_value")
    other = upload(client, ("a.txt", b"x"), data={"tags": "x"})
    assert error_of(other) == (400, "unsupported_parameter")
    assert uploads_of(client) == set()


def test_bombs_are_told_apart_from_files(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr("msa.serve.jobs.MAX_UNPACKED_BYTES", 100_000)
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("word/document.xml", "w") as file,
    ):
        for _ in range(257):
            file.write(bytes(2**20))
    bomb = gzip.compress(jsonl({"id": "first", "text": "Fine."}) + b"\n" + b" " * 1_000_000)
    with running(tmp_path, checkpoint) as client:
        job = upload(client, ("b.jsonl.gz", bomb), ("b.docx", packed.getvalue())).json()
        reasons = {r["file"]: r["reason"] for r in finished(client, job["id"])["failed"]}
    assert set(reasons) == {"b.jsonl.gz", "b.docx"}
    assert all("unpacks to more than" in reason for reason in reasons.values())


def test_a_file_that_takes_too_long_to_convert_does_not_hold_up_the_others(tmp_path, checkpoint):
    pytest.importorskip("markitdown", reason="needs the extra 'documents'")
    with running(tmp_path, checkpoint, parse_seconds=0.01) as client:
        files = [("a.html", b"<p>Slow.</p>"), ("b.txt", b"Quick."), ("c.pdf", b"%PDF-1.4")]
        job = finished(client, upload(client, *files).json()["id"])
    assert {f["file"]: f["status"] for f in job["files"]} == {
        "a.html": "failed",
        "b.txt": "done",
        "c.pdf": "failed",
    }
    reason = "converting it took longer than 0.01 s; save it again in a simpler form, or send"
    assert all(f["reason"].startswith(reason) for f in job["files"] if f["status"] == "failed")
    assert job["status"] == "done"


@pytest.mark.parametrize(
    ("given", "clean"),
    [
        ("../../etc/passwd.txt", "etc/passwd.txt"),
        ("C:\\notes\\a.md", "C:/notes/a.md"),
        ("/abs//./x.txt", "abs/x.txt"),
        ("e\u0301.txt", "\u00e9.txt"),
    ],
)
def test_names_of_clients_lead_nowhere(given, clean):
    assert clean_name(given) == clean


@pytest.mark.parametrize("given", ["", "..", "a\0.txt", "a\n.txt", "x" * 300])
def test_names_that_are_none_are_refused(given):
    with pytest.raises(ServiceError, match="file name"):
        clean_name(given)


def test_events_tell_of_a_job_until_its_end(client):
    job = upload(client, ("ev.txt", b"An event.")).json()
    with client.stream("GET", f"/api/jobs/{job['id']}/events") as stream:
        lines = [line for line in stream.iter_lines() if line]
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event:")]
    data = [json.loads(line[6:]) for line in lines if line.startswith("data:")]
    assert kinds[-1] == "done"
    assert set(kinds[:-1]) <= {"progress"}
    assert (data[-1]["status"], data[-1]["files"]) == ("done", None)
    assert error_of(client.get("/api/jobs/job_none/events")) == (404, "job_not_found")


def test_compact_and_verify_are_jobs_with_results(client):
    put(client, "old", "To be dropped.")
    client.delete("/api/banks/notes/documents/old")
    done = client.post("/api/banks/notes:compact?wait_s=30")
    assert (done.status_code, done.json()["status"]) == (200, "done")
    assert done.json()["result"]["dropped"] >= 1
    sound = client.post("/api/banks/notes:verify?wait_s=30").json()
    assert sound["result"]["problems"] == []
    listed = client.get(JOBS, params={"limit": 2}).json()["data"]
    assert [job["kind"] for job in listed] == ["verify", "compact"]


# ---- while a job runs


@pytest.fixture
def held(monkeypatch):
    """Lets index work go on only when the test says so; `reached` is set when it waits."""
    gate, reached = threading.Event(), threading.Event()
    encode = Turns.encode

    def wait(self):
        reached.set()
        assert gate.wait(30)
        return encode(self)

    monkeypatch.setattr(Turns, "encode", wait)
    yield gate, reached
    gate.set()


def test_a_cancelled_job_keeps_what_was_committed_and_says_so(client, monkeypatch):
    monkeypatch.setattr(indexing, "SLICE_DOCUMENTS", 1)
    jobs = client.app.state.service.jobs
    advance, second = jobs.store.advance, threading.Event()
    taken = threading.Event()

    def note(job_id, step):
        advance(job_id, step)
        taken.set()
        assert second.wait(30)

    monkeypatch.setattr(jobs.store, "advance", note)
    records = jsonl(*({"id": f"x{i}", "text": f"Record {i}."} for i in range(5)))
    job = upload(client, ("x.jsonl", records)).json()
    assert taken.wait(30)
    assert client.delete(f"/api/jobs/{job['id']}").status_code == 202
    second.set()
    ended = finished(client, job["id"])
    assert (ended["status"], ended["added"]) == ("cancelled", 1)
    assert "1 documents were stored before and stay" in ended["message"]
    assert client.get("/api/banks/notes/documents/x0").status_code == 200
    assert client.get("/api/banks/notes/documents/x4").status_code == 404
    assert uploads_of(client) == set()
    assert client.delete(f"/api/jobs/{job['id']}").json()["status"] == "cancelled"


def test_too_many_jobs_are_refused_before_anything_is_read(tmp_path, checkpoint, held):
    with running(tmp_path, checkpoint, max_encode_jobs=1) as client:
        first = upload(client, ("1.txt", b"One.")).json()
        assert held[1].wait(30)
        second = upload(client, ("2.txt", b"Two.")).json()
        full = upload(client, ("3.txt", b"Three."))
        assert error_of(full) == (429, "queue_full")
        assert 1 <= int(full.headers["retry-after"]) <= 120
        assert len(uploads_of(client)) == 2
        waiting = client.get(f"/api/jobs/{second['id']}").json()
        assert waiting["status"] == "queued"
        figures = client.get("/metrics").text
        assert 'msa_jobs{status="queued"} 1.0' in figures
        assert 'msa_jobs{status="running"} 1.0' in figures
        assert client.delete(f"/api/jobs/{second['id']}").json()["status"] == "cancelled"
        held[0].set()
        assert finished(client, first["id"])["status"] == "done"
        assert client.get("/api/banks/notes/documents/2.txt").status_code == 404


def test_a_stopped_service_goes_on_with_its_jobs(tmp_path, checkpoint, held):
    with running(tmp_path, checkpoint) as client:
        first = upload(client, ("1.txt", b"One.")).json()
        assert held[1].wait(30)
        second = upload(client, ("2.txt", b"Two.")).json()
        threading.Timer(0.3, held[0].set).start()
    with running(tmp_path, checkpoint) as client:
        for job in (first, second):
            assert finished(client, job["id"])["status"] == "done"
        ids = [row["id"] for row in client.get("/api/banks/notes/documents").json()["data"]]
        assert sorted(ids) == ["1.txt", "2.txt"]


def test_an_interrupted_job_goes_on_behind_what_it_stored(tmp_path, checkpoint):
    """What was deleted since is not brought back; what was not noted is looked at again first."""
    records = [{"id": f"r{i}", "text": f"Record {i}."} for i in range(6)]
    with running(tmp_path, checkpoint) as client:
        for record in records[:3]:
            put(client, record["id"], record["text"])
        client.delete("/api/banks/notes/documents/r0")
    store = JobStore(tmp_path / "notes.serve")
    path = store.new_upload(".jsonl")
    path.write_bytes(jsonl(*records))
    file = JobFile(0, "r.jsonl", path.name, None, {}, 100)
    job = store.add_job("notes", "index", "anonymous", {}, [file])
    store.begin(job.id)
    with store._changing() as db:  # as after a slice of two, and a kill within the next
        db.execute("UPDATE job_files SET taken = 2, documents = 2, status = 'running'")
    store.close()
    with running(tmp_path, checkpoint) as client:
        done = finished(client, job.id)
        assert (done["status"], done["added"], done["unchanged"]) == ("done", 3, 1)
        assert done["files"] == [
            {"file": "r.jsonl", "status": "done", "documents": 6, "bytes": 100, "reason": None}
        ]
        ids = {row["id"] for row in client.get("/api/banks/notes/documents").json()["data"]}
        assert ids == {f"r{i}" for i in range(1, 6)}


def test_files_of_this_machine_are_indexed_by_their_path(tmp_path, checkpoint):
    import asyncio

    from msa.serve.keys import ANONYMOUS

    (tmp_path / "docs/deep").mkdir(parents=True)
    (tmp_path / "docs/a.txt").write_text(FACTS["ann"])
    (tmp_path / "docs/deep/b.txt").write_text(FACTS["bob"])
    (tmp_path / "docs/empty.txt").write_text("")
    with running(tmp_path, checkpoint) as client:
        jobs = client.app.state.service.jobs
        asking = jobs.index_paths("notes", [tmp_path / "docs"], ANONYMOUS)
        job = finished(client, asyncio.run(asking).id)
        assert {f["file"]: f["status"] for f in job["files"]} == {
            "a.txt": "done",
            "deep/b.txt": "done",
            "empty.txt": "failed",
        }
        assert str(tmp_path) not in json.dumps(job)
        bank = client.app.state.service.registry.all()[0].bank
        assert [o.document for o in bank.catalog.origins.below(".")] == ["a.txt", "deep/b.txt"]
        asking = jobs.index_paths("notes", [tmp_path / "docs"], ANONYMOUS)
        again = finished(client, asyncio.run(asking).id)
        assert (again["unchanged"], again["tokens"]) == (2, 0)


# ---- when something fails


def test_a_disk_that_is_full_is_told_and_nothing_is_left(client, monkeypatch):
    def refuse(*args, **given):
        raise StorageError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(JobStore, "add_job", refuse)
        assert error_of(upload(client, ("full.txt", b"x"))) == (507, "disk_full")
    assert uploads_of(client) == set()
    with monkeypatch.context() as patch:
        patch.setattr(MemoryBank, "add", refuse)
        job = finished(client, upload(client, ("full.txt", b"x")).json()["id"])
    assert (job["status"], job["files"][0]["status"]) == ("failed", "failed")
    assert job["message"] == "The disk refused to write."
    assert uploads_of(client) == set()
    again = finished(client, upload(client, ("full.txt", b"x")).json()["id"])
    assert again["status"] == "done"


def test_a_job_whose_end_cannot_be_noted_is_done_again(client, monkeypatch):
    monkeypatch.setattr("msa.serve.jobs.RETRY_SECONDS", 0.05)
    finish, left = JobStore.finish, [1, 1]

    def refuse(self, *args, **given):
        if left:
            left.pop()
            raise StorageError("no room")
        finish(self, *args, **given)

    monkeypatch.setattr(JobStore, "finish", refuse)
    job = finished(client, upload(client, ("late.txt", b"Late.")).json()["id"])
    assert (job["status"], left) == ("done", [])
    assert client.get("/api/banks/notes/documents/late.txt").status_code == 200


def test_too_many_writes_are_refused(client, monkeypatch):
    monkeypatch.setattr("msa.serve.jobs.MAX_WRITES", 0)
    full = put(client, "w", "Waits.")
    assert error_of(full) == (429, "queue_full")
    assert int(full.headers["retry-after-ms"]) >= 1000


# ---- who may


def test_jobs_of_another_tenant_are_not_there(tmp_path, checkpoint):
    import hashlib

    def line(key, name, scopes, banks):
        return f"{hashlib.sha256(key.encode()).hexdigest()} {name} {scopes} {banks}\n"

    keys = line("k1", "ann", "read,write", "notes") + line("k2", "bob", "read,write", "other")
    keys += line("k3", "cy", "read", "notes")
    with running(tmp_path, checkpoint, keys=keys) as client:
        ann, bob, cy = ({"Authorization": f"Bearer {key}"} for key in ("k1", "k2", "k3"))
        assert upload(client, ("a.txt", b"Mine.")).status_code == 401
        job = upload(client, ("a.txt", b"Mine."), headers=ann).json()
        url = f"/api/jobs/{job['id']}"
        assert error_of(client.get(url, headers=bob)) == (404, "job_not_found")
        assert error_of(client.delete(url, headers=bob)) == (404, "job_not_found")
        assert error_of(client.get(JOBS, headers=bob)) == (404, "bank_not_found")
        assert client.get(url, headers=cy).status_code == 200
        assert error_of(client.delete(url, headers=cy)) == (403, "bank_forbidden")
        assert error_of(upload(client, ("b.txt", b"x"), headers=cy)) == (403, "bank_forbidden")


# ---- parts


def test_a_state_folder_is_held_by_one_service(tmp_path):
    store = JobStore(tmp_path)
    with pytest.raises(BankLockedError, match="--state-folder"):
        JobStore(tmp_path)
    store.close()
    JobStore(tmp_path).close()


def test_what_nothing_names_is_removed_at_the_start(tmp_path):
    store = JobStore(tmp_path)
    kept, lost = store.new_upload(".txt"), store.new_upload(".txt")
    kept.write_text("a")
    lost.write_text("b")
    store.add_job("notes", "index", "me", {}, [JobFile(0, "a.txt", kept.name, None, {}, 1)])
    store.close()
    store = JobStore(tmp_path)
    assert [path.name for path in store.uploads.iterdir()] == [kept.name]
    store.close()


def test_turns_at_a_desk_come_in_order():
    desk, order, started = Desk(), [], threading.Event()
    first = desk.ticket()

    def write(name):
        ticket = desk.ticket()
        started.set()
        with desk.turn(ticket):
            order.append(name)

    threads = []
    for name in ("a", "b", "c"):
        started.clear()
        threads.append(threading.Thread(target=write, args=(name,)))
        threads[-1].start()
        assert started.wait(5)
    assert order == []
    with desk.turn(first):
        pass
    for thread in threads:
        thread.join(5)
    assert order == ["a", "b", "c"]


def test_old_finished_jobs_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr("msa.serve.job_store.KEPT_JOBS", 2)
    store = JobStore(tmp_path)
    file = JobFile(0, "a.txt", None, "file-1", {}, 1)
    attached = store.add_job("notes", "index", "me", {}, [file])
    ids = [attached.id]
    for _ in range(5):
        store.finish(ids[-1], "done")
        ids.append(store.add_job("notes", "verify", "me", {}).id)
    there = [job_id for job_id in ids if store.job(job_id) is not None]
    assert there == [attached.id, *ids[-3:]]
    assert store.attachment("notes", "file-1").status == "done"
    store.close()
