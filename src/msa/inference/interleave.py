"""Memory Interleave (paper 3.5), one question: route, name documents, read them; again, or answer.

A round prefills the whole local context afresh, routing included, and lets the model write: numbers
of documents, whose texts then join the context of the next round, or the end of retrieval, after
which the question is stated once more and the model answers with what it has in its cache, without
routing again. `msa.inference.scheduler` runs the model, for many questions together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from msa.errors import QuestionTooLongError
from msa.inference.answers import AnswerPieces, AnswerText
from msa.inference.choosing import Sampler
from msa.inference.constraints import RoundGrammar
from msa.inference.decoding import RoundRow, TextRow
from msa.inference.evidence import UNKNOWN_SHARE, Evidence
from msa.inference.fusion import Fused, close_to_best, lead
from msa.inference.judging import Trial, make_trials
from msa.inference.options import (
    ANSWER_COVERAGE,
    ANSWER_LOG_PROBABILITY,
    COVERAGE,
    REFUSAL_LOGIT,
    AskOptions,
)
from msa.inference.refusal import (
    is_refusal,
    logit,
    refusal_range,
    refusal_score,
    routing_features,
)
from msa.inference.snapshot import QuerySnapshot
from msa.inference.spans import find_span
from msa.inference.trace import Candidates
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
    from msa.memory.store.reports import StoredDocument
    from msa.model.modeling_msa import MSAForCausalLM

# Positions that must be left for an answer when a document is to be read.
ANSWER_ROOM = 32
# Logit of the refusal below which the model would not write it by itself.
LIKELY_REFUSAL = -4.0


class AskFormat:
    """How a model is asked: the tokens of its marks, and the positions it has."""

    def __init__(self, model: MSAForCausalLM, encoder: PromptEncoder) -> None:
        """Read off what all questions have in common.

        Args:
            model: is asked.
            encoder: makes local contexts.
        """
        self.encoder = encoder
        self.device: torch.device = model.device
        self.top_k: int = model.config.top_k_documents
        self.max_positions: int = model.config.max_position_embeddings
        self._numbers: dict[int, list[int]] = {}
        template, tokenizer = encoder.template, encoder.tokenizer
        self.end_of_read = encoder.tokenize(template.end_of_read)
        self.end_of_retrieve = encoder.retrieval_end()
        self._lead_in = encoder.tokenize(template.answer)
        self._refusal = encoder.answer(template.refusal) if template.refusal else []
        self.refusal_starts = self._refusal_starts()
        ends = [encoder.tokenize(template.end), *([e] for e in _eos_tokens(model))]
        self.answers = AnswerText(tokenizer, template, [end for end in ends if end])
        pad = tokenizer.pad_token_id
        self.pad: int = pad if pad is not None else 0

    def lead_in(self, options: AskOptions) -> list[int]:
        """Tokens of the answer that are given to the model."""
        return self._lead_in if options.force_answer_prefix else []

    def refusal(self, options: AskOptions) -> list[int]:
        """Tokens of the refusal as the model would write it where it writes an answer."""
        return self._refusal[len(self.lead_in(options)) :]

    def _refusal_starts(self) -> Sequence[int]:
        """First tokens of the refusal behind the lead-in, in any case: all count as a refusal."""
        encoder, text = self.encoder, self.encoder.template.refusal
        if not text:
            return ()

        def word(token: int) -> str:
            decoded: str = encoder.tokenizer.decode([token])
            return decoded.strip().casefold()

        usual = self._refusal[len(self._lead_in)]
        cases = (text.lower(), text.capitalize(), text.title(), text.upper())
        firsts = [encoder.plain(space + case)[0] for case in cases for space in ("", " ")]
        return sorted({usual, *(t for t in firsts if word(t) == word(usual) != "")})

    def number(self, number: int) -> list[int]:
        """Tokens of a document's number; the same documents are routed to again and again."""
        if number not in self._numbers:
            if len(self._numbers) >= _NUMBERS_KEPT:
                self._numbers = {}
            self._numbers[number] = self.encoder.number(number)
        return self._numbers[number]

    def handed(self, question: str, options: AskOptions) -> list[int]:
        """What follows the end of retrieval: the question once more, and the lead-in."""
        return self.encoder.restatement(question) + self.lead_in(options)

    def room(self, question: str, context: LocalContext, options: AskOptions) -> int:
        """Positions left for an answer that is given after this context."""
        end = self.end_of_retrieve + self.handed(question, options)
        return self.max_positions - self.top_k - len(context.input_ids) - len(end)

    def check_length(self, question: str, options: AskOptions) -> None:
        """Refuse a question that leaves no position for an answer.

        Raises:
            QuestionTooLongError: with the positions needed, and those that there are.
        """
        room = self.room(question, self.encoder.context(question), options)
        if room < 1:
            needed = self.max_positions - room + 1
            raise QuestionTooLongError(
                f"The question needs {needed} positions with its prompt and an answer; this model "
                f"has {self.max_positions}. Ask a shorter question."
            )


# Documents whose numbers' tokens are kept.
_NUMBERS_KEPT = 100_000


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """A question to one state of a memory; each has an identity of its own.

    Attributes:
        question: its text.
        snapshot: the memory; stays as it is.
        options: how it is asked.
        format: of the model that answers.
        stream: whether pieces of the answer are wanted as they are written.
    """

    question: str
    snapshot: QuerySnapshot
    options: AskOptions
    format: AskFormat
    stream: bool = False


@dataclass(frozen=True, slots=True)
class _Routed:
    """What a prefill routed to, by document number.

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

    def round(
        self, index: int, read: tuple[Citation, ...] = (), end_log_odds: float | None = None
    ) -> Round:
        """For the trace."""
        routed = {
            layer: tuple(RoutedDocument(self.ids[n], n, s) for n, s in found if n in self.ids)
            for layer, found in self.layers.items()
        }
        ranked = tuple(
            RankedDocument(self.ids[n], n, f.score, f.prior, f.layers, f.lexical, f.judged)
            for n, f in self.fused.items()
            if n in self.ids
        )
        return Round(index, routed, read, ranked, end_log_odds)


@dataclass(slots=True)
class Interleave:
    """One question on its way: what it has read so far, and what it does next.

    A round is `context`, prefilled; `routed`; `naming`, written; `named`. When that has read
    nothing, or there are no rounds left: `begin_answer`, `answering`, written; `finish`.
    """

    request: Request
    started: float = field(default_factory=time.perf_counter)
    readings: list[Reading] = field(default_factory=list)
    citations: list[Citation] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    routing_seconds: float = 0.0
    left_out: int = 0  # prefills for which others were preferred, so far
    forced: str | None = None  # why the engine ended the retrieval, if it did
    scores: dict[str, float] = field(default_factory=dict)  # see `Answer.scores`
    refused: bool = False
    _undecided: bool = False  # whether only the written answer tells if it is refused
    _evidence: Evidence | None = None  # where an answer or its refusal is weighed by it
    _sampler: Sampler = field(init=False)
    _found: _Routed = field(init=False)
    _pieces: AnswerPieces = field(init=False)
    _given: int = 0  # tokens of the answer that went into its pieces
    _texts: Sequence[TextRow] = ()  # written side by side, one of which is the answer
    _unfinished: int = 0  # of these

    def __post_init__(self) -> None:
        options = self.request.options
        self._sampler = Sampler(options.temperature, options.top_p, options.seed)
        self._pieces = AnswerPieces(self.request.format.answers)

    @property
    def index(self) -> int:
        """The round that is under way, from 1."""
        return len(self.rounds) + 1

    # ---- a round

    def context(self) -> LocalContext:
        """What is to be prefilled."""
        return self.request.format.encoder.context(self.request.question, self.readings)

    def query(self) -> LexicalQuery:
        """Words to look for."""
        last = self.readings[-1:]
        texts = tuple(text for reading in last for _, text in reading.documents)
        return LexicalQuery(self.request.question, texts)

    @property
    def read(self) -> frozenset[int]:
        """Numbers of the documents that were read."""
        return frozenset(citation.number for citation in self.citations)

    @property
    def tries(self) -> bool:
        """Whether documents may be tried before this round is written (`judging.judge`).

        Only in the first: a later round looks for what the question does not say.
        """
        return self.request.options.judged_documents > 1 and self.index == 1

    def trials(self, found: Candidates) -> dict[int, Trial]:
        """The documents to be tried, by number; those that stand close together at the top."""
        options, form = self.request.options, self.request.format
        if not self.tries:
            return {}
        close = close_to_best(found.fused, options.judge_margin, options.judged_documents)
        stored = self.request.snapshot.texts(close) if close else {}
        texts = [some.document.content for some in stored.values()]
        tried = make_trials(form.encoder, self.request.question, texts, form.max_positions)
        return dict(zip(stored, tried, strict=False))

    def routed(
        self, found: Candidates, copies: set[int], prompt_tokens: int, seconds: float
    ) -> list[Event]:
        """Take in what the prefill routed to.

        Args:
            found: candidates of this question.
            copies: those of them that have the text of one that was read.
            prompt_tokens: of the context.
            seconds: that routing took.
        """
        self.prompt_tokens += prompt_tokens
        self.routing_seconds += seconds
        top_k, snapshot = self.request.format.top_k, self.request.snapshot
        layers = {layer: some[:top_k] for layer, some in found.layers.items()}
        known = self.read | copies
        unread = [number for number in found.fused if number not in known]
        shown = {n for some in layers.values() for n, _ in some}.union(unread[:top_k])
        self._found = _Routed(layers, found.fused, dict(snapshot.ids(sorted(shown))), known)
        if self.index == 1:
            self.scores |= routing_features([f.score for f in found.fused.values()])
        return [Event("routing", self.index, self._found.round(self.index))]

    def naming(self) -> RoundRow | None:
        """What writes this round; None when the rounds are used up."""
        options, form, found = self.request.options, self.request.format, self._found
        if self.index > options.max_rounds:
            self.forced = "max_rounds"
            return None
        grammar = RoundGrammar(
            {n: form.number(n) for n in found.ids if n not in found.known},
            form.end_of_read,
            form.end_of_retrieve,
            max_documents=options.max_documents_per_round,
            min_documents=options.min_documents_per_round,
            may_end=options.allow_unread or bool(self.citations),
            prior={n: fused.prior for n, fused in found.fused.items()},
        )
        shift = 0.0
        if self.index > 1:
            shift = options.end_bias - options.end_weight * lead(found.fused, found.known)
        return RoundRow(grammar, self._sampler, options.prior_weight, shift)

    def named(self, row: RoundRow) -> list[Event] | None:
        """Read the documents that were named.

        Returns:
            An event for each document read; None if some were deleted since they were routed to:
            the round is to be written again, without them.
        """
        written = row.written
        assert written is not None
        texts = self.request.snapshot.texts(written.numbers) if written.numbers else {}
        if gone := set(written.numbers) - texts.keys():
            self._found = self._found.without(gone)
            return None
        self.generated_tokens += written.length
        index = self.index
        read = self._read(written.numbers, texts)
        if not read and not written.ended:
            self.forced = "max_positions"
        self.rounds.append(self._found.round(index, read, row.end_log_odds))
        return [Event("reading", index, citation) for citation in read]

    def unread_round(self) -> None:
        """Note a round in which nothing could be named."""
        self.rounds.append(self._found.round(self.index))

    def _read(
        self, numbers: Sequence[int], texts: Mapping[int, StoredDocument]
    ) -> tuple[Citation, ...]:
        """Give documents to the question, as far as there are positions for them."""
        options, form, index = self.request.options, self.request.format, self.index
        documents: list[tuple[int, str]] = []
        citations: list[Citation] = []
        for number in numbers:
            document = texts[number].document
            if any(document.text == citation.text for citation in citations):
                continue  # a copy of what is read in this very round
            longer = [*documents, (number, document.content)]
            context = form.encoder.context(
                self.request.question, [*self.readings, Reading(tuple(longer))]
            )
            room = form.room(self.request.question, context, options)
            if room < min(ANSWER_ROOM, options.max_new_tokens):
                continue
            documents = longer
            citations.append(
                Citation(document.id, number, document.title, document.text, round=index)
            )
        if documents:
            self.readings.append(Reading(tuple(documents)))
            self.citations += citations
        return tuple(citations)

    # ---- the answer

    def begin_answer(self) -> list[int]:
        """Tokens that follow the prompt: end of retrieval, question, lead-in."""
        form = self.request.format
        handed = form.handed(self.request.question, self.request.options)
        end = form.end_of_retrieve
        self.prompt_tokens += len(handed) + (len(end) if self.forced else 0)  # else it was written
        nothing = not self.citations and self.forced is None
        self.refused = nothing and not self.request.options.allow_unread
        self._gather()
        return end + handed

    def _gather(self) -> None:
        """Look at what was read, if the answer or its refusal is weighed by it."""
        if self.refusal or self._weighs_evidence:
            texts = [(c.title or "", c.text) for c in self.citations]
            coverage = partial(self.request.snapshot.coverage, self.request.question)
            self._evidence = Evidence(texts, coverage)

    @property
    def _weighs_evidence(self) -> bool:
        """Whether the answer is."""
        return self._weighs_answers and self.request.options.evidence_weight > 0

    @property
    def _weighs_answers(self) -> bool:
        """Whether there is a choice; what is drawn keeps the probabilities that the model gives."""
        options = self.request.options
        return options.temperature == 0 and options.force_answer_prefix

    @property
    def beginnings(self) -> int:
        """First tokens of the answer that are written from, at most."""
        return self.request.options.answer_beginnings if self._weighs_answers else 1

    @property
    def refusal(self) -> list[int]:
        """Tokens whose probability is wanted where the answer begins; none if it is not."""
        options = self.request.options
        if options.refusal_threshold is None:
            return []
        return self.request.format.refusal(options)

    def judge_refusal(self, log_probability: float) -> None:
        """Take in how likely the refusal is in place of an answer."""
        self.scores[REFUSAL_LOGIT] = logit(log_probability)
        assert self._evidence is not None
        self.scores[COVERAGE] = self._evidence.share
        threshold = self.request.options.refusal_threshold
        assert threshold is not None
        least, most = refusal_range(self.scores, self.request.options.refusal_weights)
        self.scores["refusal"] = least
        self.refused |= least > threshold
        self._undecided = least <= threshold < most

    def answering(self, position: int) -> TextRow:
        """What writes the answer, from this position on."""
        form, options = self.request.format, self.request.options
        budget = 0 if self.refused else min(options.max_new_tokens, form.max_positions - position)
        prefer = None
        if self._weighs_evidence:
            assert self._evidence is not None
            prefer = self._evidence.preference(options.evidence_weight, form.answers)
        return TextRow(self._sampler, form.answers.ends, budget, self._not_first(), prefer)

    def write(self, texts: Sequence[TextRow]) -> None:
        """Take in what is written from now on: the answer, or several of which one will be it."""
        self._texts, self._unfinished = texts, len(texts)

    def _not_first(self) -> Sequence[int]:
        """Tokens that a refusal begins with, where the threshold decides, or has for an answer.

        Else the model could refuse by itself what the calibrated score would have answered.
        """
        form, options = self.request.format, self.request.options
        decided = self.refusal and not self.refused
        likely = self.scores.get(REFUSAL_LOGIT, -math.inf) > LIKELY_REFUSAL
        return form.refusal_starts if decided and likely and options.force_answer_prefix else ()

    def pieces(self, row: TextRow) -> list[Event]:
        """What of the answer has become certain since the last call."""
        if not self.request.stream or self._is_held:
            return []
        new, self._given = row.tokens[self._given :], len(row.tokens)
        return self._token("".join(self._pieces.push(token) for token in new))

    @property
    def _is_held(self) -> bool:
        """Whether nothing of the answer is certain before all is written."""
        return self.refused or self._undecided or len(self._texts) > 1

    def finish(self, row: TextRow) -> list[Event]:
        """A text is done; after the last one the rest of the pieces, and the answer."""
        self._unfinished -= 1
        if self._unfinished > 0:
            return []
        held = self._is_held
        rest = self.pieces(row)
        answer = self._finished(max(self._texts, key=lambda text: text.score))
        if self.request.stream:
            rest += self._token(answer.text if held else self._pieces.finish())
        return [*rest, Event("answer", len(self.rounds), answer)]

    def _token(self, piece: str) -> list[Event]:
        return [Event("token", len(self.rounds), piece)] if piece else []

    def _judge(self) -> None:
        """Take in the score with what the answer adds to it."""
        options = self.request.options
        self.scores["refusal"] = refusal_score(self.scores, options.refusal_weights)
        if self._undecided:
            assert options.refusal_threshold is not None
            self.refused = self.scores["refusal"] > options.refusal_threshold

    def _finished(self, row: TextRow) -> Answer:
        """The answer from what was written for it."""
        self.generated_tokens += sum(len(text.tokens) for text in self._texts)
        form, question = self.request.format, self.request.question
        text, stopped = form.answers.text(row.tokens), self.forced or "answered"
        if not row.ended:
            stopped = "max_tokens"
        citations = [replace(c, span=find_span(c.text, text, question)) for c in self.citations]
        if row.tokens:
            self.scores[ANSWER_LOG_PROBABILITY] = row.log_probability / len(row.tokens)
            if self.refusal:
                assert self._evidence is not None
                spans = [(i, c.span) for i, c in enumerate(citations) if c.span]
                shares = [self._evidence.share_around(i, span) for i, span in spans]
                self.scores[ANSWER_COVERAGE] = max(shares, default=UNKNOWN_SHARE)
                self._judge()
        template = form.encoder.template
        if self.refused or is_refusal(text, template):
            text, stopped, citations = template.refusal, "not_found", []
        usage = Usage(
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            routing_seconds=self.routing_seconds,
            total_seconds=time.perf_counter() - self.started,
        )
        return Answer(
            question=question,
            text=text,
            citations=tuple(citations),
            rounds=tuple(self.rounds),
            usage=usage,
            stopped=stopped,
            scores=self.scores,
        )


def _eos_tokens(model: MSAForCausalLM) -> list[int]:
    """Tokens that the checkpoint itself says end a text."""
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)
