"""A report as Markdown, for a page of documentation."""

from __future__ import annotations

import re
from collections.abc import Sequence

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
    percent,
    signed,
    size_name,
    where,
)
from msa.evaluation.report_page.data import PARTLY, RIGHT, VERDICTS, Findings, verdict

EXAMPLES = 3
"""Wrong answers shown of every task."""


def markdown(findings: Findings, sections: Sequence[Section]) -> str:
    """The report.

    Args:
        findings: for a few wrong answers.
        sections: what is said of them.
    """
    models = ", ".join(sorted({model_name(run) for run in findings.runs.values()}))
    parts = [
        "# Evaluation report",
        f"Model {plain(models)}.",
        *(_section(section, 2) for section in sections),
    ]
    parts.append(_examples(findings))
    return "\n\n".join(part for part in parts if part) + "\n"


def plain(text: str) -> str:
    """Text in which nothing is markup, on one line."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"([\\`*_|\[\]#$])", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _section(section: Section, level: int) -> str:
    parts = [f"{'#' * level} {plain(section.title)}"]
    parts += [_block(block) for block in section.blocks]
    parts += [_section(part, level + 1) for part in section.parts]
    return "\n\n".join(part for part in parts if part)


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return plain(block.text)
    if isinstance(block, Points):
        return "\n".join([f"**{plain(block.title)}**\n", *(f"- {plain(i)}" for i in block.items)])
    if isinstance(block, Tiles):
        return "\n".join(
            f"- **{plain(value)}** {plain(what)} ({plain(detail)})"
            for value, what, detail in block.items
        )
    if isinstance(block, Chart):
        return _chart(block)
    return _bars(block) if isinstance(block, Bars) else _table(block)


def _chart(block: Chart) -> str:
    sizes = sorted({point.size for curve in block.curves for point in curve.points})
    rows = []
    for curve in block.curves:
        at = {point.size: point.score for point in curve.points}
        scores = [Cell(percent(at.get(size)), bounds(at.get(size))) for size in sizes]
        lost = Cell("")
        if curve.lost:
            lost = Cell(signed(curve.lost.mean, ""), bounds(curve.lost, 1))
        rows.append([Cell(curve.system), *scores, lost])
    heads = ["system", *(size_name(size) for size in sizes), "lost, in percent"]
    return _table(Table(block.title, heads, rows, block.made))


def _bars(bars: Bars) -> str:
    shown = [name for name in VERDICTS if any(counts.get(name) for _, counts in bars.rows)]
    rows = []
    for label, counts in bars.rows:
        whole = sum(counts.values())
        cells = [Cell(f"{100 * counts.get(name, 0) / whole:.1f}") for name in shown]
        rows.append([Cell(label), Cell(f"{whole:,}"), *cells])
    heads = ["system", "answers", *(f"{name}, %" for name in shown)]
    return _table(Table(bars.caption, heads, rows, bars.made))


def _table(table: Table) -> str:
    lines = [
        f"**{plain(table.caption)}**\n",
        f"| {' | '.join(plain(head) for head in table.heads)} |",
        "|---" * len(table.heads) + "|",
        *(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in table.rows),
    ]
    if table.made:
        lines += ["", "Made by", *("- " + code(line) for line in table.made)]
    return "\n".join(lines)


def _cell(cell: Cell) -> str:
    text = plain(cell.text)
    if cell.mark == "best":
        text = f"**{text}**"
    if cell.mark in ("ahead", "behind"):
        text += f" {cell.mark}"
    return f"{text} ({plain(cell.detail)})" if cell.detail else text


def code(text: str) -> str:
    """Text as it is, on one line, in enough backquotes."""
    text = re.sub(r"\s+", " ", text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}"


def _examples(findings: Findings) -> str:
    """The first wrong answers of the main system on every task."""
    rows = []
    for place in findings.places:
        run = findings.at(place, findings.main)
        wrong = [r for r in run.rows if verdict(r) not in (RIGHT, PARTLY)] if run else []
        for row in wrong[:EXAMPLES]:
            cells = (row["question"], row["answer"], "; ".join(row["answers"]), verdict(row))
            assert run is not None
            rows.append([Cell(where(run)), *(Cell(_short(text)) for text in cells)])
    if not rows:
        return ""
    heads = ["task", "question", "answer", "accepted", "why"]
    caption = f"The first {EXAMPLES} of each task and size, by {findings.main}"
    return "## Wrong answers\n\n" + _table(Table(caption, heads, rows))


def _short(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
