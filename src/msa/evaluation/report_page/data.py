"""What a report says of runs: figures, why answers are wrong, who is ahead, what size costs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from msa.evaluation.metrics import Interval, all_within, bootstrap, mean
from msa.evaluation.significance import (
    Difference,
    degradation,
    false_discovery,
    mean_of_means,
    paired,
)

DEPTHS = (1, 5, 10)
FAR = 1 << 30
LAYER = re.compile(r"routed (\d+)")
"""Scores that are of one routing layer."""
CEILING = "gold"
"""Systems of this name are given what is to be found: no rivals."""

RIGHT = "right"
PARTLY = "partly right"
OUTDATED = "used an outdated fact"
MADE_UP = "should have refused"
UNROUTED = "not routed"
UNNAMED = "not named"
REFUSED = "refused wrongly"
MISREAD = "not read right"
VERDICTS = (RIGHT, PARTLY, UNROUTED, UNNAMED, MISREAD, REFUSED, MADE_UP, OUTDATED)


@dataclass(frozen=True)
class Measured:
    """The answers of one system to the questions of one task, at one size.

    Attributes:
        about: first line of the run.
        rows: one per question.
        judged: id of a question -> score from 0 to 5, of the questions that a judge has seen.
    """

    about: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    judged: Mapping[str, float]

    @property
    def task(self) -> str:
        """Name of the task, and how much of its memory was changed."""
        share = self.about.get("share")
        return str(self.about["task"]) + ("" if share is None else f", {share:.0%} changed")

    @property
    def size(self) -> int:
        """Tokens of noise; 0 where the task does not grow."""
        return int(self.about["size"])

    @property
    def system(self) -> str:
        """Name of the system."""
        return str(self.about["system"])

    @property
    def place(self) -> tuple[str, int]:
        """Task and size: what systems share that are compared."""
        return self.task, self.size

    @cached_property
    def scores(self) -> dict[str, float]:
        """Id of a question -> score, from 0 to 1."""
        return {str(row["id"]): float(row["scores"]["score"]) for row in self.rows}

    @cached_property
    def score(self) -> Interval:
        """Mean score with its interval."""
        return bootstrap(list(self.scores.values()))

    @cached_property
    def verdicts(self) -> Counter[str]:
        """How many answers are right, and why how many are not."""
        return Counter(verdict(row) for row in self.rows)

    @cached_property
    def kinds(self) -> dict[str, list[float]]:
        """Kind of question -> scores."""
        found: dict[str, list[float]] = {}
        for row in self.rows:
            found.setdefault(str(row.get("kind") or ""), []).append(float(row["scores"]["score"]))
        return found

    @cached_property
    def figures(self) -> dict[str, Interval | float | None]:
        """All other figures by name; None where the rows do not have them."""
        rows = self.rows
        gold = [row for row in rows if row["gold"]]
        ranked = [_ranks(row) for row in gold if row["ranked"]]
        names = dict.fromkeys(name for row in rows for name in row["scores"])
        names = {n: None for n in names if n != "score" and not LAYER.fullmatch(n)}
        found: dict[str, Interval | float | None] = {
            name: _interval([float(r["scores"][name]) for r in rows if name in r["scores"]])
            for name in names
        }
        found["judge"] = _interval(list(self.judged.values()))
        for depth in DEPTHS:
            found[f"R@{depth}"] = _interval([all_within(ranks, depth) for ranks in ranked])
        found["refused"] = _interval([float(row["refused"]) for row in rows])
        found["outdated"] = _interval(
            [float(r["wrong_used"]) for r in rows if _has(r, "wrong_used")]
        )
        spans = [float(r["span_right"]) for r in rows if _has(r, "span_right")]
        found["span right"] = _interval(spans)
        for name in ("rounds", "seconds", "prompt_tokens", "generated_tokens", "bytes"):
            values = [float(row[name]) for row in rows if _has(row, name)]
            found[name] = mean(values) if values else None
        return found

    @cached_property
    def layers(self) -> dict[str, Interval]:
        """Routing layer -> share of the gold documents that it routed to, in any round."""
        held: dict[str, list[float]] = {}
        for row in self.rows:
            for name, value in row["scores"].items():
                if found := LAYER.fullmatch(name):
                    held.setdefault(found[1], []).append(float(value))
        return {layer: bootstrap(held[layer]) for layer in sorted(held, key=int)}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The system that the report is about, less another.

    Attributes:
        one, other: runs of one task and size.
        difference: of the scores.
        p: of the permutation test, adjusted for all comparisons of the report.
    """

    one: Measured
    other: Measured
    difference: Difference
    p: float

    @property
    def sure(self) -> bool:
        """Whether it is more than chance (adjusted p of at most 0.05)."""
        return self.p <= 0.05


@dataclass(frozen=True, slots=True)
class Point:
    """Mean score of a system over the tasks of a family, at one size."""

    size: int
    score: Interval


@dataclass(frozen=True, slots=True)
class Curve:
    """A system's scores over size.

    Attributes:
        system: its name.
        points: by size.
        lost: percent of the first score that the last has lost; None with one point.
    """

    system: str
    points: tuple[Point, ...]
    lost: Interval | None


@dataclass(frozen=True)
class Findings:
    """All runs of a folder.

    Attributes:
        runs: by task, size and system.
        before: runs that these are compared with, by the same; empty without any.
    """

    runs: dict[tuple[str, int, str], Measured]
    before: dict[tuple[str, int, str], Measured]

    @cached_property
    def systems(self) -> tuple[str, ...]:
        """Names of the systems, the memory first, its ceiling last."""
        names = dict.fromkeys(key[2] for key in self.runs)
        return tuple(sorted(names, key=lambda n: (_order(n), [*names].index(n))))

    @property
    def main(self) -> str:
        """The system that the report is about: the memory, or else the first."""
        return self.systems[0]

    @cached_property
    def places(self) -> tuple[tuple[str, int], ...]:
        """Tasks and sizes."""
        tasks = dict.fromkeys(key[0] for key in self.runs)
        return tuple(
            (task, size)
            for task in tasks
            for size in sorted({key[1] for key in self.runs if key[0] == task})
        )

    @cached_property
    def families(self) -> dict[str, list[str]]:
        """First part of a task's name -> names of its tasks."""
        found: dict[str, list[str]] = {}
        for task in dict.fromkeys(task for task, _ in self.places):
            found.setdefault(task.split("/")[0], []).append(task)
        return found

    def at(self, place: tuple[str, int], system: str) -> Measured | None:
        """The run of a task, size and system."""
        return self.runs.get((*place, system))

    def of(self, task: str) -> list[Measured]:
        """Runs of a task, by size and system."""
        order = {name: i for i, name in enumerate(self.systems)}
        mine = (run for run in self.runs.values() if run.task == task)
        return sorted(mine, key=lambda run: (run.size, order[run.system]))

    def sizes(self, tasks: Sequence[str]) -> list[int]:
        """Sizes at which any of these tasks was run."""
        return sorted({key[1] for key in self.runs if key[0] in tasks})

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The main system less every other, wherever both were run on the same questions."""
        pairs = [
            (one, other)
            for place in self.places
            if (one := self.at(place, self.main))
            for system in self.systems[1:]
            if (other := self.at(place, system)) and one.scores.keys() & other.scores.keys()
        ]
        return _compared(pairs)

    @cached_property
    def changes(self) -> list[Comparison]:
        """These runs less those before them, of the same task, size and system."""
        pairs = [
            (run, self.before[key])
            for key, run in self.runs.items()
            if key in self.before and run.scores.keys() & self.before[key].scores.keys()
        ]
        return _compared(pairs)

    @cached_property
    def rivals(self) -> list[Comparison]:
        """For every task and size the comparison with the best other system.

        Systems that are given the gold documents, and the same memory asked otherwise, are none.
        """
        found: dict[tuple[str, int], Comparison] = {}
        for each in self.comparisons:
            if each.other.system.startswith((CEILING, "msa")):
                continue
            best = found.get(each.one.place)
            if best is None or each.other.score.mean > best.other.score.mean:
                found[each.one.place] = each
        return list(found.values())

    def curves(self, tasks: Sequence[str]) -> list[Curve]:
        """Scores over size of the systems that were run on all of these tasks, at two sizes or
        more.
        """
        found = []
        for system in self.systems:
            held = {
                size: [run.scores for task in tasks if (run := self.at((task, size), system))]
                for size in self.sizes(tasks)
                if size
            }
            whole = {size: runs for size, runs in held.items() if len(runs) == len(tasks)}
            if len(whole) < 2:
                continue
            points = [
                Point(size, mean_of_means([list(run.values()) for run in runs]))
                for size, runs in whole.items()
            ]
            first, *_, last = whole.values()
            found.append(Curve(system, tuple(points), degradation(first, last)))
        return found


def verdict(row: Mapping[str, Any]) -> str:
    """Whether an answer is right, or what went wrong first on the way to it."""
    score = float(row["scores"]["score"])
    gold = set(row["gold"])
    if row.get("wrong_used"):
        return OUTDATED
    if score >= 1:
        return RIGHT
    if not row["answers"] and not row["refused"] and row["answer"]:
        return MADE_UP
    if not gold <= _routed(row) and seen(row):
        return UNROUTED
    if not row["answer"] and not row["named"] and not row["refused"]:
        return PARTLY  # of a ranking nothing is read
    if not gold <= set(row["named"]) and seen(row):
        return UNNAMED
    if row["refused"]:
        return REFUSED
    return PARTLY if score >= 0.5 else MISREAD


def seen(row: Mapping[str, Any]) -> bool:
    """Whether the system was shown any document; what a closed book lacks is not routing."""
    return bool(row["ranked"] or row["named"] or row.get("routed"))


def _routed(row: Mapping[str, Any]) -> set[str]:
    """Ids of all documents that came into question, in any round and layer."""
    routed = {i for turn in row.get("routed") or () for ids in turn.values() for i in ids}
    return routed | set(row["ranked"]) | set(row["named"])


def _compared(pairs: Sequence[tuple[Measured, Measured]]) -> list[Comparison]:
    differences = [paired(one.scores, other.scores) for one, other in pairs]
    adjusted = false_discovery([d.p for d in differences])
    return [
        Comparison(one, other, difference, p)
        for (one, other), difference, p in zip(pairs, differences, adjusted, strict=True)
    ]


def _order(system: str) -> int:
    """The memory, the same asked otherwise, its rivals, what knows nothing, the ceiling."""
    if system == "msa":
        return 0
    if system.startswith("msa"):
        return 1
    return 4 if system.startswith(CEILING) else 3 if system.startswith("closed") else 2


def _ranks(row: Mapping[str, Any]) -> list[int]:
    place = {i: rank for rank, i in enumerate(row["ranked"])}
    return [place.get(i, FAR) for i in row["gold"]]


def _has(row: Mapping[str, Any], name: str) -> bool:
    return row.get(name) is not None


def _interval(values: Sequence[float]) -> Interval | None:
    return bootstrap(values) if values else None
