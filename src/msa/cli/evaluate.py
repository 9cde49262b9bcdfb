"""`msa eval`: tasks that a model, its memory and what it is compared with are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from msa.cli import output, report
from msa.cli.options import DeviceOption, JsonOption, ModelOption, load_model, register
from msa.errors import FetchError, InputError, MissingMaterialError, MSAError

if TYPE_CHECKING:
    from msa.evaluation.suite import Asked, Selection, Suite
    from msa.evaluation.tasks.base import Task
    from msa.model.checkpoint import Checkpoint

DataOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of question sets, or of sets in BEIR's format; each is a task.",
        show_default=False,
    ),
]


class _Group(TyperGroup):
    """`msa eval TASK...` is `msa eval run TASK...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help", "-h"):
            args = ["run", *args]
        return super().parse_args(ctx, list(_spelt_out(args)))


def _spelt_out(args: Sequence[str]) -> Iterator[str]:
    """`--systems a b` as `--systems a --systems b`."""
    listing = False
    for word in args:
        if word.startswith("-"):
            listing = word == "--systems"
            if not listing:
                yield word
        elif listing:
            yield from ("--systems", word)
        else:
            yield word


app = typer.Typer(
    name="eval",
    cls=_Group,
    help="Ask the questions of tasks, and report how they were answered.",
    epilog="Example: msa eval ruler --sizes 16K,128K --texts texts/ --output results/",
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def _eval(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def run(
    folder: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder of the runs.", show_default=False
        ),
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TASK]...",
            help="Names, families (ruler) or patterns (ruler/niah_*); see msa eval tasks.",
        ),
    ] = None,
    model: ModelOption = None,
    systems: Annotated[
        list[str] | None,
        typer.Option(
            "--systems",
            metavar="NAME",
            help="Systems to ask, after the tasks: msa bm25-5 hybrid-5+rerank full gold closed "
            "@depths, ...",
            show_default="msa and ten others",
        ),
    ] = None,
    sizes: Annotated[
        str, typer.Option(metavar="SIZES", help="Tokens of the haystacks, such as 16K,128K,1M.")
    ] = "16K,128K,1M",
    count: Annotated[
        int, typer.Option(min=1, metavar="N", help="Questions of each task, at most.")
    ] = 100,
    seed: Annotated[int, typer.Option(metavar="N", help="Of everything that is drawn.")] = 0,
    split: Annotated[
        str, typer.Option(metavar="NAME", help="Of the questions; dev in a set without test.")
    ] = "test",
    data: DataOption = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of text that haystacks are made of.", show_default=False
        ),
    ] = None,
    bank: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder where memory banks and embeddings are kept.",
            show_default="banks in that of the output",
        ),
    ] = None,
    minilm: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of all-MiniLM-L6-v2.", show_default="fetched once"
        ),
    ] = None,
    short: Annotated[
        bool,
        typer.Option(
            "--short", help="Small haystacks and few questions: minutes on two cores, not days."
        ),
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Questions asked together.")
    ] = 16,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Run tasks: ask every system the same questions, one JSON line each in DIR/runs.

    A haystack is encoded once for all that is asked in it. The same command goes on where it was
    stopped; what is answered already is not asked again. With --json, an object per run.
    """
    from msa.evaluation.suite import size_of
    from msa.evaluation.tasks import find_tasks

    if not tasks and not short:
        raise typer.BadParameter("name a task, or give --short", param_hint="TASK")
    wanted = find_tasks(tasks, data) if tasks else None
    measured = [size_of(size) for size in sizes.split(",")]
    checkpoint = load_model(model, device)
    if short:
        plan = list(_short(wanted, data, systems))
    else:
        plan = [
            Planned(task, measured if task.grows else (0,), count, systems) for task in wanted or ()
        ]
    plan = [replace(one, systems=_systems(one.systems, checkpoint, minilm)) for one in plan]
    with output.progress("Evaluating") as bar:
        made = _suite(
            checkpoint, folder, seed, split, data, texts, bank, minilm, batch_size, _teller(bar)
        )
        try:
            failed = _run_all(made, plan, short, json)
        except KeyboardInterrupt:
            raise output.Interrupted(
                "Interrupted. The same command goes on where it was stopped."
            ) from None
    if failed:
        raise typer.Exit(1)


def _run_all(suite: Suite, plan: Sequence[Planned], short: bool, json: bool) -> int:
    """Run a plan; how many of its tasks could not be run, at their sizes."""
    failed = 0
    for one in plan:
        for size in one.sizes:
            name = f"{one.task.name} at {size:,} tokens" if one.task.grows else one.task.name
            try:
                for done in suite.run(one.task, size, one.count, one.systems or ()):
                    _print_run(done, json)
            except MissingMaterialError as error:
                failed += not short
                output.print_note(f"{name} is left out: {error}")
            except MSAError as error:
                failed += 1
                output.print_error(f"{name}: {error}")
    return failed


def tasks(data: DataOption = None, json: JsonOption = False) -> None:
    """List the tasks that there are; with --data those of its question sets too."""
    from msa.evaluation.tasks import all_tasks

    found = all_tasks(data).values()
    if json:
        for task in found:
            row = {"task": task.name, "title": task.title, "metric": task.metric}
            output.print_json({**row, "grows": task.grows})
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for task in found:
        grows = Text("any size" if task.grows else "", style="dim")
        table.add_row(Text(task.name, style="bold"), task.title, task.metric, grows)
    output.stdout().print(table)


@dataclass(frozen=True, slots=True)
class Planned:
    """What is to be run.

    Attributes:
        task: of the registry.
        sizes: tokens of its haystacks; 0 for a task that does not grow.
        count: questions.
        systems: names; None for the default ones.
    """

    task: Task
    sizes: Sequence[int]
    count: int
    systems: Sequence[str] | None


def _short(
    wanted: Sequence[Task] | None, data: Path | None, systems: Sequence[str] | None
) -> Iterator[Planned]:
    """What the short form runs, of those tasks; says what it leaves out."""
    from msa.evaluation.suite import SHORT

    for selection in SHORT:
        for task in _selected(selection, data):
            if wanted is None or task.name in {one.name for one in wanted}:
                sizes = selection.sizes if task.grows else (0,)
                yield Planned(task, sizes, selection.count, systems or selection.systems)


def _selected(selection: Selection, data: Path | None) -> Iterator[Task]:
    from msa.evaluation.tasks import find_tasks

    for pattern in selection.tasks:
        try:
            yield from find_tasks([pattern], data)
        except InputError as error:  # a set that --data does not have
            output.print_note(f"left out: {error}")


def _suite(
    checkpoint: Checkpoint,
    folder: Path,
    seed: int,
    split: str,
    data: Path | None,
    texts: Path | None,
    bank: Path | None,
    minilm: Path | None,
    batch_size: int,
    progress: Callable[[str, str], Callable[[int, int], None]],
) -> Suite:
    from msa.evaluation.provenance import provenance
    from msa.evaluation.suite import Suite
    from msa.evaluation.tasks.base import Request
    from msa.evaluation.workbench import Workplace
    from msa.model.identity import model_fingerprints

    banks = bank or folder / "banks"
    place = Workplace(banks=banks, cache=banks / "embeddings", minilm=minilm, progress=progress)
    tokenizer = checkpoint.tokenizer

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    request = Request(count_tokens=count_tokens, split=split, seed=seed, texts=texts, data=data)
    about = provenance(
        seed,
        model=model_fingerprints(checkpoint.model).weights[:16],
        model_name=checkpoint.name,
        dtype=str(checkpoint.model.dtype).removeprefix("torch."),
    )
    return Suite(checkpoint, place, folder, request, about, batch_size=batch_size)


def _systems(names: Sequence[str] | None, checkpoint: Checkpoint, minilm: Path | None) -> list[str]:
    """Systems by name, the default ones if none was named; those without MiniLM where it is not
    to be had, which is said.

    Raises:
        InputError: there is no such system.
        FetchError: one was named that needs MiniLM, and it is not to be had.
    """
    from msa.evaluation.minilm import minilm_folder
    from msa.evaluation.suite import SYSTEMS
    from msa.evaluation.workbench import expanded_systems, parse_system

    found = expanded_systems(names or SYSTEMS, checkpoint.model.config.routing_layers)
    dense = [n for n in found if parse_system(n).kind in ("minilm", "hybrid")]
    if dense and minilm is None:
        try:
            minilm_folder()
        except FetchError as error:
            if names:
                raise
            output.print_note(f"{', '.join(dense)} left out: {error}")
            return [name for name in found if name not in dense]
    return found


def _teller(bar: output.ProgressBar) -> Callable[[str, str], Callable[[int, int], None]]:
    """Makes, for every piece of work, what tells the bar how far it is."""

    def make(work: str, unit: str) -> Callable[[int, int], None]:
        return lambda done, whole: bar.set(work, done, f"{done:,} of {whole:,} {unit}")

    return make


def _print_run(done: Asked, json: bool) -> None:
    found = done.summary()
    if json:
        output.print_json(found)
        return
    size = f" at {found['size']:,} tokens" if found["size"] else ""
    share = "" if found["share"] is None else f", {100 * found['share']:.0f}% changed"
    output.stdout().print(
        f"{found['task']}{size}{share}, {found['system']}: {found['metric']} "
        f"{100 * found['score']:.1f} of {output.plural(found['questions'], 'question')}, "
        f"{found['seconds']:.2f} s each",
        soft_wrap=True,
    )


register(app, run, "msa eval run ruler --sizes 16K,128K --texts texts/ --output results/")
register(app, tasks, "msa eval tasks --data sets/")
register(app, report.report, "msa eval report results/ --compare earlier/")
register(app, report.judge, "msa eval judge results/ --judge-url URL --judge-model NAME")
