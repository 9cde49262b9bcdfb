"""`msa train`: a model from a configuration file."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from msa.cli import output
from msa.cli.options import JsonOption

SHOWN_METRICS = ("loss", "learning_rate")


def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="What to train, on what, and how long.")
    ],
    folder: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder of the run.", show_default=False
        ),
    ],
    json: JsonOption = False,
) -> None:
    """Train a model as a configuration file says.

    Checkpoints, metrics.jsonl and the finished model (DIR/model) lie in the folder of the run. A
    run that was interrupted goes on from its last checkpoint with the same command.
    """
    from msa.training.run import train as run

    with output.progress("Training", total=1.0) as bar:

        def show(stage: str, step: int, steps: int, metrics: dict[str, float]) -> None:
            values = "  ".join(f"{k} {metrics[k]:.4g}" for k in SHOWN_METRICS if k in metrics)
            bar.set(stage, step / max(1, steps), f"step {step} of {steps}  {values}")

        try:
            with contextlib.redirect_stdout(sys.stderr):  # the trainer's own prints
                model = run(config, folder, progress=show)
        except KeyboardInterrupt:
            raise output.Interrupted(
                "Interrupted. The same command goes on from the last checkpoint."
            ) from None
    if json:
        output.print_json({"model": model})
    else:
        output.stdout().print(f"The model is in {model}", soft_wrap=True)
