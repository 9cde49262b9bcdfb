"""Training steps as a map-style dataset: step i is made from the seed and i alone.

So a resumed run sees the very steps that an uninterrupted one would have seen.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from msa.errors import TrainingError
from msa.synthetic_worlds import World, WorldDocument, WorldQuestion, generate_world
from msa.training.config import RealData, Stage, TokenizerSettings
from msa.training.samples import SampleBuilder


class RealWorlds:
    """Real documents and questions, dealt out as worlds."""

    def __init__(self, folders: Sequence[str]) -> None:
        """Read the training questions of every folder and the documents.

        Raises:
            TrainingError: a file is missing; the message says which.
        """
        self.sets = [_QuestionSet(Path(folder)) for folder in folders]

    def __bool__(self) -> bool:
        return bool(self.sets)

    def world(self, rng: random.Random, num_documents: int, max_words: int) -> World:
        """Some questions with their gold documents, filled up with other documents."""
        return rng.choice(self.sets).world(rng, num_documents, max_words)


class _QuestionSet:
    def __init__(self, folder: Path) -> None:
        self.documents = {
            row["id"]: (row.get("title") or "", row["text"])
            for row in read_jsonl(folder / "corpus.jsonl.gz", "id", "text")
        }
        self.ids = list(self.documents)
        self.questions = [
            row
            for row in read_jsonl(folder / "questions.train.jsonl.gz", "question")
            if row.get("answers") and 1 <= len(row.get("gold") or ()) <= 2
        ]
        if not self.questions:
            raise TrainingError(
                f"{folder / 'questions.train.jsonl.gz'}: no question has answers and one or two "
                "gold documents; remove the folder under real_data"
            )
        self.by_document: dict[str, list[int]] = {}
        for index, row in enumerate(self.questions):
            self.by_document.setdefault(row["gold"][-1], []).append(index)
        self.golds = sorted(self.by_document)

    def world(self, rng: random.Random, num_documents: int, max_words: int) -> World:
        documents: dict[str, WorldDocument] = {}
        questions = []
        for gold in rng.sample(self.golds, min(num_documents // 3, len(self.golds))):
            for index in self.by_document[gold][:6]:
                row = self.questions[index]
                made = self._question(row, documents, num_documents, max_words)
                if made is not None:
                    questions.append(made)
        while len(documents) < min(num_documents, len(self.ids)):
            key = rng.choice(self.ids)
            documents.setdefault(key, self._document(key, "", max_words))
        return World(tuple(documents.values()), tuple(questions))

    def _question(
        self,
        row: Mapping[str, Any],
        documents: dict[str, WorldDocument],
        num_documents: int,
        max_words: int,
    ) -> WorldQuestion | None:
        gold = tuple(row["gold"])
        if any(key not in self.documents for key in gold):
            return None
        if len(documents.keys() | set(gold)) > num_documents:
            return None
        answer = str(row["answers"][0])
        for key in gold:
            if key not in documents:
                documents[key] = self._document(key, answer, max_words)
        if answer not in documents[gold[-1]].text:
            return None
        return WorldQuestion(
            question=row["question"],
            answer=answer,
            aliases=tuple(row["answers"][1:]),
            gold=gold,
            relation="real",
            hops=len(gold),
        )

    def _document(self, key: str, answer: str, max_words: int) -> WorldDocument:
        """The title and a stretch of the text, around the answer when it is long."""
        title, text = self.documents[key]
        words = re.findall(r"\S+\s*", text)
        start = 0
        if len(words) > max_words and answer in text:
            start = max(0, len(text[: text.index(answer)].split()) - max_words // 2)
            start = min(start, len(words) - max_words)
        text = "".join(words[start : start + max_words]).strip()
        return WorldDocument(key=key, title=title, text=f"{title}. {text}" if title else text)


def read_jsonl(path: Path, *fields: str) -> Iterator[dict[str, Any]]:
    """Rows of a gzipped JSONL file, all of which must have these fields.

    Raises:
        TrainingError: the file cannot be read, or a row lacks a field.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if not isinstance(row, dict) or not row.keys() >= set(fields):
                    raise ValueError(f"line {number}: expected an object with {list(fields)}")
                yield row
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise TrainingError(
            f"{path}: cannot be read ({error}); correct or remove it under real_data"
        ) from error


def tokenizer_texts(settings: TokenizerSettings, real: RealData, seed: int) -> Iterator[str]:
    """Texts that the tokenizer is trained on: generated worlds, then real texts."""
    for index in range(settings.worlds):
        world = generate_world(seed + 10_000_019 + index, 64, breadth=1.0)
        yield from (document.text for document in world.documents)
        yield from (f"{q.question} {q.answer}" for q in world.questions)
    paths = [Path(p) for p in real.texts] + [Path(p) / "corpus.jsonl.gz" for p in real.questions]
    for path in paths:
        left = settings.text_characters
        for row in read_jsonl(path, "text"):
            if left <= 0:
                break
            left -= len(row["text"])
            yield row["text"]


class StepDataset(Dataset[dict[str, object]]):
    """The steps of one stage."""

    def __init__(
        self,
        stage: Stage,
        builder: SampleBuilder,
        real: RealWorlds,
        seed: int,
        processes: int = 1,
    ) -> None:
        """`processes` share the steps of the stage: each has so many of its own."""
        self.stage, self.processes = stage, processes
        self.builder = builder
        self.real = real
        self.seed = seed
        if stage.world.real > 0 and not real:
            raise TrainingError(
                f"stage {stage.name!r} has world.real={stage.world.real}, but real_data.questions "
                "names no folders; name some, or set it to 0"
            )

    def __len__(self) -> int:
        return self.stage.steps * self.processes

    def __getitem__(self, index: int) -> dict[str, object]:
        rng = random.Random(f"{self.seed}/{self.stage.name}/{index}")
        world = self._world(rng, index)
        stage = self.stage
        return self.builder.step(world, rng, stage.world, stage.samples, stage.losses)

    def _world(self, rng: random.Random, index: int) -> World:
        settings = self.stage.world
        if rng.random() < settings.real:
            words = settings.max_document_tokens * 2 // 3
            return self.real.world(rng, settings.documents, words)
        first, last = settings.breadth[0], settings.breadth[-1]
        breadth = first + (last - first) * index / max(len(self) - 1, 1)
        return generate_world(rng.getrandbits(48), settings.documents, breadth=breadth)
