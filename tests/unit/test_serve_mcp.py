"""MCP: the tools, by the official client in memory, both ways of speaking the protocol."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from msa import Document, MemoryBank
from msa.inference.options import AskOptions
from msa.model.checkpoint import Checkpoint
from msa.text.prompts import PromptTemplate
from msa.types import Answer, Citation, Usage

mcp = pytest.importorskip("mcp", reason="needs the extra 'serve'")
pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from msa.serve.keys import Principal  # noqa: E402
from msa.serve.mcp_server import local  # noqa: E402
from msa.serve.mcp_tools import Caller, _answered  # noqa: E402
from msa.serve.service import Service  # noqa: E402
from msa.serve.settings import ServeSettings  # noqa: E402

MODES = ("auto", "legacy")
READER = Principal("reader", frozenset({"read"}), ("*",))
OWNER = Principal("owner", frozenset({"read", "write"}), ("*",))
QUESTION = "Where was Ada born?"
PEOPLE = [
    Document("ada", "Ada was born in Rome.", title="Ada", metadata={"user": "a"}),
    Document("bob", "Bob is Ada's son, a baker.", metadata={"user": "b"}),
]
PLACES = [Document("rome", "Rome lies on the Tiber.", title="Rome")]


@pytest.fixture
def checkpoint(tiny_model, tiny_tokenizer) -> Checkpoint:
    options = AskOptions(max_rounds=2, max_new_tokens=6)
    return Checkpoint(tiny_model, tiny_tokenizer, PromptTemplate(), options, "tiny")


@pytest.fixture
def settings(tmp_path, checkpoint) -> ServeSettings:
    folders = {}
    for name, documents in (("people", PEOPLE), ("places", PLACES)):
        folders[name] = tmp_path / name
        with MemoryBank.create(tmp_path / name, checkpoint) as bank:
            bank.add(documents)
    return ServeSettings(banks=folders, queue_seconds=600, ask_seconds=600)  # a busy machine


@pytest.fixture
def using(settings, checkpoint):
    """Runs a coroutine function with a client of a service: `using(work, holder, mode)`."""

    def using(
        work: Callable[[Any], Awaitable[Any]], holder: Principal = OWNER, mode: str = "auto"
    ) -> Any:
        async def run() -> Any:
            async with Service.running(settings, checkpoint) as service:
                server = local(service, holder, "https://msa.example.org")
                async with mcp.Client(server, mode=mode) as client:
                    return await work(client)

        return asyncio.run(run())

    return using


async def call(client: Any, tool: str, **arguments: Any) -> dict[str, Any]:
    """What a tool gives; its text says the same."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    assert len(result.content) == 1
    assert json.loads(result.content[0].text) == result.structured_content
    return result.structured_content


async def refusal(client: Any, tool: str, **arguments: Any) -> str:
    """What a tool says that refuses."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error
    return result.content[0].text


def test_the_log_is_left_to_whoever_runs_the_process(settings, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])
    level = logging.root.level
    local(Service(settings), OWNER)
    assert logging.root.handlers == []
    assert logging.root.level == level


@pytest.mark.parametrize("mode", MODES)
def test_search_and_fetch_are_the_pair_that_chatgpt_reads(using, mode):
    async def work(client: Any) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert list(tools["search"].input_schema["properties"]) == ["query"]
        assert list(tools["fetch"].input_schema["properties"]) == ["id"]
        assert tools["search"].annotations.read_only_hint
        found = await call(client, "search", query=QUESTION)
        assert list(found) == ["results"]
        assert {item["id"] for item in found["results"]} == {"people/1", "people/2", "places/1"}
        for item in found["results"]:
            assert set(item) == {"id", "title", "url"}
            assert item["url"] == f"https://msa.example.org/d/{item['id']}"
        document = await call(client, "fetch", id="people/1")
        assert document == {
            "id": "people/1",
            "title": "Ada",
            "text": "Ada was born in Rome.",
            "url": "https://msa.example.org/d/people/1",
            "metadata": {"user": "a", "msa_bank": "people", "msa_document": "ada"},
        }

    using(work, READER, mode)


@pytest.mark.parametrize("mode", MODES)
def test_ask_gives_the_engines_answer_and_tells_each_round_on_the_way(using, mode):
    told: list[tuple[float, str]] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        told.append((done, message or ""))

    async def work(client: Any) -> dict[str, Any]:
        arguments = {"question": QUESTION, "bank": "people"}
        result = await client.call_tool("ask", arguments, progress_callback=progress)
        return result.structured_content

    answer = using(work, READER, mode)
    assert answer["bank"] == "people"
    assert {c["id"] for c in answer["citations"]} <= {"people/1", "people/2"}
    read = [c["id"] for c in answer["citations"]]
    assert [i for turn in answer["rounds"] for i in turn["read"]] == read
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    routed = [f"round {turn['round']}: routing over the memory" for turn in answer["rounds"]]
    assert [message for _, message in told if "routing" in message] == routed
    reading = [message.rpartition(" ")[2] for _, message in told if "reading" in message]
    assert reading == read


@pytest.mark.parametrize(
    ("address", "url"),
    [("https://x.org/d/{}/{}", "https://x.org/d/people/1?span=17-21"), (None, "msa://people/1")],
)
def test_a_link_of_a_citation_highlights_the_answer_where_it_is_a_page(address, url):
    citation = Citation("ada", 1, "Ada", "Ada was born in Rome.", 1, (17, 21))
    answer = Answer(QUESTION, "Rome", (citation,), (), Usage(1, 1, 0.0, 0.0), "answered")
    caller = Caller(READER, (address or "msa://{}/{}").format)
    assert [c.url for c in _answered(caller, "people", answer).citations] == [url]


def test_a_filter_holds_for_what_is_read(using):
    async def work(client: Any) -> None:
        answer = await call(client, "ask", question=QUESTION, bank="people", filter={"user": "b"})
        assert {c["document"] for c in answer["citations"]} <= {"bob"}
        assert all(turn["routed"] <= 1 for turn in answer["rounds"])

    using(work)


def test_tools_that_write_are_there_for_those_who_may(using):
    async def names(client: Any) -> set[str]:
        return {tool.name for tool in (await client.list_tools()).tools}

    reading = {"search", "fetch", "ask", "status"}
    assert using(names, READER) == reading
    assert using(names, OWNER) == reading | {"add", "delete"}

    async def add(client: Any) -> str:
        return await refusal(client, "add", text="Cid paints.", bank="people")

    assert "Unknown tool: add" in using(add, READER)


def test_what_is_added_is_found_at_once_and_is_gone_once_deleted(using):
    async def work(client: Any) -> None:
        added = await call(client, "add", text="Cid paints.", bank="people", title="Cid")
        (passage,) = added["passages"]
        assert added["outcome"] == "added"
        assert (passage["id"], passage["title"]) == ("people/3", "Cid")
        again = await call(client, "add", text="Cid paints.", bank="people", title="Cid")
        assert (again["outcome"], again["passages"]) == ("unchanged", [passage])
        found = await call(client, "search", query="Who paints?")
        assert passage in found["results"]
        deleted = await call(client, "delete", ids=["people/3", "people/3"])
        assert deleted == {"deleted": [added["document"]]}
        assert "deleted" in await refusal(client, "fetch", id="people/3")
        assert passage not in (await call(client, "search", query="Who paints?"))["results"]

    using(work)


def test_delete_takes_all_or_none_where_one_id_is_wrong(using):
    async def work(client: Any) -> None:
        assert "ever had" in await refusal(client, "delete", ids=["people/1", "people/99"])
        assert (await call(client, "fetch", id="people/1"))["title"] == "Ada"

    using(work)


def test_another_text_under_an_id_takes_the_place_of_the_first(using):
    async def work(client: Any) -> None:
        changed = await call(client, "add", id="ada", text="Ada was born in Oslo.", bank="people")
        assert changed["outcome"] == "updated"
        assert changed["passages"][0]["id"] == "people/3"
        assert "replaced" in await refusal(client, "fetch", id="people/1")

    using(work)


def test_a_long_text_is_fetched_in_parts_and_deleted_as_one(using):
    async def work(client: Any) -> None:
        text = " ".join(f"Sentence {i} of a long book." for i in range(200))
        added = await call(client, "add", id="book", text=text, bank="places")
        parts = [passage["id"] for passage in added["passages"]]
        assert len(parts) > 1
        part = await call(client, "fetch", id=parts[1])
        assert part["metadata"]["msa_document"] == "book"
        assert part["metadata"]["msa_part"] == f"2 of {len(parts)}"
        assert await call(client, "delete", ids=parts) == {"deleted": ["book"]}

    using(work)


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        ("ask", {"question": QUESTION}, "Name a bank with `bank`; there are: people, places."),
        ("ask", {"question": " ", "bank": "people"}, "is empty; ask something"),
        ("ask", {"question": QUESTION, "bank": "other"}, "There is no such bank."),
        ("ask", {"question": QUESTION, "bank": "people", "filter": {"user": {"x": 1}}}, "user"),
        ("search", {}, "query"),
        ("fetch", {"id": "ada"}, "'ada' is no id; give one as search returns it, BANK/NUMBER."),
        ("fetch", {"id": "people/0"}, "No document has ever had this number."),
        ("fetch", {"id": "other/1"}, "There is no such bank."),
        ("add", {"text": "", "bank": "people"}, "cannot be stored"),
        ("delete", {"ids": []}, "at least 1 item"),
    ],
)
def test_what_cannot_be_done_is_said_in_words(using, tool, arguments, said):
    async def work(client: Any) -> None:
        message = await refusal(client, tool, **arguments)
        assert said in message
        assert "Traceback" not in message

    using(work)


def test_a_failure_of_ours_tells_nothing_of_itself(using, monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("secret text of a document")

    monkeypatch.setattr("msa.serve.mcp_tools.stored_document", broken)

    async def work(client: Any) -> None:
        message = await refusal(client, "fetch", id="people/1")
        assert "The service failed" in message
        assert "secret" not in message

    using(work)


@pytest.mark.parametrize("mode", MODES)
def test_a_passage_is_a_resource_under_its_number(using, mode):
    async def work(client: Any) -> None:
        (template,) = (await client.list_resource_templates()).resource_templates
        assert template.uri_template == "msa://{bank}/{number}"
        content = (await client.read_resource("msa://people/1")).contents[0]
        assert content.text == "Ada\n\nAda was born in Rome."
        assert content.mime_type == "text/plain"
        for uri in ("msa://people/9", "msa://other/1"):
            with pytest.raises(mcp.MCPError, match=r"No document|no such bank"):
                await client.read_resource(uri)

    using(work, READER, mode)


def test_status_names_the_banks_and_what_they_hold(using):
    async def work(client: Any) -> None:
        banks = {bank["name"]: bank for bank in (await call(client, "status"))["banks"]}
        assert {name: bank["documents"] for name, bank in banks.items()} == {
            "people": 2,
            "places": 1,
        }
        assert banks["people"]["bytes"] > 0
        assert banks["people"]["writable"] is False

    using(work, READER)


def test_a_key_sees_the_banks_of_its_globs_alone(using):
    holder = Principal("guest", frozenset({"read", "write"}), ("pla*",))

    async def work(client: Any) -> None:
        found = await call(client, "search", query=QUESTION)
        assert [item["id"] for item in found["results"]] == ["places/1"]
        status = await call(client, "status")
        assert [bank["name"] for bank in status["banks"]] == ["places"]
        for tool, arguments in (
            ("fetch", {"id": "people/1"}),
            ("ask", {"question": QUESTION, "bank": "people"}),
            ("add", {"text": "x", "bank": "people"}),
            ("delete", {"ids": ["people/1"]}),
        ):
            assert "There is no such bank." in await refusal(client, tool, **arguments)
        await call(client, "ask", question=QUESTION)  # its only bank needs no name

    using(work, holder)
