"""Which state of the sources this package is."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from pathlib import Path


def commit() -> str | None:
    """Short hash of the package's checkout, with "+" when files differ from it.

    Of a package that was installed from Git, of what was installed; None if neither can be told.
    """
    here = Path(__file__)
    if not _git("ls-files", here.name):  # another repository may lie around an installed package
        return _installed_commit()
    changed = _git("status", "--short", "--untracked-files=no")
    return _git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def _git(*command: str) -> str:
    folder = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def _installed_commit() -> str | None:
    """What pip noted down."""
    try:
        noted = importlib.metadata.distribution("msa-memory").read_text("direct_url.json")
        found: str = json.loads(noted or "{}")["vcs_info"]["commit_id"][:7]
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return None
    return found
