"""Systems that answer the questions of a set, all behind one small interface.

A memory (`MemorySystem`) and what it is compared with: the same model's reader, handed documents
by a retriever (`ReaderSystem`), handed the gold documents (`GoldSystem`: the ceiling) or none
(`GoldSystem` with `depth` 0: what the backbone knows by itself).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from msa.evaluation.question_sets import Question
from msa.evaluation.reader import TextReader, is_refusal
from msa.evaluation.retrieval import Retriever, best_rows
from msa.types import Answer, Document

if TYPE_CHECKING:
    from msa.inference.engine import MemoryEngine

RANKED = 16
"""Documents of a ranking that are kept."""
DOCUMENT = "document"
"""Metadata under which a document of a bank carries its id."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a system made of one question.

    Attributes:
        answer: text.
        refused: it said that it does not know.
        ranked: ids of the best documents for the question, best first.
        named: ids of the documents that were read, in reading order.
        rounds: of reading.
        stopped: why the answer ended.
        seconds: wall time; that of the batch over its questions.
        prompt_tokens, generated_tokens: how much was read and written.
        routed: for every round, routing layer -> ids of the documents attended to there.
        texts: id -> text of the documents that were read.
        spans: where the citations say that the answer stands, the text there; a memory's only.
        bytes: of compressed content that was fetched; None where nobody counts them.
    """

    answer: str
    refused: bool
    ranked: tuple[str, ...]
    named: tuple[str, ...]
    rounds: int
    stopped: str
    seconds: float
    prompt_tokens: int
    generated_tokens: int
    routed: tuple[Mapping[int, tuple[str, ...]], ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    spans: tuple[str, ...] = ()
    bytes: int | None = None


class System(Protocol):
    """Answers questions about one corpus."""

    def ask(
        self, questions: Sequence[Question], *, hidden: Sequence[Sequence[str]] | None = None
    ) -> list[Outcome]:
        """Answer a batch.

        Args:
            questions: of the set.
            hidden: ids of documents that each question must be answered without.
        """
        ...


class ReaderSystem:
    """A retriever, and a model's reader of its best documents.

    Args:
        reader: answers.
        retriever: over `documents`.
        documents: the corpus.
        depth: documents handed over, best first.
    """

    def __init__(
        self,
        reader: TextReader,
        retriever: Retriever,
        documents: Sequence[Document],
        depth: int,
    ) -> None:
        self._reader = reader
        self._retriever = retriever
        self._documents = documents
        self._row = {document.id: i for i, document in enumerate(documents)}
        self._depth = depth

    def ask(
        self, questions: Sequence[Question], *, hidden: Sequence[Sequence[str]] | None = None
    ) -> list[Outcome]:
        """See `System.ask`."""
        began = time.perf_counter()
        scores = self._retriever.scores([question.text for question in questions])
        for row, ids in enumerate(hidden or []):
            scores[row, [self._row[i] for i in ids]] = -np.inf
        ranked = [
            [i for i in best if scores[row, i] > -np.inf]
            for row, best in enumerate(best_rows(scores, RANKED))
        ]
        given = [best[: self._depth] for best in ranked]
        return _read(self._reader, self._documents, questions, ranked, given, began)


class GoldSystem:
    """A model's reader of the gold documents themselves.

    Args:
        reader: answers.
        documents: the corpus.
        depth: gold documents handed over, in their order; all by default, 0 for none.
    """

    def __init__(
        self, reader: TextReader, documents: Sequence[Document], depth: int | None = None
    ) -> None:
        self._reader = reader
        self._documents = documents
        self._row = {document.id: i for i, document in enumerate(documents)}
        self._depth = depth

    def ask(
        self, questions: Sequence[Question], *, hidden: Sequence[Sequence[str]] | None = None
    ) -> list[Outcome]:
        """See `System.ask`."""
        began = time.perf_counter()
        out = hidden or [() for _ in questions]
        given = [
            [self._row[i] for i in question.gold if i not in ids][: self._depth]
            for question, ids in zip(questions, out, strict=True)
        ]
        return _read(self._reader, self._documents, questions, given, given, began)


class MemorySystem:
    """A memory bank, asked as users ask it.

    Args:
        engine: over a bank of `bank_documents`.
        documents: the corpus.
        options: of `MemoryEngine.ask`, where they differ from the checkpoint's own.
    """

    def __init__(
        self,
        engine: MemoryEngine,
        documents: Sequence[Document],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._engine = engine
        self._known = {document.id for document in documents}
        self._options = dict(options or {})

    def ask(
        self, questions: Sequence[Question], *, hidden: Sequence[Sequence[str]] | None = None
    ) -> list[Outcome]:
        """See `System.ask`; with `hidden` documents every question is asked by itself."""
        if hidden is None:
            return self._ask(questions, {})
        outcomes = []
        for question, ids in zip(questions, hidden, strict=True):
            away = frozenset(ids)

            def shown(metadata: Mapping[str, Any], away: frozenset[str] = away) -> bool:
                return metadata[DOCUMENT] not in away

            outcomes += self._ask([question], {"filter": shown})
        return outcomes

    def _ask(self, questions: Sequence[Question], more: Mapping[str, Any]) -> list[Outcome]:
        texts = [question.text for question in questions]
        began = time.perf_counter()
        answers = self._engine.ask(texts, **self._options, **more)
        seconds = (time.perf_counter() - began) / len(texts)
        return [self._outcome(answer, seconds) for answer in answers]

    def _outcome(self, answer: Answer, seconds: float) -> Outcome:
        ranked = answer.rounds[0].ranked if answer.rounds else ()
        read = [citation.id for turn in answer.rounds for citation in turn.read]
        said_no = is_refusal(answer.text, self._engine.bank.template)
        return Outcome(
            answer=answer.text,
            refused=answer.stopped == "not_found" or said_no,
            ranked=_whole([d.id for d in ranked], self._known)[:RANKED],
            named=_whole(read, self._known),  # a refusal cites nothing
            rounds=len(answer.rounds),
            stopped=answer.stopped,
            seconds=seconds,
            prompt_tokens=answer.usage.prompt_tokens,
            generated_tokens=answer.usage.generated_tokens,
        )


def bank_documents(documents: Sequence[Document]) -> Iterator[Document]:
    """Documents as a bank is to hold them: each carries its id as metadata, to be filtered by."""
    for document in documents:
        yield replace(document, metadata={**document.metadata, DOCUMENT: document.id})


def _whole(ids: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    """Ids of documents; parts of one that was split ("book#2") count as the document, once."""
    return tuple(dict.fromkeys(i if i in known else i.rsplit("#", 1)[0] for i in ids))


def _read(
    reader: TextReader,
    documents: Sequence[Document],
    questions: Sequence[Question],
    ranked: Sequence[Sequence[int]],
    given: Sequence[Sequence[int]],
    began: float,
) -> list[Outcome]:
    """Let a reader answer from rows of the corpus."""
    texts = [[(row + 1, documents[row].content) for row in rows] for rows in given]
    answers = reader.answer([question.text for question in questions], texts)
    seconds = (time.perf_counter() - began) / len(questions)
    return [
        Outcome(
            answer=answer.text,
            refused=answer.refused,
            ranked=tuple(documents[row].id for row in best),
            named=tuple(documents[number - 1].id for number in answer.numbers),
            rounds=1,
            stopped="answered",
            seconds=seconds,
            prompt_tokens=answer.prompt_tokens,
            generated_tokens=answer.generated_tokens,
        )
        for answer, best in zip(answers, ranked, strict=True)
    ]
