"""Write docs/cli.md: every command of `msa` with what its `--help` says.

Usage: python tools/cli_docs.py [docs/cli.md]; without a file, prints.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from msa.cli.main import app

HEAD = """# The command `msa`

Written from `msa --help` by `make docs`; change the commands, not this page.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage,
130 interrupted. `--debug`, anywhere on the line, shows tracebacks. With `--json`, every command
prints JSON, one object per line.
"""


def cell(text: str) -> str:
    """A text as it stands in a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def default(parameter: Any) -> str:
    """A parameter's default, if it has one that says something."""
    value = parameter.default
    if parameter.required or value is None or value is False or callable(value):
        return ""
    if value is True:
        return f"`{parameter.opts[0]}`"
    return f"`{value}`"


def rows(command: Any) -> Iterator[str]:
    """The table of a command's arguments and options."""
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            names = f"`{parameter.metavar or parameter.name.upper()}`"
        else:
            names = ", ".join(f"`{o}`" for o in (*parameter.opts, *parameter.secondary_opts))
            if parameter.metavar:
                names += f" {parameter.metavar}"
        required = "required" if parameter.required else default(parameter)
        yield f"| {cell(names)} | {cell(parameter.help or '')} | {required} |"


def sections(command: Any, path: str) -> Iterator[str]:
    """The command's section, then those of its subcommands."""
    yield f"\n## `{path}`\n\n{(command.help or '').strip()}\n"
    table = list(rows(command))
    if table:
        yield "\n| | | default |\n|---|---|---|\n" + "\n".join(table) + "\n"
    if command.epilog:
        example = command.epilog.removeprefix("Example: ")
        yield f"\n```sh\n{example}\n```\n"
    for name, child in getattr(command, "commands", {}).items():
        yield from sections(child, f"{path} {name}")


def document() -> str:
    """The whole page."""
    return HEAD + "".join(sections(typer.main.get_command(app), "msa"))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(document(), encoding="utf-8")
    else:
        print(document(), end="")
