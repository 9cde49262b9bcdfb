"""Runs of an evaluation as a page for people: HTML that needs nothing else, and Markdown."""

from __future__ import annotations

from pathlib import Path

from msa.errors import InputError
from msa.evaluation.report_page.content import sections
from msa.evaluation.report_page.data import read_findings
from msa.evaluation.report_page.html import page
from msa.evaluation.report_page.markdown import markdown

NAME = "report.html"


def write_report(
    folder: str | Path, output: str | Path | None = None, compare: str | Path | None = None
) -> tuple[Path, Path]:
    """Write what the runs of a folder show, and nothing that they do not.

    Args:
        folder: of `msa eval run`; `runs/*.jsonl` and what a judge has said are read.
        output: the HTML file; by default `report.html` in the folder. The Markdown lies beside it.
        compare: folder of earlier runs; these are compared with them, question by question.

    Returns:
        The HTML file and the Markdown file. The same runs make the same files.

    Raises:
        InputError: there are no runs, one is damaged, or the output is no name of an HTML file.
    """
    target = Path(output) if output is not None else Path(folder, NAME)
    if target.suffix != ".html":
        raise InputError(f"--output {target}: give the name of an HTML file, as in {NAME}")
    findings = read_findings(folder, compare)
    found = sections(findings)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(".md")
    for path, text in ((target, page(findings, found)), (beside, markdown(findings, found))):
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    return target, beside
