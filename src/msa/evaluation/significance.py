"""Whether a difference between two systems is more than chance; pure functions of scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msa.errors import InputError
from msa.evaluation.metrics import BOOTSTRAP_BLOCK, Interval, bootstrap

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FLIPS = 10_000
"""Drawn by the permutation test where there are too many to go through."""
EXACT = 12
"""Differences up to which all flips are gone through."""
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Difference:
    """One system less another over the questions that both answered.

    Attributes:
        by: mean of the differences, with its 95% bootstrap interval over questions.
        p: of the permutation test, two-sided: how often differences whose signs are thrown by a
            coin have a mean as far from 0.
        sign_p: of the sign test, two-sided: only who is better at each question counts.
        better, worse: questions at which the one is better, and at which the other is.
        questions: that both answered.
    """

    by: Interval
    p: float
    sign_p: float
    better: int
    worse: int
    questions: int


def paired(one: Mapping[str, float], other: Mapping[str, float], *, seed: int = 0) -> Difference:
    """Compare two systems by the questions that both answered.

    Args:
        one, other: id of a question -> score.
        seed: of the resampling and of the flips.

    Raises:
        InputError: they share no question.
    """
    differences = [score - other[i] for i, score in one.items() if i in other]
    if not differences:
        raise InputError("two runs are to be compared that share no question; draw with one seed")
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return Difference(
        bootstrap(differences, seed=seed),
        _permutation(differences, seed),
        _sign(better, worse),
        better,
        worse,
        len(differences),
    )


def false_discovery(values: Sequence[float]) -> list[float]:
    """P values as Benjamini and Hochberg adjust them for there being many, in the same order.

    Of those at most 0.05, 5% at most are chance, as is to be expected.
    """
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
    adjusted = [1.0] * len(values)
    least = 1.0
    for above, i in enumerate(order):
        least = min(least, values[i] * len(values) / (len(values) - above))
        adjusted[i] = least
    return adjusted


def mean_of_means(groups: Sequence[Sequence[float]], *, seed: int = 0) -> Interval:
    """Mean over groups of their means, with its 95% bootstrap interval over questions.

    Args:
        groups: values of the questions of each, at least one.
        seed: of the resampling.
    """
    import numpy as np

    drawn = np.mean([_resampled(values, seed + i) for i, values in enumerate(groups)], axis=0)
    return _interval(math.fsum(math.fsum(g) / len(g) for g in groups) / len(groups), drawn)


def degradation(
    first: Sequence[Mapping[str, float]], last: Sequence[Mapping[str, float]], *, seed: int = 0
) -> Interval | None:
    """How much of the first score the last has lost, in percent, with its 95% interval.

    Questions that both have are resampled together, others by themselves.

    Args:
        first, last: for each task, id of a question -> score.
        seed: of the resampling.

    Returns:
        None where the first score is 0: nothing can be lost.
    """
    import numpy as np

    began, ended = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    means = [0.0, 0.0]
    for i, (one, other) in enumerate(zip(first, last, strict=True)):
        ids = sorted(one)
        same = ids == sorted(other)
        began += _resampled([one[j] for j in ids], seed + 2 * i)
        ended += _resampled([other[j] for j in sorted(other)], seed + 2 * i + (not same))
        means[0] += math.fsum(one.values()) / len(one)
        means[1] += math.fsum(other.values()) / len(other)
    if not means[0]:
        return None
    kept = began > 0
    lost = 100 * (began[kept] - ended[kept]) / began[kept]
    return _interval(100 * (means[0] - means[1]) / means[0], lost)


def _resampled(values: Sequence[float], seed: int) -> NDArray[np.float64]:
    """Means of `RESAMPLES` resamples."""
    import numpy as np

    data = np.asarray(values, dtype=np.float64)
    random = np.random.default_rng(seed)
    block = max(1, BOOTSTRAP_BLOCK // len(data))
    sizes = [min(block, RESAMPLES - start) for start in range(0, RESAMPLES, block)]
    drawn = (random.integers(0, len(data), (size, len(data))) for size in sizes)
    return np.concatenate([data[rows].mean(axis=1) for rows in drawn])


def _interval(mean: float, drawn: NDArray[np.float64]) -> Interval:
    import numpy as np

    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(mean, float(low), float(high))


def _permutation(differences: Sequence[float], seed: int) -> float:
    import numpy as np

    data = np.asarray([d for d in differences if d], dtype=np.float64)
    if not len(data):
        return 1.0
    seen = abs(data.sum()) - 1e-9
    if len(data) <= EXACT:
        flips = 1 - 2 * (np.arange(2 ** len(data))[:, None] >> np.arange(len(data)) & 1)
        return float((abs(flips @ data) >= seen).mean())
    random = np.random.default_rng(seed)
    flips = 1 - 2 * random.integers(0, 2, (FLIPS, len(data)), dtype=np.int8)
    return float(((abs(flips @ data) >= seen).sum() + 1) / (FLIPS + 1))


def _sign(better: int, worse: int) -> float:
    thrown = better + worse
    tail = sum(math.comb(thrown, k) for k in range(min(better, worse) + 1))
    return min(1.0, float(2 * tail / 2**thrown))
