"""Runs as tables: Markdown for people, JSON for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msa.errors import InputError
from msa.evaluation.metrics import Interval, mean
from msa.evaluation.runs import Run, difference, figures, read_run

COLUMNS = ("R@1", "R@5", "R@16", "named", "em", "f1", "refused")
HEADS = ("R@1", "R@5", "R@16", "named", "EM", "F1", "refused")
LEGEND = """\
*R@k*: every gold document is among the first k of the ranking (two-hop questions have two to four
of them). *named*: every gold document was read. EM and F1 as SQuAD scores. Shares are in percent;
what stands behind ± is half of the 95% bootstrap interval over questions. Seconds are wall time per
question, asked in batches.
"""

Key = tuple[str, str, bool]
"""Set, system, whether the gold documents were hidden."""


def read_runs(folder: str | Path) -> dict[Key, Run]:
    """Every run of a folder.

    Raises:
        InputError: there is none, one is damaged, or two are of the same set and system.
    """
    runs: dict[Key, Run] = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        found = read_run(path)
        key = _key(found)
        if key in runs:
            raise InputError(f"{path}: a second run of {key[1]} on {key[0]}; keep one of the two")
        if found.rows:
            runs[key] = found
    if not runs:
        raise InputError(f"{folder}: no runs (*.jsonl) with answers; ask some questions first")
    return runs


def as_json(runs: Mapping[Key, Run], seed: int = 0) -> dict[str, Any]:
    """Set -> system -> figures, with where each comes from."""
    found: dict[str, Any] = {}
    for (name, system, hidden), run in runs.items():
        row = {
            key: [round(v, 4) for v in (value.mean, value.low, value.high)]
            if isinstance(value, Interval)
            else round(value, 4)
            for key, value in figures(run, seed).items()
        }
        label = f"{system}, gold hidden" if hidden else system
        found.setdefault(name, {})[label] = {"about": run.about, **row}
    return found


def markdown(runs: Mapping[Key, Run], seed: int = 0) -> str:
    """All tables of a folder of runs."""
    parts = [LEGEND, *_provenance(runs)]
    names = list(dict.fromkeys(key[0] for key in runs))
    for name in names:
        shown = {key[1]: run for key, run in runs.items() if key[0] == name and not key[2]}
        if shown:
            parts.append(_set_table(name, shown, seed))
    parts.append(_average_table(runs, seed))
    parts.append(_refusal_table(runs, seed))
    return "\n".join(part for part in parts if part)


def compared(
    runs: Mapping[Key, Run], one: str, others: Sequence[str], name: str = "f1", seed: int = 0
) -> dict[str, tuple[str, Interval]]:
    """Set -> the best of some systems there, and by how much another is above it, paired.

    Args:
        runs: of `read_runs`.
        one: system that is compared.
        others: systems of which the best in each set counts.
        name: what they are compared by.
        seed: of the bootstrap.
    """
    found = {}
    for (set_name, system, hidden), run in runs.items():
        if system != one or hidden:
            continue
        rivals = {o: runs[set_name, o, False] for o in others if (set_name, o, False) in runs}
        if rivals:
            best = max(rivals, key=lambda o: mean([float(r[name]) for r in rivals[o].rows]))
            found[set_name] = (best, difference(run, rivals[best], name, seed))
    return found


def _key(run: Run) -> Key:
    about = run.about
    name = f"{about['set']} {about['split']}"
    if about.get("title_hints"):
        name += ", asked with titles"
    return name, str(about["system"]), bool(about["hidden"])


def _provenance(runs: Mapping[Key, Run]) -> list[str]:
    """One line per way in which runs were made."""
    made = []
    for run in runs.values():
        names = ("commit", "model", "dtype", "machine", "threads", "torch", "seed")
        line = "; ".join(f"{n}: {run.about[n]}" for n in names if run.about.get(n) is not None)
        made.append(f"{line}\n")
    return list(dict.fromkeys(made))


def _set_table(name: str, runs: Mapping[str, Run], seed: int) -> str:
    lines = [
        f"## {name}\n",
        f"| system | n | {' | '.join(HEADS)} | rounds | s/question |",
        "|---" * (len(HEADS) + 4) + "|",
    ]
    for system, run in runs.items():
        found = figures(run, seed)
        cells = [_percent(found[column]) for column in COLUMNS]
        lines.append(
            f"| {system} | {len(run.rows)} | {' | '.join(cells)} | {found['rounds']:.1f} "
            f"| {found['seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _average_table(runs: Mapping[Key, Run], seed: int) -> str:
    """Means over the sets, of systems that were asked on every one of them."""
    shown = {key: run for key, run in runs.items() if not key[2]}
    names = {key[0] for key in shown}
    systems = list(dict.fromkeys(key[1] for key in shown))
    whole = [s for s in systems if all((name, s, False) in shown for name in names)]
    if len(names) < 2 or not whole:
        return ""
    lines = [
        f"## Mean over {len(names)} sets\n",
        f"| system | {' | '.join(HEADS)} |",
        "|---" * (len(HEADS) + 1) + "|",
    ]
    for system in whole:
        found = [figures(shown[name, system, False], seed) for name in sorted(names)]
        cells = [f"{100 * mean([_middle(f[column]) for f in found]):.1f}" for column in COLUMNS]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _refusal_table(runs: Mapping[Key, Run], seed: int) -> str:
    """Systems that were asked with the gold documents hidden, beside the same left in."""
    lines = []
    for (name, system, hidden), run in runs.items():
        if not hidden:
            continue
        left_in = runs.get((name, system, False))
        cells = [_percent(figures(r, seed)["refused"]) if r else "" for r in (run, left_in)]
        lines.append(f"| {name} | {system} | {len(run.rows)} | {' | '.join(cells)} |")
    if not lines:
        return ""
    head = [
        "## Refusals\n",
        "Each question's gold documents are taken out of the memory before it is asked, or left "
        "in.\n",
        "| set | system | n | refused, taken out | refused, left in |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(head + lines) + "\n"


def _middle(value: float | Interval) -> float:
    return value.mean if isinstance(value, Interval) else value


def _percent(value: float | Interval) -> str:
    if isinstance(value, Interval):
        return f"{100 * value.mean:.1f} ± {50 * (value.high - value.low):.1f}"
    return f"{100 * value:.1f}"
