"""Question sets as they are evaluated: one split, drawn by a seed, over the whole corpus."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msa.training.question_sets as training
from msa.errors import InputError
from msa.types import Document

EVALUATION_SPLITS = ("dev", "test")


@dataclass(frozen=True, slots=True)
class Question:
    """A question with what is right.

    Attributes:
        text: the question.
        answers: accepted answers; none for a question that the documents do not answer.
        gold: ids of the documents needed, in reading order where the set has one.
        id: unique in its set.
        own: ids of documents that only this question may see. Documents that are nobody's own are
            seen by all, so that a haystack is encoded once for all questions.
        hidden: ids of documents that it must be answered without, for refusals.
        kind: a row of the report's tables, such as "two hops".
        wrong: answers that would use a deleted or outdated fact.
        max_new_tokens: of the answer; by default as the model's options say.
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    id: str = ""
    own: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    kind: str = ""
    wrong: tuple[str, ...] = ()
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Documents and the questions about them.

    Attributes:
        name: of the folder.
        split: that the questions are of.
        documents: the whole corpus, in the order of the file.
        questions: in the order of the file, or as drawn.
        data_hash: sha256 (16 hex digits) of the documents and of all questions of the split.
    """

    name: str
    split: str
    documents: tuple[Document, ...]
    questions: tuple[Question, ...]
    data_hash: str

    def gold_rows(self) -> list[list[int]]:
        """For every question, the rows of its gold documents in `documents`."""
        row = {document.id: i for i, document in enumerate(self.documents)}
        return [[row[i] for i in question.gold] for question in self.questions]

    def owned(self) -> frozenset[str]:
        """Ids of the documents that are some question's own."""
        return frozenset(i for question in self.questions for i in question.own)


def read_question_set(
    folder: str | Path,
    split: str | None = None,
    *,
    count: int | None = None,
    seed: int = 0,
    title_hints: bool = False,
) -> QuestionSet:
    """Read a folder that `msa.training.question_sets` describes, one split of it.

    Args:
        folder: of the set: `corpus.jsonl.gz` and `questions.SPLIT.jsonl.gz`.
        split: such as "dev"; by default "dev", or else "test".
        count: questions drawn, at most; by default all, in the order of the file.
        seed: of the draw.
        title_hints: put a row's `title_hint`, where it has one, in front of its question (for sets
            whose questions do not say what they are about).

    Raises:
        InputError: a file is missing or damaged, or a row is not valid; the message names the line.
    """
    folder = Path(folder)
    if split is None:
        there = [s for s in EVALUATION_SPLITS if list(folder.glob(f"questions.{s}.jsonl*"))]
        split = there[0] if there else EVALUATION_SPLITS[0]
    held = training.QuestionSet.load(folder, f"questions.{split}.jsonl.gz")
    questions = [
        Question(
            f"{q.title_hint}: {q.question}" if title_hints and q.title_hint else q.question,
            q.answers,
            q.gold,
            q.id,
        )
        for q in held.questions
    ]
    ids = Counter(q.id for q in questions)
    twice = [i for i, times in ids.items() if times > 1]
    if twice:
        raise InputError(f"{folder}: question id {twice[0]!r} is given twice; ids must be unique")
    if count is not None and count < len(questions):
        questions = random.Random(seed).sample(questions, count)
    documents = tuple(held.documents.values())
    digest = hash_of([*documents, *held.questions])
    return QuestionSet(folder.resolve().name, split, documents, tuple(questions), digest)


def with_fewer_documents(questions: QuestionSet, count: int, seed: int = 0) -> QuestionSet:
    """The set over a smaller corpus: the gold documents of its questions, and others drawn.

    For quick looks only; among fewer documents everything is easier to find.

    Args:
        questions: of `read_question_set`.
        count: documents kept, or as many as are gold if these are more.
        seed: of the draw.
    """
    gold = {i for question in questions.questions for i in question.gold}
    others = [d.id for d in questions.documents if d.id not in gold]
    drawn = random.Random(seed).sample(others, min(len(others), max(0, count - len(gold))))
    kept = gold | set(drawn)
    documents = tuple(d for d in questions.documents if d.id in kept)
    return replace(questions, documents=documents, data_hash=f"{questions.data_hash}/{count}")


def hash_of(rows: Iterable[Any]) -> str:
    """16 hex digits of what is in rows (data classes): documents, questions, changes.

    Packing, the order of keys and keys that are not read do not matter.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(asdict(row), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]
