"""Measuring: seconds side by side, bytes on top, bandwidth, exponents, and where it was done."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from msa.evaluation.provenance import provenance

Run = Callable[[], object]
Note = Callable[[str], None]

REPEATS = 7
MAX_SECONDS = 8.0
"""After this long a function is not run again; it has run once at least."""


PAUSE = 0.01
"""Between calls, so that the threads of the one before have gone to sleep: some wait spinning."""


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was told; a CPU is always done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Run, device: torch.device) -> float:
    """Wall time of one call."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def side_by_side(
    runs: Mapping[str, Run],
    device: torch.device,
    repeats: int = REPEATS,
    max_seconds: float = MAX_SECONDS,
) -> dict[str, float]:
    """Median wall time of each function, all measured in turns.

    Each runs once before, to warm up. Taking turns lets what else the machine does fall on all of
    them alike, so that their ratios hold where their seconds do not.

    Args:
        runs: name -> function.
        device: waited for at both ends of each call.
        repeats: calls of each, at least 1.
        max_seconds: a function whose calls took this long together is not called again; one whose
            first call took as long is not called a second time.

    Returns:
        Name -> seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        first = seconds(run, device)
        if first >= max_seconds:
            times[name].append(first)
    for _ in range(repeats):
        for name, run in runs.items():
            if sum(times[name]) < max_seconds:
                time.sleep(PAUSE)
                times[name].append(seconds(run, device))
    return {name: median(values) for name, values in times.items()}


def bandwidth(tensors: Sequence[Tensor], repeats: int = REPEATS) -> float:
    """Bytes per second at which these tensors can be read from memory, once and in order.

    The fastest call of the fastest of three reductions over them: what a routing kernel cannot
    beat. (The fastest, not the median: a limit that a busy machine lowered would flatter us.)

    Args:
        tensors: contiguous, finite, of one device; together larger than the caches, or it is the
            caches that are measured.
        repeats: passes of each reduction.
    """
    device = tensors[0].device
    words = [t.view(-1).view(torch.float32) for t in tensors]
    size = sum(w.nbytes for w in words)
    reductions: tuple[Callable[[Tensor], Tensor], ...] = (
        torch.sum,
        torch.amax,
        lambda w: torch.dot(w, w),
    )

    def fastest(reduce: Callable[[Tensor], Tensor]) -> float:
        def run() -> None:
            for w in words:
                reduce(w)

        return min(seconds(run, device) for _ in range(repeats + 1))

    return size / min(fastest(reduce) for reduce in reductions)


def extra_bytes(run: Run, device: torch.device, repeats: int = 3) -> int | None:
    """Memory that one call needs on top of what is held before it, at its peak.

    The least of a few calls: what else a process does can only add to it. What a first call makes
    once and keeps is no cost of the others.

    On a GPU, of torch's allocator. On Linux, of the process (its resident set), to a few hundred
    kB. None on a CPU elsewhere, where it cannot be asked.
    """
    measure = _extra_on_gpu if device.type == "cuda" else _extra_of_process
    found = [measure(run, device) for _ in range(repeats)]
    return min((extra for extra in found if extra is not None), default=None)


def _extra_on_gpu(run: Run, device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


def _extra_of_process(run: Run, device: torch.device) -> int | None:
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give back what was freed, so that its reuse counts
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present again
    except (OSError, AttributeError):
        return None
    before = _process_bytes("VmRSS")
    run()
    return max(0, _process_bytes("VmHWM") - before)


def _process_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be taken on the device; None where it cannot be asked."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(w.split()[1]) * 1024 for w in lines if w.startswith("MemAvailable:")), None)


def exponent(tokens: Sequence[int], costs: Sequence[float]) -> float | None:
    """The p of cost ~ tokens ** p: the slope of a least-squares line through the logarithms.

    None for fewer than two sizes, or a cost that is not above zero.
    """
    if len(set(tokens)) < 2 or min(costs) <= 0:
        return None
    x, y = [math.log(t) for t in tokens], [math.log(c) for c in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures were made on: processor or card, threads, versions, commit."""
    found = provenance(seed=0)
    name = str(found["machine"])
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}; {name}"
    return {
        "device": str(device),
        "machine": name,
        "threads": found["threads"],
        "cores": found["cores"] or 0,
        "load average": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "",
        "python": platform.python_version(),
        "torch": found["torch"],
        "commit": found["commit"],
    }
