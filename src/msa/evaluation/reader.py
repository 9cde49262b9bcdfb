"""A model's reader without its routing: documents are passed in by a retriever.

This is retrieval-augmented generation on the same backbone, in the same text format and with the
same weights as when the model reads what it routed to itself: the local context of one round in
which these documents were named and read, the end of the retrieval, the question stated once more,
the lead-in of the answer. No memory is attended to unless one is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from msa.errors import InputError
from msa.evaluation.metrics import normalize_answer
from msa.inference.batch import prompt_batch
from msa.inference.choosing import Sampler
from msa.inference.decoding import (
    Decoder,
    Preference,
    TextRow,
    begin_texts,
    feed_pending,
    write_all,
)
from msa.inference.evidence import Evidence
from msa.inference.interleave import AskFormat
from msa.inference.options import AskOptions
from msa.model.checkpoint import Checkpoint
from msa.text.prompts import LocalContext, PromptEncoder, PromptTemplate, Reading
from msa.types import Document, MemoryReader


@dataclass(frozen=True, slots=True)
class ReadAnswer:
    """What was answered from documents that were passed in.

    Attributes:
        text: the answer.
        refused: it is the template's refusal, or empty.
        numbers: of the documents that the prompt had room for.
        prompt_tokens, generated_tokens: how much was read and written.
    """

    text: str
    refused: bool
    numbers: tuple[int, ...]
    prompt_tokens: int
    generated_tokens: int


def is_refusal(answer: str, template: PromptTemplate) -> bool:
    """Whether an answer is empty or says, in the template's words, that there is none."""
    return normalize_answer(answer) in ("", normalize_answer(template.refusal))


class TextReader:
    """Answers questions from given documents, greedily, in batches.

    Args:
        checkpoint: the model, with its tokenizer and text format.
        max_new_tokens: of an answer.
        memory: attended to beside the documents, routed from as the context says; none by default.
        refusal_threshold: probability of the refusal, as the model gives it, above which the reader
            refuses, in (0, 1]; 1 always answers.
        coverage: how much of a question each of some texts holds; answers are weighed by it as the
            checkpoint's `AskOptions.evidence_weight` says. Without it they are not.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        max_new_tokens: int = 64,
        memory: MemoryReader | None = None,
        refusal_threshold: float = 0.5,
        coverage: Callable[[str, Sequence[str]], Sequence[float]] | None = None,
    ) -> None:
        self._model = checkpoint.model.eval()
        self._encoder = PromptEncoder(checkpoint.tokenizer, checkpoint.template)
        self._memory = memory
        self._max_new_tokens = max_new_tokens
        self._refusal_threshold = refusal_threshold
        form, plain = AskFormat(self._model, self._encoder), AskOptions()
        self._lead_in, self._refusal = form.lead_in(plain), form.refusal(plain)
        self._refusal_starts = form.refusal_starts
        self._answers, self._pad = form.answers, form.pad
        options = checkpoint.ask_options
        self._coverage, self._weight = coverage, options.evidence_weight
        self._beginnings = options.answer_beginnings

    def answer(
        self,
        questions: Sequence[str],
        documents: Sequence[Sequence[tuple[int, Document]]],
        max_new_tokens: Sequence[int | None] | None = None,
    ) -> list[ReadAnswer]:
        """Answer a batch of questions.

        Args:
            questions: as asked.
            documents: those given, each with a number, to each question, in reading order; the last
                ones are left out where the model has no positions for them. None at all is allowed.
            max_new_tokens: of each answer, where it is not the reader's.

        Raises:
            InputError: a question leaves no position for an answer.
        """
        pairs = list(zip(questions, documents, strict=True))
        fitted = [self._fitted(question, given) for question, given in pairs]
        preferences = [
            self._preference(question, given[: len(numbers)])
            for (question, given), (_, numbers) in zip(pairs, fitted, strict=True)
        ]
        limits = [n or self._max_new_tokens for n in max_new_tokens or [None] * len(questions)]
        written = self._write([context for context, _ in fitted], limits, preferences)
        answers = []
        for (context, numbers), tokens in zip(fitted, written, strict=True):
            text = self._answers.text(tokens)
            refused = is_refusal(text, self._encoder.template)
            size = len(context.input_ids)
            answers.append(ReadAnswer(text, refused, numbers, size, len(tokens)))
        return answers

    def _preference(
        self, question: str, documents: Sequence[tuple[int, Document]]
    ) -> Preference | None:
        if self._coverage is None or not self._weight:
            return None
        texts = [(document.title or "", document.text) for _, document in documents]
        evidence = Evidence(texts, partial(self._coverage, question))
        return evidence.preference(self._weight, self._answers)

    def context(self, question: str, documents: Sequence[tuple[int, str]]) -> LocalContext:
        """The whole prompt: what the engine's own context is when it begins to answer."""
        readings = [Reading(tuple(documents))] if documents else []
        context = self._encoder.context(question, readings)
        context.extend(self._encoder.retrieval_end())
        context.extend(self._encoder.restatement(question))
        context.extend(self._lead_in)
        return context

    def room(self, question: str) -> int:
        """Tokens of documents that can be read for a question; below 0 if it is too long itself."""
        return self._positions - len(self.context(question, [(1, "")]).input_ids)

    def size(self, number: int, text: str) -> int:
        """Tokens that a document takes, its number twice: as it is named, and in front of it."""
        reading = self._encoder.reading(Reading(((number, text),)))
        return len(reading) + len(self._encoder.number(number))

    @property
    def _positions(self) -> int:
        """Of a prompt."""
        config = self._model.config
        return int(config.max_position_embeddings - config.top_k_documents - 1)

    def _fitted(
        self, question: str, documents: Sequence[tuple[int, Document]]
    ) -> tuple[LocalContext, tuple[int, ...]]:
        room = self._positions
        texts = [(number, document.content) for number, document in documents]
        for count in range(len(texts), -1, -1):
            context = self.context(question, texts[:count])
            if len(context.input_ids) <= room:
                return context, tuple(number for number, _ in documents[:count])
        raise InputError(
            f"the question needs {len(context.input_ids)} positions with its prompt; this model "
            f"has {room}. Ask a shorter question"
        )

    def _write(
        self,
        contexts: Sequence[LocalContext],
        limits: Sequence[int],
        preferences: Sequence[Preference | None],
    ) -> list[list[int]]:
        """Tokens of every answer, end mark included."""
        model, config = self._model, self._model.config
        prompts = prompt_batch(contexts, config.top_k_documents, self._pad, model.device)
        decoder = Decoder(model, prompts, self._memory, self._pad)
        positions = config.max_position_embeddings
        refused = self._refused(decoder, len(contexts))
        rows = [
            TextRow(
                Sampler(0.0, 1.0, None),
                self._answers.ends,
                0 if no else min(limit, positions - start),
                self._refusal_starts,
                prefer,
            )
            for limit, start, no, prefer in zip(
                limits, decoder.positions, refused, preferences, strict=True
            )
        ]
        texts = [
            [row] if row.done else begin_texts(logits, row, self._beginnings)
            for row, logits in zip(rows, decoder.logits, strict=True)
        ]
        whose = [i for i, some in enumerate(texts) for _ in some]
        decoder, written = decoder.select(whose), [row for some in texts for row in some]
        feed_pending(decoder, written)
        write_all(decoder, written)
        return [max(some, key=lambda row: row.score).tokens for some in texts]

    def _refused(self, decoder: Decoder, rows: int) -> list[bool]:
        """Whether the refusal is likely enough; else it is not to be written."""
        if not self._refusal:
            return [False] * rows
        limit = math.log(self._refusal_threshold)
        return [value > limit for value in decoder.log_probability(self._refusal)]
