"""What the loads of a service found, as sections of a page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measuring.serving import Finding

PAGE = "serving.md"
_HEAD = """# A service under load

Written by `python benchmarks/serving.py KIND --output docs/results`, a section for each kind.
"""
_TITLES = {
    "concurrency": "Many questions at once",
    "indexing": "Questions beside an index job",
    "kills": "kill -9 while documents are sent",
    "soak": "Hours of use",
    "hostile": "What strangers send",
    "start": "From the start to the first answer",
}
MOST_FAILURES = 20


def section(finding: Finding, source: Mapping[str, Any]) -> str:
    """A section of the page: where the figures come from, a table, what went wrong."""
    settings = "; ".join(f"{name}: {value}" for name, value in finding.settings.items())
    lines = [
        f"## {_TITLES[finding.kind]}",
        "",
        f"`{source['command']}`",
        "",
        f"commit: {source['commit']}; machine: {source['machine']}, {source['cores']} cores; "
        f"torch: {source['torch']}; model: {source['model']}; seed: {source['seed']}; {settings}",
        "",
        "| figure | value | bar |",
        "|---|---|---|",
        *(f"| {what} | {value} | {bar} |" for what, value, bar in finding.figures),
    ]
    if finding.failures:
        lines += ["", f"{len(finding.failures)} that must not be:", ""]
        lines += [f"- {_one_line(text)}" for text in finding.failures[:MOST_FAILURES]]
    for text in finding.notes:
        lines += ["", text]
    return "\n".join(lines) + "\n"


def write(folder: Path, finding: Finding, source: Mapping[str, Any]) -> Path:
    """Put a section into the page, in place of an older one of its kind; the page's path."""
    path = folder / PAGE
    text = path.read_text() if path.exists() else _HEAD
    head, *sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    held = {part.split("\n", 1)[0].removeprefix("## "): part.strip() + "\n" for part in sections}
    held[_TITLES[finding.kind]] = section(finding, source)
    known = [held.pop(title) for title in _TITLES.values() if title in held]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head.strip() + "\n", *known, *held.values()]))
    return path


def _one_line(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())[:400]
