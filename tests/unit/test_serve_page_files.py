from __future__ import annotations

import re

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from fastapi import FastAPI
from starlette.testclient import TestClient

from msa.serve import page
from msa.serve.errors import add_handlers


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    app.include_router(page.router)
    add_handlers(app)
    return TestClient(app)


def test_who_has_the_page_already_gets_304(client):
    first = client.get("/")
    again = client.get("/", headers={"If-None-Match": f'"x", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["cache-control"] == "no-cache"
    assert client.head("/").headers["etag"] == first.headers["etag"]


def test_every_file_that_the_page_names_is_there(client):
    names = re.findall(r'(?:src|href)="static/[0-9a-f]{16}/([^"]+)"', client.get("/").text)
    assert names
    for name in names:
        modules = re.findall(r'from "\./([^"]+)"', client.get("/" + page.asset_url(name)).text)
        for module in [name, *modules]:
            found = client.get("/" + page.asset_url(module))
            assert found.status_code == 200
            assert found.headers["cache-control"] == "public, max-age=31536000, immutable"


def test_modules_of_another_version_are_not_mixed_in(client):
    found = client.get("/static/0123456789abcdef/page.js")
    assert found.status_code == 404
    assert found.json()["error"]["code"] == "unknown_url"
    assert client.get("/" + page.asset_url("page.js") + ".map").status_code == 404


def test_an_asset_that_is_not_there_is_named():
    with pytest.raises(
        KeyError, match=r"'nothing\.css' is no file of the page; there are: api\.js"
    ):
        page.asset_url("nothing.css")


def test_nothing_runs_but_files_of_the_service(client):
    text = client.get("/").text
    policy = client.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    assert not re.search(
        r"<script(?![^>]* src=)|\son\w+=|\sstyle=|https?://",
        text.replace("http://www.w3.org/2000/svg", ""),
    )


def test_no_module_makes_html_of_text():
    site = page._site()
    for name, code in site.assets.items():
        sinks = rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\("
        assert not re.search(sinks, code), name
