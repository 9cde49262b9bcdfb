"""Scores of answers and rankings; pure functions."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space (as SQuAD scores).

    >>> normalise_answer("The  Eiffel-Tower.")
    'eiffeltower'
    """
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1.0 if the answer equals an accepted one after normalisation, else 0.0."""
    return float(normalise_answer(answer) in {normalise_answer(a) for a in accepted})


def token_f1(answer: str, accepted: Sequence[str]) -> float:
    """Best F1 over words with any accepted answer, from 0 to 1 (as SQuAD scores)."""
    return max((_f1(normalise_answer(answer), normalise_answer(a)) for a in accepted), default=0.0)


def _f1(answer: str, accepted: str) -> float:
    given, wanted = answer.split(), accepted.split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def recall(found: Sequence[str], gold: Sequence[str]) -> float:
    """Share of the gold ids among those found, from 0 to 1."""
    return sum(g in set(found) for g in gold) / len(gold) if gold else 0.0


def mean(values: Sequence[float]) -> float:
    """Mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0
