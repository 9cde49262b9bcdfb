"""Scores of answers and rankings; pure functions."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Values that are drawn at once.
BOOTSTRAP_BLOCK = 1 << 20
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space (as SQuAD scores).

    >>> normalize_answer("The  Eiffel-Tower.")
    'eiffeltower'
    """
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1.0 if the answer equals an accepted one after normalization, else 0.0."""
    return float(normalize_answer(answer) in {normalize_answer(a) for a in accepted})


def token_f1(answer: str, accepted: Sequence[str]) -> float:
    """Best F1 over words with any accepted answer, from 0 to 1 (as SQuAD scores)."""
    return max((_f1(normalize_answer(answer), normalize_answer(a)) for a in accepted), default=0.0)


def _f1(answer: str, accepted: str) -> float:
    given, wanted = answer.split(), accepted.split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def contains(text: str, answer: str) -> bool:
    """Whether the answer stands in a text, whole words only, after normalization."""
    wanted = normalize_answer(answer)
    return bool(wanted) and f" {wanted} " in f" {normalize_answer(text)} "


def uses_wrong(answer: str, wrong: Sequence[str], accepted: Sequence[str]) -> bool:
    """Whether an answer holds one of the wrong ones, not as a part of an accepted one.

    >>> uses_wrong("In Rome.", ["Rome"], ["Paris"]), uses_wrong("New York", ["York"], ["New York"])
    (True, False)
    """
    left = f" {normalize_answer(answer)} "
    for right in sorted(map(normalize_answer, accepted), key=len, reverse=True):
        left = left.replace(f" {right} ", " | ") if right else left
    return any(f" {normalize_answer(w)} " in left for w in wrong if normalize_answer(w))


def ndcg(ranked: Sequence[str], grades: Mapping[str, float], k: int) -> float:
    """Normalized discounted cumulative gain of the first k, from 0 to 1; 0 without relevant ones.

    Args:
        ranked: ids, best first.
        grades: id -> how relevant it is; others are not.
        k: at least 1.
    """
    gains = [grades.get(i, 0.0) for i in ranked[:k]]
    best = _discounted(sorted(grades.values(), reverse=True)[:k])
    return _discounted(gains) / best if best else 0.0


def _discounted(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(place + 2) for place, gain in enumerate(gains))


def recall(found: Sequence[str], gold: Sequence[str]) -> float:
    """Share of the gold ids among those found, from 0 to 1."""
    return sum(g in set(found) for g in gold) / len(gold) if gold else 0.0


def mean(values: Sequence[float]) -> float:
    """Mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def recall_at(ranks: Sequence[int], k: int) -> float:
    """Share of the gold documents within the first k, from 0 to 1.

    Args:
        ranks: of every gold document, from 0.
        k: at least 1.
    """
    return mean([float(rank < k) for rank in ranks])


def all_within(ranks: Sequence[int], k: int) -> float:
    """1.0 if every gold document is within the first k, else 0.0; 0.0 without any.

    Args:
        ranks: of every gold document, from 0.
        k: at least 1.
    """
    return float(bool(ranks) and max(ranks) < k)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its bootstrap interval.

    Attributes:
        mean: of the values.
        low, high: percentile bounds of the resampled means.
    """

    mean: float
    low: float
    high: float


def bootstrap(
    values: Sequence[float], *, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> Interval:
    """Mean of the values with the percentile bootstrap interval over questions.

    Args:
        values: one per question, at least one.
        seed: of the resampling; the same seed gives the same interval.
        resamples: how many means are drawn.
        level: share of them that lies within the interval.
    """
    import numpy as np

    data = np.asarray(values, dtype=np.float64)
    random = np.random.default_rng(seed)
    block = max(1, BOOTSTRAP_BLOCK // len(data))
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    drawn = (random.integers(0, len(data), (size, len(data))) for size in sizes)
    means = np.concatenate([data[rows].mean(axis=1) for rows in drawn])
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(data.mean()), float(low), float(high))
