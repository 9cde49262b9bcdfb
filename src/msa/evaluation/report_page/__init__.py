"""Runs of an evaluation as a page for people: HTML that needs nothing else, and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msa.errors import InputError
from msa.evaluation.report_page.content import sections
from msa.evaluation.report_page.html import page
from msa.evaluation.report_page.markdown import markdown
from msa.evaluation.report_page.sources import PAGE, read_findings

NAME = "report.html"


def write_report(
    sources: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    compare: str | Path | None = None,
) -> tuple[Path, Path]:
    """Write what runs show, and nothing that they do not.

    Args:
        sources: folders of `msa eval run` (`runs/*.jsonl` and what a judge has said are read) and
            HTML files of earlier reports, one or several; see `read_findings`.
        output: the HTML file; by default `report.html` in the folder. The Markdown lies beside it.
        compare: folder or page of earlier runs; these are compared with them, question by question.

    Returns:
        The HTML file and the Markdown file. The same runs make the same files.

    Raises:
        InputError: there are no runs, one is damaged, or the output is no name of an HTML file.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    first = Path(given[0])
    if output is None and first.suffix == PAGE:
        raise InputError(f"{first} is a page; name the new one with --output FILE")
    target = Path(output) if output is not None else first / NAME
    if target.suffix != PAGE:
        raise InputError(f"--output {target}: give the name of an HTML file, as in {NAME}")
    findings = read_findings(given, compare)
    found = sections(findings)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(".md")
    for path, text in ((target, page(findings, found)), (beside, markdown(findings, found))):
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    return target, beside
