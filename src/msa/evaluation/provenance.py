"""Where a figure comes from: command, commit, machine, seed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def provenance(seed: int, **more: Any) -> dict[str, Any]:
    """What must stand beside every published figure.

    Args:
        seed: of what was drawn.
        **more: what else tells runs apart, such as the fingerprint of the model.
    """
    import torch

    script = Path(sys.argv[0])
    is_file = script.suffix == ".py"
    name = f"python {script.parent.name}/{script.name}" if is_file else script.name
    return {
        "command": " ".join([name, *(_shown(word) for word in sys.argv[1:])]),
        "commit": commit() or "unknown",
        "machine": f"{platform.machine()}, {_processor()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seed": seed,
        **more,
    }


def _shown(word: str) -> str:
    """An argument; of an absolute path its last three parts, which do not depend on the machine."""
    path = Path(word)
    return "/".join(path.parts[1:][-3:]) if path.is_absolute() else word


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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
