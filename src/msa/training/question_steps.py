"""Training steps from question sets: real documents, real questions, in the inference format.

A step draws questions of one set, their gold documents and hard negatives; all documents of a step
are the memory of every question in it. Chains of Memory Interleave are split into their rounds
(paper 3.5), and a round may have read documents that do not help, as it will at inference.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from msa.errors import TrainingError
from msa.text.prompts import PromptEncoder, Reading
from msa.training.config import QuestionSettings, QuestionStage
from msa.training.negatives import HardNegatives, hard_negatives
from msa.training.question_sets import QuestionSet, TrainingQuestion
from msa.training.samples import (
    IGNORED,
    MAX_DIGITS,
    NUMBER_ROOM,
    Sample,
    by_length,
    collate,
    digits_of,
    draw_numbers,
    pad,
)

# Weights of the tokens of a round: whether a number comes, or the end, counts double; which number
# is mostly the router's to say.
DECISION_WEIGHT = 2.0
NUMBER_WEIGHT = 0.05
MAX_NAMED = 4


@dataclass(frozen=True, slots=True)
class Source:
    """A question set with what its steps need.

    Attributes:
        questions: the set.
        negatives: of its questions, in their order.
        settings: as configured.
        by_document: last gold document -> rows of the questions that end there.
        mistaken: document -> rows of the questions that it looks right for, and is not.
    """

    questions: QuestionSet
    negatives: HardNegatives
    settings: QuestionSettings
    by_document: Mapping[str, Sequence[int]]
    mistaken: Mapping[str, Sequence[int]]


def load_sources(settings: Sequence[QuestionSettings], cache: str | Path) -> list[Source]:
    """Read question sets and find their hard negatives (kept under `cache`).

    Raises:
        InputError: a set cannot be read.
        TrainingError: a set has no question with a gold document.
    """
    sources = []
    for entry in settings:
        questions = QuestionSet.load(entry.path, on_error="skip")
        if entry.gold_only:
            needed = {key for q in questions.questions for key in (*q.gold, *q.context)}
            kept = {key: d for key, d in questions.documents.items() if key in needed}
            questions = replace(questions, documents=kept)
        by_document: dict[str, list[int]] = {}
        for row, question in enumerate(questions.questions):
            if question.gold and question.answers:
                by_document.setdefault(question.gold[-1], []).append(row)
        if not by_document:
            raise TrainingError(
                f"{entry.path}: no question has a gold document and an answer; leave it out"
            )
        negatives = hard_negatives(questions, 12, cache=cache)
        mistaken: dict[str, list[int]] = {}
        for rows in by_document.values():
            for row in rows:
                for key in negatives.of(row, 4):
                    mistaken.setdefault(key, []).append(row)
        sources.append(Source(questions, negatives, entry, by_document, mistaken))
    return sources


class QuestionSteps(Dataset[dict[str, object]]):
    """The steps of one stage; step i is made from the seed and i alone."""

    def __init__(
        self,
        stage: QuestionStage,
        sources: Sequence[Source],
        encoder: PromptEncoder,
        top_k: int,
        seed: int,
        processes: int = 1,
    ) -> None:
        """`processes` share the steps of the stage: each has so many of its own."""
        self.stage, self.sources, self.encoder = stage, list(sources), encoder
        self.top_k, self.seed, self.processes = top_k, seed, processes

    def __len__(self) -> int:
        return self.stage.steps * self.processes

    def __getitem__(self, index: int) -> dict[str, object]:
        rng = random.Random(f"{self.seed}/{self.stage.name}/{index}")
        stage = self.stage
        language = stage.name_documents or stage.read or stage.again or stage.refuse or stage.hop
        able = [s for s in self.sources if (s.settings.reads if language else s.settings.routes)]
        source = rng.choices(able, [s.settings.weight for s in able])[0]
        return _Step(self.stage, source, self.encoder, rng).tensors(self.top_k)


class _Step:
    """One step: documents, their numbers, and samples over them."""

    def __init__(
        self, stage: QuestionStage, source: Source, encoder: PromptEncoder, rng: random.Random
    ) -> None:
        self.stage, self.source, self.encoder, self.rng = stage, source, encoder, rng
        self.rows: dict[str, int] = {}
        self.texts: list[str] = []
        self.numbers = draw_numbers(rng, stage.documents + 64, 1, stage.max_digits)
        self.chosen: list[int] = []

    def tensors(self, top_k: int) -> dict[str, object]:
        """Tensors as `MSAForTraining.forward` takes them."""
        self._draw()
        stage, rng = self.stage, self.rng
        routed = self.chosen[: stage.route] if self.source.settings.routes else []
        samples = [self._route(i) for i in routed]
        later = (self._later(i) for i in self.chosen if self.source.settings.routes)
        samples += list(islice((s for s in later if s is not None), stage.route_again))
        route_only = by_length(samples)
        reading = rng.sample(self.chosen, len(self.chosen)) if self.source.settings.reads else []
        language: list[Sample] = []
        plans = (
            (stage.name_documents, self._named),
            (stage.read, self._answered),
            (stage.hop, self._next),
            (stage.again, self._again),
            (stage.refuse, self._refused),
        )
        for count, make in plans:
            wanted = int(count + rng.random())  # on average `count`
            made = (sample for sample in map(make, reading) if sample is not None)
            language += islice(made, wanted)
        for sample in language:
            if rng.random() < stage.without_memory:
                sample.context.sees_memory = [False] * len(sample.labels)
        limit = stage.max_document_tokens + NUMBER_ROOM
        order = sorted(range(len(self.texts)), key=lambda i: len(self.texts[i]))
        ids = [self.encoder.document(self.numbers[i], self.texts[i])[:limit] for i in order]
        place = {row: at for at, row in enumerate(order)}
        for sample in samples + language:
            sample.positives = [place[row] for row in sample.positives]
            sample.read = [place[row] for row in sample.read]
        groups = [(part, True) for part in route_only]
        groups += [(part, False) for part in by_length(language)]
        return {
            "documents": pad([_tensor(row) for row in ids], 0),
            "lengths": _tensor([len(row) for row in ids]),
            "digits": _tensor([digits_of(self.numbers[i])[:MAX_DIGITS] for i in order]),
            "groups": [
                {**collate(part, len(ids), top_k), "route_only": _tensor([only])}
                for part, only in groups
            ],
        }

    def _draw(self) -> None:
        """Questions whose gold documents and negatives fill the memory of the step."""
        source, rng, stage = self.source, self.rng, self.stage
        questions = source.questions.questions
        golds = list(source.by_document)
        for gold in rng.sample(golds, min(len(golds), stage.documents)):
            rows = list(source.by_document[gold])
            rng.shuffle(rows)
            for row in rows[: stage.questions_per_document]:
                wanted = [*questions[row].gold, *self._negatives(row, stage.negatives)]
                if len(self.rows.keys() | set(wanted)) > stage.documents:
                    continue
                for key in wanted:
                    self._add(key)
                self.chosen.append(row)
            if len(self.rows) >= stage.documents - 1:
                break
        rng.shuffle(self.chosen)

    def _negatives(self, row: int, count: int) -> list[str]:
        """Some of the hard negatives, at random among the best."""
        best = list(self.source.negatives.of(row, 3 * count))
        return self.rng.sample(best, min(count, len(best)))

    def _add(self, key: str) -> int:
        if key not in self.rows:
            self.rows[key] = len(self.texts)
            document = self.source.questions.documents[key]
            self.texts.append(self._cut(document.content))
        return self.rows[key]

    def _cut(self, text: str) -> str:
        limit = self.stage.max_document_tokens
        if len(text) < limit:  # a token has at least one character
            return text
        ids = self.encoder.plain(text)
        if len(ids) <= limit:
            return text
        cut: str = self.encoder.tokenizer.decode(ids[:limit])
        return cut.replace("\ufffd", "")

    def _lost(self, row: int) -> bool:
        """The answer stands in a part of the gold documents that was cut off."""
        question, documents = self._question(row), self.source.questions.documents
        answer = question.answers[0].lower()
        cut = any(answer in self.texts[self.rows[key]].lower() for key in question.gold)
        return not cut and any(answer in documents[key].content.lower() for key in question.gold)

    def _question(self, row: int) -> TrainingQuestion:
        return self.source.questions.questions[row]

    def _wrong(self, row: int, count: int) -> list[int]:
        """Documents of the step that do not answer the question, hard negatives first."""
        question = self._question(row)
        hard = [key for key in self.source.negatives.of(row, 12) if key in self.rows]
        self.rng.shuffle(hard)
        if len(hard) < count:
            others = [k for k in self.rows if k not in question.gold and k not in hard]
            hard += self.rng.sample(others, min(count - len(hard), len(others)))
        return [self.rows[key] for key in hard[:count]]

    def _reading(self, rows: Sequence[int]) -> Reading:
        return Reading(tuple((self.numbers[row], self.texts[row]) for row in rows))

    def _mixed(self, right: int, wrong: Sequence[int]) -> list[int]:
        """The right document mostly first, as routing would have it."""
        rows = list(wrong)
        at = 0 if self.rng.random() < 0.7 else self.rng.randint(0, len(rows))
        rows.insert(at, right)
        return rows

    def _begin(self, row: int, readings: Sequence[Sequence[int]]) -> Sample:
        context = self.encoder.context(
            self._question(row).question, [self._reading(rows) for rows in readings]
        )
        count = len(context.input_ids)
        sample = Sample(context, [IGNORED] * count, [0.0] * count, [])
        sample.read = [i for rows in readings for i in rows]
        return sample

    def _name(self, sample: Sample, rows: Sequence[int]) -> Sample:
        """The model goes on reading."""
        for row in rows:
            ids = self.encoder.number(self.numbers[row])
            sample.write(ids[:1], DECISION_WEIGHT)
            sample.write(ids[1:], NUMBER_WEIGHT)
        sample.write(self.encoder.written([]), DECISION_WEIGHT)
        sample.positives = list(rows) if self.source.settings.routes else []
        return sample

    def _route(self, row: int) -> Sample:
        """Round 1, for the routing loss: all gold documents are right."""
        sample = self._begin(row, [])
        sample.positives = [self.rows[key] for key in self._question(row).gold]
        return sample

    def _later(self, row: int) -> Sample | None:
        """Round 2, for the routing loss."""
        gold = [self.rows[key] for key in self._question(row).gold]
        if len(gold) > 1:
            wrong = self._wrong(row, 1) if self.rng.random() < 0.6 else []
            sample = self._begin(row, [self._mixed(gold[0], wrong)])
            sample.positives = gold[1:]
            return sample
        wrong = self._wrong(row, 2)
        if not wrong:
            return None
        sample = self._begin(row, [wrong])
        sample.positives = gold
        return sample

    def _readings(self, row: int) -> list[list[int]]:
        """Rounds that end with all gold documents read, some wrong ones among them."""
        gold = [self.rows[key] for key in self._question(row).gold]
        rng = self.rng
        if len(gold) == 1:
            kind = rng.random()
            if kind < 0.55:
                return [gold]
            if kind < 0.85:
                return [self._mixed(gold[0], self._wrong(row, 1))]
            if kind < 0.93:
                return [self._mixed(gold[0], self._wrong(row, 2))]
            wrong = self._wrong(row, 3)
            if len(wrong) < 3:
                return [self._mixed(gold[0], wrong)]
            return [wrong[:2], self._mixed(gold[0], wrong[2:])]
        # Of two hops the second is mostly found later; what stands side by side is read together.
        if rng.random() < (0.4 if self._question(row).hops > 1 else 0.85):
            return [list(gold)]
        wrong = self._wrong(row, 2)
        first = self._mixed(gold[0], wrong[:1]) if rng.random() < 0.6 else gold[:1]
        rest = gold[1:]
        return [first, [*rest, *wrong[1:2]] if rng.random() < 0.5 else rest]

    def _answered(self, row: int) -> Sample | None:
        """The last round: the retrieval ends, the question again, the answer, more questions."""
        if not self._question(row).answers or self._lost(row):
            return None
        sample = self._begin(row, self._readings(row))
        if sum(len(self.texts[i]) for i in sample.read) > 6 * self.stage.max_read_tokens:
            return None
        sample.write(self.encoder.retrieval_end(), DECISION_WEIGHT)
        self._answer(sample, row, known=True)
        for other, known in self._others(row, set(sample.read)):
            self._answer(sample, other, known=known)
        return sample

    def _others(self, row: int, read: set[int]) -> list[tuple[int, bool]]:
        """Further questions: those that the texts read answer, and some that they do not."""
        keys = [key for key, at in self.rows.items() if at in read]
        fitting = [
            i
            for key in keys
            for i in self.source.by_document.get(key, ())
            if i != row and set(self._question(i).gold) <= set(keys) and not self._lost(i)
        ]
        self.rng.shuffle(fitting)
        picked = [(i, True) for i in fitting[: self.stage.more_questions]]
        picked += [(i, False) for i in self._foreign(row, keys)]
        self.rng.shuffle(picked)
        return picked

    def _foreign(self, row: int, keys: Sequence[str]) -> list[int]:
        """Questions that what was read does not answer, those that it looks right for first."""
        hard = [i for key in keys for i in self.source.mistaken.get(key, ())]
        found = []
        for among in (hard, self.chosen):
            able = [
                i
                for i in dict.fromkeys(among)
                if i != row and not set(self._question(i).gold) & set(keys)
            ]
            if able and self.rng.random() < self.stage.foreign:
                found.append(self.rng.choice(able))
        return found

    def _answer(self, sample: Sample, row: int, *, known: bool) -> None:
        question = self._question(row)
        text = question.answers[0] if known else self.encoder.template.refusal
        sample.write_answer(self.encoder, question.question, text)

    def _named(self, row: int) -> Sample | None:
        """Round 1: all gold documents, one or several, and then no further one."""
        if not self.source.settings.routes:
            return None
        gold = [self.rows[key] for key in self._question(row).gold]
        return self._name(self._begin(row, []), gold[:MAX_NAMED])

    def _next(self, row: int) -> Sample | None:
        """A second hop: the first document is read, the others are to be found."""
        gold = [self.rows[key] for key in self._question(row).gold]
        if len(gold) < 2:
            return None
        wrong = self._wrong(row, 1) if self.rng.random() < 0.6 else []
        return self._name(self._begin(row, [self._mixed(gold[0], wrong)]), gold[1:])

    def _again(self, row: int) -> Sample | None:
        """What was read does not help: the model reads on."""
        wrong = self._wrong(row, 2)
        if not wrong:
            return None
        gold = [self.rows[key] for key in self._question(row).gold]
        return self._name(self._begin(row, [wrong]), gold[:1])

    def _refused(self, row: int) -> Sample | None:
        """What was read does not help, and there is nothing more: the refusal."""
        wrong = self._wrong(row, 4 if self.rng.random() < 0.25 else 2)
        if len(wrong) < 2:
            return None
        sample = self._begin(row, [wrong[i : i + 2] for i in range(0, len(wrong), 2)])
        sample.write(self.encoder.retrieval_end(), 0.0)  # the engine ends it
        self._answer(sample, row, known=False)
        return sample


def _tensor(values: Sequence[object]) -> Tensor:
    return torch.tensor(values)
