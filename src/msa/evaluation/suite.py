"""Tasks, run: every system on every task and size, a file of JSON lines each.

A haystack is encoded once for all questions and tasks that have it. A memory that changes is asked
after 0, 10 and 50% of its documents were updated or deleted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msa.errors import InputError
from msa.evaluation.metrics import mean
from msa.evaluation.question_sets import QuestionSet, hash_of
from msa.evaluation.runs import Run, run
from msa.evaluation.tasks.base import Change, Request, Task
from msa.evaluation.workbench import Workbench, Workplace, parse_system
from msa.model.checkpoint import Checkpoint
from msa.types import Document

RUNS = "runs"
"""Folder of the runs, in that of the output."""
SHARES = (0.0, 0.1, 0.5)
"""Of the documents, that are changed."""
SYSTEMS = (
    "msa",
    "bm25-1",
    "bm25-5",
    "bm25-10",
    "minilm-5",
    "backbone-5",
    "hybrid-5",
    "hybrid-5+rerank",
    "full",
    "gold",
    "closed",
)
"""What is asked by default."""
FEW = ("msa", "bm25-5", "gold")
UNITS = {"K": 10**3, "M": 10**6}


@dataclass(frozen=True, slots=True)
class Selection:
    """Tasks that are run in the same way.

    Attributes:
        tasks: names or patterns.
        sizes: tokens of the haystack, for tasks that grow.
        count: questions of each.
        systems: that are asked.
    """

    tasks: tuple[str, ...]
    sizes: tuple[int, ...]
    count: int
    systems: tuple[str, ...] = FEW


SHORT = (
    Selection(("ruler/niah_single_1", "ruler/niah_single_2"), (16_000, 64_000), 10),
    Selection(("ruler/niah_multikey_2", "ruler/vt"), (16_000,), 10),
    Selection(("ruler/niah_multiquery", "ruler/cwe", "ruler/fwe"), (16_000,), 5),
    Selection(("beyond", "changing"), (16_000,), 8, ("msa", "bm25-5")),
    Selection(("curve/squad", "curve/hotpotqa"), (16_000, 64_000), 10),
    Selection(("curve/worlds",), (16_000,), 10),
)
"""A part of everything that takes minutes, not days."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A run that is done.

    Attributes:
        path: of its file.
        run: what is in it.
    """

    path: Path
    run: Run

    def summary(self) -> dict[str, Any]:
        """For people: what was asked of whom, and how it went."""
        about, rows = self.run.about, self.run.rows
        return {
            "task": about["task"],
            "size": about["size"],
            "share": about["share"],
            "system": about["system"],
            "metric": about["metric"],
            "score": round(mean([row["scores"]["score"] for row in rows]), 4),
            "questions": len(rows),
            "seconds": round(mean([row["seconds"] for row in rows]), 3),
            "run": str(self.path),
        }


class Suite:
    """Runs tasks on one model.

    Args:
        checkpoint: the model of all systems.
        workplace: where banks are kept.
        output: folder; the runs are in its `runs`.
        request: of all tasks; size and count are set for each.
        about: where the answers come from, for the first line of every run.
        batch_size: questions asked together.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        workplace: Workplace,
        output: Path,
        request: Request,
        about: Mapping[str, Any],
        *,
        batch_size: int = 16,
    ) -> None:
        self._checkpoint = checkpoint
        self._place = workplace
        self._output = output
        self._request = request
        self._about = dict(about)
        self._batch_size = batch_size

    def run(self, task: Task, size: int, count: int, systems: Sequence[str]) -> Iterator[Asked]:
        """Ask every system the questions of a task; what is answered already is not asked again.

        Args:
            task: of the registry.
            size: tokens of the haystack; not looked at by tasks that do not grow.
            count: questions.
            systems: names, see `msa.evaluation.workbench`.

        Raises:
            InputError: the task cannot be loaded, a system does not fit, or a run's file was made
                otherwise.
        """
        size = size if task.grows else 0
        request = replace(self._request, size=size, count=count)
        for share, questions, base in variants(task, request):
            bench = Workbench(
                self._checkpoint, questions, self._place, base=base, seed=request.seed
            )
            with closing(bench):
                for system in fitting(task, systems):
                    yield self._asked(task, size, share, questions, bench, system)

    def _asked(
        self,
        task: Task,
        size: int,
        share: float | None,
        questions: QuestionSet,
        bench: Workbench,
        system: str,
    ) -> Asked:
        path = run_path(self._output, task.name, size, share, system)
        about = {
            **self._about,
            "task": task.name,
            "title": task.title,
            "metric": task.metric,
            "size": size,
            "share": share,
            "set": questions.name,
            "split": questions.split,
            "data": questions.data_hash,
            "documents": len(questions.documents),
            "system": system,
        }
        name = path.stem.replace("__", "/")
        progress = self._place.progress
        done = run(
            path,
            about,
            lambda: bench.system(system),
            questions.questions,
            batch_size=self._batch_size,
            progress=progress(name, "questions") if progress else None,
            score=task.score,
            ranks=task.ranks,
        )
        return Asked(path, done)


Variant = tuple[float | None, QuestionSet, tuple[QuestionSet, Sequence[Change]] | None]
"""Share that was changed, the questions then, and the set before with its changes."""


def variants(task: Task, request: Request) -> Iterator[Variant]:
    """The set of a task; of a memory that changes, one for every share.

    Raises:
        InputError: the task cannot be loaded.
    """
    before = task.load(request)
    if task.change is None:
        yield None, before, None
        return
    for share in SHARES:
        changed = task.change(request, share)
        after = replace(
            before,
            questions=changed.questions,
            documents=changed_documents(before.documents, changed.changes),
            data_hash=f"{before.data_hash}-{hash_of(changed.changes)}",
        )
        yield share, after, (before, changed.changes)


def changed_documents(
    documents: Sequence[Document], changes: Sequence[Change]
) -> tuple[Document, ...]:
    """Documents as they are after changes; new ones after the others.

    Raises:
        InputError: one is deleted that is not there.
    """
    found = {document.id: document for document in documents}
    for change in changes:
        if change.document is not None:
            found[change.id] = change.document
        elif found.pop(change.id, None) is None:
            raise InputError(f"document {change.id!r} is to be deleted, and is not there")
    return tuple(found.values())


def fitting(task: Task, systems: Sequence[str]) -> list[str]:
    """Systems that a task can ask; of those that rank in the same way, the first only."""
    if not task.ranks:
        return list(systems)
    found: dict[object, str] = {}
    for name in systems:
        parts = parse_system(name)
        if parts.kind not in ("full", "gold", "closed"):
            found.setdefault((parts.kind, parts.rerank, repr(parts.options)), name)
    return list(found.values())


def run_path(output: Path, task: str, size: int, share: float | None, system: str) -> Path:
    """Where the run of a system on a task lies."""
    changed = "" if share is None else f"+{100 * share:.0f}%"
    safe = re.sub(r"[^\w.+-]+", "-", system).strip("-")
    return output / RUNS / f"{task.replace('/', '__')}{changed}@{size}--{safe}.jsonl"


def size_of(text: str) -> int:
    """Tokens: a number, perhaps with K (thousands) or M (millions) after it.

    Raises:
        InputError: it is something else.
    """
    unit = UNITS.get(text[-1:].upper(), 1)
    try:
        size = int(float(text.rstrip("kKmM")) * unit)
    except ValueError:
        size = 0
    if size < 1:
        raise InputError(f"size {text!r}: expected tokens, such as 16K or 1M")
    return size
