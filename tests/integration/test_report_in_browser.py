"""The report of an evaluation in a browser, from a file, as people open it."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

from evaluation_runs import write_runs

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from msa.evaluation.report_page import write_report  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
expect = playwright.expect
PATIENCE_MS = 60_000
SYSTEMS = ("msa", "bm25-1", "full", "gold")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_runs(folder / "now", count=30, systems=SYSTEMS)
    write_runs(folder / "before", count=30, shift=-0.4, systems=("msa",))
    return write_report(folder / "now", compare=folder / "before")[0]


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=PATIENCE_MS)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def visit(browser, report, **options):
    """The page; when done, it has asked for nothing else, and nothing complained."""
    with contextlib.closing(browser.new_context(reduced_motion="reduce", **options)) as context:
        context.set_default_timeout(PATIENCE_MS)
        requests, problems = [], []
        context.on("request", lambda request: requests.append(request.url))
        context.on("weberror", lambda error: problems.append(str(error.error)))
        context.on("console", lambda message: problems.append(message.text))
        context.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error('CSP', e.blockedURI))"
        )
        page = context.new_page()
        page.goto(report.as_uri())
        expect(page.locator("#found")).to_contain_text("answers of msa")
        yield page
        assert page.evaluate("window.pwned") is None
        assert requests == [report.as_uri()]
        assert problems == []


@pytest.fixture
def page(browser, report):
    with visit(browser, report, viewport={"width": 1280, "height": 900}) as page:
        yield page


def test_where_it_loses_is_on_the_first_page(page):
    box = page.locator(".points.behind")
    expect(box.locator("h3")).to_have_text("Where msa loses")
    assert box.bounding_box()["y"] < 900
    expect(box).to_contain_text("outdated or deleted fact; none may")


def test_a_question_opens_with_its_way_and_markup_in_it_is_text(page):
    page.select_option("select[name=verdict]", label="not read right")
    first = page.locator("#list details").first
    first.locator("summary").click()
    opened = first.locator(".opened")
    for head in ("Needed documents", "Round 1: routed to", "Read, in this order", "Every system"):
        expect(opened.get_by_role("heading", name=head)).to_be_visible()
    expect(opened.locator(".layer").first).to_have_text("layer 9")
    expect(opened.locator(".ids .needed").first).to_have_attribute("title", "needed")
    expect(opened.locator(".read p").first).to_contain_text("<img src=x onerror=")
    expect(opened.locator("tbody tr")).to_have_count(4)
    expect(opened.locator(".cost").last).to_contain_text("tokens read")
    assert page.locator("#list img, #list script").count() == 0


def test_a_score_leads_to_its_questions(page):
    table = page.get_by_role("group", name="qa", exact=True)
    row = table.locator("tr", has_text="qa/squad 128K")
    row.locator("a").nth(1).click()
    expect(page.locator("#found")).to_have_text("30 answers of bm25-1.")
    expect(page.locator("select[name=place]")).to_have_value("6")
    expect(page.locator("#list .said").first).to_contain_text("qa/squad at 128K")
    assert page.locator("#questions").bounding_box()["y"] < 200


def test_questions_are_chosen_by_outcome_words_and_change(page):
    page.select_option("select[name=verdict]", label="not routed")
    expect(page.locator("#list .badge").first).to_have_text("not routed")
    page.select_option("select[name=verdict]", label="All")
    page.fill("input[name=words]", "note 17?")
    expect(page.locator("#found")).to_have_text("10 answers of msa.")
    page.fill("input[name=words]", "no such words")
    expect(page.locator("#found")).to_have_text("0 answers of msa.")
    page.fill("input[name=words]", "")
    page.select_option("select[name=verdict]", label="better than before")
    first = page.locator("#list details").first
    first.locator("summary").click()
    expect(first.get_by_role("heading", name="Before")).to_be_visible()
    expect(first.locator("summary .badge")).to_have_text("right")


def test_more_questions_come_when_they_are_asked_for(page):
    page.select_option("select[name=verdict]", label="All")
    expect(page.locator("#list > li")).to_have_count(40)
    page.locator("#more").click()
    expect(page.locator("#list > li")).to_have_count(80)


def test_a_link_opens_the_section_that_it_leads_to(page):
    expect(page.locator("#provenance")).not_to_have_attribute("open", "")
    page.get_by_role("navigation").get_by_role("link", name="Provenance").click()
    expect(page.locator("#provenance")).to_have_attribute("open", "")


def test_colors_can_be_chosen(page):
    button = page.get_by_role("button", name="Dark colors")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    button.click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    expect(page.get_by_role("button", name="Light colors")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_overflows_and_axe_finds_nothing_serious(browser, report, width, scheme):
    axe = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    source = Path(axe.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    options = {"viewport": {"width": width, "height": 860}, "color_scheme": scheme}
    with visit(browser, report, bypass_csp=True, **options) as page:
        page.select_option("select[name=place]", label="changing/updates, 50% changed")
        opened = "details.section, .made, #list > li:first-child > details"
        page.evaluate(f"document.querySelectorAll('{opened}').forEach((each) => each.open = true)")
        expect(page.locator(".opened").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate(source)
        rules = {"color-contrast": {"enabled": True}}
        found = page.evaluate("(rules) => axe.run({ rules })", rules)
        serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
        shown = [(v["id"], v["nodes"][0]["failureSummary"]) for v in serious]
        assert not shown
