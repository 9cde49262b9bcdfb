"""BM25 over texts in memory: by `bm25s`, and by SQLite's FTS5 where that is not installed."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from msa.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WORD = re.compile(r"\w+")


class BM25Index:
    """BM25 of the `bm25s` library, English stopwords left out.

    Args:
        texts: what is searched; at least one.
        extra: the extra of this package that brings `bm25s`, for the message.

    Raises:
        InputError: `bm25s` is not installed.
    """

    def __init__(self, texts: Sequence[str], extra: str) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise InputError(
                f"bm25s is not installed; pip install 'msa-memory[{extra}]'"
            ) from error
        self._tokenize: Any = bm25s.tokenize
        self._index: Any = bm25s.BM25()
        self._index.index(self._tokens(texts), show_progress=False)

    def scores(self, question: str) -> NDArray[np.float32] | None:
        """[N] float32, one per text; None for a question without a word."""
        (words,) = self._tokens([question], return_ids=False)
        return self._index.get_scores(words) if words else None

    def best(self, questions: Sequence[str], k: int) -> list[list[int]]:
        """Rows of up to k texts per question, best first; texts without a common word left out."""
        found, scores = self._index.retrieve(self._tokens(questions), k=k, show_progress=False)
        return [
            [int(row) for row, value in zip(rows, values, strict=True) if value > 0]
            for rows, values in zip(found, scores, strict=True)
        ]

    def _tokens(self, texts: Sequence[str], **options: Any) -> Any:
        return self._tokenize(list(texts), stopwords="en", show_progress=False, **options)


def bm25_recall(
    texts: Sequence[str], questions: Sequence[tuple[str, int]], depths: Sequence[int]
) -> list[float]:
    """Share of the questions whose text is among the best so many by BM25.

    Args:
        texts: what is searched.
        questions: (question, row of its text).
        depths: of the lists of the best.

    Returns:
        One share per depth; 0 without questions.
    """
    found = [0] * len(depths)
    with sqlite3.connect(":memory:") as database:
        database.execute("create virtual table texts using fts5(text, tokenize='porter unicode61')")
        database.executemany(
            "insert into texts (rowid, text) values (?, ?)", enumerate(texts, start=0)
        )
        for question, row in questions:
            words = " OR ".join(f'"{word}"' for word in _WORD.findall(question))
            ranked = database.execute(
                "select rowid from texts where texts match ? order by rank limit ?",
                (words or '""', max(depths)),
            ).fetchall()
            place = next((i for i, (found_row,) in enumerate(ranked) if found_row == row), None)
            for i, depth in enumerate(depths):
                found[i] += place is not None and place < depth
    return [count / max(1, len(questions)) for count in found]
