"""Runs: a file of JSON lines per set and system, one per question, that can be gone on with.

The first line says where the answers come from. A file that was made otherwise (another model,
other data, another seed or other options) is refused, so that no figure mixes two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msa.errors import InputError
from msa.evaluation.metrics import (
    contains,
    exact_match,
    token_f1,
    uses_wrong,
)
from msa.evaluation.tasks.base import answer_scores

if TYPE_CHECKING:
    from msa.evaluation.question_sets import Question
    from msa.evaluation.systems import Outcome, System

    Score = Callable[[Question, Outcome], Mapping[str, float]]
    """Figures of an answer by name."""

SAME = (
    *("task", "size", "share", "set", "split", "system"),
    *("seed", "questions", "model", "data"),
)
"""What a file must agree in to be gone on with."""
SHOWN = 300
"""Characters of a text that was read that are kept."""


@dataclass(frozen=True, slots=True)
class Run:
    """Answers of one system to the questions of one set.

    Attributes:
        about: the first line: provenance, set, system.
        rows: one per question, in the order of the file.
    """

    about: dict[str, Any]
    rows: list[dict[str, Any]]


def run(
    path: str | Path,
    about: Mapping[str, Any],
    system: Callable[[], System],
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
    score: Score = answer_scores,
    ranks: int = 0,
) -> Run:
    """Ask what has not been asked yet, and write every answer as it comes.

    Args:
        path: of the file; made, or gone on with.
        about: where the answers come from; see `SAME`.
        system: makes the system; not called when every question is answered already.
        questions: drawn from the set.
        batch_size: questions asked together.
        progress: called with the questions answered and all of them.
        score: figures of an answer by name.
        ranks: only rank so many documents; 0 to have the questions answered.

    Raises:
        InputError: the file is damaged, or was made otherwise.
    """
    path = Path(path)
    about = {**about, "questions": len(questions)}
    done = _resumed(path, about)
    asked: System | None = None
    for start in range(0, len(questions), batch_size):
        # The same questions together after a stop as without one: rounding depends on it.
        batch = questions[start : start + batch_size]
        if all(question.id in done for question in batch):
            continue
        asked = asked or system()
        outcomes = asked.rank(batch, ranks) if ranks else asked.ask(batch)
        with path.open("a", encoding="utf-8") as file:
            for question, outcome in zip(batch, outcomes, strict=True):
                if question.id not in done:
                    row = _row(question, outcome, score(question, outcome))
                    file.write(json.dumps(row) + "\n")
        if progress is not None:
            progress(start + len(batch), len(questions))
    return read_run(path)


def read_run(path: str | Path) -> Run:
    """A run's file.

    Raises:
        InputError: it cannot be read, or a line is damaged; the message says which.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a run ({error})") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(dict(json.loads(line)))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{path}, line {number}: not a line of a run ({error}); delete the line to ask its "
                "question again"
            ) from error
    if not rows or "about" not in rows[0]:
        raise InputError(f"{path}: no run (its first line says where the answers come from)")
    return Run(rows[0]["about"], rows[1:])


def _resumed(path: Path, about: Mapping[str, Any]) -> set[str]:
    """Ids that are answered already; a new file gets its first line."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"about": dict(about)}) + "\n", encoding="utf-8")
        return set()
    drop_torn_line(path)
    held = read_run(path)
    for name in SAME:
        if held.about.get(name) != about.get(name):
            raise InputError(
                f"{path}: was made with {name} {held.about.get(name)!r}, not {about.get(name)!r}; "
                "give another output folder, or delete the file"
            )
    return {row["id"] for row in held.rows}


def drop_torn_line(path: Path) -> None:
    """Cut off a last line that a stop tore: it has no end."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])


def _row(question: Question, outcome: Outcome, scores: Mapping[str, float]) -> dict[str, Any]:
    answers = list(question.answers)
    right = float(outcome.refused)  # where there is no answer
    held = asdict(outcome)
    spans = held.pop("spans")
    return {
        "id": question.id,
        "kind": question.kind,
        "question": question.text,
        "answers": answers,
        "gold": list(question.gold),
        **held,
        "texts": {key: text[:SHOWN] for key, text in outcome.texts.items()},
        "em": exact_match(outcome.answer, answers) if answers else right,
        "f1": round(token_f1(outcome.answer, answers), 6) if answers else right,
        "scores": {
            name: round(float(value), 6)
            for name, value in {**document_scores(question, outcome), **scores}.items()
        },
        "wrong_used": uses_wrong(outcome.answer, question.wrong, answers),
        "span_right": any(contains(span, a) for span in spans for a in answers) if spans else None,
        "seconds": round(outcome.seconds, 4),
    }


def document_scores(question: Question, outcome: Outcome) -> dict[str, float]:
    """How well the documents were found: those that were read, and those that were routed to.

    Empty without gold documents. "routed LAYER" is the share of the gold documents that the layer
    selected in some round; "named ..." are of the documents that were read.
    """
    gold = set(question.gold)
    if not gold:
        return {}
    found: dict[str, float] = {}
    if outcome.rounds:
        both = len(gold & set(outcome.named))
        precision = both / len(outcome.named) if outcome.named else 0.0
        share = both / len(gold)
        total = precision + share
        found["named precision"], found["named recall"] = precision, share
        found["named f1"] = 2 * precision * share / total if total else 0.0
    for layer in sorted({layer for turn in outcome.routed for layer in turn}):
        seen = {i for turn in outcome.routed for i in turn.get(layer, ())}
        found[f"routed {layer}"] = len(gold & seen) / len(gold)
    if outcome.routed:
        seen = {i for turn in outcome.routed for some in turn.values() for i in some}
        found["routed"] = len(gold & seen) / len(gold)
    return found
