"""A folder in BEIR's format, read directly: `corpus.jsonl`, `queries.jsonl`, `qrels/SPLIT.tsv`."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msa.errors import InputError
from msa.evaluation.question_sets import Question, QuestionSet
from msa.types import Document

HEADER = "query-id\tcorpus-id\tscore"


@dataclass(frozen=True, slots=True)
class BeirSet:
    """Documents, queries, and how relevant which is to which.

    Attributes:
        questions: the queries that have a relevant document; their gold documents are these.
        grades: question id -> document id -> how relevant it is, above 0.
    """

    questions: QuestionSet
    grades: Mapping[str, Mapping[str, float]]


def is_beir(folder: Path) -> bool:
    """Whether a folder has documents and queries."""
    return all(list(folder.glob(f"{name}.jsonl*")) for name in ("corpus", "queries"))


def read_beir(
    folder: Path, split: str = "test", *, count: int | None = None, seed: int = 0
) -> BeirSet:
    """Read a folder, one split of it.

    Args:
        folder: with `corpus.jsonl`, `queries.jsonl` (or packed, `.jsonl.gz`) and `qrels`.
        split: a file of `qrels`.
        count: queries drawn, at most; by default all.
        seed: of the draw.

    Raises:
        InputError: a file is missing, or a line is not valid; the message names it.
    """
    documents = {
        key: Document(key, _text(row, "text", where), row.get("title") or None)
        for where, key, row in _rows(folder, "corpus")
    }
    texts = {key: _text(row, "text", where) for where, key, row in _rows(folder, "queries")}
    grades = _grades(folder / "qrels" / f"{split}.tsv", documents, texts)
    ids = [key for key in texts if grades.get(key)]
    if not ids:
        raise InputError(f"{folder}: no query has a relevant document in qrels/{split}.tsv")
    digest = hashlib.sha256(repr((list(documents.items()), texts, grades)).encode())
    if count is not None and count < len(ids):
        ids = random.Random(seed).sample(ids, count)
    questions = tuple(Question(texts[i], (), tuple(grades[i]), i) for i in ids)
    found = QuestionSet(
        folder.resolve().name, split, tuple(documents.values()), questions, digest.hexdigest()[:16]
    )
    return BeirSet(found, grades)


def _rows(folder: Path, name: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """`FILE:LINE`, the `_id` and the object of every line."""
    paths = [p for p in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz") if p.is_file()]
    if not paths:
        raise InputError(f"{folder}: holds no {name}.jsonl; expected a folder in BEIR's format")
    seen: set[str] = set()
    for where, line in _lines(paths[0]):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not valid JSON ({error})") from error
        key = row.get("_id") if isinstance(row, dict) else None
        if not isinstance(key, str) or not key:
            raise InputError(f"{where}: expected an object with a text as _id")
        if key in seen:
            raise InputError(f"{where}: the _id {key!r} was used before; ids are unique")
        seen.add(key)
        yield where, key, row


def _grades(
    path: Path, documents: Mapping[str, Document], texts: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.tsv"))
        raise InputError(
            f"{path}: no such file; the splits there are: {', '.join(there) or 'none'}"
        )
    found: dict[str, dict[str, float]] = {}
    for where, line in _lines(path):
        if line == HEADER:
            continue
        try:
            query, document, grade = line.split("\t")
            value = float(grade)
        except ValueError:
            raise InputError(
                f"{where}: {line[:60]!r}; expected query-id, corpus-id and score between tabs"
            ) from None
        if query not in texts or document not in documents:
            name = f"query {query!r}" if query not in texts else f"document {document!r}"
            raise InputError(f"{where}: there is no {name}; add it or delete the line")
        if value > 0:
            found.setdefault(query, {})[document] = value
    return found


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """`FILE:LINE` and the text of every line that is not blank."""
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line.rstrip("\r\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {key} is {value!r:.40}; expected a text")
    return value
