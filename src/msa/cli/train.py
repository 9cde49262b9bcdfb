"""`msa train`: a model from a configuration file, or routers for the texts of a bank."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msa.cli import output
from msa.cli.options import DeviceOption, JsonOption, ModelOption, load_model, open_bank

if TYPE_CHECKING:
    from msa.training.router_pretraining import RouterReport

SHOWN_METRICS = ("loss", "learning_rate")


def train(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CONFIG.yaml]",
            help="What to train, on what, and how long.",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder of the run. With --routers-only, of the new model; by default the bank's "
            "name with -model after it.",
            show_default=False,
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Put a value into the configuration, such as seed=3, 'stages[0].steps=10' or "
            "'stages[*].documents=16'; may be repeated.",
            show_default=False,
        ),
    ] = None,
    routers_only: Annotated[
        bool,
        typer.Option(
            "--routers-only",
            help="Without a configuration: train the routers of --model on the texts of --bank.",
        ),
    ] = False,
    bank: Annotated[
        Path | None,
        typer.Option(
            "--bank", "-b", metavar="DIR", help="Bank whose texts are used.", show_default=False
        ),
    ] = None,
    passages: Annotated[
        int, typer.Option(min=1, metavar="N", help="Documents of the bank used, at most.")
    ] = 4000,
    seed: Annotated[int, typer.Option(metavar="N", help="Of what is drawn from the bank.")] = 0,
    model: ModelOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Train a model as a configuration file says, or its routers on a bank without any labels.

    With a configuration: checkpoints, metrics.jsonl and the finished model (DIR/model) lie in the
    folder of the run. A run that was interrupted goes on from its last checkpoint with the same
    command.

    With --routers-only: questions are made from the bank's own texts, the model is run over them
    once, and its routers are trained in seconds. Recall is measured on questions that were held
    out. The bank itself is left as it is: it must be made again with the new model.
    """
    if routers_only == (config is not None):
        raise typer.BadParameter(
            "give a CONFIG.yaml, or --routers-only with --bank", param_hint="CONFIG.yaml"
        )
    if config is not None:
        if folder is None:
            raise typer.BadParameter("name the folder of the run", param_hint="--output")
        _train(config, folder, changes or [], json)
        return
    if changes:
        raise typer.BadParameter("changes a CONFIG.yaml, and there is none", param_hint="--set")
    if bank is None:
        raise typer.BadParameter("--routers-only needs the bank", param_hint="--bank")
    _train_routers(bank, folder, model, device, passages, seed, json)


def _train(config: Path, folder: Path, changes: list[str], json: bool) -> None:
    from msa.training.run import train as run

    with output.progress("Training", total=1.0) as bar:

        def show(stage: str, step: int, steps: int, metrics: dict[str, float]) -> None:
            values = "  ".join(f"{k} {metrics[k]:.4g}" for k in SHOWN_METRICS if k in metrics)
            bar.set(stage, step / max(1, steps), f"step {step} of {steps}  {values}")

        try:
            with contextlib.redirect_stdout(sys.stderr):  # the trainer's own prints
                model = run(config, folder, changes, progress=show)
        except KeyboardInterrupt:
            raise output.Interrupted(
                "Interrupted. The same command goes on from the last checkpoint."
            ) from None
    if json:
        output.print_json({"model": model})
    else:
        output.stdout().print(f"The model is in {model}", soft_wrap=True)


def _train_routers(
    bank_path: Path,
    folder: Path | None,
    model: str | None,
    device: str | None,
    passages: int,
    seed: int,
    json: bool,
) -> None:
    folder = folder or bank_path.with_name(f"{bank_path.resolve().name}-model")
    bank = open_bank(bank_path)  # a folder that is no bank is said before a model is loaded
    checkpoint = load_model(model, device)
    with output.progress("Training the routers", total=1.0) as bar:
        from msa.training.router_settings import RouterSettings
        from msa.training.router_stage import train_on_bank

        def show(what: str, done: int, total: int) -> None:
            bar.set(f"Training the routers: {what}", done / max(1, total), f"{done} of {total}")

        settings = RouterSettings(seed=seed)
        try:
            report = train_on_bank(
                checkpoint, bank, folder, passages=passages, settings=settings, progress=show
            )
        except KeyboardInterrupt:
            raise output.Interrupted(
                "Interrupted. The same command goes on after the texts that were run."
            ) from None
    if json:
        output.print_json({"model": folder, **output.to_json(report)})
    else:
        _print(report, folder)


def _print(report: RouterReport, folder: Path) -> None:
    console = output.stdout()
    before, after = report.before["all"], report.after["all"]
    deepest = max(after)
    console.print(
        f"Recall on {output.plural(report.held_out_queries, 'question')} held out, first and among "
        f"{deepest}: {before[1]:.1%} and {before[deepest]:.1%} before, {after[1]:.1%} and "
        f"{after[deepest]:.1%} after",
        soft_wrap=True,
        highlight=False,
    )
    if report.skipped_losses:
        output.print_note(f"{output.plural(report.skipped_losses, 'step')} gave no number")
    if not report.best_epoch:
        output.print_note("training found nothing better; the routers are as they were")
    console.print(f"The model is in {folder}", soft_wrap=True)
    console.print(
        "Routers decide what a bank stores, so make the bank again with it: "
        f"msa index PATHS... --bank NEW --model {folder}",
        soft_wrap=True,
        style="dim",
    )
