"""The page at `/` in a browser, against the real service with the small model."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

import msa  # noqa: E402
from msa import Document, MemoryBank  # noqa: E402
from msa.demo.material import load_material  # noqa: E402
from msa.serve.app import create_app  # noqa: E402
from msa.serve.page import SECURITY_HEADERS, asset_url  # noqa: E402
from msa.serve.settings import ServeSettings  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
expect = playwright.expect
PATIENCE_MS = 20_000

TWO_HOPS = "Who is the mayor of the port where Deborah M. Eastbury was born?"
RENATA = "Who was the employer of Renata Clements?"
EVIL = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script><svg onload=pwned=1>"
KEY = "secret-key-of-the-test"


@contextlib.contextmanager
def serving(checkpoint, **settings):
    """A service on a free port of this machine; its address and its app."""
    app = create_app(ServeSettings.load(**settings), checkpoint)
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
        thread.start()
        try:
            url = f"http://127.0.0.1:{door.getsockname()[1]}/"
            deadline = time.monotonic() + 60
            while app.state.service.state == "loading" or not server.started:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert app.state.service.state == "ready", app.state.service.failure
            yield url, app
        finally:
            server.should_exit = True
            thread.join(60)


@pytest.fixture(scope="module")
def checkpoint():
    return msa.load("worlds")


@pytest.fixture(scope="module")
def service(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("served")
    with MemoryBank.create(folder / "worlds", checkpoint) as bank:
        bank.add([*load_material("worlds").documents, evil_document()])
    banks = {name: folder / name for name in ("worlds", "yard", "zero")}
    for name in ("yard", "zero"):
        MemoryBank.create(banks[name], checkpoint).close()
    with serving(checkpoint, banks=banks) as (url, app):
        yield url, app


def evil_document():
    return Document("evil<b>", EVIL, title="<script>pwned=1</script>", metadata={"user": EVIL})


@pytest.fixture(scope="module")
def url(service):
    return service[0]


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=PATIENCE_MS)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def visit(browser, url, expected_errors=(), **options):
    """A new visitor's page; when done, nothing foreign was asked for and nothing complained."""
    with contextlib.closing(browser.new_context(reduced_motion="reduce", **options)) as context:
        context.set_default_timeout(PATIENCE_MS)
        requests, problems = [], []
        context.on("request", lambda request: requests.append(request.url))
        context.on("weberror", lambda error: problems.append(str(error.error)))
        context.on(
            "console",
            lambda message: (
                problems.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        context.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error('CSP', e.blockedURI))"
        )
        page = context.new_page()
        page.goto(url)
        expect(page.locator("#ask-about")).not_to_have_text(re.compile(r"^\s*$"))
        yield page
        foreign = [found for found in requests if not found.startswith((url, "data:"))]
        assert not foreign
        assert [p for p in problems if not any(e in p for e in expected_errors)] == []


@pytest.fixture
def page(browser, url):
    with visit(browser, url, viewport={"width": 1280, "height": 860}) as page:
        yield page


def ask(page, question):
    """The card of a question that has been answered."""
    page.fill("#question", question)
    page.keyboard.press("Enter")
    card = page.locator("#answers > li").first
    expect(card.locator(".asked")).to_have_text(question)
    expect(card.locator(".foot")).to_be_visible(timeout=PATIENCE_MS)
    return card


def put(url, name, **document):
    """Store a document as another client would."""
    data = json.dumps(document).encode()
    headers = {"Content-Type": "application/json"}
    address = f"{url}api/banks/worlds/documents/{name}"
    with urlopen(Request(address, data, headers, method="PUT")) as response:
        assert response.status < 300


def renata():
    """The demo's document about Renata Clements."""
    steps = [step for step in load_material("worlds").steps if step.kind == "add"]
    return steps[0].document


# ---- files


def test_the_page_is_asked_for_anew_and_what_it_loads_is_kept(url):
    with urlopen(url) as response:
        page, headers = response.read().decode(), response.headers
    assert headers["Cache-Control"] == "no-cache"
    loaded = re.findall(r'(?:src|href)="(static/[^"]+)"', page)
    assert asset_url("page.js") in loaded
    assert asset_url("style.css") in loaded
    for address in loaded:
        with urlopen(url + address) as response:
            assert "immutable" in response.headers["Cache-Control"]
            assert {k: response.headers[k] for k in SECURITY_HEADERS} == SECURITY_HEADERS
    assert {k: headers[k] for k in SECURITY_HEADERS} == SECURITY_HEADERS


# ---- asking


def test_an_answer_streams_and_its_source_opens_with_the_words_marked(page, url):
    card = ask(page, TWO_HOPS)
    expect(card.locator(".answer")).to_have_text("Cornelius Vidal")
    expect(card.locator(".stages")).to_contain_text("read 2 documents")
    chips = card.locator(".chips button")
    expect(chips).to_have_count(2)
    chips.nth(1).click()
    passage = page.locator("#passage")
    expect(passage.locator("#passage-round")).to_contain_text("Read in round 2")
    expect(passage.locator("mark")).to_have_text("Cornelius Vidal")
    expect(passage.locator("#passage-title")).to_be_focused()
    with page.context.expect_page() as opened:
        passage.get_by_role("link", name="Permalink").click()
    expect(opened.value.locator("mark")).to_have_text("Cornelius Vidal")
    opened.value.close()
    page.keyboard.press("Escape")
    expect(passage).to_be_hidden()
    expect(chips.nth(1)).to_be_focused()


def test_the_trace_shows_what_every_layer_routed_to_and_what_was_read(page):
    card = ask(page, TWO_HOPS)
    card.get_by_text("How it was found").click()
    rounds = card.locator(".round")
    expect(rounds).to_have_count(3)
    expect(rounds.first.get_by_role("heading", level=4)).to_have_text(
        ["Layer 3", "Layer 4", "Layer 5", "All layers together"]
    )
    expect(rounds.first.locator(".layer").last.locator("li.read")).to_contain_text("Deborah")
    assert rounds.first.locator("li:not(.read)").count() > 4
    expect(rounds.last).to_contain_text("nothing more was read")


def test_spans_are_counted_in_characters_not_in_utf16_units(page, url):
    found = page.evaluate(
        """async (url) => (await import(url)).marked("😀 über 😀 x", [2, 6]).map(
             (piece) => piece.textContent ?? piece)""",
        url + asset_url("dom.js"),
    )
    assert found == ["😀 ", "über", " 😀 x"]


def test_filters_are_read_as_the_command_line_reads_them(page, url):
    found = page.evaluate(
        """async (url) => ["user=anna", "year>=1990, user!=x", "year=1910", 'year="1910"', ""].map(
             (await import(url)).parseFilter)""",
        url + asset_url("dom.js"),
    )
    assert found == [
        {"user": {"eq": "anna"}},
        {"and": [{"year": {"gte": 1990}}, {"user": {"ne": "x"}}]},
        {"year": {"in": [1910, "1910"]}},
        {"year": {"eq": "1910"}},
        None,
    ]


def test_a_filter_holds_in_questions_and_a_wrong_one_is_told(browser, url):
    with visit(browser, url, expected_errors=["status of 400"]) as page:
        page.get_by_text("Only some documents").click()
        page.fill("#ask-filter", "nonsense")
        page.fill("#question", TWO_HOPS)
        page.keyboard.press("Enter")
        expect(page.locator("#question-problem")).to_contain_text("“nonsense” is no condition")
        page.fill("#ask-filter", "user=nobody")
        card = ask(page, TWO_HOPS)
        expect(card.locator(".problem")).to_contain_text("none that passes the filter")


def test_stop_ends_the_answer_and_the_model(page, checkpoint, monkeypatch):
    steps = []
    forward = checkpoint.model.forward

    def slow(*args, **kwargs):
        steps.append(time.monotonic())
        time.sleep(0.4)
        return forward(*args, **kwargs)

    monkeypatch.setattr(checkpoint.model, "forward", slow)
    page.fill("#question", TWO_HOPS)
    page.keyboard.press("Enter")
    card = page.locator("#answers > li").first
    expect(card.locator(".stages .now")).to_contain_text("Answering")
    page.get_by_role("button", name="Stop").click()
    expect(card.locator(".problem")).to_have_text("Stopped.")
    time.sleep(1.5)
    assert time.monotonic() - steps[-1] > 0.5
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_what_is_copied_runs_and_asks_the_same(page, url, language):
    needed = {"curl": shutil.which("curl"), "Python": importlib.util.find_spec("openai")}
    if needed[language] is None:
        pytest.skip(f"{'openai' if language == 'Python' else 'curl'} is not installed")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_text("Only some documents").click()
    page.fill("#ask-filter", "user!=it's me")
    card = ask(page, TWO_HOPS)
    card.get_by_role("button", name=f"Copy as {language}").click()
    expect(page.locator(".toast")).to_contain_text(f"{language}")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert f"{url}{'api' if language == 'curl' else 'v1'}" in copied
    command = ["sh", "-c", copied] if language == "curl" else [sys.executable, "-c", copied]
    done = subprocess.run(command, capture_output=True, check=True, timeout=120, text=True)
    said = json.loads(done.stdout)["text"] if language == "curl" else done.stdout.strip()
    assert said == "Cornelius Vidal"


def events(*some):
    """A body of server-sent events."""
    return "".join(f"event: {kind}\ndata: {json.dumps(data)}\n\n" for kind, data in some)


REFUSED = {
    "question": TWO_HOPS,
    "text": "It is not there.",
    "citations": [],
    "rounds": [{"index": 1, "routed": {"3": []}, "read": [], "ranked": []}],
    "usage": {
        "prompt_tokens": 9,
        "generated_tokens": 2,
        "routing_seconds": 0.1,
        "total_seconds": 0.2,
    },
    "stopped": "not_found",
    "scores": {},
}


def test_what_is_not_in_the_memory_is_shown_as_such(page):
    page.route(
        "**/ask",
        lambda route: route.fulfill(
            content_type="text/event-stream", body=events(("answer", REFUSED))
        ),
    )
    card = ask(page, TWO_HOPS)
    expect(card.locator(".refused")).to_contain_text("Not in this memory.")
    expect(card.locator(".answer")).to_be_hidden()
    expect(page.locator("#live")).to_contain_text("Not in this memory.")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (events(("token", "Cor")), "The answer broke off; ask once more."),
        (
            events(("error", {"error": {"message": "It is closing.", "code": "x"}})),
            "It is closing.",
        ),
    ],
)
def test_an_answer_that_fails_says_so_and_can_be_asked_again(page, body, told):
    page.route(
        "**/ask",
        lambda route: route.fulfill(content_type="text/event-stream", body=body),
        times=1,
    )
    card = ask(page, TWO_HOPS)
    expect(card.locator(".problem")).to_contain_text(told)
    card.get_by_role("button", name="Ask again").click()
    expect(card.locator(".answer")).to_have_text("Cornelius Vidal")
    expect(card.locator(".problem")).to_be_hidden()


# ---- the memory


def test_files_are_added_and_each_is_told_its_fate(page, tmp_path):
    page.click("#to-memory")
    files = {
        "harbor.md": "# Harbor\n\nThe harbor of Tavac was rebuilt in 1871.",
        "broken.jsonl": '{"id": "a", "text":',
        "rows.jsonl": '{"id": "row-1", "text": "Row one tells of a lamp.", "user": "anna"}',
    }
    for name, text in files.items():
        Path(tmp_path, name).write_text(text)
    page.set_input_files("#files", [tmp_path / name for name in files])
    job = page.locator("#jobs > li").first
    expect(job).to_have_class(re.compile("finished"), timeout=PATIENCE_MS)
    expect(job.locator(".files li")).to_have_count(3)
    broken = job.locator(".files li.failed")
    expect(broken).to_contain_text("broken.jsonl")
    expect(broken.locator(".reason")).to_contain_text("JSON")
    expect(job.locator(".files li.done")).to_have_count(2)
    page.select_option("#search-by", "words")
    page.fill("#search", "lamp")
    page.keyboard.press("Enter")
    expect(page.locator("#documents > li").first).to_contain_text("Row one tells of a lamp.")
    page.fill("#search", "")
    page.fill("#list-filter", "user=anna")
    page.keyboard.press("Enter")
    expect(page.locator("#documents > li")).to_have_count(1)


def test_files_are_dropped_on_the_page_and_their_job_is_found_again(page, service, monkeypatch):
    _, app = service
    go_on = threading.Event()
    wait = app.state.service.turns.encode
    monkeypatch.setattr(app.state.service.turns, "encode", lambda: (go_on.wait(60), wait())[1])
    dropped = """() => {
      const data = new DataTransfer();
      data.items.add(new File(["The lighthouse of Skairton is red."], "lighthouse.txt"));
      for (const type of ["dragenter", "dragover", "drop"]) {
        dispatchEvent(new DragEvent(type, { dataTransfer: data, cancelable: true }));
      }
    }"""
    try:
        page.evaluate(dropped)
        job = page.locator("#jobs > li")
        expect(job.locator(".files li")).to_contain_text("lighthouse.txt")
        expect(job.locator(".about").first).to_contain_text("Reading")
        page.reload()
        expect(job.locator(".files li")).to_contain_text("lighthouse.txt")
        with page.expect_response(lambda answer: answer.request.method == "DELETE"):
            job.get_by_role("button", name="Cancel").click()
    finally:
        go_on.set()
    expect(job).to_have_class(re.compile("finished"))
    expect(job.locator(".files li .score")).to_have_text("not added")


def test_what_is_deleted_is_gone_in_the_next_answer_and_undo_keeps_it(page, url):
    document = renata()
    put(url, document.id, text=document.text, title=document.title)
    card = ask(page, RENATA)
    expect(card.locator(".answer")).to_have_text("Goltava Machine Works")
    page.click("#to-memory")
    page.fill("#search", "Renata Clements")
    page.keyboard.press("Enter")
    row = page.locator(f"#documents > li[data-id='{document.id}']")
    row.get_by_role("button", name="Delete").click()
    expect(row).to_be_hidden()
    page.get_by_role("button", name="Undo").click()
    expect(row).to_be_visible()
    row.get_by_role("button", name="Delete").click()
    expect(row).to_be_hidden()
    page.keyboard.press("u")
    expect(row).to_be_visible()
    row.get_by_role("button", name="Delete").click()
    page.click("#to-ask")
    card = ask(page, RENATA)
    expect(card).not_to_contain_text("Goltava")
    expect(card.locator(".chips")).not_to_contain_text("Renata Clements")
    page.click("#to-memory")
    expect(row).to_have_count(0)


def test_deleting_a_part_that_was_found_deletes_the_whole(page, url):
    text = " ".join(f"The glass organ of Vessel {i} was tuned in {1600 + i}." for i in range(120))
    put(url, "organs", text=text)
    page.click("#to-memory")
    page.fill("#search", "When was the glass organ of Vessel 7 tuned?")
    page.keyboard.press("Enter")
    rows = page.locator("#documents > li[data-id^='organs#']")
    expect(rows.first).to_be_visible()
    rows.first.get_by_role("button", name="Delete").click()
    expect(page.locator(".toast")).to_contain_text(
        re.compile(r"“organs, all \d+ parts” is deleted")
    )
    page.select_option("#search-by", "words")
    page.fill("#search", "Vessel")
    page.locator("#to-ask").click()
    ask(page, TWO_HOPS)  # sends the delete
    page.click("#to-memory")
    expect(page.locator("#list-about")).to_have_text("No documents")


def test_markup_in_documents_is_text_and_runs_nothing(page):
    page.click("#to-memory")
    page.select_option("#search-by", "words")
    page.fill("#search", "pwned")
    page.keyboard.press("Enter")
    row = page.locator("#documents > li").first
    expect(row.locator(".snippet")).to_contain_text("<img src=x")
    row.locator(".name").click()
    expect(page.locator("#passage-text")).to_have_text(EVIL)
    expect(page.locator("#passage-title")).to_have_text("<script>pwned=1</script>")
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="Permalink").click()
    expect(opened.value.locator("main")).to_contain_text("<script>window.pwned=1</script>")
    assert [p.evaluate("window.pwned ?? null") for p in (page, opened.value)] == [None, None]


def test_numbers_and_plan_are_in_bytes(page):
    page.click("#to-memory")
    numbers = page.locator("#numbers")
    expect(numbers).to_contain_text("Routing layers")
    expect(numbers).to_contain_text("3, 4, 5")
    expect(numbers).to_contain_text(re.compile(r"At most [\d.]+ [kM]B of [\d.]+ [MG]B free"))


def test_an_empty_memory_says_how_to_fill_it(page):
    page.select_option("#banks", "zero")
    expect(page.locator("#empty")).to_contain_text("This memory is empty")
    examples = page.locator("#examples button")
    expect(examples).to_have_count(3)
    examples.first.click()
    expect(page.locator("#question")).to_have_value("Who signed the contract with Northwind?")
    expect(page.locator("#question")).to_be_focused()


def test_the_demo_fills_an_empty_memory_and_brings_questions(page):
    page.select_option("#banks", "yard")
    page.click("#load-demo")
    expect(page.locator("#jobs > li")).to_have_class(re.compile("finished"))
    expect(page.locator("#ask")).to_be_visible()
    expect(page.locator("#empty-text")).to_be_hidden()
    examples = page.locator("#examples button")
    expect(examples).to_have_count(3)
    expect(examples.last).to_have_text(TWO_HOPS)
    examples.last.click()
    page.keyboard.press("Enter")
    expect(page.locator("#answers .answer").first).to_have_text("Cornelius Vidal")
    expect(examples.last).to_be_hidden()
    page.select_option("#banks", "zero")
    expect(page.locator("#empty-text")).to_be_visible()
    expect(examples.first).to_have_text("Who signed the contract with Northwind?")


def test_a_memory_is_verified_and_compacted(page, url):
    put(url, "brief", text="This note does not stay for long.")
    page.click("#to-memory")
    about = page.locator("#upkeep-about")
    page.get_by_role("button", name="Verify").click()
    expect(about).to_have_text(re.compile(r"^Sound: \d+ documents, [\d.]+ [kM]B are as they were"))
    page.select_option("#search-by", "words")
    page.fill("#search", "does not stay for long")
    page.keyboard.press("Enter")
    page.locator("#documents > li[data-id=brief]").get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Compact").click()  # sends the delete first
    expect(about).to_have_text(re.compile(r"^\d+ deleted documents? dropped, [\d.]+ .* freed\.$"))
    expect(page.locator("#figures")).not_to_contain_text("Deleted, not compacted")


def test_what_fails_in_upkeep_is_told(browser, url):
    full = {"error": {"message": "Too many jobs are waiting."}}
    with visit(browser, url, expected_errors=("429",)) as page:
        page.route("**:verify", lambda route: route.fulfill(status=429, json=full))
        page.click("#to-memory")
        page.get_by_role("button", name="Verify").click()
        expect(page.locator("#upkeep-about")).to_have_text("Too many jobs are waiting.")
        expect(page.get_by_role("button", name="Verify")).to_be_enabled()


# ---- who may come in


def test_who_has_no_key_is_asked_for_one(browser, tmp_path, checkpoint):
    keys = tmp_path / "keys"
    keys.write_text(f"{hashlib.sha256(KEY.encode()).hexdigest()} reader read notes\n")
    MemoryBank.create(tmp_path / "notes", checkpoint).close()
    settings = {"banks": {"notes": tmp_path / "notes"}, "api_key_file": keys}
    with (
        serving(checkpoint, **settings) as (url, _),
        contextlib.closing(browser.new_context()) as context,
    ):
        page = context.new_page()
        page.goto(url)
        box = page.locator("#sign-in")
        expect(box).to_be_visible()
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#sign-in-why")).to_contain_text("not valid")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        expect(box).to_be_hidden()
        expect(page.locator("#ask-about")).to_have_text("Nothing is in it yet")
        page.click("#to-memory")
        expect(page.locator("#add-files")).to_be_hidden()  # the key may read only
        expect(page.locator("#upkeep")).to_be_hidden()
        stored = page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage)]")
        assert KEY not in stored[0]
        assert KEY in stored[1]


# ---- keyboard, colors, sizes, screen readers


def test_the_keyboard_is_enough(page):
    page.locator("h1").first.click()
    page.keyboard.press("/")
    expect(page.locator("#question")).to_be_focused()
    ask(page, TWO_HOPS)
    page.locator("#question").blur()
    page.keyboard.press("2")
    expect(page.locator("#passage mark")).to_have_text("Cornelius Vidal")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    expect(page.locator("#help-box")).to_be_visible()
    page.keyboard.press("Escape")
    page.evaluate("scrollTo(0, 9999)")
    page.keyboard.press("m")
    expect(page.locator("#memory")).to_be_visible()
    expect(page.locator("#to-memory")).to_have_attribute("aria-current", "page")
    assert page.evaluate("scrollY") == 0
    page.locator("#skip").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    expect(page.locator("#memory")).to_be_visible()


def test_screen_readers_are_told_the_answer_once(page):
    ask(page, TWO_HOPS)
    expect(page.locator("#live")).to_have_attribute("aria-live", "polite")
    expect(page.locator("#live")).to_have_text("Answer: Cornelius Vidal")


def test_chosen_colors_stay(page):
    page.click("#theme")
    page.click("#theme")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 20, 18)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_overflows_and_axe_finds_nothing_serious(browser, url, width, scheme):
    axe = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    source = Path(axe.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    size = {"width": width, "height": 780}
    with visit(browser, url, viewport=size, color_scheme=scheme) as page:
        page.evaluate(source)
        card = ask(page, TWO_HOPS)
        card.get_by_text("How it was found").click()
        check(page, width)
        card.locator(".chips button").nth(1).click()
        check(page, width)
        page.keyboard.press("Escape")
        page.click("#to-memory")
        expect(page.locator("#documents > li").first).to_be_visible()
        check(page, width)


def check(page, width):
    """Nothing is wider than the window, and nothing keeps anybody out."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = page.evaluate("axe.run()")
    assert found["passes"]
    serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert [(v["id"], [n["target"] for n in v["nodes"]]) for v in serious] == []
