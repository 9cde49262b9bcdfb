"""Files and vector stores, through OpenAI's own client."""

from __future__ import annotations

import hashlib
import json
import threading

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("pydantic_settings")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")
pytest.importorskip("openai")

import openai

import msa
from msa.memory.store.filters import metadata_test
from msa.serve.errors import ServiceError
from msa.serve.fairness import Turns
from msa.serve.openai.file_ids import cited_file, document_number
from msa.serve.openai.filters import bank_filter
from serve_tools import FACTS, put, running


@pytest.fixture(scope="module")
def checkpoint():
    return msa.load("worlds")


@pytest.fixture(scope="module")
def http(tmp_path_factory, checkpoint):
    with running(tmp_path_factory.mktemp("service"), checkpoint) as client:
        yield client


def make_client(http, key="none"):
    return openai.OpenAI(
        base_url="http://localhost/v1", api_key=key, http_client=http, max_retries=0
    )


@pytest.fixture(scope="module")
def client(http):
    return make_client(http)


@pytest.fixture
def store(client):
    """A new vector store with two files, one of them JSONL."""
    made = client.vector_stores.create(name=None, metadata={"of": "tests"})
    for name, text, attributes in (
        ("ann.md", FACTS["ann"], {"user": "ann", "year": 1921}),
        ("bob.txt", FACTS["bob"], {"user": "bob", "year": 1902}),
    ):
        file = client.vector_stores.files.upload_and_poll(
            vector_store_id=made.id, file=(name, text.encode()), attributes=attributes
        )
        assert file.status == "completed"
    yield client.vector_stores.retrieve(made.id)
    client.vector_stores.delete(made.id)


def code_of(caught):
    return caught.value.status_code, caught.value.body["code"], caught.value.body["param"]


# ---- files


def test_a_file_comes_back_as_it_was_sent_until_it_is_deleted(client, http):
    file = client.files.create(file=("a/b.md", b"# Title\n\nText."), purpose="assistants")
    assert (file.filename, file.bytes, file.purpose) == ("b.md", 14, "assistants")
    assert client.files.retrieve(file.id) == file
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert client.files.content(file.id).read() == b"# Title\n\nText."
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.retrieve(file.id)
    assert code_of(caught)[1] == "file_not_found"
    assert not list(http.app.state.service.jobs.store.uploads.iterdir())


def test_all_pages_of_files_hold_each_once(client):
    made = [
        client.files.create(file=(f"{i}.txt", b"x"), purpose=("assistants", "user_data")[i % 2]).id
        for i in range(5)
    ]
    assert [f.id for f in client.files.list(limit=2, order="asc")] == made
    assert [f.id for f in client.files.list(limit=2)] == made[::-1]
    assert [f.id for f in client.files.list(purpose="user_data", order="asc")] == made[1::2]
    for name in made:
        client.files.delete(name)
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.list(after=made[0])
    assert code_of(caught)[2] == "after"


def test_files_that_cannot_be_used_are_refused_by_name(client):
    for given, expected in (
        ({"purpose": "fine-tune"}, (400, "invalid_value", "purpose")),
        (
            {"purpose": "assistants", "expires_after": {"anchor": "created_at", "seconds": 3600}},
            (400, "unsupported_parameter", "expires_after"),
        ),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.files.create(file=("a.txt", b"x"), **given)
        assert code_of(caught) == expected
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("a.exe", b"x"), purpose="assistants")
    assert code_of(caught) == (415, "unsupported_file", "file")


# ---- vector stores


def test_a_vector_store_is_a_bank(client, store):
    assert store.metadata == {"of": "tests"}
    assert (store.status, store.file_counts.completed, store.file_counts.total) == (
        "completed",
        2,
        2,
    )
    assert store.usage_bytes > 0
    listed = [s.id for s in client.vector_stores.list(limit=1, order="asc")]
    assert set(listed) == {"notes", store.id}
    changed = client.vector_stores.update(store.id, metadata={"of": "others"})
    assert changed.metadata == {"of": "others"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"name": "two words"}, (400, "invalid_value", "name")),
        ({"name": "notes"}, (409, "bank_exists", "name")),
        (
            {"name": "a", "expires_after": {"anchor": "last_active_at", "days": 1}},
            (400, "unsupported_parameter", "expires_after"),
        ),
        (
            {"name": "a", "chunking_strategy": {"type": "static", "static": {}}},
            (400, "unsupported_parameter", "chunking_strategy"),
        ),
        ({"name": "a", "description": "x"}, (400, "unsupported_parameter", "description")),
    ],
)
def test_vector_stores_that_cannot_be_made_are_refused_by_name(client, given, expected):
    with pytest.raises(openai.APIStatusError) as caught:
        client.vector_stores.create(**given)
    assert code_of(caught) == expected
    assert [s.id for s in client.vector_stores.list()] == ["notes"]


def test_a_search_cites_files_with_scores_and_attributes(client, store):
    found = client.vector_stores.search(store.id, query="Who built the stone bridge?").data
    assert found[0].filename == "bob.txt"
    assert found[0].file_id.startswith("file-")
    assert found[0].attributes == {"user": "bob", "year": 1902}
    assert found[0].content[0].text == FACTS["bob"]
    assert all(0 <= result.score <= 1 for result in found)
    assert [r.score for r in found] == sorted((r.score for r in found), reverse=True)
    several = client.vector_stores.search(
        store.id, query=["stone bridge", "chemistry school"], max_num_results=2
    )
    assert several.to_dict()["search_query"] == ["stone bridge", "chemistry school"]
    assert {r.filename for r in several.data} == {"ann.md", "bob.txt"}
    least = found[0].score
    strict = client.vector_stores.search(
        store.id, query="Who built the stone bridge?", ranking_options={"score_threshold": least}
    )
    assert [r.filename for r in strict.data] == ["bob.txt"]


def test_a_search_keeps_to_its_filter(client, store):
    old = {"type": "lt", "key": "year", "value": 1910}
    both = {"type": "or", "filters": [old, {"type": "in", "key": "user", "value": ["ann"]}]}
    names = {"ann.md", "bob.txt"}
    for filters, expected in ((old, {"bob.txt"}), (both, names)):
        found = client.vector_stores.search(store.id, query="Who was born?", filters=filters)
        assert {r.filename for r in found.data} == expected
    none = client.vector_stores.search(
        store.id, query="x", filters={"type": "eq", "key": "user", "value": "cy"}
    )
    assert none.data == []
    with pytest.raises(openai.BadRequestError) as caught:
        client.vector_stores.search(
            store.id, query="x", filters={"type": "near", "key": "a", "value": 1}
        )
    assert code_of(caught) == (400, "invalid_value", "filters.type")


def test_documents_of_the_bank_are_files_of_their_own(client, http):
    put(http, "cy", FACTS["cy"], title="Bees")
    found = client.vector_stores.search("notes", query="Who kept bees?").data[0]
    assert (found.filename, found.file_id[:10]) == ("Bees", "doc-notes-")
    assert client.files.retrieve(found.file_id).filename == "Bees"
    assert client.files.content(found.file_id).text == FACTS["cy"]


def test_a_file_can_be_given_other_attributes_and_taken_out(client, http, store):
    files = list(client.vector_stores.files.list(store.id, order="asc"))
    ann = files[0]
    assert ann.attributes == {"user": "ann", "year": 1921}
    page = client.vector_stores.files.content(ann.id, vector_store_id=store.id)
    assert [part.text for part in page] == [FACTS["ann"]]
    changed = client.vector_stores.files.update(
        ann.id, vector_store_id=store.id, attributes={"user": "anna"}
    )
    assert changed.attributes == {"user": "anna"}
    found = client.vector_stores.search(
        store.id, query="chemistry", filters={"type": "eq", "key": "user", "value": "anna"}
    )
    assert [r.attributes for r in found.data] == [{"user": "anna"}]
    assert client.vector_stores.files.delete(ann.id, vector_store_id=store.id).deleted
    assert [f.id for f in client.vector_stores.files.list(store.id)] == [files[1].id]
    found = client.vector_stores.search(store.id, query="Who taught chemistry?").data
    assert [r.filename for r in found] == ["bob.txt"]
    assert client.files.retrieve(ann.id).filename == "ann.md"


def test_a_batch_is_polled_to_its_end_and_every_file_has_its_fate(client, store):
    records = [{"id": "one", "text": "One boat.", "page": 1}, {"text": "Two boats."}]
    batch = client.vector_stores.file_batches.upload_and_poll(
        store.id,
        files=[
            ("boats.jsonl", "\n".join(map(json.dumps, records)).encode()),
            ("empty.txt", b" "),
            ("utf16.txt", b"\xff\xfeh\0i\0"),
        ],
    )
    assert batch.status == "completed"
    counts = batch.file_counts
    assert (counts.completed, counts.failed, counts.in_progress, counts.total) == (1, 2, 0, 3)
    failed = list(
        client.vector_stores.file_batches.list_files(
            batch.id, vector_store_id=store.id, filter="failed"
        )
    )
    assert {f.last_error.code for f in failed} == {"invalid_file"}
    assert {f.last_error.message for f in failed} == {
        "empty document",
        "UTF-16 text; convert it to UTF-8 first",
    }
    found = client.vector_stores.search(store.id, query="How many boats?", max_num_results=2).data
    assert {r.filename for r in found} == {"boats.jsonl"}
    assert {"page": 1} in [r.attributes for r in found]


def test_polling_is_told_when_to_come_again_and_a_batch_can_be_cancelled(
    client, store, monkeypatch
):
    gate, encode = threading.Event(), Turns.encode
    monkeypatch.setattr(Turns, "encode", lambda self: (gate.wait(30), encode(self))[1])
    file = client.files.create(file=("slow.txt", b"Slow."), purpose="assistants")
    batch = client.vector_stores.file_batches.create(store.id, file_ids=[file.id])
    assert batch.status == "in_progress"
    raw = client.vector_stores.file_batches.with_raw_response.retrieve(
        batch.id, vector_store_id=store.id
    )
    assert int(raw.headers["openai-poll-after-ms"]) > 0
    with pytest.raises(openai.ConflictError) as caught:
        client.vector_stores.files.delete(file.id, vector_store_id=store.id)
    assert code_of(caught)[1] == "file_in_progress"
    threading.Timer(0.3, gate.set).start()
    ended = client.vector_stores.file_batches.cancel(batch.id, vector_store_id=store.id)
    assert (ended.status, ended.file_counts.cancelled) in (("cancelled", 1), ("completed", 0))
    again = client.vector_stores.files.create_and_poll(file.id, vector_store_id=store.id)
    assert again.status == "completed"


def test_batches_that_cannot_be_made_are_refused(client, store):
    for given, code in (
        ({"file_ids": ["file-none"]}, (404, "file_not_found", "file_ids")),
        ({}, (400, "missing_required_parameter", "file_ids")),
        (
            {"file_ids": ["a"], "files": [{"file_id": "a"}]},
            (400, "invalid_value", "files"),
        ),
        ({"file_ids": ["a"], "attributes": {"k" * 65: 1}}, None),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            client.vector_stores.file_batches.create(store.id, **given)
        assert code_of(caught) == code if code else caught.value.status_code == 400


def test_files_of_another_key_are_not_there(tmp_path, checkpoint):
    keys = "".join(
        f"{hashlib.sha256(key.encode()).hexdigest()} {name} read,write notes\n"
        for key, name in (("k1", "ann"), ("k2", "bob"))
    )
    with running(tmp_path, checkpoint, keys=keys) as http:
        ann, bob = make_client(http, "k1"), make_client(http, "k2")
        file = ann.files.create(file=("a.txt", b"Mine."), purpose="assistants")
        assert [f.id for f in bob.files.list()] == []
        for call in (
            lambda: bob.files.retrieve(file.id),
            lambda: bob.files.content(file.id),
            lambda: bob.files.delete(file.id),
            lambda: bob.vector_stores.files.create("notes", file_id=file.id),
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                call()
            assert code_of(caught)[1] == "file_not_found"
        with pytest.raises(openai.PermissionDeniedError):
            ann.vector_stores.create(name="mine")


# ---- parts


@pytest.mark.parametrize(
    ("filters", "passes"),
    [
        ({"type": "eq", "key": "a", "value": 1}, True),
        ({"type": "ne", "key": "a", "value": 1}, False),
        ({"type": "gte", "key": "a", "value": 2}, False),
        ({"type": "nin", "key": "b", "value": ["x", "y"]}, True),
        ({"type": "eq", "key": "and", "value": ["z"]}, True),
        (
            {
                "type": "and",
                "filters": [
                    {"type": "eq", "key": "a", "value": 1},
                    {"type": "or", "filters": [{"type": "lt", "key": "a", "value": 0}]},
                ],
            },
            False,
        ),
    ],
)
def test_filters_mean_what_they_mean_at_openai(filters, passes):
    assert metadata_test(bank_filter(filters))({"a": 1, "b": "w", "and": ["z"]}) is passes


@pytest.mark.parametrize(
    ("filters", "param"),
    [
        ([], "filters"),
        ({"key": "a"}, "filters.type"),
        ({"type": "eq", "key": "a"}, "filters.value"),
        ({"type": "eq", "key": 1, "value": 1}, "filters.key"),
        ({"type": "and", "filters": {}}, "filters.filters"),
        ({"type": "eq", "key": "a", "value": 1, "boost": 2}, "filters.boost"),
        ({"type": "in", "key": "a", "value": 1}, "filters"),
    ],
)
def test_filters_that_are_none_are_refused_by_name(filters, param):
    with pytest.raises(ServiceError) as caught:
        bank_filter(filters)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_ids_say_which_file_a_document_came_from():
    file = f"file-{'0a' * 12}"
    for document_id in (
        f"{file}/a.txt",
        f"{file}/a.txt#2",
        f"{file}/a.txt/r1",
        f"{file}/a.txt/r1#3",
    ):
        cited = cited_file("notes", document_id, 7)
        assert (cited.file_id, cited.filename) == (file, "a.txt")
    own = cited_file("my-notes", "a/b.txt", 7)
    assert (own.file_id, own.filename) == ("doc-my-notes-7", "a/b.txt")
    assert document_number(own.file_id) == ("my-notes", 7)
    assert document_number(file) is None
