"""BM25 over a few texts, by SQLite's FTS5: what plain word search finds, to compare with."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


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
