"""Documents over HTTP, one by one, and their permanent addresses."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("pydantic_settings")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")
pytest.importorskip("httpx2")

import msa
from serve_tools import FACTS, error_of, finished, put, running


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with running(tmp_path_factory.mktemp("service"), msa.load("worlds")) as client:
        for name, text in FACTS.items():
            assert put(client, name, text).status_code == 201
        yield client


def bank_of(client):
    return client.app.state.service.registry.all()[0].bank


def test_what_was_put_is_given_back(client):
    put(client, "shelf/one", "On the first shelf stood a lamp.", title="Shelf", metadata={"n": 1})
    got = client.get("/api/banks/notes/documents/shelf%2Fone")
    assert got.status_code == 200
    body = got.json()
    assert (body["id"], body["title"], body["metadata"]) == ("shelf/one", "Shelf", {"n": 1})
    assert body["text"] == "On the first shelf stood a lamp."
    assert got.headers["etag"] == f'"{body["etag"]}"'
    assert body["parts"][0]["url"].endswith(f"/d/notes/{body['parts'][0]['number']}")


def test_a_bank_that_another_process_took_over_is_not_written_to(tmp_path):
    """Its lock was removed, and `msa index` opened it."""
    with running(tmp_path, msa.load("worlds")) as client:
        assert put(client, "ann", FACTS["ann"]).status_code == 201
        path = bank_of(client).path
        (path / "writer.lock").unlink()
        with msa.MemoryBank.open(path):
            lines = json.dumps({"text": "One more."})
            batch = client.post("/api/banks/notes/documents:batch?wait_s=60", content=lines)
            job = finished(client, batch.json()["id"])
            for refused in (
                put(client, "bob", FACTS["bob"]),
                client.delete("/api/banks/notes/documents/ann"),
                client.post("/api/banks/notes/documents:delete", json={"ids": ["ann"]}),
            ):
                assert error_of(refused) == (409, "bank_locked")
                assert refused.headers["x-should-retry"] == "false"
                assert "Another process has opened the bank" in refused.text
                assert str(tmp_path) not in refused.text
            assert job["status"] == "failed"
            assert job["message"].startswith("Another process has opened the bank for writing;")
        asked = client.post("/api/banks/notes/ask", json={"question": "Where was Ann born?"})
        assert asked.status_code == 200


def test_putting_the_same_again_changes_nothing(client):
    generation = bank_of(client).generation
    again = put(client, "ann", FACTS["ann"])
    assert (again.status_code, again.json()["outcome"]) == (200, "unchanged")
    assert bank_of(client).generation == generation


def test_new_metadata_keeps_the_number_and_new_text_does_not(client):
    first = put(client, "m", "A kettle stood on the stove.").json()
    marked = put(client, "m", "A kettle stood on the stove.", metadata={"room": "kitchen"}).json()
    assert marked["outcome"] == "updated"
    assert marked["etag"] != first["etag"]
    assert marked["parts"] == first["parts"]
    other = put(client, "m", "A kettle fell off the stove.").json()
    assert other["parts"][0]["number"] > first["parts"][0]["number"]


def test_conditions_are_met_or_refused(client):
    etag = put(client, "c", "The clock struck nine.").json()["etag"]
    url = "/api/banks/notes/documents/c"
    new = {"text": "The clock struck ten."}
    assert error_of(client.put(url, json=new, headers={"If-None-Match": "*"})) == (
        412,
        "precondition_failed",
    )
    assert client.put(url, json=new, headers={"If-Match": '"other"'}).status_code == 412
    assert client.get(url).json()["text"] == "The clock struck nine."
    assert client.put(url, json=new, headers={"If-Match": f'"{etag}"'}).status_code == 200
    now = client.get(url).headers["etag"]
    assert client.get(url, headers={"If-None-Match": now}).status_code == 304
    assert client.get(url, headers={"If-None-Match": f'"{etag}"'}).status_code == 200


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"text": "  "}, "invalid_value"),
        ({}, "invalid_value"),
        ({"text": "a", "metadata": [1]}, "invalid_value"),
        ({"text": "a", "tags": []}, "unsupported_parameter"),
    ],
)
def test_what_cannot_be_stored_is_refused(client, body, code):
    assert error_of(client.put("/api/banks/notes/documents/bad", json=body)) == (400, code)
    assert client.get("/api/banks/notes/documents/bad").status_code == 404


def test_deleted_documents_are_gone_and_those_not_there_are_named(client):
    put(client, "d1", "One went.")
    put(client, "d2", "Two went.")
    gone = client.post(
        "/api/banks/notes/documents:delete", json={"ids": ["d1", "d2", "never"]}
    ).json()
    assert gone == {"deleted": 2, "missing": ["never"]}
    assert error_of(client.get("/api/banks/notes/documents/d1")) == (404, "document_not_found")
    assert client.delete("/api/banks/notes/documents/d1").status_code == 404


def test_a_long_document_has_parts_which_are_no_documents_of_their_own(client):
    text = "\n\n".join(f"Chapter {i} tells of the river and the stone." for i in range(120))
    parts = put(client, "book", text).json()["parts"]
    assert len(parts) > 1
    assert client.get("/api/banks/notes/documents/book").json()["text"].split() == text.split()
    one = client.get("/api/banks/notes/documents/book%232").json()
    assert (one["id"], len(one["parts"])) == ("book#2", 1)
    assert error_of(client.delete("/api/banks/notes/documents/book%232")) == (400, "document_part")
    page = client.get(f"/d/notes/{parts[1]['number']}", headers={"Accept": "text/html"}).text
    assert f'<a rel="prev" href="{parts[0]["number"]}">' in page
    client.delete("/api/banks/notes/documents/book")


def test_pages_hold_every_document_once_while_the_bank_changes(client):
    seen, after = [], 0
    while after is not None:
        page = client.get(f"/api/banks/notes/documents?limit=1&after={after}").json()
        seen += [row["number"] for row in page["data"]]
        after = page["next"]
        put(client, "late", f"Written after {len(seen)} rows.") if len(seen) == 1 else None
    assert len(seen) == len(set(seen))
    assert seen == sorted(bank_of(client).ids(seen))
    assert set(seen) == {s.number for s in bank_of(client).documents()}


def test_lists_can_be_filtered_and_searched_by_words(client):
    put(client, "k", "The kiln was cold.", metadata={"user": "ann"})
    rows = client.get("/api/banks/notes/documents", params={"filter": '{"user": "ann"}'}).json()
    assert [row["id"] for row in rows["data"]] == ["k"]
    found = client.get("/api/banks/notes/documents", params={"q": "stone bridge Tarn"}).json()
    assert found["data"][0]["id"] == "bob"
    for wrong in ("[1]", "{", '{"a": {"near": 1}}'):
        response = client.get("/api/banks/notes/documents", params={"filter": wrong})
        assert error_of(response)[0] == 400


# ---- permalinks


def number_of(client, name):
    return client.get(f"/api/banks/notes/documents/{name}").json()["parts"][0]["number"]


def test_a_permalink_gives_json_or_a_page_by_what_is_accepted(client):
    number = number_of(client, "ann")
    got = client.get(f"/d/notes/{number}", params={"q": "born in Lisbon"})
    start, end = got.json()["spans"][0]
    assert got.json()["text"][start:end] == "born in Lisbon"
    page = client.get(
        f"/d/notes/{number}", params={"span": "0-3"}, headers={"Accept": "text/html,*/*"}
    )
    assert page.headers["content-type"].startswith("text/html")
    assert '<mark id="answer">Ann</mark> Moreau' in page.text


def test_words_that_do_not_stand_together_are_highlighted_each(client):
    spans = client.get(f"/d/notes/{number_of(client, 'ann')}", params={"q": "school Lisbon"})
    text = spans.json()["text"]
    assert [text[a:b] for a, b in spans.json()["spans"]] == ["Lisbon", "school"]


def test_no_document_can_bring_a_script_or_load_anything(client):
    evil = "</p><script>alert(1)</script><img src=x onerror=alert(1)> & more"
    put(client, "evil", evil, title="<svg onload=alert(1)>", metadata={"<b>": "<i>"})
    url = f"/d/notes/{number_of(client, 'evil')}"
    page = client.get(url, params={"q": "<script>alert(1)"}, headers={"Accept": "text/html"})
    for tag in ("<script", "<img", "<svg", "<b>", "<i>"):
        assert tag not in page.text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.text.replace(
        '<mark id="answer">', ""
    ).replace("</mark>", "")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"


def test_numbers_that_were_deleted_are_gone_and_others_never_were(client):
    put(client, "gone", "This will be deleted.")
    number = number_of(client, "gone")
    client.delete("/api/banks/notes/documents/gone")
    assert error_of(client.get(f"/d/notes/{number}")) == (410, "document_deleted")
    page = client.get(f"/d/notes/{number}", headers={"Accept": "text/html"})
    assert page.status_code == 410
    assert "will be deleted" not in page.text
    for never in (10**6, 0):
        assert error_of(client.get(f"/d/notes/{never}")) == (404, "document_not_found")
    assert error_of(client.get(f"/d/other/{number}")) == (404, "bank_not_found")
    for wrong in ("3", "5-2", "a-b"):
        response = client.get(f"/d/notes/{number}", params={"span": wrong})
        assert error_of(response) == (400, "invalid_value")


def test_batches_of_lines_tell_the_fate_of_each(client):
    lines = [
        {"id": "l1", "text": "The ferry left at dawn.", "metadata": {"user": "l"}},
        {"id": "l2", "text": ""},
        {"id": "l3", "text": "The ferry came back at dusk."},
    ]
    response = client.post(
        "/api/banks/notes/documents:batch?wait_s=30",
        content="\n".join(map(json.dumps, lines)),
        headers={"Content-Type": "application/jsonl"},
    )
    job = response.json()
    assert (response.status_code, job["status"]) == (200, "done")
    assert (job["added"], job["rejected"]) == (2, 1)
    assert job["failed"] == [{"file": "documents.jsonl:2", "reason": "empty document"}]
    assert client.get("/api/banks/notes/documents/l1").json()["metadata"] == {"user": "l"}
