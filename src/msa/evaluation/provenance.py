"""Where a figure comes from: command, commit, machine, seed."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from msa.build import commit


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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
