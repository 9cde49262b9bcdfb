"""Options that several commands share, and what they open: models, banks, engines."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msa.cli import output
from msa.errors import InputError
from msa.types import JSON

if TYPE_CHECKING:
    from msa.inference.engine import MemoryEngine
    from msa.memory.bank import MemoryBank
    from msa.model.checkpoint import Checkpoint

BankOption = Annotated[
    Path,
    typer.Option(
        "--bank", "-b", metavar="DIR", help="Folder of the memory bank.", show_default=False
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Name (see msa model list), folder or Hub id of a model; the default one if not "
        "given.",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1, ...; a GPU if there is one.",
        show_default=False,
    ),
]
FilterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="NAME=VALUE",
        help="Only documents with this metadata; repeat for more.",
        show_default=False,
    ),
]
SlackOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        metavar="X",
        help="Search the routing keys in blocks, for many questions to a large bank on a CPU: 1 "
        "finds the same, 0.8 nearly the same with fewer of them read.",
        show_default=False,
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Ray cluster to work on. [default: one on this machine]",
        show_default=False,
    ),
]
ShardsOption = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Hold the bank in so many processes (extra 'distributed')."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]


def register(
    app: typer.Typer, command: Callable[..., None], example: str, name: str | None = None
) -> None:
    """Make a function a command: its docstring is the help, with an example below."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    app.command(name, help=text, epilog=f"Example: {example}")(command)


def metadata_filter(pairs: list[str] | None) -> dict[str, JSON] | None:
    """Metadata that documents must have, as a filter of `msa.memory.store.filters`.

    A value is text, and JSON if it can be: `year=1910` is met by the number and by the text, since
    columns of tables are text. Quotes make it text only, braces conditions: `year={"gte": 1910}`.
    """
    if not pairs:
        return None
    wanted: list[dict[str, JSON]] = []
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint="--filter")
        wanted.append({name: _condition(value)})
    together = {name: value for condition in wanted for name, value in condition.items()}
    return together if len(together) == len(wanted) else {"and": [*wanted]}


def _condition(value: str) -> JSON:
    """What a value on the command line asks of a document's."""
    try:
        parsed: JSON = json.loads(value, parse_constant=lambda name: name)
    except ValueError:
        return value
    except RecursionError:
        raise typer.BadParameter(
            f"{value[:20]!r}... is nested too deeply", param_hint="--filter"
        ) from None
    if isinstance(parsed, str | dict):
        return value if parsed == value else parsed
    return {"in": [parsed, value]}


def load_model(name: str | None, device: str | None, *, quiet: bool = False) -> Checkpoint:
    """A model on its device, with what belongs to it; no progress is shown when `quiet`.

    Raises:
        ModelError: no such model, damaged weights, or it cannot be fetched.
        InputError: no such device.
    """
    with LoadProgress(quiet=quiet) as progress:
        import torch

        quiet_transformers()
        from msa.model.loading import load

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"device {device!r} cannot be used: {reason}") from error
        return load(name, device=device, progress=progress)


def quiet_transformers() -> None:
    """Let transformers say nothing: ours says in one line what is wrong."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class LoadProgress:
    """A bar while a model is loaded; with a notice for each thing that is fetched or prepared."""

    def __init__(self, what: str = "Loading the model", *, quiet: bool = False) -> None:
        self._what = what
        self._quiet = quiet
        self._shown = contextlib.ExitStack()
        self._bar: output.ProgressBar | None = None

    def __enter__(self) -> LoadProgress:
        if not self._quiet:
            self._bar = self._shown.enter_context(output.progress(self._what))
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.close()

    def __call__(self, what: str, done: int, total: int) -> None:
        """As `msa.model.bases.Progress`."""
        if self._quiet:
            return
        if what != self._what or self._bar is None:
            self._what = what
            self._shown.close()
            output.print_note(f"{what} ({output.size(total)})" if total else what)
            self._bar = self._shown.enter_context(output.progress(what, total or None))
        note = f"{output.size(done)} of {output.size(total)}" if total else None
        self._bar.set(what, done, note)


def stdin_lines() -> Iterator[str]:
    """Lines of stdin, as they come; each ends with a line feed, whatever it was typed on.

    Raises:
        InputError: they are not text.
    """
    try:
        while line := sys.stdin.readline():
            yield line.removesuffix("\n").removesuffix("\r") + "\n" * line.endswith("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not valid text ({error}); convert it to UTF-8 first") from None


def quiet_warnings() -> None:
    """Keep warnings of libraries out of what people read; `--debug` shows them."""
    warnings.simplefilter("ignore")


@contextlib.contextmanager
def open_engine(
    bank_path: Path,
    model: str | None,
    device: str | None,
    slack: float | None = None,
    shards: int | None = None,
    ray: str | None = None,
) -> Iterator[MemoryEngine]:
    """An engine over an existing bank, opened for reading, perhaps in shards.

    Raises:
        InputError: `slack` with shards.
    """
    shards = shards or (1 if ray else None)
    if slack is not None and shards:
        raise InputError(f"--slack {slack} with --shards: leave it out, shards are scanned in full")
    bank = open_bank(bank_path)  # a folder that is no bank is said before a model is loaded
    bank.close()
    checkpoint = load_model(model, device)
    with output.progress("Opening the bank"):
        from msa.inference.engine import MemoryEngine
        from msa.memory.bank import MemoryBank
        from msa.memory.search.clustered_index import PruningSettings

        stack = contextlib.ExitStack()
        bank = stack.enter_context(MemoryBank.open(bank_path, checkpoint, read_only=True))
        pruning = None if slack is None else PruningSettings(slack=slack)
        memory = None
        if shards:
            from msa.memory.distributed.sharded_bank import ShardedBank

            device_ = checkpoint.model.device
            memory = stack.enter_context(ShardedBank(bank, device_, shards=shards, address=ray))
        engine = stack.enter_context(MemoryEngine(bank, memory=memory, pruning=pruning))
    with stack:
        yield engine


def open_bank(path: Path, *, write: bool = False) -> MemoryBank:
    """A bank without a model: enough to look, delete, compact and verify."""
    from msa.memory.bank import MemoryBank

    return MemoryBank.open(path, read_only=not write)
