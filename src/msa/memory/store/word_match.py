"""How well a document fits a query word by word: BM25 and two things that it does not see.

BM25 weighs every word by itself, so that one rare word which stands often outweighs all others. The
mean of three is taken here, each in [0, 1]:

- its BM25 score over that of the best document;
- the overlap: how much of the question stands in it, as words and as pairs of neighbours (the
  unigrams and ordered bigrams of the sequential dependence model, Metzler and Croft 2005), the rare
  ones counting more. After a first hop only what no text read so far holds;
- whether its title stands in the question or in a text that was read: what a second hop asks for.
  Not a title that a text which was read has itself: other parts of the same article are no hop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

Pair = tuple[str, str]
_Key = TypeVar("_Key", str, Pair)


@dataclass(frozen=True, slots=True)
class Sought:
    """What of a query is looked for in a document.

    Attributes:
        terms: weight of every term of the question that no text read holds.
        pairs: the same for neighbouring terms.
        texts: terms of the question and of each text that was read, between spaces.
    """

    terms: Mapping[str, float]
    pairs: Mapping[Pair, float]
    texts: tuple[str, ...]

    @classmethod
    def of(
        cls,
        question: Sequence[str],
        read: Sequence[Sequence[str]],
        rarity: Callable[[str], float],
    ) -> Sought:
        """Terms in the order of the texts, and how much each counts, above 0."""
        held = {term for text in read for term in text}
        neighbours = {pair for text in read for pair in _pairs(text)}
        terms = {term: rarity(term) for term in question if term not in held}
        pairs = {
            (one, other): rarity(one) + rarity(other)
            for one, other in _pairs(question)
            if (one, other) not in neighbours
        }
        return cls(terms, pairs, tuple(_spaced(text) for text in (question, *read)))

    @property
    def wanted(self) -> set[str]:
        """Terms whose places in a document are needed."""
        return self.terms.keys() | {term for pair in self.pairs for term in pair}

    def overlap(self, places: Mapping[int, str]) -> float:
        """Mean share of the terms and of the pairs that stand in a document, in [0, 1].

        Args:
            places: position -> term, at least for the wanted ones.
        """
        shares = (
            share(self.terms, set(places.values())),
            share(self.pairs, {(term, places.get(at + 1, "")) for at, term in places.items()}),
        )
        return sum(shares) / len(shares)

    def names(self, title: Sequence[str]) -> bool:
        """Whether a title stands in the question, or in a text that was read, word for word."""
        return bool(title) and any(_spaced(title) in text for text in self.texts)


def word_score(bm25: float, best: float, overlap: float, named: bool) -> float:
    """The mean of the three, in [0, 1]; `best` is the highest BM25 score, above 0."""
    return (bm25 / best + overlap + named) / 3


def rarity(count: int, documents: int) -> float:
    """How much a term counts that so many of the documents hold: BM25's weight, above 0."""
    return math.log1p((max(0, documents - count) + 0.5) / (count + 0.5))


def shares(
    question: Sequence[str], texts: Sequence[Sequence[str]], rarity: Callable[[str], float]
) -> list[float]:
    """How much of a question each text holds, all given as terms; 1 where it has no words."""
    weights = {term: rarity(term) for term in question}
    return [share(weights, set(terms)) if weights else 1.0 for terms in texts]


def share(weights: Mapping[_Key, float], found: Collection[_Key]) -> float:
    """How much of the weights the keys that were found have; 0 without any."""
    whole = sum(weights.values())
    return sum(w for key, w in weights.items() if key in found) / whole if whole else 0.0


def _pairs(text: Sequence[str]) -> set[Pair]:
    return set(pairwise(text))


def _spaced(terms: Sequence[str]) -> str:
    return f" {' '.join(terms)} "
