"""Requests of evaluation tasks for tests, and what one of their questions may see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from msa.evaluation.question_sets import Question, QuestionSet
from msa.evaluation.systems import Outcome
from msa.evaluation.tasks.base import Request
from msa.types import Document


def count_words(text: str) -> int:
    """Words stand for tokens."""
    return len(text.split())


def write_texts(folder: Path) -> Path:
    """A folder with some thousand words of text in three files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a.txt", "b.md", "c.txt"):
        lines = [f"Sentence {i} of {name[0]} says that the river was calm." for i in range(400)]
        (folder / name).write_text("\n\n".join(lines), encoding="utf-8")
    return folder


def request(texts: Path | None = None, **more) -> Request:
    return Request(count_tokens=count_words, texts=texts, **({"count": 12} | more))


def seen(found: QuestionSet) -> Callable[[Question], list[Document]]:
    """Gives the documents that a question may see: those that are nobody's own, and its own."""
    by_id = {d.id: d for d in found.documents}
    owned = {i for question in found.questions for i in question.own}
    shared = [d for d in found.documents if d.id not in owned]
    return lambda question: [*shared, *(by_id[i] for i in question.own)]


def outcome(answer: str, refused: bool = False) -> Outcome:
    return Outcome(answer, refused, (), (), 1, "answered", 0.0, 0, 0)
