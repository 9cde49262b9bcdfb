"""Which dtype a model runs in by default."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from msa.errors import ConfigError
from msa.model.home import home

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL_BYTES = 100e6
"""Weights below this run in float32 on a CPU: their products are too small to gain anything."""

MARGIN = 0.8  # bfloat16 must take less than this share of the time of float32
ROWS, STEPS = 256, 10  # tokens read and written for a question of SQuAD, one passage read
WIDTH, INNER = 576, 1536
REPEATS = 30  # in turns, so that what else the machine does for a while meets all alike
CPU_FILE = "cpu.json"

_log = logging.getLogger(__name__)


def named_dtype(name: str | torch.dtype) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ConfigError: there is none of that name that a model can run in.
    """
    if isinstance(name, str):
        if name not in DTYPES:
            raise ConfigError(f"dtype {name!r}: expected one of {', '.join(DTYPES)}")
        return DTYPES[name]
    return name


def cpu_dtype(weight_bytes: float) -> torch.dtype:
    """What a model runs in on this CPU: bfloat16 where that is faster, else float32.

    Measured once for each kind of CPU and version of torch, and kept in `msa.model.home`.

    Args:
        weight_bytes: size of the checkpoint's weights.
    """
    return torch.float32 if weight_bytes < SMALL_BYTES else _fastest()


@cache
def _fastest() -> torch.dtype:
    key = f"{_cpu_name()}, torch {torch.__version__}, {ROWS} rows, {STEPS} steps, in turns"
    path = home() / CPU_FILE
    kept: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(kept, dict) and kept.get(key) in DTYPES:
        return DTYPES[kept[key]]
    seconds = _measured(("float32", "bfloat16"))
    chosen = "bfloat16" if seconds["bfloat16"] < MARGIN * seconds["float32"] else "float32"
    times = ", ".join(f"{name} {1000 * t:.1f} ms" for name, t in seconds.items())
    _log.info("%s: %s; %s is used", key, times, chosen)
    with contextlib.suppress(OSError):  # then it is measured again at the next start
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{CPU_FILE}.{os.getpid()}")
        temporary.write_text(json.dumps({key: chosen}) + "\n", encoding="utf-8")
        temporary.replace(path)
    return DTYPES[chosen]


def _measured(names: Sequence[str]) -> dict[str, float]:
    """Seconds that the products of one layer take for one question, at best, in each dtype."""
    work = {name: _question(DTYPES[name]) for name in names}
    best = dict.fromkeys(names, float("inf"))
    for _ in range(REPEATS):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def _question(dtype: torch.dtype) -> Callable[[], None]:
    """Many rows once, then a token many times; in low precision as two rows, as the model does."""
    weight = torch.randn(INNER, WIDTH).to(dtype)
    rows = torch.randn(ROWS, WIDTH).to(dtype)
    row = torch.randn(2 if dtype.itemsize < 4 else 1, WIDTH).to(dtype)

    def run() -> None:
        torch.nn.functional.linear(rows, weight)
        for _ in range(STEPS):
            torch.nn.functional.linear(row, weight)

    return run


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n"):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
