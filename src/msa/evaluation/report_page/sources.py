"""Where a report's runs come from: folders of `msa eval run`, and pages of earlier reports."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msa.errors import InputError
from msa.evaluation.judge import judged_scores
from msa.evaluation.report_page.data import Findings, Measured
from msa.evaluation.report_page.explorer import unpacked
from msa.evaluation.runs import read_run

RUNS = "runs"
PAGE = ".html"
_NEEDED = ("task", "title", "metric", "size", "system")
_DATA = re.compile(r'<script id="data" type="application/gzip">([^<]*)</script>')

Key = tuple[str, int, str]


def read_findings(
    sources: str | Path | Sequence[str | Path], compare: str | Path | None = None
) -> Findings:
    """All runs of output folders and of pages, perhaps with those of another to compare with.

    Args:
        sources: folders of `msa eval run` and HTML files of `msa eval report`, one or several; a
            run that stands in several is taken from the first.
        compare: one more of these.

    Raises:
        InputError: there are no runs, one is damaged or was not made by `msa eval`, or a page does
            not hold its runs whole.
    """
    given = [sources] if isinstance(sources, str | Path) else sources
    runs: dict[Key, Measured] = {}
    for source in given:
        for key, run in _read(Path(source)).items():
            runs.setdefault(key, run)
    runs = dict(sorted(runs.items()))  # one order, wherever they come from
    return Findings(runs, _read(Path(compare)) if compare else {})


def _read(source: Path) -> dict[Key, Measured]:
    found: dict[Key, Measured] = {}
    for path, run in _page(source) if source.suffix == PAGE else _folder(source):
        missing = [name for name in _NEEDED if name not in run.about]
        if missing:
            raise InputError(
                f"{path}: its first line has no {missing[0]!r}; the report reads what "
                "`msa eval run` has written"
            )
        if not run.rows:
            continue
        key = (*run.place, run.system)
        if key in found:
            raise InputError(
                f"{path}: a second run of {run.system} on {run.task}; keep one of them"
            )
        found[key] = run
    if not found:
        raise InputError(f"{source}: no answers in {RUNS}/*.jsonl; run `msa eval run` first")
    return found


def _folder(folder: Path) -> Iterator[tuple[Path, Measured]]:
    for path in sorted((folder / RUNS).glob("*.jsonl")):
        held = read_run(path)
        yield path, Measured(held.about, held.rows, judged_scores(folder, path.stem, held.rows))


def _page(path: Path) -> Iterator[tuple[Path, Measured]]:
    """The runs that a page holds; texts that were read are cut as they are there."""
    try:
        found = _DATA.search(path.read_text(encoding="utf-8"))
        data = unpacked(found[1]) if found else None
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as a report ({error})") from error
    if not isinstance(data, dict) or not all("about" in place for place in data["places"]):
        raise InputError(f"{path}: no page of msa eval report that holds its runs; give the folder")
    if data["left"]:
        raise InputError(
            f"{path}: {data['left']:,} questions are left out of this page; give the folder"
        )
    pool = data["pool"]
    for place in data["places"]:
        for system, answers in place["answers"].items():
            about = place["about"][system]
            rows, judged = [], {}
            for question, answer in zip(place["questions"], answers, strict=True):
                if answer is not None:
                    rows.append(_row(question, answer, pool))
                    if "judge" in answer:
                        judged[question["id"]] = answer["judge"]
            yield path, Measured(about, rows, judged)


def _row(
    question: Mapping[str, Any], answer: Mapping[str, Any], pool: Sequence[str]
) -> dict[str, Any]:
    """A line of a run."""
    return {
        "id": question["id"],
        "kind": question["kind"],
        "question": pool[question["text"]],
        "answers": [pool[i] for i in question["accepted"]],
        "gold": [pool[i] for i in question["gold"]],
        "answer": pool[answer["answer"]],
        "refused": answer["refused"],
        "ranked": [pool[i] for i in answer["ranked"]],
        "named": [pool[i] for i in answer["named"]],
        "routed": [
            {layer: [pool[i] for i in ids] for layer, ids in turn.items()}
            for turn in answer["routed"]
        ],
        "texts": {pool[i]: pool[text] for i, text in answer["texts"]},
        "rounds": answer["rounds"],
        "stopped": answer["stopped"],
        "seconds": answer["seconds"],
        "prompt_tokens": answer["read"],
        "generated_tokens": answer["written"],
        "bytes": answer["bytes"],
        "span_right": answer["span"],
        "wrong_used": answer["outdated"],
        "scores": answer["scores"],
    }
