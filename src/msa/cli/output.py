"""What the commands print: results on stdout, progress and errors on stderr, JSON if asked."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

PLAIN_WIDTH = 100
"""Columns when the output is no terminal; a terminal has its own width."""

QUIET_SECONDS = 15.0
"""Between two progress lines when stderr is no terminal."""


def stdout() -> Console:
    """A console for results; made again, so that it writes to what stdout is now."""
    return _console(sys.stdout)


def stderr() -> Console:
    """A console for progress and errors."""
    return _console(sys.stderr)


def _console(file: Any) -> Console:
    plain = not file.isatty() and "COLUMNS" not in os.environ
    width = PLAIN_WIDTH if plain else None
    return Console(file=file, width=width, highlight=False, markup=False, emoji=False)


def print_json(value: Any) -> None:
    """Write a result as one line of JSON on stdout."""
    unicode = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    print(json.dumps(to_json(value), ensure_ascii=not unicode), flush=True)


def print_what_cannot_be_written() -> None:
    """Let characters that the terminal's encoding lacks become `?` instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def to_json(value: Any) -> Any:
    """The value in JSON's own types: dataclasses and mappings as objects, paths as strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def one_line(text: str, width: int | None = None) -> str:
    """A text of strangers, safe to print: one line, no control characters, at most `width`."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if width is not None and len(line) > width:
        return line[: max(0, width - 1)].rstrip() + "…"
    return line


def print_error(message: str) -> None:
    """One line on stderr: `Error: ...`."""
    line = Text("Error: ", style="bold red") + Text(one_line(message), style="default")
    stderr().print(line, soft_wrap=True)


def print_note(message: str) -> None:
    """One line on stderr that is no error."""
    stderr().print(one_line(message), soft_wrap=True)


def number(value: float) -> str:
    """1234567 as 1,234,567."""
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes in decimal units: 1.2 GB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def plural(count: int, noun: str) -> str:
    """`1 document`, `2 documents`."""
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"


class Interrupted(Exception):  # noqa: N818 - the user asked for it
    """The user pressed Ctrl-C; the message says what is safe and how to go on."""


class ProgressBar:
    """A bar on a terminal; elsewhere a line now and then, so that a log shows life."""

    def __init__(self, console: Console, description: str, total: float | None) -> None:
        self._console = console
        self._description = description
        self._total = total
        self._done = 0.0
        self._said = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[note]}", markup=False),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(description, total=total, note="")

    def start(self) -> None:
        """Show the bar."""
        if self._bar:
            self._bar.start()

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()

    def advance(self, amount: float = 0.0, note: str | None = None) -> None:
        """Go on by `amount` of the total; `note` stands beside the bar."""
        self.set(self._description, self._done + amount, note)

    def set(self, description: str, done: float, note: str | None = None) -> None:
        """Say what is going on, how much of the total is done, and a note beside the bar."""
        self._description, self._done = description, done
        if self._bar:
            changes: dict[str, Any] = {} if note is None else {"note": note}
            self._bar.update(self._task, completed=done, description=description, **changes)
        elif note is not None and time.monotonic() - self._said >= QUIET_SECONDS:
            self._said = time.monotonic()
            share = f" {100 * done / self._total:.0f}%" if self._total else ""
            self._console.print(f"{description}{share}: {note}", soft_wrap=True)


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[ProgressBar]:
    """A progress bar on stderr for as long as the block runs."""
    bar = ProgressBar(stderr(), description, total)
    bar.start()
    try:
        yield bar
    finally:
        bar.stop()
