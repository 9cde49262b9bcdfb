"""Memory Interleave (paper 3.5): route, name documents, read them; again, or answer.

A round prefills the whole local context afresh, routing included, and lets the model write: numbers
of documents, whose texts then join the context of the next round, or the end of retrieval, after
which the question is stated once more and the model answers with what it has in its cache, without
routing again. All questions of a batch go through a round together; those that are done with
reading leave the batch and are answered together.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from msa.errors import InputError
from msa.inference.answers import AnswerPieces, AnswerText, EndsWith, stream_tokens
from msa.inference.batch import Batch, continued, prompt_batch
from msa.inference.constraints import (
    CheckLogits,
    Grammars,
    RetrievalConstraint,
    RoundComplete,
    RoundGrammar,
    Written,
    check_logits,
)
from msa.inference.library import Library
from msa.inference.options import AskOptions
from msa.inference.trace import TracingReader, fuse_layers
from msa.memory.reports import StoredDocument
from msa.text.prompts import LocalContext, PromptEncoder, Reading
from msa.types import (
    Answer,
    Citation,
    Event,
    Round,
    RoutedDocument,
    Usage,
)

if TYPE_CHECKING:
    from msa.model.cache import MSACache
    from msa.model.modeling_msa import MSAForCausalLM

# Positions that must be left for an answer when a document is to be read.
ANSWER_ROOM = 32
# Far above any round: the grammar ends every one of them.
_ROUND_TOKENS = 4096


@dataclass(slots=True)
class _Question:
    """One question on its way."""

    row: int  # in the list that was asked
    text: str
    started: float
    readings: list[Reading] = field(default_factory=list)
    citations: list[Citation] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    routing_seconds: float = 0.0
    forced: str | None = None  # why the engine ended the retrieval, if it did

    @property
    def read(self) -> set[int]:
        return {citation.number for citation in self.citations}


@dataclass(slots=True)
class _Routed:
    """What a prefill routed to, for one question."""

    layers: dict[int, tuple[RoutedDocument, ...]]
    documents: dict[int, StoredDocument]  # by number
    fused: dict[int, float]  # number -> score


class Interleave:
    """Answers questions of one memory; see `run`."""

    def __init__(
        self,
        model: MSAForCausalLM,
        encoder: PromptEncoder,
        library: Library,
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
        self._draws = 0
        self._numbers: dict[int, list[int]] = {}
        template, tokenizer = encoder.template, encoder.tokenizer
        self._end_of_read = encoder.tokenize(template.end_of_read)
        self._end_of_retrieve = encoder.retrieval_end()
        self._lead_in = encoder.tokenize(template.answer) if options.force_answer_prefix else []
        ends = [encoder.tokenize(template.end), *([e] for e in _eos_tokens(model))]
        self._answers = AnswerText(tokenizer, template, [end for end in ends if end])
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
        active = [_Question(i, text, started) for i, text in enumerate(questions)]
        for question in active:
            self.check_length(question.text)
        index = 0
        while active:
            index += 1
            contexts = [self._encoder.context(q.text, q.readings) for q in active]
            prompts = prompt_batch(contexts, self._top_k, self._pad, self._device)
            may_read = index <= self._options.max_rounds
            routed, written, cache = self._round(active, contexts, prompts, may_read)
            reading = []
            for question, found, wrote in zip(active, routed, written, strict=True):
                yield question.row, Event("routing", index, Round(index, found.layers, ()))
                read = self._read(question, index, found, wrote)
                question.rounds.append(Round(index, found.layers, read))
                for citation in read:
                    yield question.row, Event("reading", index, citation)
                reading.append(bool(read))
            ending = [i for i, reads in enumerate(reading) if not reads]
            if ending:
                rows = [active[i] for i in ending]
                yield from self._answer(rows, ending, prompts, cache, stream)
            active = [q for q, reads in zip(active, reading, strict=True) if reads]

    def _round(
        self,
        active: Sequence[_Question],
        contexts: Sequence[LocalContext],
        prompts: Batch,
        may_read: bool,
    ) -> tuple[list[_Routed], list[Written | None], MSACache]:
        """Prefill and let the model name documents; `None` where it was not let."""
        reader = TracingReader(self._library.reader)
        inputs: dict[str, Any] = {
            "attention_mask": prompts.attention_mask,
            "position_ids": prompts.position_ids,
            "memory": reader,
            "routing_mask": prompts.routing_mask,
            "memory_mask": prompts.memory_mask,
        }
        for question, context in zip(active, contexts, strict=True):
            question.prompt_tokens += len(context.input_ids)
        if may_read:
            routed: list[_Routed] = []

            def grammars() -> list[RoundGrammar]:
                routed.extend(self._routed(reader))
                return [self._grammar(q, r) for q, r in zip(active, routed, strict=True)]

            written, cache = self._write_round(prompts, Grammars(grammars), inputs)
        else:
            with torch.no_grad():
                out = self._model(prompts.input_ids, use_cache=True, logits_to_keep=1, **inputs)
            check_logits(out.logits[:, -1])
            routed, cache = self._routed(reader), out.past_key_values
            written = [None] * len(active)
        for question, wrote in zip(active, written, strict=True):
            question.routing_seconds += reader.seconds
            question.generated_tokens += wrote.length if wrote else 0
            question.forced = None if may_read else "max_rounds"
        return routed, written, cache

    def _write_round(
        self, prompts: Batch, grammars: Grammars, inputs: Mapping[str, Any]
    ) -> tuple[list[Written | None], MSACache]:
        constraint = RetrievalConstraint(
            grammars, prompts.length, self._pad, self._options.prior_weight
        )
        with self._drawing():
            out = self._model.generate(
                prompts.input_ids,
                generation_config=self._generation_config(_ROUND_TOKENS),
                logits_processor=LogitsProcessorList([constraint]),
                stopping_criteria=StoppingCriteriaList([RoundComplete(grammars, prompts.length)]),
                **inputs,
            )
        tokens = out.sequences[:, prompts.length :].tolist()
        written = [g.parse(row) for g, row in zip(grammars.rows, tokens, strict=True)]
        assert None not in written, "a round did not end: the grammar has no end"
        return written, out.past_key_values

    def _routed(self, reader: TracingReader) -> list[_Routed]:
        """Documents behind the routed rows of the memory, for every question."""
        batch = reader.rows()
        rows = {row for layers in batch for found in layers.values() for row, _ in found}
        stored = self._library.lookup(sorted(rows))
        routed = []
        for layers in batch:
            named = {
                layer: [(stored[row], score) for row, score in found if row in stored]
                for layer, found in layers.items()
            }
            trace = {
                layer: tuple(RoutedDocument(s.document.id, s.number, v) for s, v in found)
                for layer, found in named.items()
            }
            documents = {s.number: s for found in named.values() for s, _ in found}
            scores = {layer: [(d.number, d.score) for d in found] for layer, found in trace.items()}
            fused = fuse_layers(scores, self._options.prior_temperature)
            routed.append(_Routed(trace, documents, fused))
        return routed

    def _grammar(self, question: _Question, routed: _Routed) -> RoundGrammar:
        options, read = self._options, question.read
        return RoundGrammar(
            {n: self._number(n) for n in routed.documents if n not in read},
            self._end_of_read,
            self._end_of_retrieve,
            max_documents=options.max_documents_per_round,
            may_end=options.allow_unread or bool(read),
            prior=routed.fused,
        )

    def _number(self, number: int) -> list[int]:
        """Tokens of a document's number; the same documents are routed to again and again."""
        if number not in self._numbers:
            self._numbers[number] = self._encoder.number(number)
        return self._numbers[number]

    def _read(
        self, question: _Question, index: int, routed: _Routed, wrote: Written | None
    ) -> tuple[Citation, ...]:
        """Hand the named documents to the question, as far as there are positions for them."""
        documents: list[tuple[int, str]] = []
        citations: list[Citation] = []
        for number in wrote.numbers if wrote else ():
            document = routed.documents[number].document
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
        self,
        questions: Sequence[_Question],
        rows: Sequence[int],
        prompts: Batch,
        cache: MSACache,
        stream: bool,
    ) -> Iterator[tuple[int, Event]]:
        """State the questions again and let the model answer, behind the cache of its prompt."""
        index = torch.tensor(rows, device=self._device)
        cache.truncate(prompts.length)
        cache.batch_select_indices(index)
        handed = [self._encoder.restatement(q.text) + self._lead_in for q in questions]
        for question, ids in zip(questions, handed, strict=True):
            end = self._end_of_retrieve if question.forced else []  # else the model wrote it
            question.prompt_tokens += len(ids) + len(end)
        batch = continued(prompts, index, [self._end_of_retrieve + h for h in handed], self._pad)
        room = (self._max_positions - 1 - batch.position_ids[:, -1]).tolist()
        budgets = [min(self._options.max_new_tokens, r) for r in room]
        if stream:
            written = yield from self._stream(questions[0], batch, cache, budgets[0])
        else:
            written = self._generate_answers(batch, cache, max(budgets))
        for question, tokens, budget in zip(questions, written, budgets, strict=True):
            answer = self._finished(question, tokens[:budget])
            yield question.row, Event("answer", len(question.rounds), answer)

    def _stream(
        self, question: _Question, batch: Batch, cache: MSACache, budget: int
    ) -> Generator[tuple[int, Event], None, list[list[int]]]:
        number = len(question.rounds)
        pieces = AnswerPieces(self._answers)
        tokens = stream_tokens(
            lambda streamer, stop: self._generate_answers(batch, cache, budget, streamer, [stop])
        )
        try:
            while True:
                try:
                    piece = pieces.push(next(tokens))
                except StopIteration as stopped:
                    written: list[list[int]] = stopped.value
                    break
                if piece:
                    yield question.row, Event("token", number, piece)
        finally:
            tokens.close()
        if piece := pieces.finish():
            yield question.row, Event("token", number, piece)
        return written

    def _generate_answers(
        self,
        batch: Batch,
        cache: MSACache,
        budget: int,
        streamer: Any = None,
        stopping: Sequence[Any] = (),
    ) -> list[list[int]]:
        """Tokens that the model writes behind each row, padding behind the end included."""
        ends = self._answers.ends
        with self._drawing():
            out = self._model.generate(
                batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                past_key_values=cache,
                generation_config=self._generation_config(budget),
                logits_processor=LogitsProcessorList([CheckLogits()]),
                stopping_criteria=StoppingCriteriaList([EndsWith(ends, batch.length), *stopping]),
                streamer=streamer,
            )
        written: list[list[int]] = out.sequences[:, batch.length :].tolist()
        return written

    def _finished(self, question: _Question, tokens: Sequence[int]) -> Answer:
        found = self._answers.find_end(tokens)
        question.generated_tokens += len(tokens) if found is None else found[1]
        stopped = question.forced or "answered"
        usage = Usage(
            prompt_tokens=question.prompt_tokens,
            generated_tokens=question.generated_tokens,
            routing_seconds=question.routing_seconds,
            total_seconds=time.perf_counter() - question.started,
        )
        return Answer(
            question=question.text,
            text=self._answers.text(tokens),
            citations=tuple(question.citations),
            rounds=tuple(question.rounds),
            usage=usage,
            stopped="max_tokens" if found is None else stopped,
        )

    def _generation_config(self, max_new_tokens: int) -> GenerationConfig:
        """Our settings in full, so that none of the checkpoint's own generation defaults remain."""
        options = self._options
        sampling = options.temperature > 0
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=sampling,
            temperature=options.temperature if sampling else 1.0,
            top_p=options.top_p if sampling else 1.0,
            top_k=0 if sampling else None,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=[end[0] for end in self._answers.ends if len(end) == 1] or None,
            pad_token_id=self._pad,
            use_cache=True,
            return_dict_in_generate=True,
        )

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Seed what is drawn inside, and leave torch's global generator as it was."""
        seed = self._options.seed
        if seed is None or self._options.temperature == 0:
            yield
            return
        devices = [] if self._device.type == "cpu" else [self._device]
        kind = "cuda" if self._device.type == "cpu" else self._device.type
        with torch.random.fork_rng(devices, device_type=kind):
            torch.manual_seed(seed + self._draws)
            self._draws += 1
            yield


def _eos_tokens(model: MSAForCausalLM) -> list[int]:
    """Tokens that the checkpoint itself says end a text."""
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)
