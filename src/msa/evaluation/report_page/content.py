"""The sections of a report: tables, curves, why answers are wrong, comparisons, provenance."""

from __future__ import annotations

from collections.abc import Sequence

from msa.evaluation.metrics import Interval, mean
from msa.evaluation.report_page.blocks import (
    Bars,
    Block,
    Cell,
    Chart,
    Section,
    Table,
    Text,
    bounds,
    made,
    number,
    p_value,
    percent,
    seconds,
    share,
    signed,
    size_in_bytes,
    size_name,
)
from msa.evaluation.report_page.data import (
    CEILING,
    DEPTHS,
    VERDICTS,
    Comparison,
    Findings,
    Measured,
)
from msa.evaluation.report_page.summary import summary
from msa.evaluation.significance import mean_of_means

OWN = ("judge", *(f"R@{k}" for k in DEPTHS), "refused", "outdated", "span right")
COSTS = ("rounds", "seconds", "prompt_tokens", "generated_tokens", "bytes")
COST_HEADS = ("rounds", "seconds", "tokens read", "tokens written", "content fetched")


def sections(findings: Findings) -> list[Section]:
    """All that a report says."""
    found = [summary(findings), _scores(findings)]
    if curves := _curves(findings):
        found.append(curves)
    found += [_costs(findings), _why(findings), _tasks(findings)]
    if findings.changes:
        found.append(_changes(findings))
    if findings.comparisons:
        found.append(_comparisons(findings))
    found.append(_provenance(findings))
    return found


def _scores(findings: Findings) -> Section:
    """A table per family: tasks and sizes by systems."""
    rivals = {c.one.place: c for c in findings.rivals}
    blocks: list[Block] = [
        Text(
            "Behind or ahead: of the best other system, by more than chance. The best score of a "
            f"row is set bold; systems named {CEILING} are given the right documents and are no "
            "rivals. Every score leads to its questions."
        )
    ]
    for family, tasks in findings.families.items():
        runs = [run for task in tasks for run in findings.of(task)]
        systems = [name for name in findings.systems if any(r.system == name for r in runs)]
        rows = []
        for place in findings.places:
            if place[0] not in tasks:
                continue
            here = {s: run for s in systems if (run := findings.at(place, s))}
            fair = [run.score.mean for s, run in here.items() if not s.startswith(CEILING)]
            name = f"{place[0]} {size_name(place[1])}".strip()
            any_run = next(iter(here.values()))
            row = [Cell(name, f"{any_run.about['metric']}; {len(any_run.rows):,} questions")]
            for system in systems:
                run = here.get(system)
                best = run and not system.startswith(CEILING) and run.score.mean >= max(fair)
                mark = "best" if best else ""
                if system == findings.main and place in rivals and rivals[place].sure:
                    mark = "ahead" if rivals[place].difference.by.mean > 0 else "behind"
                row.append(share(run.score, (*place, system), mark) if run else Cell(""))
            rows.append(row)
        blocks.append(Table(family, ["task", *systems], rows, made(runs)))
    return Section("scores", "Scores", blocks)


def _curves(findings: Findings) -> Section | None:
    blocks: list[Block] = []
    rows, runs = [], []
    for family, tasks in findings.families.items():
        curves = findings.curves(tasks)
        if not curves:
            continue
        mine = [run for task in tasks for run in findings.of(task)]
        runs += mine
        named = family if len(tasks) == 1 else f"{family}, mean of {len(tasks)} tasks"
        blocks.append(Chart(named, curves, made(mine)))
        for curve in curves:
            first, last = curve.points[0], curve.points[-1]
            lost = Cell("")
            if curve.lost:
                lost = Cell(signed(curve.lost.mean, ""), bounds(curve.lost, 1))
            rows.append(
                [
                    Cell(f"{family}: {curve.system}"),
                    Cell(f"{size_name(first.size)} to {size_name(last.size)}"),
                    share(first.score),
                    share(last.score),
                    lost,
                ]
            )
    if not blocks:
        return None
    heads = ["system", "tokens", "score at first", "score at last", "lost, in percent"]
    blocks.append(Table("Degradation", heads, rows, made(runs)))
    return Section("curves", "Over size", blocks)


def _costs(findings: Findings) -> Section:
    mine = [run for run in findings.runs.values() if run.system == findings.main]
    rows = []
    partial = []
    used: list[Measured] = []
    for system in findings.systems:
        runs = [found for run in mine if (found := findings.at(run.place, system))]
        if len(runs) < len(mine):
            partial.append(f"{system} ({len(runs)} of {len(mine)})")
            continue
        used += runs
        values = {
            name: mean([float(v) for run in runs if isinstance(v := run.figures[name], float)])
            if any(run.figures[name] is not None for run in runs)
            else None
            for name in COSTS
        }
        score = mean_of_means([list(run.scores.values()) for run in runs])
        rows.append([Cell(system), share(score), *_cost_cells(values)])
    blocks: list[Block] = [
        Text(
            "Means over the tasks and sizes of the memory, of systems that were run on all of "
            "them. Seconds are wall time per question, of batches divided by their questions."
            + (f" Not run on all: {', '.join(partial)}." if partial else "")
        ),
        Table("Quality and cost per question", ["system", "score", *COST_HEADS], rows, made(used)),
    ]
    return Section("cost", "Cost beside quality", blocks, short="Cost")


def _cost_cells(values: dict[str, float | None]) -> list[Cell]:
    return [
        number(values["rounds"]),
        seconds(values["seconds"]),
        number(values["prompt_tokens"], 0),
        number(values["generated_tokens"], 0),
        size_in_bytes(values["bytes"]),
    ]


def _why(findings: Findings) -> Section:
    """What became of the answers, over everything that a system was asked."""
    rows = []
    for system in findings.systems:
        counts: dict[str, int] = {}
        for run in findings.runs.values():
            if run.system == system:
                for name, count in run.verdicts.items():
                    counts[name] = counts.get(name, 0) + count
        rows.append((system, counts))
    legend = (
        "What went wrong first on the way: a document that is needed was in no routing layer and "
        "no ranking (not routed); it was there and was not read (not named); it was read and the "
        "answer is wrong (not read right), or was refused (refused wrongly); there is no answer "
        "and one was given (should have refused); the answer is a fact that was deleted or "
        "replaced (outdated). Partly right: half of the score or more."
    )
    bars = Bars("Answers of every system", rows, made(list(findings.runs.values())))
    return Section("why", "Why answers are wrong", [Text(legend), bars], short="Why wrong")


def _tasks(findings: Findings) -> Section:
    parts: list[Section] = []
    for family, tasks in findings.families.items():
        for task in tasks:
            runs = findings.of(task)
            blocks: list[Block] = [
                Text(f"{_capital(runs[0].about['title'])}. Score: {runs[0].about['metric']}."),
                _task_table(runs),
            ]
            if len(tasks) > 1 and (curves := findings.curves([task])):
                blocks.append(Chart(task, curves, made(runs)))
            blocks += [b for b in (_kinds(runs), _layers(runs)) if b]
            bars = [(_label(run), run.verdicts) for run in runs]
            blocks.append(Bars("Why answers are wrong", bars, made(runs)))
            name = f"task-{family}-{len(parts)}"
            parts.append(Section(name, task, blocks, folded=True))
    return Section("tasks", "Task by task", [], parts, short="Tasks")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _label(run: Measured) -> str:
    return f"{run.system} {size_name(run.size)}".strip()


def _task_table(runs: Sequence[Measured]) -> Table:
    """All figures of a task; columns that no run has are left out."""
    scores = [n for n in dict.fromkeys(n for r in runs for n in r.figures) if n not in COSTS]
    names = [n for n in scores if n not in OWN] + [n for n in OWN if n in scores]
    names = [n for n in names if any(run.figures.get(n) is not None for run in runs)]
    rows = []
    for run in runs:
        cells = []
        for name in names:
            value = run.figures.get(name)
            interval = value if isinstance(value, Interval) else None
            judged = name == "judge" and interval
            cells.append(
                Cell(f"{interval.mean:.2f} of 5", bounds(interval, 1))
                if judged and interval
                else share(interval)
            )
        costs = {name: v if isinstance(v := run.figures[name], float) else None for name in COSTS}
        head = [Cell(_label(run)), Cell(f"{len(run.rows):,}")]
        score = share(run.score, (*run.place, run.system))
        rows.append([*head, score, *cells, *_cost_cells(costs)])
    heads = ["system", "questions", "score", *names, *COST_HEADS]
    return Table("All figures", heads, rows, made(runs))


def _kinds(runs: Sequence[Measured]) -> Table | None:
    kinds = list(dict.fromkeys(kind for run in runs for kind in run.kinds))
    if len(kinds) < 2:
        return None
    rows = [
        [
            Cell(_label(run)),
            *(
                share(mean_of_means([run.kinds[kind]])) if kind in run.kinds else Cell("")
                for kind in kinds
            ),
        ]
        for run in runs
    ]
    heads = ["system", *(kind or "other" for kind in kinds)]
    return Table("Scores by kind of question", heads, rows, made(runs))


def _layers(runs: Sequence[Measured]) -> Table | None:
    routed = [run for run in runs if run.layers]
    layers = sorted({layer for run in routed for layer in run.layers}, key=int)
    if not layers:
        return None
    rows = [
        [Cell(_label(run)), *(share(run.layers.get(layer)) for layer in layers)] for run in routed
    ]
    caption = "Share of the needed documents that each layer routed to, in any round"
    return Table(caption, ["system", *(f"layer {layer}" for layer in layers)], rows, made(routed))


def _changes(findings: Findings) -> Section:
    changes = sorted(findings.changes, key=lambda c: c.difference.by.mean)
    worse = [c for c in changes if c.sure and c.difference.by.mean < 0]
    better = [c for c in changes if c.sure and c.difference.by.mean > 0]
    text = (
        f"Of {len(changes)} runs that both folders have, {len(worse)} are worse than before by "
        f"more than chance and {len(better)} better."
    )
    missing = [key for key in findings.runs if key not in findings.before]
    if missing:
        text += f" {len(missing)} runs are not in the other folder."
    blocks: list[Block] = [Text(text)]
    if worse or better:
        caption = "Changed by more than chance"
        blocks.append(_differences([*worse, *better], caption, before=True))
    table = _differences(changes, "These runs less those before", before=True)
    every = Section("changes-all", "Every run that both have", [table], folded=True)
    return Section("changes", "Compared with before", blocks, [every], short="Before")


def _comparisons(findings: Findings) -> Section:
    text = (
        f"{findings.main} less every other system, over the questions that both answered. Better "
        "and worse count questions; the sign test looks at these alone."
    )
    table = _differences(findings.comparisons, f"{findings.main} less the other", before=False)
    blocks: list[Block] = [Text(text), table]
    return Section("comparisons", "All comparisons", blocks, folded=True, short="Comparisons")


def _differences(comparisons: Sequence[Comparison], caption: str, *, before: bool) -> Table:
    rows = []
    for each in comparisons:
        by = each.difference.by
        mark = ("ahead" if by.mean > 0 else "behind") if each.sure else ""
        system = each.one.system if before else each.other.system
        rows.append(
            [
                Cell(f"{each.one.task} {size_name(each.one.size)}".strip()),
                Cell(system, place=(*each.one.place, system)),
                Cell(percent(each.one.score)),
                Cell(percent(each.other.score)),
                Cell(signed(100 * by.mean), bounds(by), mark),
                Cell(p_value(each.p)),
                Cell(p_value(each.difference.p)),
                Cell(p_value(each.difference.sign_p)),
                Cell(f"{each.difference.better} / {each.difference.worse}"),
                Cell(f"{each.difference.questions:,}"),
            ]
        )
    heads = ["task", "system", "now" if before else "score", "before" if before else "other"]
    heads += [
        "difference",
        "p, adjusted",
        "p, permutation",
        "p, sign test",
        "better / worse",
        "both",
    ]
    runs = [run for each in comparisons for run in (each.one, each.other)]
    return Table(caption, heads, rows, made(runs))


def _provenance(findings: Findings) -> Section:
    keys = ("command", "commit", "model", "data", "seed", "machine", "cores", "threads", "torch")
    rows = []
    for run in findings.runs.values():
        name = f"{run.task} {size_name(run.size)}".strip()
        cells = [Cell(str(run.about.get(key, ""))) for key in keys]
        rows.append([Cell(f"{name}, {run.system}"), Cell(str(run.about.get("split", ""))), *cells])
    text = (
        "The command beside a figure makes it again; with one seed, on a CPU, exactly. The hash of "
        "the data is of all documents and questions of the split."
    )
    table = Table("Where every run comes from", ["run", "split", *keys], rows)
    return Section("provenance", "Provenance", [Text(text), table], folded=True)


def verdict_class(name: str) -> str:
    """Name of a verdict's color."""
    return f"v{VERDICTS.index(name)}"
