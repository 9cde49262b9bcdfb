"""Pages of mapped files are dropped, so that a process stays as small as was planned.

What is read through a map counts as the process's own memory until the kernel wants it back, so a
process that asks for long from a bank larger than memory grows to the whole of it. Letting go of
the pages leaves them in the page cache, where the next read finds them.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

# Linux: maps of the process, and the advice that pages are not needed. Elsewhere nothing is done.
_MAPS = Path("/proc/self/maps")
_DONTNEED = 4
# A fault brings in its neighbours: up to 16 pages, at both ends of what is read.
_AROUND = 2 * 16 * mmap.PAGESIZE

# A process may hold about so much of mapped files before it drops them.
WINDOW_BYTES = 128 << 20


class PageWindow:
    """Counts what is read through maps, and drops the pages when they are too many."""

    def __init__(self, limit: int = WINDOW_BYTES) -> None:
        self.limit = limit
        self._touched = 0
        self._lock = threading.Lock()

    def touched(self, pieces: int, num_bytes: int, maps: Iterable[Tensor]) -> None:
        """Take note of a read.

        Args:
            pieces: places that were read.
            num_bytes: of all of them.
            maps: one tensor of each map that may have been read from since the last time.
        """
        with self._lock:
            self._touched += num_bytes + pieces * _AROUND
            if self._touched < self.limit:
                return
            self._touched = 0
        drop_pages(maps)


def drop_pages(maps: Iterable[Tensor]) -> int:
    """Give back the pages of mapped files; what they hold stays as it is.

    Args:
        maps: one tensor of each map, held by the caller, so that the maps stay where they are.

    Returns:
        Bytes of address space given back; 0 where the system cannot.
    """
    if sys.platform != "linux" or not _MAPS.exists():
        return 0
    # Only what is certainly a file: memory of another kind would lose what it holds.
    ranges = _file_ranges()
    starts = [start for start, _ in ranges]
    library = ctypes.CDLL(None, use_errno=True)
    done = 0
    for tensor in maps:
        place = bisect.bisect_right(starts, tensor.data_ptr()) - 1
        if place < 0 or tensor.data_ptr() >= ranges[place][1]:
            continue
        start, end = ranges[place]
        size = ctypes.c_size_t(end - start)
        if library.madvise(ctypes.c_void_p(start), size, ctypes.c_int(_DONTNEED)) == 0:
            done += end - start
    return done


def release_heap() -> None:
    """Give back memory that was freed; glibc keeps much of what many buffers took by turns."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _file_ranges() -> list[tuple[int, int]]:
    """Addresses at which safetensors files are mapped, ascending; removed files included."""
    ranges = []
    for line in _MAPS.read_text(errors="replace").splitlines():
        if ".safetensors" in line:
            start, end = line.split(" ", 1)[0].split("-")
            ranges.append((int(start, 16), int(end, 16)))
    return sorted(ranges)
