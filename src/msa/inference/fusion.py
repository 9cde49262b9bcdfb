"""One ranking of documents from what every routing layer, and the words alone, say about them."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from msa.types import RankedDocument

NOISE_RANK = 8
"""Where in a ranking documents stand that are found for any question."""

# Probabilities below this count as this much.
_LEAST_JUDGED = 1e-6


@dataclass(frozen=True, slots=True)
class Fused:
    """A document in the fused ranking.

    Attributes:
        score: weighted sum of its layer scores and of its lexical score.
        prior: softmax of the scores over all documents of the ranking; these sum to 1.
        layers: routing layers whose candidate lists hold it.
        lexical: how well its words fit, in [0, 1]; None if no words found it.
        judged: how likely the question is after its text (`judging.judge`), in [0, 1]; None if it
            was not tried.
    """

    score: float
    prior: float
    layers: tuple[int, ...]
    lexical: float | None
    judged: float | None = None


def fuse(
    layers: Mapping[int, Sequence[tuple[int, float]]],
    *,
    temperature: float,
    layer_weights: Mapping[int, float] | None = None,
    lexical: Mapping[int, float] | None = None,
    lexical_weight: float = 0.0,
) -> dict[int, Fused]:
    """Rank all candidates together.

    The paper keeps every layer's selection apart; this ranking is an extension of it. A document
    that is no candidate of a layer gets that layer's lowest candidate score there, which is the
    most that it can have had. A document that no word has found has the lexical score 0.

    Args:
        layers: routing layer -> its candidates, each a document and its score (Eq. 2).
        temperature: of the softmax that gives `prior`, above 0.
        layer_weights: routing layer -> factor of its scores; a layer that is not named has 0. By
            default all are equal and sum to 1: the score is the mean.
        lexical: document -> how well its words fit, in [0, 1] (`MemoryBank.lexical_ranking`); its
            documents are candidates too. Not used when `lexical_weight` is 0.
        lexical_weight: factor of that score.

    Returns:
        Document -> its place, best first, equal scores by document; empty without candidates.
    """
    scores = {layer: dict(candidates) for layer, candidates in layers.items() if candidates}
    words = lexical if lexical and lexical_weight > 0 else {}
    lowest = {layer: min(found.values()) for layer, found in scores.items()}
    if layer_weights is None:
        layer_weights = dict.fromkeys(scores, 1.0 / max(1, len(scores)))
    total: dict[int, float] = {}
    for document in {d for found in scores.values() for d in found} | words.keys():
        total[document] = lexical_weight * words.get(document, 0.0) + sum(
            layer_weights.get(layer, 0.0) * found.get(document, lowest[layer])
            for layer, found in scores.items()
        )
    found = {
        document: Fused(
            score,
            0.0,
            tuple(sorted(layer for layer, some in scores.items() if document in some)),
            words.get(document),
        )
        for document, score in total.items()
    }
    return _ranked(found, temperature)


def lead(fused: Mapping[int, Fused | RankedDocument], known: Container[int]) -> float:
    """How far the best unread document stands above what is found for any question.

    Args:
        fused: a ranking, best first.
        known: documents that do not count.

    Returns:
        The difference of the fused scores of the first and the `NOISE_RANK`th (or the last) of the
        others; 0 without any.
    """
    unread = islice((f.score for d, f in fused.items() if d not in known), NOISE_RANK)
    scores = list(unread)
    return scores[0] - scores[-1] if scores else 0.0


def close_to_best(fused: Mapping[int, Fused], margin: float, count: int) -> list[int]:
    """The first documents of a ranking, as far as they are within a margin of the best.

    Args:
        fused: a ranking, best first.
        margin: of the fused score.
        count: documents, at most.

    Returns:
        At least two documents, or none: one alone has nothing to be compared with.
    """
    first = list(fused)[:count]
    close = [d for d in first if fused[first[0]].score - fused[d].score <= margin]
    return close if len(close) > 1 else []


def judgment(likely: float) -> float:
    """What counts of how likely the question is after a text: the logarithm, bounded."""
    return math.log(max(likely, _LEAST_JUDGED))


def rank_judged(
    fused: Mapping[int, Fused], judged: Mapping[int, float], *, weight: float, temperature: float
) -> dict[int, Fused]:
    """Rank once more, by what the model made of the documents that it tried.

    Each of them loses as much as its `judgment` is below the best of them, times the weight; the
    others stay as they are.

    Args:
        fused: of `fuse`.
        judged: some of its documents -> how likely the question is after each, in [0, 1].
        weight: factor of the logarithm.
        temperature: of the softmax that gives `prior`, above 0.
    """
    if not judged:
        return dict(fused)
    logs = {document: judgment(likely) for document, likely in judged.items()}
    best = max(logs.values())
    found = {
        document: replace(
            some,
            score=some.score + weight * (logs.get(document, best) - best),
            judged=judged.get(document),
        )
        for document, some in fused.items()
    }
    return _ranked(found, temperature)


def _ranked(found: Mapping[int, Fused], temperature: float) -> dict[int, Fused]:
    """Best first, equal scores by document, with the prior that goes with the scores."""
    ranked = sorted(found, key=lambda document: (-found[document].score, document))
    best = found[ranked[0]].score if ranked else 0.0
    exponents = [math.exp((found[d].score - best) / temperature) for d in ranked]
    mass = sum(exponents)
    return {
        document: replace(found[document], prior=exponent / mass)
        for document, exponent in zip(ranked, exponents, strict=True)
    }
