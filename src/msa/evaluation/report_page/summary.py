"""The first page of a report: where the model loses, said plainly; then where it does not."""

from __future__ import annotations

from msa.evaluation.metrics import mean
from msa.evaluation.report_page.blocks import (
    Block,
    Points,
    Section,
    Text,
    Tiles,
    bounds,
    gap,
    percent,
    signed,
    size_name,
    where,
)
from msa.evaluation.report_page.data import (
    CEILING,
    OUTDATED,
    PARTLY,
    RIGHT,
    Comparison,
    Findings,
    Measured,
)
from msa.evaluation.significance import mean_of_means

MOST = 12
"""Lines of a list; what is left out is counted."""


def summary(findings: Findings) -> Section:
    """What a reader must know first."""
    main = findings.main
    behind = [c for c in findings.rivals if c.difference.by.mean < 0]
    ahead = [c for c in findings.rivals if c.difference.by.mean > 0]
    lost = sorted((c for c in behind if c.sure), key=lambda c: c.difference.by.mean)
    won = sorted((c for c in ahead if c.sure), key=lambda c: -c.difference.by.mean)
    blocks: list[Block] = [_mixed(findings), _tiles(findings)]
    if findings.rivals:
        blocks.append(
            Text(
                f"Against the best other system at each of {len(findings.rivals)} tasks and sizes, "
                f"{main} is behind by more than chance at {len(lost)} (lower at {len(behind)}) and "
                f"ahead by more than chance at {len(won)} (higher at {len(ahead)})."
            )
        )
    losses = [*_listed(lost), *_other_losses(findings), *_unsure("Lower", behind)]
    nothing = "Nowhere that these questions can show."
    tone = "behind" if losses else ""
    blocks.append(Points(f"Where {main} loses", losses or [nothing], tone))
    if ahead:
        gains = [*_listed(won), *_unsure("Higher", ahead)]
        blocks.append(Points(f"Where {main} is ahead", gains, "ahead"))
    blocks.append(
        Text(
            "Scores are in percent. Intervals are 95% bootstrap intervals over questions. "
            "Differences are between answers to the same questions; p is of a permutation test "
            "of their signs, two-sided, adjusted for all comparisons of this report (Benjamini "
            "and Hochberg); at most 0.05 counts as more than chance."
        )
    )
    return Section("summary", "Summary", [b for b in blocks if b != Text("")])


def _mixed(findings: Findings) -> Text:
    models = {str(run.about.get("model")) for run in findings.runs.values()}
    if len(models) < 2:
        return Text("")
    return Text(
        f"Attention: these runs are of {len(models)} models ({', '.join(sorted(models))}); figures "
        "beside each other may not be of the same one."
    )


def _tiles(findings: Findings) -> Tiles:
    mine = [run for run in findings.runs.values() if run.system == findings.main]
    overall = mean_of_means([list(run.scores.values()) for run in mine])
    questions = sum(len(run.rows) for run in mine)
    tiles = [
        (
            percent(overall),
            f"mean score of {findings.main}",
            f"95% interval {bounds(overall)}; {questions:,} answers, {len(mine)} tasks and sizes",
        )
    ]
    best = _best_other(findings, mine)
    if best:
        system, score = best
        said = "the best other system, over the same"
        tiles.append((f"{100 * score:.1f}", f"mean score of {system}", said))
    for family, tasks in findings.families.items():
        for curve in findings.curves(tasks):
            if curve.system == findings.main and curve.lost:
                first, last = (size_name(curve.points[i].size) for i in (0, -1))
                tiles.append(
                    (
                        f"{signed(curve.lost.mean, '')}%",
                        f"of its {family} score lost from {first} to {last} tokens",
                        f"95% interval {bounds(curve.lost, 1)}",
                    )
                )
    if after := _changed(mine):
        used = sum(run.verdicts[OUTDATED] for run in after)
        answers = sum(len(run.rows) for run in after)
        said = f"must be 0; {answers:,} answers after changes"
        tiles.append((str(used), "outdated or deleted facts used", said))
    return Tiles(tiles)


def _best_other(findings: Findings, mine: list[Measured]) -> tuple[str, float] | None:
    """The rival with the best mean, of those that were run wherever the memory was."""
    found = {}
    for system in findings.systems[1:]:
        runs = [findings.at(run.place, system) for run in mine]
        if not system.startswith((CEILING, "msa")) and all(runs):
            found[system] = mean([run.score.mean for run in runs if run])
    best = max(found, key=found.__getitem__, default=None)
    return None if best is None else (best, found[best])


def _listed(comparisons: list[Comparison]) -> list[str]:
    lines = [
        f"{where(c.one)}: {percent(c.one.score)} against {percent(c.other.score)} of "
        f"{c.other.system} ({c.one.about['metric']}; {gap(c)})"
        for c in comparisons
    ]
    left = len(lines) - MOST
    return lines if left <= 0 else [*lines[:MOST], f"and at {left} more, in the tables"]


def _unsure(word: str, comparisons: list[Comparison]) -> list[str]:
    found = sorted((c for c in comparisons if not c.sure), key=lambda c: -abs(c.difference.by.mean))
    if not found:
        return []
    names = [f"{where(c.one)} {signed(100 * c.difference.by.mean)}" for c in found]
    return [f"{word}, but within chance: {', '.join(names)}"]


def _other_losses(findings: Findings) -> list[str]:
    """What no comparison with a rival says."""
    main = findings.main
    mine = [run for run in findings.runs.values() if run.system == main]
    lines = []
    for family, tasks in findings.families.items():
        curves = {curve.system: curve for curve in findings.curves(tasks)}
        lost = curves[main].lost if main in curves else None
        if lost and lost.low > 0:
            first, last = (size_name(curves[main].points[i].size) for i in (0, -1))
            others = [
                f"{name} {signed(curve.lost.mean, '')}%"
                for name, curve in curves.items()
                if curve.lost and name != main and not name.startswith("msa")
            ]
            beside = f"; beside it {', '.join(others)}" if others else ""
            lines.append(
                f"From {first} to {last} tokens {family} loses {lost.mean:.1f}% of its score "
                f"(95% interval {bounds(lost, 1)}){beside}"
            )
    lines += _wrong(mine)
    ceilings = [c for c in findings.comparisons if c.other.system == CEILING]
    if ceilings:
        short = mean([-c.difference.by.mean for c in ceilings])
        if short > 0:
            lines.append(
                f"Given the right documents, the same reader scores {100 * short:.1f} points more "
                "on average: what finding and naming lose"
            )
    weak = sorted(mine, key=lambda run: run.score.mean)[:3]
    named = ", ".join(f"{where(run)} {percent(run.score)}" for run in weak)
    if len(mine) > 3:
        lines.append(f"Lowest scores: {named}")
    return lines


def _changed(mine: list[Measured]) -> list[Measured]:
    """Runs over a memory in which documents were replaced or deleted."""
    return [run for run in mine if run.about.get("share")]


def _wrong(mine: list[Measured]) -> list[str]:
    counts: dict[str, int] = {}
    for run in mine:
        for name, count in run.verdicts.items():
            counts[name] = counts.get(name, 0) + count
    wrong = {name: count for name, count in counts.items() if name not in (RIGHT, PARTLY)}
    whole = sum(wrong.values())
    if not whole:
        return []
    parts = ", ".join(
        f"{name} {100 * count / whole:.0f}%"
        for name, count in sorted(wrong.items(), key=lambda item: -item[1])
    )
    lines = [f"Of {whole:,} wrong answers: {parts}"]
    used = sum(run.verdicts[OUTDATED] for run in _changed(mine))
    if older := wrong.get(OUTDATED, 0) - used:
        lines.append(
            f"{older:,} answers believed an older document where a newer one says otherwise"
        )
    if used:
        lines.insert(0, f"{used:,} answers used an outdated or deleted fact; none may")
    return lines
