"""Constraints for pip: the lowest versions that `pyproject.toml` allows, one a line.

    python tools/lowest_versions.py > lowest.txt
    pip install --constraint lowest.txt '.[train]'

Extras named `dev` are left out: the tests' tools may be any version.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[[^]]*\])?>=(?P<version>[0-9.]+)")


def lowest(requirements: list[str]) -> list[str]:
    """`name==version` of every requirement's lower bound.

    Raises:
        ValueError: a requirement has none.
    """
    found = []
    for requirement in requirements:
        match = REQUIREMENT.match(requirement)
        if match is None:
            raise ValueError(f"'{requirement}' in {PYPROJECT.name} has no lower bound (name>=1.2)")
        found.append(f"{match['name']}=={match['version']}")
    return found


def main() -> None:
    """Print the constraints."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = list(project["dependencies"])
    requirements += [r for name, some in extras.items() if name != "dev" for r in some]
    print("\n".join(sorted(set(lowest(requirements)))))


if __name__ == "__main__":
    main()
