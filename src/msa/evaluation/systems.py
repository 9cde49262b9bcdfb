"""Systems that answer the questions of a set, all behind one small interface.

A memory (`MemorySystem`) and what it is compared with: the same model's reader, given documents
by a retriever (`ReaderSystem`), as many as its prompt has room for (`FullSystem`), the gold
documents (`GoldSystem`: the ceiling) or none (`GoldSystem` with `depth` 0: what the backbone knows
by itself).

A question sees the documents that are nobody's own, and its own (`Question.own`), less those that
are hidden from it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from msa.errors import InputError, MSAError
from msa.evaluation.question_sets import Question
from msa.evaluation.reader import TextReader, is_refusal
from msa.evaluation.rerank import Reranker
from msa.evaluation.retrieval import Retriever, Scores, best_rows
from msa.inference.scheduler import Scheduler
from msa.memory.store.manifest import Manifest
from msa.ops.quantization import packed_width
from msa.types import Answer, Document

if TYPE_CHECKING:
    from msa.inference.engine import MemoryEngine

RANKED = 16
"""Documents of a ranking that are kept."""
DOCUMENT = "document"
"""Metadata under which a document of a bank carries its id."""
OWNED = "owned"
"""Metadata of the documents that are some question's own: true."""
FULL = "context_full"
"""Why an answer ended that was given from a part of the documents: there was no room for more."""


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
        bytes: of compressed content that was fetched; None where they are not counted.
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

    def ask(self, questions: Sequence[Question]) -> list[Outcome]:
        """Answer a batch."""
        ...

    def rank(self, questions: Sequence[Question], depth: int) -> list[Outcome]:
        """Rank so many documents for each question; nothing is read or answered.

        Raises:
            InputError: the system does not rank.
        """
        ...


class ReaderSystem:
    """A retriever, and a model's reader of its best documents.

    Args:
        reader: answers.
        retriever: over `documents`.
        documents: the corpus.
        depth: documents given, best first.
        owned: ids of documents that are some question's own.
        reranker: puts the best of the retriever into another order.
    """

    def __init__(
        self,
        reader: TextReader,
        retriever: Retriever,
        documents: Sequence[Document],
        depth: int,
        *,
        owned: Iterable[str] = (),
        reranker: Reranker | None = None,
    ) -> None:
        self._reader = reader
        self._retriever = retriever
        self._documents = documents
        self._row = {document.id: i for i, document in enumerate(documents)}
        self._owned = self._rows(owned)
        self._depth = depth
        self._reranker = reranker

    def ask(self, questions: Sequence[Question]) -> list[Outcome]:
        """See `System.ask`."""
        began = time.perf_counter()
        ranked, tokens = self._ranked(questions, RANKED)
        given = [best[: self._depth] for best in ranked]
        outcomes = _read(self._reader, self._documents, questions, ranked, given, began)
        return [
            replace(outcome, prompt_tokens=outcome.prompt_tokens + more)
            for outcome, more in zip(outcomes, tokens, strict=True)
        ]

    def rank(self, questions: Sequence[Question], depth: int) -> list[Outcome]:
        """See `System.rank`."""
        began = time.perf_counter()
        ranked, tokens = self._ranked(questions, depth)
        seconds = (time.perf_counter() - began) / len(questions)
        return [
            ranking([self._documents[row].id for row in rows], seconds, read)
            for rows, read in zip(ranked, tokens, strict=True)
        ]

    def _ranked(
        self, questions: Sequence[Question], depth: int
    ) -> tuple[list[list[int]], list[int]]:
        """Rows of the best documents that every question sees; tokens that were read for it."""
        scores = self._retriever.scores([question.text for question in questions])
        for row, question in enumerate(questions):
            self._hide(scores[row], question)
        ranked = [
            [i for i in best if scores[row, i] > -np.inf]
            for row, best in enumerate(best_rows(scores, depth))
        ]
        if self._reranker is None:
            return ranked, [0] * len(ranked)
        tokens = []
        for row, (question, best) in enumerate(zip(questions, ranked, strict=True)):
            texts = [self._documents[i].content for i in best[:RANKED]]
            order, read = self._reranker.order(question.text, texts)
            ranked[row] = [best[i] for i in order] + best[RANKED:]
            tokens.append(read)
        return ranked, tokens

    def _hide(self, scores: Scores, question: Question) -> None:
        """Leave out other questions' documents and those that are hidden; `scores` [N] changes."""
        own = self._rows(question.own)
        out = self._rows(i for i in question.hidden if i in self._row)
        kept = scores[own]
        scores[self._owned] = -np.inf
        scores[own] = kept
        scores[out] = -np.inf

    def _rows(self, ids: Iterable[str]) -> NDArray[np.int64]:
        return np.array([self._row[i] for i in ids], dtype=np.int64)


class FullSystem:
    """A model's reader of all documents, or of as many as its prompt has room for.

    Those are drawn by the seed and the question's id, whether they are gold or not, and stand in
    the order of the corpus; a question's own stand among the others at random.

    Args:
        reader: answers.
        documents: the corpus.
        owned: ids of documents that are some question's own.
        seed: of the draw.
    """

    def __init__(
        self,
        reader: TextReader,
        documents: Sequence[Document],
        *,
        owned: Iterable[str] = (),
        seed: int = 0,
    ) -> None:
        self._reader = reader
        self._documents = documents
        self._owned = frozenset(owned)
        self._row = {document.id: i for i, document in enumerate(documents)}
        self._shared = [i for i, d in enumerate(documents) if d.id not in self._owned]
        self._seed = seed

    def ask(self, questions: Sequence[Question]) -> list[Outcome]:
        """See `System.ask`; every question by itself, since prompts are as long as they can be."""
        outcomes = []
        for question in questions:
            began = time.perf_counter()
            rows, whole = self._drawn(question)
            (outcome,) = _read(self._reader, self._documents, [question], [rows], [rows], began)
            stopped = outcome.stopped if whole else FULL
            outcomes.append(replace(outcome, stopped=stopped, ranked=outcome.ranked[:RANKED]))
        return outcomes

    def rank(self, questions: Sequence[Question], depth: int) -> list[Outcome]:
        """See `System.rank`."""
        raise InputError("full reads documents in their order and ranks none; leave it out here")

    def _drawn(self, question: Question) -> tuple[list[int], bool]:
        """Rows in reading order, and whether they are all that the question sees."""
        draw = random.Random(f"{self._seed}/{question.id}")
        own = [self._row[i] for i in question.own]
        place = {row: float(row) for row in self._shared}
        place |= {row: draw.uniform(0, len(self._documents)) for row in own}
        seen = [row for row in place if self._documents[row].id not in question.hidden]
        draw.shuffle(seen)
        room = self._reader.room(question.text)
        kept = []
        for row in seen:
            room -= self._reader.size(row + 1, self._documents[row].content)
            if room < 0:
                break
            kept.append(row)
        return sorted(kept, key=place.__getitem__), len(kept) == len(seen)


class GoldSystem:
    """A model's reader of the gold documents themselves.

    Args:
        reader: answers.
        documents: the corpus.
        depth: gold documents given, in their order; all by default, 0 for none.
    """

    def __init__(
        self, reader: TextReader, documents: Sequence[Document], depth: int | None = None
    ) -> None:
        self._reader = reader
        self._documents = documents
        self._row = {document.id: i for i, document in enumerate(documents)}
        self._depth = depth

    def ask(self, questions: Sequence[Question]) -> list[Outcome]:
        """See `System.ask`."""
        began = time.perf_counter()
        given = [
            [self._row[i] for i in question.gold if i not in question.hidden][: self._depth]
            for question in questions
        ]
        return _read(self._reader, self._documents, questions, given, given, began)

    def rank(self, questions: Sequence[Question], depth: int) -> list[Outcome]:
        """See `System.rank`."""
        raise InputError("gold and closed search nothing and rank nothing; leave them out here")


class MemorySystem:
    """A memory bank, asked as users ask it.

    Args:
        engine: over a bank of `bank_documents`.
        documents: the corpus.
        options: of `MemoryEngine.ask`, where they differ from the checkpoint's own.
        owned: ids of documents that are some question's own.
    """

    def __init__(
        self,
        engine: MemoryEngine,
        documents: Sequence[Document],
        options: Mapping[str, Any] | None = None,
        *,
        owned: Collection[str] = (),
    ) -> None:
        self._engine = engine
        self._known = {document.id for document in documents}
        self._options = dict(options or {})
        self._has_owned = bool(owned)
        self._chunk_bytes = chunk_bytes(engine.bank.manifest)

    def ask(self, questions: Sequence[Question]) -> list[Outcome]:
        """See `System.ask`; all go through the model together, each with its filter."""
        began = time.perf_counter()
        scheduler = Scheduler(self._engine.model, max_rows=len(questions))
        requests = []
        for question in questions:
            changes = dict(self._options)
            if question.max_new_tokens:
                changes.setdefault("max_new_tokens", question.max_new_tokens)
            seen = self._filter(question)
            requests.append(self._engine.request(question.text, filter=seen, **changes))
            scheduler.add(requests[-1])
        answers: dict[Any, Answer] = {}
        while not scheduler.idle:
            for request, event in scheduler.step():
                if isinstance(event, MSAError):
                    raise event
                if event.kind == "answer":
                    answers[request] = event.data
        seconds = (time.perf_counter() - began) / len(questions)
        return [self._outcome(answers[request], seconds) for request in requests]

    def rank(self, questions: Sequence[Question], depth: int) -> list[Outcome]:
        """See `System.rank`."""
        outcomes = []
        options = {"candidates": depth, **self._options}
        for seen, group in groupby(questions, key=self._filter):
            began = time.perf_counter()
            texts = [question.text for question in group]
            found = self._engine.candidates(texts, seen, **options)
            seconds = (time.perf_counter() - began) / len(texts)
            for one in found:
                there = self._engine.bank.ids(one.fused)
                names = _whole([there[n] for n in one.fused if n in there], self._known)
                outcomes.append(ranking(names[:depth], seconds))
        return outcomes

    def _filter(self, question: Question) -> dict[str, Any] | None:
        """Documents that the question sees; None for all."""
        parts: list[dict[str, Any]] = []
        if self._has_owned:
            own = {DOCUMENT: {"in": list(question.own)}}
            parts.append({"or": [{OWNED: {"ne": True}}, own]})
        if question.hidden:
            parts.append({DOCUMENT: {"nin": sorted(question.hidden)}})
        return {"and": parts} if parts else None

    def _outcome(self, answer: Answer, seconds: float) -> Outcome:
        bank = self._engine.bank
        ranked = answer.rounds[0].ranked if answer.rounds else ()
        read = [citation for turn in answer.rounds for citation in turn.read]
        routed = [[d for some in turn.routed.values() for d in some] for turn in answer.rounds]
        stored = bank.get_many({d.number for some in routed for d in some})
        chunks = sum(stored[d.number].num_chunks for some in routed for d in some)
        said_no = is_refusal(answer.text, bank.template)
        return Outcome(
            answer=answer.text,
            refused=answer.stopped == "not_found" or said_no,
            ranked=_whole([d.id for d in ranked], self._known)[:RANKED],
            named=_whole([c.id for c in read], self._known),  # a refusal cites nothing
            rounds=len(answer.rounds),
            stopped=answer.stopped,
            seconds=seconds,
            prompt_tokens=answer.usage.prompt_tokens,
            generated_tokens=answer.usage.generated_tokens,
            routed=tuple(
                {layer: _whole([d.id for d in some], self._known) for layer, some in found.items()}
                for found in (turn.routed for turn in answer.rounds)
            ),
            texts={c.id: c.text for c in read},
            spans=tuple(c.text[slice(*c.span)] for c in answer.citations if c.span),
            bytes=chunks * self._chunk_bytes,
        )


def bank_documents(
    documents: Sequence[Document], owned: Collection[str] = ()
) -> Iterator[Document]:
    """Documents as a bank is to hold them: with what they are filtered by as metadata."""
    for document in documents:
        mark = {OWNED: True} if document.id in owned else {}
        yield replace(document, metadata={**document.metadata, DOCUMENT: document.id, **mark})


def chunk_bytes(manifest: Manifest) -> int:
    """Bytes of the content of a chunk in one layer: a pooled key and a pooled value."""
    width = manifest.head_dim * manifest.torch_dtype.itemsize
    if manifest.packed:
        width = packed_width(manifest.head_dim, manifest.packed)
    return 2 * manifest.num_key_value_heads * width


def ranking(ids: Sequence[str], seconds: float, read: int = 0) -> Outcome:
    """A ranking without an answer, and how many tokens were read for it."""
    return Outcome("", False, tuple(ids), (), 0, "ranked", seconds, read, 0)


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
    texts = [[(row + 1, documents[row]) for row in rows] for rows in given]
    limits = [question.max_new_tokens for question in questions]
    answers = reader.answer([question.text for question in questions], texts, limits)
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
            texts={documents[n - 1].id: documents[n - 1].content for n in answer.numbers},
        )
        for answer, best in zip(answers, ranked, strict=True)
    ]
