"""The tasks of the evaluation by name; a file for each, or for a family of much the same."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path

from msa.errors import InputError
from msa.evaluation.tasks.base import Task
from msa.evaluation.tasks.folders import folder_tasks

MODULES: tuple[str, ...] = (
    *("ruler", "no_shared_words", "states", "events", "conflicts", "dialogue"),
    *("changing", "worlds"),
)
"""Modules of this folder; each has `TASKS`, a tuple of tasks."""

TASKS: dict[str, Task] = {
    task.name: task
    for module in MODULES
    for task in import_module(f"msa.evaluation.tasks.{module}").TASKS
}


OF_DATA = ("qa", "curve", "beir")
"""Families of tasks that are folders of question sets."""


def all_tasks(data: Path | None = None) -> dict[str, Task]:
    """Every task by name; with those of a folder of question sets, if one is given."""
    return TASKS | ({task.name: task for task in folder_tasks(data)} if data else {})


def find_tasks(patterns: Sequence[str], data: Path | None = None) -> list[Task]:
    """Tasks of those names, in the order of the registry, none twice.

    Args:
        patterns: names; families ("ruler"); or names with `*` ("ruler/niah_*").
        data: folder of question sets, which are tasks too.

    Raises:
        InputError: a pattern fits no task; the message has the names that are nearest.
    """
    tasks = all_tasks(data)
    found: dict[str, Task] = {}
    for pattern in patterns:
        fitting = {
            name: task
            for name, task in tasks.items()
            if fnmatchcase(name, pattern) or name.startswith(f"{pattern.rstrip('/')}/")
        }
        if not fitting:
            near = difflib.get_close_matches(pattern, tasks, 3, 0.4) or sorted(tasks)[:3]
            family = pattern.partition("/")[0]
            hint = "" if data or family not in OF_DATA else "; give its folder with --data"
            raise InputError(
                f"no task {pattern!r}; the nearest: {', '.join(near)}; msa eval tasks lists all"
                f"{hint}"
            )
        found |= fitting
    return [task for name, task in tasks.items() if name in found]
