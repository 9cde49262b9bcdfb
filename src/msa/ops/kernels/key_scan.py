"""Routing keys above thresholds, in one pass over the keys, compiled for the processor by Numba.

A key is read once, turned into float32 in registers and multiplied with all vectors; what is not
above a threshold leaves nothing behind. So the time is that of reading the keys, as long as there
are few vectors. (torch has no product that does so: its products of bfloat16 are rounded to 8 bits,
keys in other types must be copied into float32 first, and all scores go through memory.)

The score of a key and a vector depends on these two alone, not on what else is looked for or where
the key lies.

Shapes: C keys of W numbers, R vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from torch import Tensor

# A thread scans at least so many bytes, and stops when it has found so many keys.
SHARE = 1 << 18
ROOM = 1024
# Vectors are multiplied four at a time: a key is loaded once for them, and sums are independent.
WIDTH = 4
# Sums may be added up in any order, and in one instruction with products; NaN and infinity count.
FAST = {"reassoc", "contract", "nsz"}
# Two threads must not enter Numba's thread pool at once: not every kind of it allows that.
_POOL = Lock()


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiled at the first call, and kept on disk for other processes where there is room."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            compiled: Callable[..., Any] = njit(cache=True, **options)(function)
        except RuntimeError:  # neither beside this file nor in the user's cache may it write
            compiled = njit(**options)(function)
        return compiled

    return decorate


@intrinsic  # type: ignore[untyped-decorator]
def _number(context: Any, key: Any) -> Any:
    """A number of a key as float32: from float32, int8, or bfloat16 given by its bits."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (number,) = arguments
        if key == types.uint16:  # bfloat16 is the upper half of a float32
            bits = builder.zext(number, ir.IntType(32))
            return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, 16)), ir.FloatType())
        return builder.sitofp(number, ir.FloatType()) if key == types.int8 else number

    return types.float32(key), code


@_compiled(nogil=True, fastmath=FAST, error_model="numpy")
def _score(keys, scales, key, vectors, scores):  # type: ignore[no-untyped-def]
    """Write the scores of one key into [R]."""
    for row in range(len(scores)):
        total = np.float32(0)
        for i in range(keys.shape[1]):
            total += _number(keys[key, i]) * vectors[row, i]
        scores[row] = total if scales is None else total * scales[key]


@_compiled(nogil=True, fastmath=FAST, error_model="numpy")
def _scan(keys, scales, chosen, vectors, thresholds, start, end, places, scores):  # type: ignore[no-untyped-def]
    """Keys from `start` to `end` above a threshold: how many, and where it stopped.

    `vectors` are a multiple of `WIDTH`; the others as in `scan`.
    """
    found = 0
    for place in range(start, end):
        key = place if chosen is None else chosen[place]
        above = False
        for row in range(0, len(vectors), WIDTH):
            a = b = c = d = np.float32(0)
            for i in range(keys.shape[1]):
                number = _number(keys[key, i])
                a += number * vectors[row, i]
                b += number * vectors[row + 1, i]
                c += number * vectors[row + 2, i]
                d += number * vectors[row + 3, i]
            if scales is not None:
                scale = scales[key]
                a, b, c, d = a * scale, b * scale, c * scale, d * scale
            above |= a > thresholds[row] or b > thresholds[row + 1]
            above |= c > thresholds[row + 2] or d > thresholds[row + 3]
        if above:
            if found == len(places):
                return found, place
            _score(keys, scales, key, vectors, scores[found])
            places[found] = key
            found += 1
    return found, end


@_compiled(parallel=True)
def _scan_parts(keys, scales, chosen, vectors, thresholds, cuts, places, scores, found, ends):  # type: ignore[no-untyped-def]
    """`_scan` of every part of a block, each in a thread."""
    for i in prange(len(found)):
        found[i], ends[i] = _scan(
            keys, scales, chosen, vectors, thresholds, cuts[i], cuts[i + 1], places[i], scores[i]
        )


class KeyScan:
    """The scan of some keys for some vectors.

    Args:
        keys: [C, W] float32, int8, or uint16 for the bits of bfloat16; on the CPU, one number after
            the other.
        scales: [C] float32 for int8 keys, else None.
        chosen: [C'] int64, the keys that are scanned; None for all.
        vectors: [R, W] float32.
    """

    def __init__(
        self, keys: Tensor, scales: Tensor | None, chosen: Tensor | None, vectors: Tensor
    ) -> None:
        self.size = len(vectors)
        missing = -self.size % WIDTH
        self.vectors = torch.nn.functional.pad(vectors.float(), (0, 0, 0, missing)).numpy()
        self.thresholds = np.full(self.size + missing, np.inf, np.float32)
        self.of = [None if t is None else t.numpy() for t in (keys.detach(), scales, chosen)]
        self.bytes = keys.shape[1] * keys.element_size()
        self.threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        self.places = np.empty((self.threads, ROOM), np.int64)
        self.scores = np.empty((self.threads, ROOM, len(self.vectors)), np.float32)

    def __call__(self, start: int, end: int, thresholds: Tensor) -> tuple[Tensor, Tensor, int]:
        """What is above a threshold among the keys from `start` to `end`, in their order.

        Args:
            start, end: places among the keys, or among those that are chosen.
            thresholds: [R] float32.

        Returns:
            [n] int64, keys with a score above the threshold of some vector; [R, n] float32, their
            scores for all vectors; and the place where the scan stopped: `end`, or before it when
            it found more than there is room for.
        """
        self.thresholds[: self.size] = thresholds.numpy()
        parts = max(1, min(self.threads, (end - start) * self.bytes // SHARE))
        given = (*self.of, self.vectors, self.thresholds)
        if parts == 1:
            found, stop = _scan(*given, start, end, self.places[0], self.scores[0])
            return *self._copied([found]), stop
        cuts = np.linspace(start, end, parts + 1).astype(np.int64)
        counts, stops = np.zeros(parts, np.int64), np.zeros(parts, np.int64)
        with _POOL:
            torch_threads = torch.get_num_threads()
            numba.set_num_threads(parts)
            _scan_parts(*given, cuts, self.places, self.scores, counts, stops)
            if torch.get_num_threads() != torch_threads:  # Numba has just made the pool of both
                torch.set_num_threads(torch_threads)
        # what lies behind a part that stopped early is scanned again
        early = np.flatnonzero(stops < cuts[1:])
        whole = parts if not len(early) else int(early[0]) + 1
        return *self._copied(counts[:whole].tolist()), int(stops[whole - 1])

    def _copied(self, found: list[int]) -> tuple[Tensor, Tensor]:
        """Keys and scores of the first parts, one part after the other; counts per part."""
        places = np.concatenate([self.places[i, :n] for i, n in enumerate(found)])
        scores = np.concatenate([self.scores[i, :n, : self.size] for i, n in enumerate(found)])
        return torch.from_numpy(places), torch.from_numpy(scores).T
