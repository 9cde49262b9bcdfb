"""Every question with every system's answer: data for the page's script, and for later reports."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from typing import Any

from msa.evaluation.report_page.blocks import where
from msa.evaluation.report_page.data import RIGHT, VERDICTS, Findings, Measured, verdict

ROWS = 12_000
"""Answers in the page, at most, so that a browser opens it at once."""
TEXT = 600
"""Characters of a text that was read, at most."""
TEXTS = 10
"""Texts of an answer, at most."""


class _Pool:
    """Texts, each once, by number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __call__(self, text: Any) -> int:
        return self._numbers.setdefault(str(text), len(self._numbers))

    def texts(self) -> list[str]:
        return list(self._numbers)


def explorer_data(findings: Findings, rows: int = ROWS) -> dict[str, Any]:
    """What the script shows; texts and ids are numbers of places in `pool`.

    Args:
        findings: all runs.
        rows: answers, at most; where there are more, every task and size has its share, and those
            that the main system answers wrong come first.
    """
    pool = _Pool()
    answers = sum(len(run.rows) for run in findings.runs.values())
    limit = answers if answers <= rows else max(5, rows // len(findings.runs))
    places, left = [], 0
    for place in findings.places:
        runs = {s: run for s in findings.systems if (run := findings.at(place, s))}
        chosen, more = _chosen(runs, limit)
        left += more
        first = next(iter(runs.values()))
        places.append(
            {
                "task": place[0],
                "size": place[1],
                "label": where(first),
                "metric": first.about["metric"],
                "about": {str(findings.systems.index(s)): run.about for s, run in runs.items()},
                "questions": [
                    {
                        "id": i,
                        "text": pool(row["question"]),
                        "accepted": [pool(answer) for answer in row["answers"]],
                        "gold": [pool(g) for g in row["gold"]],
                        "kind": row.get("kind") or "",
                    }
                    for i, row in chosen.items()
                ],
                "answers": {
                    str(findings.systems.index(s)): _answers(findings, run, list(chosen), pool)
                    for s, run in runs.items()
                },
            }
        )
    return {
        "systems": findings.systems,
        "verdicts": VERDICTS,
        "places": places,
        "left": left,
        "pool": pool.texts(),
    }


def packed(data: Mapping[str, Any]) -> str:
    """Data as text that is safe wherever it stands: JSON, gzip, base64."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def unpacked(text: str) -> Any:
    """Data of `packed`.

    Raises:
        ValueError, OSError, EOFError, zlib.error: it is none.
    """
    return json.loads(gzip.decompress(base64.b64decode(text)))


def _chosen(runs: Mapping[str, Measured], limit: int) -> tuple[dict[str, Any], int]:
    """Id -> row of the questions that are shown, and how many are not."""
    rows = {str(row["id"]): row for run in runs.values() for row in run.rows}
    main = {str(row["id"]): row for row in next(iter(runs.values())).rows}
    order = {i: place for place, i in enumerate(rows)}

    def first(i: str) -> tuple[bool, int]:
        return i not in main or verdict(main[i]) == RIGHT, order[i]

    kept = sorted(sorted(rows, key=first)[:limit], key=order.__getitem__)
    return {i: rows[i] for i in kept}, len(rows) - len(kept)


def _answers(
    findings: Findings, run: Measured, ids: list[str], pool: _Pool
) -> list[dict[str, Any] | None]:
    held = {str(row["id"]): row for row in run.rows}
    before = findings.before.get((*run.place, run.system))
    earlier = {str(row["id"]): row for row in before.rows} if before else {}
    found: list[dict[str, Any] | None] = []
    for i in ids:
        row = held.get(i)
        if row is None:
            found.append(None)
            continue
        answer = _answer(row, pool)
        if i in run.judged:
            answer["judge"] = run.judged[i]
        if i in earlier:
            was = earlier[i]
            answer["before"] = {
                "score": float(was["scores"]["score"]),
                "answer": pool(was["answer"]),
                "verdict": VERDICTS.index(verdict(was)),
            }
        found.append(answer)
    return found


def _answer(row: Mapping[str, Any], pool: _Pool) -> dict[str, Any]:
    texts = row.get("texts") or {}
    return {
        "score": float(row["scores"]["score"]),
        "scores": row["scores"],
        "verdict": VERDICTS.index(verdict(row)),
        "answer": pool(row["answer"]),
        "refused": bool(row["refused"]),
        "named": [pool(i) for i in row["named"]],
        "ranked": [pool(i) for i in row["ranked"]],
        "routed": [
            {layer: [pool(i) for i in ids] for layer, ids in turn.items()}
            for turn in row.get("routed") or ()
        ],
        "texts": [[pool(i), pool(text[:TEXT])] for i, text in list(texts.items())[:TEXTS]],
        "rounds": row["rounds"],
        "stopped": row["stopped"],
        "seconds": row["seconds"],
        "read": row["prompt_tokens"],
        "written": row["generated_tokens"],
        "bytes": row.get("bytes"),
        "span": row.get("span_right"),
        "outdated": row.get("wrong_used"),
    }
