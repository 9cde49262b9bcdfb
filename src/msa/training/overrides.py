"""Changes to a configuration file from the command line: `--set stages[0].steps=10`."""

from __future__ import annotations

import re
from typing import Any

import yaml

from msa.errors import ConfigError

_KEY = re.compile(r"\w+(\[(\d+|\*)\])?(\.\w+(\[(\d+|\*)\])?)*")
_PART = re.compile(r"\w+|\[(?:\d+|\*)\]")


def override(values: Any, text: str) -> None:
    """Put one value into the contents of a YAML file, in place.

    Args:
        values: as YAML gives them.
        text: "KEY=VALUE". KEY is a path, such as `seed`, `adapter.rank`, `stages[0].steps` or
            `stages[*].steps` (all of them); mappings on the way that are not there are made. VALUE
            is YAML, such as `3`, `false`, `[a, b]` or `{rank: 8}`.

    Raises:
        ConfigError: the text is of another form, or the path leads nowhere.
    """
    key, sign, given = text.partition("=")
    if not sign or not _KEY.fullmatch(key.strip()):
        raise ConfigError(f"--set {text}: expected KEY=VALUE, such as seed=3 or stages[0].steps=10")
    try:
        value = yaml.safe_load(given)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--set {text}: the value is no YAML ({reason})") from error
    _put(values, _PART.findall(key), value, text)


def _put(node: Any, path: list[str], value: Any, text: str) -> None:
    first, *rest = path
    if not first.startswith("["):
        if not isinstance(node, dict):
            raise ConfigError(f"--set {text}: {first!r} stands in no mapping")
        if not rest:
            node[first] = value
            return
        if node.get(first) is None and not rest[0].startswith("["):
            node[first] = {}
        _put(node.get(first), rest, value, text)
        return
    if not isinstance(node, list):
        raise ConfigError(f"--set {text}: {first} does not follow a list")
    chosen = range(len(node)) if first == "[*]" else [int(first[1:-1])]
    for index in chosen:
        if index >= len(node):
            raise ConfigError(f"--set {text}: the list has {len(node)} entries, counted from 0")
        if rest:
            _put(node[index], rest, value, text)
        else:
            node[index] = value
