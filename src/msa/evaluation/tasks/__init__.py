"""The tasks of the evaluation by name; a file for each, or for a family of much the same."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import import_module

from msa.errors import InputError
from msa.evaluation.tasks.base import Task

MODULES: tuple[str, ...] = (
    *("ruler", "no_shared_words", "states", "events", "conflicts", "dialogue"),
    "changing",
)
"""Modules of this folder; each has `TASKS`, a tuple of tasks."""

TASKS: dict[str, Task] = {
    task.name: task
    for module in MODULES
    for task in import_module(f"msa.evaluation.tasks.{module}").TASKS
}


def find_tasks(patterns: Sequence[str]) -> list[Task]:
    """Tasks of those names, in the order of the registry, none twice.

    Args:
        patterns: names; families ("ruler"); or names with `*` ("ruler/niah_*").

    Raises:
        InputError: a pattern fits no task; the message has the names that are nearest.
    """
    found: dict[str, Task] = {}
    for pattern in patterns:
        fitting = {
            name: task
            for name, task in TASKS.items()
            if fnmatchcase(name, pattern) or name.startswith(f"{pattern.rstrip('/')}/")
        }
        if not fitting:
            near = difflib.get_close_matches(pattern, TASKS, 3, 0.4) or sorted(TASKS)[:3]
            raise InputError(
                f"no task {pattern!r}; the nearest: {', '.join(near)}; `msa eval tasks` lists all"
            )
        found |= fitting
    return [task for name, task in TASKS.items() if name in found]
