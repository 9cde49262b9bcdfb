"""`msa`: the command tree, and how errors reach people.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Results go to stdout, progress and
errors to stderr. The commands import what they need when they run: help needs no torch.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

import msa
from msa.cli import (
    ask,
    bank,
    convert,
    demo,
    evaluate,
    index,
    mcp,
    model,
    options,
    output,
    serve,
    train,
)
from msa.errors import MSAError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

# Typer's own classes have moved between releases; their places in this order have not.
_UsageError, _ShownError = typer.BadParameter.__mro__[1:3]

app = typer.Typer(
    name="msa",
    help="Ask a memory of documents that a language model routes over and reads.",
    epilog="Example: msa demo",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"msa {msa.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _global_options(
    context: typer.Context,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", help="Show tracebacks, the warnings of libraries and what a model runs in."
        ),
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Fetch nothing from the network, as MSA_OFFLINE=1.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Run the model in float32, bfloat16 or float16, as MSA_DTYPE=NAME; before the "
            "command.",
            show_default="on a CPU what is faster there, on a GPU as stored",
        ),
    ] = None,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    if dtype is not None:
        os.environ["MSA_DTYPE"] = dtype
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(EXIT_USAGE)


options.register(app, demo.demo, "msa demo")
options.register(app, index.index, "msa index notes/ papers.jsonl --bank bank/")
options.register(app, ask.ask, 'msa ask "When was Ada born?" --bank bank/ --trace')
options.register(app, ask.search, 'msa search "born in London" --bank bank/ --top-k 5')
options.register(app, serve.serve, "msa serve notes/ --bank bank/")
options.register(app, mcp.mcp, "msa mcp --bank notes=bank/")
app.add_typer(bank.app, name="bank")
app.add_typer(model.app, name="model")
options.register(app, convert.convert, "msa convert Qwen/Qwen3-0.6B mine/ --texts notes/")
options.register(app, train.train, "msa train configs/worlds.yaml --output runs/mine")
app.add_typer(evaluate.app, name="eval")


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code."""
    words = list(sys.argv[1:] if args is None else args)
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]  # anywhere on the line, as people type it
    if "--offline" in words[:end]:
        os.environ["MSA_OFFLINE"] = "1"
    words = [w for i, w in enumerate(words) if w not in ("--debug", "--offline") or i > end]
    output.print_what_cannot_be_written()
    if debug:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("msa").setLevel(logging.INFO)
    else:
        options.quiet_warnings()
    sys.exit(_run(words, debug))


def _run(words: list[str], debug: bool) -> int:
    """The exit code of one command line; errors become one line on stderr."""
    try:
        code = typer.main.get_command(app)(words, prog_name="msa", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort, output.Interrupted) as stop:
        return _interrupted(str(stop))
    except Exception as error:
        if isinstance(error, _ShownError):
            message: str = error.format_message()  # type: ignore[attr-defined]
            usage = isinstance(error, _UsageError)
            output.print_error(message.rstrip(".") + _usage_hint(error) if usage else message)
            return EXIT_USAGE if usage else EXIT_FAILED
        if debug:
            raise
        if isinstance(error, MSAError):
            output.print_error("; ".join([str(error), *getattr(error, "__notes__", ())]))
        elif isinstance(error, OSError):
            name = f"{error.filename}: " if error.filename else ""
            output.print_error(f"{name}{error.strerror or error}")
        else:
            text = str(error) or "no message"
            output.print_error(
                f"{type(error).__name__}: {text} (a fault of ours; --debug shows where)"
            )
        return EXIT_FAILED
    if code == EXIT_INTERRUPTED:
        return _interrupted()
    return code if isinstance(code, int) else 0


def _usage_hint(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "msa"
    return f". Try '{command} --help'."


def _interrupted(message: str = "") -> int:
    output.print_note(message or "Interrupted.")
    return EXIT_INTERRUPTED
