"""Whether an answer is given or refused: a score from a few features, and a threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from msa.inference.options import (
    BIAS,
    OF_THE_ANSWER,
    REFUSAL_LOGIT,
    ROUTING_MARGIN,
    ROUTING_SCORE,
)
from msa.text.prompts import PromptTemplate

# Without weights of a checkpoint's own the score is the probability of the refusal.
PLAIN_WEIGHTS: Mapping[str, float] = {REFUSAL_LOGIT: 1.0}
_SMALLEST = 1e-12


def logit(log_probability: float) -> float:
    """log(p / (1 - p)) of a probability that is given by its logarithm; finite."""
    probability = min(max(math.exp(log_probability), _SMALLEST), 1.0 - _SMALLEST)
    return math.log(probability) - math.log1p(-probability)


def routing_features(scores: Sequence[float]) -> dict[str, float]:
    """Features of a fused ranking; empty without candidates.

    Args:
        scores: of its documents, best first.
    """
    if not scores:
        return {}
    return {ROUTING_SCORE: scores[0], ROUTING_MARGIN: scores[0] - scores[min(1, len(scores) - 1)]}


def refusal_score(features: Mapping[str, float], weights: Mapping[str, float] | None) -> float:
    """How likely it is that the memory does not hold the answer, in (0, 1).

    Args:
        features: of one question; one that is missing counts as 0.
        weights: factor of every feature, and "bias"; `PLAIN_WEIGHTS` when None.
    """
    return _probability(_total(features, PLAIN_WEIGHTS if weights is None else weights))


def refusal_range(
    features: Mapping[str, float], weights: Mapping[str, float] | None
) -> tuple[float, float]:
    """The least and the greatest score that there can be once the answer is written.

    They are equal where the score weighs nothing of the answer.

    Args:
        features: what is known of one question before.
        weights: as of `refusal_score`.
    """
    weights = PLAIN_WEIGHTS if weights is None else weights
    low = high = _total(features, weights)
    for name, ends in OF_THE_ANSWER.items():
        if weights.get(name) and name not in features:
            least, most = sorted(weights[name] * end for end in ends)
            low, high = low + least, high + most
    return _probability(low), _probability(high)


def _total(features: Mapping[str, float], weights: Mapping[str, float]) -> float:
    known = sum(weights.get(name, 0.0) * value for name, value in features.items())
    return weights.get(BIAS, 0.0) + known


def _probability(total: float) -> float:
    return 1.0 / (1.0 + math.exp(-max(-700.0, min(700.0, total))))


def is_refusal(text: str, template: PromptTemplate) -> bool:
    """Whether an answer is the refusal, written by the model itself."""
    wanted = _normalized(template.refusal)
    return bool(wanted) and _normalized(text) == wanted


def _normalized(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .!")
