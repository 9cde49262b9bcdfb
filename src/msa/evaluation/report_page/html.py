"""A report as one HTML page that needs nothing else and runs nothing but its own script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from itertools import groupby

from msa.evaluation.report_page.blocks import (
    Bars,
    Block,
    Cell,
    Chart,
    Points,
    Section,
    Table,
    Text,
    Tiles,
    bounds,
    model_name,
    signed,
    size_name,
)
from msa.evaluation.report_page.content import verdict_class
from msa.evaluation.report_page.data import VERDICTS, Findings
from msa.evaluation.report_page.explorer import explorer_data, packed
from msa.evaluation.report_page.markup import Html, breakable, el
from msa.evaluation.report_page.plot import bar_svg, curves_svg, swatch

TITLE = "Evaluation report"
WORDS = {"ahead": "ahead", "behind": "behind"}


def page(findings: Findings, sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        findings: for the questions.
        sections: what is said of them.
    """
    style, script = _file("report.css"), _file("report.js")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    )
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", TITLE),
        el("style", Html(style)),
    )
    links = [
        el("a", section.short or section.title, href=f"#{section.id}")
        for section in [*sections[:-1], Section("questions", "Questions", []), sections[-1]]
    ]
    header = el(
        "header",
        el("a", "Evaluation", href="#top", class_="brand"),
        el("nav", *links, aria_label="Sections"),
        el("button", "Dark", id="theme", type="button", aria_pressed="false"),
    )
    *rest, last = [_section(section, findings) for section in sections]
    main = el("main", _intro(findings), *rest, _questions(findings), last, id="main")
    data = el("script", Html(packed(explorer_data(findings))), id="data", type="application/gzip")
    skip = el("a", "Skip to the summary", href="#summary", class_="skip")
    body = el("body", skip, header, main, data, el("script", Html(script)), id="top")
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _file(name: str) -> str:
    return (resources.files("msa.evaluation.report_page") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _intro(findings: Findings) -> Html:
    models = ", ".join(sorted({model_name(run) for run in findings.runs.values()}))
    tasks = len({task for task, _ in findings.places})
    answers = sum(len(run.rows) for run in findings.runs.values())
    about = f"Model {models}: {tasks} tasks, {len(findings.systems)} systems, {answers:,} answers."
    return el("div", el("h1", TITLE), el("p", about), class_="intro")


def _section(section: Section, findings: Findings, level: str = "h2") -> Html:
    blocks = [
        el("div", *(_block(b, findings) for b in group), class_="charts" if charts else None)
        for charts, group in groupby(section.blocks, lambda block: isinstance(block, Chart))
    ]
    parts = [_section(part, findings, "h3") for part in section.parts]
    heading = el(level, section.title)
    if section.folded:
        summary = el("summary", heading)
        return el("details", summary, *blocks, *parts, id=section.id, class_="section")
    return el("section", heading, *blocks, *parts, id=section.id, class_="section")


def _block(block: Block, findings: Findings) -> Html:
    if isinstance(block, Text):
        return el("p", block.text, class_="text")
    if isinstance(block, Points):
        items = el("ul", *(el("li", item) for item in block.items))
        return el("div", el("h3", block.title), items, class_=f"points {block.tone}".strip())
    if isinstance(block, Tiles):
        tiles = [
            el("div", el("dt", what), el("dd", el("b", value), el("span", detail)))
            for value, what, detail in block.items
        ]
        return el("dl", *tiles, class_="tiles")
    if isinstance(block, Chart):
        return _chart(block, findings)
    return _bars(block) if isinstance(block, Bars) else _table(block)


def _chart(block: Chart, findings: Findings) -> Html:
    keys = []
    for curve in block.curves:
        lost = curve.lost
        said = f"lost {signed(lost.mean, '')}% ({bounds(lost, 1)})" if lost else "nothing to lose"
        keys.append(
            el(
                "li",
                swatch(curve.system, findings.systems),
                el("b", breakable(curve.system)),
                el("span", said),
            )
        )
    ends = [size_name(block.curves[0].points[i].size) for i in (0, -1)]
    title = f"{block.title}: score in percent over {ends[0]} to {ends[1]} tokens"
    return el(
        "figure",
        el("figcaption", block.title),
        curves_svg(block.curves, findings.systems, title),
        el("ul", *keys, class_="legend"),
        _made(block.made),
        class_="chart card",
    )


def _table(table: Table) -> Html:
    heads = [el("th", head, scope="col") for head in table.heads]
    rows = [el("tr", *(_cell(cell, not i) for i, cell in enumerate(row))) for row in table.rows]
    return _scrolled(table.caption, heads, rows, table.made)


def _bars(bars: Bars) -> Html:
    shown = [name for name in VERDICTS if any(counts.get(name) for _, counts in bars.rows)]
    heads = [el("th", "system", scope="col"), el("th", "shares", scope="col")]
    for name in shown:
        key = el("i", class_=f"key {verdict_class(name)}")
        heads.append(el("th", key, name, scope="col"))
    rows = []
    for label, counts in bars.rows:
        whole = sum(counts.values())
        shares = [(verdict_class(name), counts.get(name, 0) / whole) for name in shown]
        cells = [
            el("td", f"{100 * counts.get(name, 0) / whole:.1f}", el("small", f"{counts[name]:,}"))
            if counts.get(name)
            else el("td", "–")
            for name in shown
        ]
        rows.append(
            el(
                "tr",
                el("th", breakable(label), scope="row"),
                el("td", bar_svg(shares), class_="bars"),
                *cells,
            )
        )
    return _scrolled(bars.caption, heads, rows, bars.made)


def _scrolled(caption: str, heads: list[Html], rows: list[Html], made: Sequence[str]) -> Html:
    table = el("table", el("thead", el("tr", *heads)), el("tbody", *rows))
    frame = el("div", table, class_="scroll", tabindex="0", role="group", aria_label=caption)
    return el("div", el("p", caption, class_="caption"), frame, _made(made), class_="table card")


def _cell(cell: Cell, first: bool) -> Html:
    text: str = cell.text
    if cell.place:
        task, size, system = cell.place
        text = el(
            "a", cell.text, class_="to", data_task=task, data_size=size, data_system=system,
            href="#questions",
        )  # fmt: skip
    word = el("span", WORDS[cell.mark], class_="mark") if cell.mark in WORDS else None
    detail = el("small", cell.detail) if cell.detail else None
    if first:
        name = text if isinstance(text, Html) else breakable(text)
        return el("th", name, word, detail, scope="row")
    return el("td", text, word, detail, class_=cell.mark or None)


def _made(lines: Sequence[str]) -> Html | None:
    if not lines:
        return None
    items = [el("li", el("code", line)) for line in lines]
    return el("details", el("summary", "How this was made"), el("ul", *items), class_="made")


def _questions(findings: Findings) -> Html:
    """The place of the questions, and what they are chosen by; the script fills it."""

    def choice(name: str, label: str) -> Html:
        return el("label", label, el("select", name=name))

    search = el("input", type="search", name="words", placeholder="in question or answer")
    form = el(
        "form",
        choice("place", "Task"),
        choice("system", "System"),
        choice("verdict", "Answers"),
        el("label", "Words", search),
        id="choose",
        class_="card",
    )
    return el(
        "section",
        el("h2", "Questions"),
        el("noscript", el("p", "The questions are shown by a script, which is off.")),
        form,
        el("p", "Unpacking …", id="found", role="status", class_="text"),
        el("ol", id="list"),
        el("button", "Show more", id="more", type="button", hidden=True),
        id="questions",
        class_="section",
    )
