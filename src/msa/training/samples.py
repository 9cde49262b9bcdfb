"""From worlds to training batches: documents to encode, and single-step samples of questions.

A chain of Memory Interleave is split into its steps (paper 3.5): question -> first number;
question and first text -> second number; question and all texts -> end of retrieval and answer.
Every sample is a local context made by the `PromptEncoder` that inference uses.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from msa.synthetic_worlds import World, WorldDocument, WorldQuestion
from msa.text.prompts import LocalContext, PromptEncoder, Reading
from msa.training.config import LossSettings, SampleSettings, WorldSettings
from msa.types import Document

IGNORED = -100
MAX_DIGITS = 8
BLANK_DIGIT = 10
# Samples of one kind are run in groups of about so many tokens.
GROUP_TOKENS = 2500
# The longest of a group is at most so many times as long as the shortest.
MAX_STRETCH = 1.4
# Tokens of a document beside its text: the marks around it and its number, twice.
NUMBER_ROOM = 8 + 2 * MAX_DIGITS


@dataclass(slots=True)
class Sample:
    """One row: a local context, what is predicted in it, and which documents are right."""

    context: LocalContext
    labels: list[int]
    weights: list[float]
    positives: list[int]
    read: list[int] = field(default_factory=list)

    def write(self, ids: Sequence[int], weight: float) -> None:
        """Append tokens that are predicted, with a weight; 0 for tokens that are not."""
        self.context.extend(ids)
        self.labels += ids if weight else [IGNORED] * len(ids)
        self.weights += [weight] * len(ids)

    def write_answer(self, encoder: PromptEncoder, question: str, text: str) -> None:
        """Append the question, stated once more, the lead-in, and an answer that is predicted."""
        self.write(encoder.restatement(question), 0.0)
        lead_in = len(encoder.tokenize(encoder.template.answer))
        ids = encoder.answer(text)
        self.write(ids[:lead_in], 0.0)
        self.write(ids[lead_in:], 1.0)


class SampleBuilder:
    """Builds the tensors of one training step from one world."""

    def __init__(self, encoder: PromptEncoder, top_k: int) -> None:
        self.encoder = encoder
        self.top_k = top_k

    def step(
        self,
        world: World,
        rng: random.Random,
        settings: WorldSettings,
        samples: SampleSettings,
        losses: LossSettings,
    ) -> dict[str, object]:
        """Tensors of one step.

        Returns:
            "documents" [N, L] int64 right-padded, "lengths" [N] int64, "digits" [N, MAX_DIGITS]
            int64, and "groups": list of dictionaries of `collate`, without kinds of samples that
            the world has no questions for.
        """
        # of like length side by side, so that little padding is computed
        world = replace(world, documents=tuple(sorted(world.documents, key=_length)))
        numbers = draw_numbers(rng, len(world.documents), settings.min_digits, settings.max_digits)
        texts = [
            self._cut(_content(document), settings.max_document_tokens)
            for document in world.documents
        ]
        text_of = {d.key: text for d, text in zip(world.documents, texts, strict=True)}
        # A real text that was cut may have lost the answer; such a question would teach to guess.
        questions = tuple(q for q in world.questions if q.answer in text_of[q.gold[-1]])
        world = replace(world, questions=questions)
        maker = _WorldSamples(self.encoder, world, numbers, texts, rng, losses)
        one = [q for q in questions if len(q.gold) == 1]
        two = [q for q in questions if len(q.gold) == 2]
        groups = [
            [maker.name(q) for q in _draw(rng, one + two, samples.name)],
            [maker.answer(q, samples.more_questions) for q in _draw(rng, one, samples.read)],
            [maker.hop(q) for q in _draw(rng, two, samples.hop)],
            [maker.answer(q, samples.more_questions) for q in _draw(rng, two, samples.answer)],
            [maker.copy() for _ in range(samples.copy)],
        ]
        rows = [
            self.encoder.document(n, text)[: settings.max_document_tokens + NUMBER_ROOM]
            for n, text in zip(numbers, texts, strict=True)
        ]
        return {
            "documents": pad([torch.tensor(r) for r in rows], 0),
            "lengths": torch.tensor([len(r) for r in rows]),
            "digits": torch.tensor([digits_of(n) for n in numbers]),
            "groups": [
                collate(part, len(rows), self.top_k) for g in groups for part in by_length(g)
            ],
        }

    def _cut(self, text: str, max_tokens: int) -> str:
        ids = self.encoder.plain(text)
        if len(ids) <= max_tokens:
            return text
        cut: str = self.encoder.tokenizer.decode(ids[:max_tokens])
        return cut.replace("\ufffd", "")


class _WorldSamples:
    """Samples of one world, with the numbers that its documents have in this step."""

    def __init__(
        self,
        encoder: PromptEncoder,
        world: World,
        numbers: Sequence[int],
        texts: Sequence[str],
        rng: random.Random,
        losses: LossSettings,
    ) -> None:
        self.encoder = encoder
        self.rng = rng
        self.context_weight = losses.context
        self.row = {document.key: i for i, document in enumerate(world.documents)}
        self.numbers = numbers
        self.texts = texts
        self.by_document: dict[str, list[WorldQuestion]] = {}
        for question in world.questions:
            self.by_document.setdefault(question.gold[-1], []).append(question)

    def name(self, question: WorldQuestion) -> Sample:
        """Round 1: the number of the first document."""
        return self._numbered(question, [], question.gold[0])

    def hop(self, question: WorldQuestion) -> Sample:
        """Round 2: the number of the second document, with the first one read."""
        reading = self._reading(question.gold[0])
        return self._numbered(question, [reading], question.gold[1])

    def answer(self, question: WorldQuestion, more: int) -> Sample:
        """The last round: end of retrieval, the question again, the answer.

        Nothing is left to be found, so that the routing loss has no say in it.
        After it stand further questions that the same texts answer, each with its answer.
        """
        sample = self._begin(question, [self._reading(key) for key in question.gold])
        sample.write(self.encoder.retrieval_end(), 1.0)
        sample.read = [self.row[key] for key in question.gold]
        others = [
            q
            for key in question.gold
            for q in self.by_document.get(key, ())
            if q is not question and set(q.gold) <= set(question.gold)
        ]
        self.rng.shuffle(others)
        for q in [question, *others[:more]]:
            sample.write(self.encoder.restatement(q.question), self.context_weight)
            sample.write(self.encoder.answer(q.answer), 1.0)
        return sample

    def copy(self) -> Sample:
        """A piece of text, something between, and the piece again, to be written.

        Half of the pieces are shuffled token by token, so that nothing but copying helps. Ours:
        copying heads form within a few hundred such steps.
        """
        context = LocalContext()
        context.extend(self.encoder.tokenize(self.encoder.template.prefix), sees_memory=False)
        context.prefix_length = len(context.input_ids)
        piece = self._piece(8, 24)
        if self.rng.random() < 0.5:
            self.rng.shuffle(piece)
        context.extend(piece + self._piece(1, 8), sees_memory=False)
        first = len(context.input_ids)
        sample = Sample(context, [IGNORED] * first, [0.0] * first, [])
        sample.write(piece, 1.0)
        # where the piece comes again cannot be known
        sample.labels[first], sample.weights[first] = IGNORED, 0.0
        context.sees_memory[first:] = [False] * len(piece)
        return sample

    def _piece(self, shortest: int, longest: int) -> list[int]:
        """Some consecutive tokens of some document."""
        ids = self.encoder.plain(self.rng.choice(self.texts))
        length = min(len(ids), self.rng.randint(shortest, longest))
        start = self.rng.randint(0, len(ids) - length)
        return ids[start : start + length]

    def _reading(self, key: str) -> Reading:
        row = self.row[key]
        return Reading(((self.numbers[row], self.texts[row]),))

    def _begin(self, question: WorldQuestion, readings: Sequence[Reading]) -> Sample:
        context = self.encoder.context(question.question, readings)
        sample = Sample(context, [], [], [])
        start = len(self.encoder.context(question.question).input_ids) if readings else None
        count = len(context.input_ids)
        start = count if start is None else start
        if not self.context_weight:  # no logits for what counts nothing
            start = count
        sample.labels = [IGNORED] * start + context.input_ids[start:]
        sample.weights = [0.0] * start + [self.context_weight] * (count - start)
        return sample

    def _numbered(
        self, question: WorldQuestion, readings: Sequence[Reading], target: str
    ) -> Sample:
        sample = self._begin(question, readings)
        row = self.row[target]
        sample.read = [self.row[key] for key in question.gold[: len(readings)]]
        sample.write(self.encoder.written([self.numbers[row]]), 1.0)
        sample.positives = [row]
        return sample


def collate(samples: Sequence[Sample], num_documents: int, top_k: int) -> dict[str, Tensor]:
    """Right-padded tensors of a group of samples.

    Returns:
        "input_ids", "position_ids", "labels" [B, T] int64; "routing_mask", "memory_mask" [B, T]
        bool; "weights" [B, T] float32; "positives", "read" [B, N] bool.
    """
    contexts = [s.context for s in samples]
    positives = torch.zeros(len(samples), num_documents, dtype=torch.bool)
    read = torch.zeros_like(positives)
    for i, sample in enumerate(samples):
        positives[i, sample.positives] = True
        read[i, sample.read] = True
    return {
        "input_ids": pad([torch.tensor(c.input_ids) for c in contexts], 0),
        "position_ids": pad([torch.tensor(c.positions(top_k)) for c in contexts], 0),
        "routing_mask": pad([torch.tensor(c.routes) for c in contexts], False),
        "memory_mask": pad([torch.tensor(c.sees_memory) for c in contexts], False),
        "labels": pad([torch.tensor(s.labels) for s in samples], IGNORED),
        "weights": pad([torch.tensor(s.weights) for s in samples], 0.0),
        "positives": positives,
        "read": read,
    }


def empty_group(num_documents: int, device: torch.device, *, route_only: bool) -> dict[str, Tensor]:
    """A group, as `collate` gives one, that asks nothing and teaches nothing."""
    shape = (1, 2)
    nothing = torch.zeros(1, num_documents, dtype=torch.bool, device=device)
    return {
        "input_ids": torch.zeros(shape, dtype=torch.int64, device=device),
        "position_ids": torch.arange(2, device=device)[None],
        "routing_mask": torch.zeros(shape, dtype=torch.bool, device=device),
        "memory_mask": torch.zeros(shape, dtype=torch.bool, device=device),
        "labels": torch.full(shape, IGNORED, device=device),
        "weights": torch.zeros(shape, device=device),
        "positives": nothing,
        "read": nothing,
        "route_only": torch.tensor([route_only], device=device),
    }


def pad(rows: list[Tensor], value: float) -> Tensor:
    """Stack rows of different lengths, padded on the right."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def draw_numbers(rng: random.Random, count: int, min_digits: int, max_digits: int) -> list[int]:
    """Different document numbers, their lengths drawn evenly from the range."""
    numbers: set[int] = set()
    while len(numbers) < count:
        low = 10 ** (rng.randint(min_digits, max_digits) - 1)
        numbers.add(rng.randrange(low, 10 * low))
    drawn = sorted(numbers)
    rng.shuffle(drawn)
    return drawn


def _content(document: WorldDocument) -> str:
    """The text as a bank encodes it, title in front."""
    return Document(id=document.key, text=document.text, title=document.title).content


def _length(document: WorldDocument) -> int:
    return len(_content(document))


def by_length(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Parts of like length, of at most about `GROUP_TOKENS` tokens, with little padding."""
    parts: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: len(s.labels)):
        length = len(sample.labels)
        part = parts[-1] if parts else []
        full = (len(part) + 1) * length > GROUP_TOKENS
        if not part or full or length > MAX_STRETCH * len(part[0].labels):
            parts.append([])
        parts[-1].append(sample)
    return parts


def digits_of(number: int) -> list[int]:
    """The digits from the left, then BLANK_DIGIT up to MAX_DIGITS."""
    digits = [int(d) for d in str(number)][:MAX_DIGITS]
    return digits + [BLANK_DIGIT] * (MAX_DIGITS - len(digits))


def _draw(
    rng: random.Random, questions: Sequence[WorldQuestion], count: int
) -> list[WorldQuestion]:
    if not questions or not count:
        return []
    if count <= len(questions):
        return rng.sample(list(questions), count)
    return [rng.choice(questions) for _ in range(count)]
