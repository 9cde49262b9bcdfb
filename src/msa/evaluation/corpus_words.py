"""How rare the words of a corpus are, where no bank holds it: for readers of what was retrieved."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

from msa.memory.store.word_index import Tokenizer
from msa.memory.store.word_match import rarity, shares
from msa.text.normalization import nfc

_TEXTS_AT_ONCE = 1000


class CorpusWords:
    """Says the same of a corpus as `MemoryBank.lexical_coverage` of a bank of it.

    Args:
        texts: of its documents, with their titles.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._tokenizer = Tokenizer()
        self._counts: Counter[str] = Counter()
        self._documents = 0
        remaining = iter(texts)
        while part := list(itertools.islice(remaining, _TEXTS_AT_ONCE)):
            self._documents += len(part)
            for terms in self._tokenizer.sequences([nfc(text) for text in part]):
                self._counts.update(set(terms))

    def coverage(self, question: str, texts: Sequence[str]) -> list[float]:
        """See `MemoryBank.lexical_coverage`."""
        asked, *held = self._tokenizer.sequences([nfc(text) for text in (question, *texts)])
        return shares(asked, held, lambda term: rarity(self._counts[term], self._documents))
