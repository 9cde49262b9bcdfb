"""Memory Interleave (paper 3.5): route, name documents, read them; again, or answer.

A round prefills the whole local context afresh, routing included, and lets the model write: numbers
of documents, whose texts then join the context of the next round, or the end of retrieval, after
which the question is stated once more and the model answers with what it has in its cache, without
routing again. All questions of a batch go through a round together; those that are done with
reading leave the batch and are answered together.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from msa.errors import InputError
from msa.inference.answers import AnswerPieces, AnswerText
from msa.inference.batch import prompt_batch
from msa.inference.constraints import RoundGrammar, Written
from msa.inference.decoding import (
    Decoder,
    Sampler,
    Text,
    check_logits,
    write_rounds,
    write_texts,
)
from msa.inference.fusion import Fused
from msa.inference.library import QuerySnapshot
from msa.inference.options import ANSWER_LOG_PROBABILITY, REFUSAL_LOGIT, AskOptions
from msa.inference.refusal import (
    is_refusal,
    logit,
    needs_answer,
    refusal_score,
    routing_features,
)
from msa.inference.spans import find_span
from msa.inference.trace import CandidateReader, candidates
from msa.memory.store.reports import StoredDocument
from msa.memory.store.word_index import LexicalQuery
from msa.text.prompts import LocalContext, PromptEncoder, Reading
from msa.types import (
    Answer,
    Citation,
    Event,
    RankedDocument,
    Round,
    RoutedDocument,
    Usage,
)

if TYPE_CHECKING:
    from msa.model.modeling_msa import MSAForCausalLM

# Positions that must be left for an answer when a document is to be read.
ANSWER_ROOM = 32


@dataclass(slots=True)
class _Question:
    """One question on its way."""

    row: int  # in the list that was asked
    text: str
    started: float
    sampler: Sampler
    readings: list[Reading] = field(default_factory=list)
    citations: list[Citation] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    routing_seconds: float = 0.0
    forced: str | None = None  # why the engine ended the retrieval, if it did
    scores: dict[str, float] = field(default_factory=dict)  # see `Answer.scores`
    refused: bool = False

    @property
    def read(self) -> set[int]:
        return {citation.number for citation in self.citations}


@dataclass(frozen=True, slots=True)
class _Routed:
    """What a prefill routed to, for one question, by document number.

    Attributes:
        layers: routing layer -> (number, score) of the documents attended to, best first.
        fused: all candidates, best first.
        ids: number -> id, of those that were attended to or stand first among the unread ones.
        known: numbers of those that were read, or whose text was; the others can be named.
    """

    layers: dict[int, list[tuple[int, float]]]
    fused: dict[int, Fused]
    ids: dict[int, str]
    known: frozenset[int] = frozenset()

    def without(self, gone: set[int]) -> _Routed:
        """The same, when some documents are no longer there."""
        return replace(self, ids={n: name for n, name in self.ids.items() if n not in gone})

    def round(self, index: int, read: tuple[Citation, ...] = ()) -> Round:
        """For the trace."""
        routed = {
            layer: tuple(RoutedDocument(self.ids[n], n, s) for n, s in found if n in self.ids)
            for layer, found in self.layers.items()
        }
        ranked = tuple(
            RankedDocument(self.ids[n], n, f.score, f.prior, f.layers, f.lexical)
            for n, f in self.fused.items()
            if n in self.ids
        )
        return Round(index, routed, read, ranked)


class Interleave:
    """Answers questions of one memory; see `run`."""

    def __init__(
        self,
        model: MSAForCausalLM,
        encoder: PromptEncoder,
        library: QuerySnapshot,
        options: AskOptions,
    ) -> None:
        """Bring together what a batch of questions needs.

        Args:
            model: in evaluation mode.
            encoder: makes local contexts.
            library: the memory; not changed while the batch is under way.
            options: as asked.
        """
        self._model = model
        self._encoder = encoder
        self._library = library
        self._options = options
        self._device: torch.device = model.device
        self._top_k: int = model.config.top_k_documents
        self._max_positions: int = model.config.max_position_embeddings
        self._numbers: dict[int, list[int]] = {}
        template, tokenizer = encoder.template, encoder.tokenizer
        self._end_of_read = encoder.tokenize(template.end_of_read)
        self._end_of_retrieve = encoder.retrieval_end()
        self._lead_in = encoder.tokenize(template.answer) if options.force_answer_prefix else []
        ends = [encoder.tokenize(template.end), *([e] for e in _eos_tokens(model))]
        self._answers = AnswerText(tokenizer, template, [end for end in ends if end])
        self._refusal: list[int] = []  # as the model would write it where it writes an answer
        if template.refusal:
            self._refusal = encoder.answer(template.refusal)[len(self._lead_in) :]
        pad = tokenizer.pad_token_id
        self._pad: int = pad if pad is not None else 0

    def run(
        self, questions: Sequence[str], *, stream: bool = False
    ) -> Generator[tuple[int, Event], None, None]:
        """Yield (index of the question, event) while the questions are answered.

        Every question ends with its "answer" event; "token" events come with `stream` only, and
        then of one question alone.

        Raises:
            InputError: a question does not fit into the model's positions.
            ModelError: the model computes what is not a number.
        """
        started = time.perf_counter()
        options = self._options
        active = [
            _Question(i, text, started, Sampler(options.temperature, options.top_p, options.seed))
            for i, text in enumerate(questions)
        ]
        for question in active:
            self.check_length(question.text)
        index = 0
        while active:
            index += 1
            contexts = [self._encoder.context(q.text, q.readings) for q in active]
            decoder, routed = self._prefill(active, contexts)
            written, routed, texts = self._write(active, decoder, routed, index)
            reading = []
            for question, found, wrote in zip(active, routed, written, strict=True):
                yield question.row, Event("routing", index, found.round(index))
                read = self._read(question, index, texts, wrote)
                if index == 1:
                    question.scores |= routing_features([f.score for f in found.fused.values()])
                question.rounds.append(found.round(index, read))
                for citation in read:
                    yield question.row, Event("reading", index, citation)
                reading.append(bool(read))
            ending = [i for i, reads in enumerate(reading) if not reads]
            if ending:
                decoder.rewind(ending)
                yield from self._answer([active[i] for i in ending], decoder, stream)
            active = [q for q, reads in zip(active, reading, strict=True) if reads]

    def _prefill(
        self, active: Sequence[_Question], contexts: Sequence[LocalContext]
    ) -> tuple[Decoder, list[_Routed]]:
        """Run the model on the whole local contexts, routing included."""
        prompts = prompt_batch(contexts, self._top_k, self._pad, self._device)
        reader = CandidateReader(self._library.reader, self._top_k)
        decoder = Decoder(self._model, prompts, reader, self._pad)
        routed = self._routed(active, reader)
        check_logits(decoder.logits)
        for question, context in zip(active, contexts, strict=True):
            question.prompt_tokens += len(context.input_ids)
            question.routing_seconds += reader.seconds
        return decoder, routed

    def _write(
        self, active: Sequence[_Question], decoder: Decoder, routed: list[_Routed], index: int
    ) -> tuple[list[Written | None], list[_Routed], dict[int, StoredDocument]]:
        """Let the model name documents and get their texts; None where the rounds are used up.

        Documents that were deleted since they were routed to are no longer there to be named: the
        round is written again without them.
        """
        if index > self._options.max_rounds:
            for question in active:
                question.forced = "max_rounds"
            return [None] * len(active), routed, {}
        samplers = [question.sampler for question in active]
        while True:
            grammars = [self._grammar(q, r) for q, r in zip(active, routed, strict=True)]
            written = write_rounds(decoder, grammars, samplers, self._options.prior_weight)
            named = {number for wrote in written for number in wrote.numbers}
            texts = dict(self._library.texts(named)) if named else {}
            gone = named - texts.keys()
            if not gone:
                break
            routed = [found.without(gone) for found in routed]
            decoder.rewind()
        for question, wrote in zip(active, written, strict=True):
            question.generated_tokens += wrote.length
        return [*written], routed, texts

    def _routed(self, active: Sequence[_Question], reader: CandidateReader) -> list[_Routed]:
        """What every question of the batch was routed to, and which documents these are."""
        queries = [
            LexicalQuery(q.text, tuple(text for r in q.readings[-1:] for _, text in r.documents))
            for q in active
        ]
        found = candidates(reader, self._library, self._options, queries)
        attended = [{i: some[: self._top_k] for i, some in c.layers.items()} for c in found]
        shown, known = [], []
        for question, layers, c in zip(active, attended, found, strict=True):
            known.append(self._known(question, c.fused))
            unread = [n for n in c.fused if n not in known[-1]]
            shown.append(
                {n for some in layers.values() for n, _ in some}.union(unread[: self._top_k])
            )
        ids = self._library.ids(sorted(set().union(*shown)))
        return [
            _Routed(layers, c.fused, {n: ids[n] for n in some if n in ids}, read)
            for layers, c, some, read in zip(attended, found, shown, known, strict=True)
        ]

    def _known(self, question: _Question, candidates: Iterable[int]) -> frozenset[int]:
        """What was read for a question, and the candidates that are copies of it."""
        read = question.read
        if not read:
            return frozenset()
        unread = [number for number in candidates if number not in read]
        return frozenset(read | self._library.copies(unread, read))

    def _grammar(self, question: _Question, routed: _Routed) -> RoundGrammar:
        options, read = self._options, question.read
        return RoundGrammar(
            {n: self._number(n) for n in routed.ids if n not in routed.known},
            self._end_of_read,
            self._end_of_retrieve,
            max_documents=options.max_documents_per_round,
            min_documents=options.min_documents_per_round,
            may_end=options.allow_unread or bool(read),
            prior={n: fused.prior for n, fused in routed.fused.items()},
        )

    def _number(self, number: int) -> list[int]:
        """Tokens of a document's number; the same documents are routed to again and again."""
        if number not in self._numbers:
            self._numbers[number] = self._encoder.number(number)
        return self._numbers[number]

    def _read(
        self,
        question: _Question,
        index: int,
        texts: Mapping[int, StoredDocument],
        wrote: Written | None,
    ) -> tuple[Citation, ...]:
        """Hand the named documents to the question, as far as there are positions for them."""
        documents: list[tuple[int, str]] = []
        citations: list[Citation] = []
        for number in wrote.numbers if wrote else ():
            document = texts[number].document
            if any(document.text == citation.text for citation in citations):
                continue  # a copy of what is read in this very round
            longer = [*documents, (number, document.content)]
            context = self._encoder.context(
                question.text, [*question.readings, Reading(tuple(longer))]
            )
            if self._room(question.text, context) < min(ANSWER_ROOM, self._options.max_new_tokens):
                continue
            documents = longer
            citations.append(
                Citation(document.id, number, document.title, document.text, round=index)
            )
        if documents:
            question.readings.append(Reading(tuple(documents)))
            question.citations += citations
        elif wrote is not None and not wrote.ended:
            question.forced = "max_positions"
        return tuple(citations)

    def _room(self, question: str, context: LocalContext) -> int:
        """Positions left for an answer that is given after this context."""
        end = self._end_of_retrieve + self._encoder.restatement(question) + self._lead_in
        return self._max_positions - self._top_k - len(context.input_ids) - len(end)

    def check_length(self, question: str) -> None:
        """Refuse a question that leaves no position for an answer.

        Raises:
            InputError: with the positions needed, and those that there are.
        """
        room = self._room(question, self._encoder.context(question))
        if room < 1:
            needed = self._max_positions - room + 1
            raise InputError(
                f"The question needs {needed} positions with its prompt and an answer; this model "
                f"has {self._max_positions}. Ask a shorter question."
            )

    def _answer(
        self, questions: Sequence[_Question], decoder: Decoder, stream: bool
    ) -> Iterator[tuple[int, Event]]:
        """State the questions again and let the model answer, behind the cache of its prompt."""
        handed = [self._encoder.restatement(q.text) + self._lead_in for q in questions]
        for question, ids in zip(questions, handed, strict=True):
            end = self._end_of_retrieve if question.forced else []  # else the model wrote it
            question.prompt_tokens += len(ids) + len(end)
        decoder.feed([self._end_of_retrieve + ids for ids in handed])
        self._refuse_early(questions, decoder)
        budgets = [
            0 if q.refused else min(self._options.max_new_tokens, self._max_positions - start)
            for q, start in zip(questions, decoder.positions, strict=True)
        ]
        samplers = [question.sampler for question in questions]
        number = len(questions[0].rounds)  # of the last round; a stream has one question
        held = questions[0].refused or self._refuses_late
        pieces = AnswerPieces(self._answers)
        texts = [Text() for _ in questions]
        for texts in write_texts(decoder, samplers, self._answers.ends, budgets):
            if stream and not held and (piece := pieces.push(texts[0].tokens[-1])):
                yield questions[0].row, Event("token", number, piece)
        answers = [self._finished(q, text) for q, text in zip(questions, texts, strict=True)]
        if stream and (piece := answers[0].text if held else pieces.finish()):
            yield questions[0].row, Event("token", number, piece)
        for question, answer in zip(questions, answers, strict=True):
            yield question.row, Event("answer", len(question.rounds), answer)

    def _refuse_early(self, questions: Sequence[_Question], decoder: Decoder) -> None:
        """Refuse before anything is written, where that can be told by then."""
        for question in questions:
            nothing = not question.citations and question.forced is None
            question.refused = nothing and not self._options.allow_unread
        if self._options.refusal_threshold is None or not self._refusal:
            return
        likely = decoder.log_probability(self._refusal)
        for question, log_probability in zip(questions, likely, strict=True):
            question.scores[REFUSAL_LOGIT] = logit(log_probability)
            if not self._refuses_late:
                self._judge(question)

    @property
    def _refuses_late(self) -> bool:
        """Whether an answer must be written in full before it is known to be refused."""
        options = self._options
        return options.refusal_threshold is not None and needs_answer(options.refusal_weights)

    def _judge(self, question: _Question) -> None:
        threshold = self._options.refusal_threshold
        if threshold is None or not self._refusal:
            return
        score = refusal_score(question.scores, self._options.refusal_weights)
        question.scores["refusal"] = score
        question.refused |= score > threshold

    def _finished(self, question: _Question, written: Text) -> Answer:
        """The answer from what was written for it."""
        question.generated_tokens += len(written.tokens)
        text, stopped = self._answers.text(written.tokens), question.forced or "answered"
        if not written.ended:
            stopped = "max_tokens"
        if written.tokens:
            mean = written.log_probability / len(written.tokens)
            question.scores[ANSWER_LOG_PROBABILITY] = mean
            if self._refuses_late:
                self._judge(question)
        citations = [
            replace(c, span=find_span(c.text, text, question.text)) for c in question.citations
        ]
        if question.refused or is_refusal(text, self._encoder.template):
            text, stopped, citations = self._encoder.template.refusal, "not_found", []
        usage = Usage(
            prompt_tokens=question.prompt_tokens,
            generated_tokens=question.generated_tokens,
            routing_seconds=question.routing_seconds,
            total_seconds=time.perf_counter() - question.started,
        )
        return Answer(
            question=question.text,
            text=text,
            citations=tuple(citations),
            rounds=tuple(question.rounds),
            usage=usage,
            stopped=stopped,
            scores=question.scores,
        )


def _eos_tokens(model: MSAForCausalLM) -> list[int]:
    """Tokens that the checkpoint itself says end a text."""
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)
