"""Question sets: real questions over real documents, read from a folder.

A folder holds `corpus.jsonl.gz` (or `corpus.jsonl`) with rows {id, title, text}, and for every
split `questions.SPLIT.jsonl.gz` with rows {id, question, answers, gold, ...}: `gold` lists the ids
of the documents that are needed, `answers` the accepted answers.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    id: str = ""


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Documents and the questions about them.

    Attributes:
        name: of the folder.
        split: that the questions are of.
        documents: the whole corpus, in the order of the file.
        questions: in the order of the file, or as drawn.
        data_hash: sha256 (16 hex digits) of the two files' contents.
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


def read_question_set(
    folder: str | Path,
    split: str | None = None,
    *,
    count: int | None = None,
    seed: int = 0,
    title_hints: bool = False,
) -> QuestionSet:
    """Read a folder of the schema above.

    Args:
        folder: of the set.
        split: such as "dev"; by default "dev", or else "test".
        count: questions drawn, at most; by default all, in the order of the file.
        seed: of the draw.
        title_hints: put a row's `title_hint`, where it has one, in front of its question (for sets
            whose questions do not say what they are about).

    Raises:
        InputError: a file is missing or damaged, or a row is not valid; the message names the line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of a question set")
    corpus = _file(folder, "corpus")
    if split is None:
        splits = [s for s in EVALUATION_SPLITS if _paths(folder, f"questions.{s}")]
        if not splits:
            raise InputError(f"{folder}: no questions of {EVALUATION_SPLITS}; name the split")
        split = splits[0]
    source = _file(folder, f"questions.{split}")
    contents = {path: _content(path) for path in (corpus, source)}
    documents = _documents(corpus, contents[corpus])
    known = {document.id for document in documents}
    questions = [
        _question(row, known, where, title_hints) for where, row in _rows(source, contents[source])
    ]
    _check_unique([q.id for q in questions], source)
    if not questions:
        raise InputError(f"{source}: holds no questions")
    if count is not None and count < len(questions):
        questions = random.Random(seed).sample(questions, count)
    digest = hashlib.sha256()
    for content in contents.values():
        digest.update(hashlib.sha256(content).digest())
    return QuestionSet(
        folder.resolve().name, split, tuple(documents), tuple(questions), digest.hexdigest()[:16]
    )


def _paths(folder: Path, stem: str) -> list[Path]:
    names = (f"{stem}.jsonl.gz", f"{stem}.jsonl")
    return [folder / name for name in names if (folder / name).is_file()]


def _file(folder: Path, stem: str) -> Path:
    if found := _paths(folder, stem):
        return found[0]
    there = sorted(p.name for p in folder.glob("*.jsonl*"))
    raise InputError(
        f"{folder}: no {stem}.jsonl.gz; a question set holds corpus.jsonl.gz and "
        f"questions.SPLIT.jsonl.gz, and this folder holds {', '.join(there) or 'neither'}"
    )


def _documents(path: Path, content: bytes) -> list[Document]:
    documents = []
    for where, row in _rows(path, content):
        title = row.get("title")
        for name in ("id", "text"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise InputError(f"{where}: {name} is {row.get(name)!r}; expected a text")
        if title is not None and not isinstance(title, str):
            raise InputError(f"{where}: title is {title!r}; expected a text or null")
        documents.append(Document(id=row["id"], text=row["text"], title=title or None))
    _check_unique([document.id for document in documents], path)
    if not documents:
        raise InputError(f"{path}: holds no documents")
    return documents


def _question(row: dict[str, Any], known: set[str], where: str, title_hints: bool) -> Question:
    for name in ("id", "question"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise InputError(f"{where}: {name} is {row.get(name)!r}; expected a text")
    for name in ("answers", "gold"):
        values = row.get(name)
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise InputError(f"{where}: {name} is {values!r}; expected a list of texts")
    strangers = [i for i in row["gold"] if i not in known]
    if strangers:
        raise InputError(f"{where}: gold document {strangers[0]!r} is not in the corpus")
    if row["answers"] and not row["gold"]:
        raise InputError(f"{where}: has answers and no gold; name the documents that hold them")
    hint = row.get("title_hint")
    text = f"{hint}: {row['question']}" if title_hints and hint else row["question"]
    return Question(text, tuple(row["answers"]), tuple(row["gold"]), row["id"])


def _check_unique(ids: Sequence[str], path: Path) -> None:
    seen: set[str] = set()
    for i in ids:
        if i in seen:
            raise InputError(f"{path}: id {i!r} is given twice; ids must be unique")
        seen.add(i)


def _content(path: Path) -> bytes:
    """What a file holds, unpacked."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); get it anew") from error


def _rows(path: Path, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a row stands ("FILE, line 3"), and the row."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: no JSON ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected a JSON object")
        yield f"{path}, line {number}", row
