"""Question sets on disk: documents, and questions with their answers and gold documents.

A set is a folder with `corpus.jsonl.gz` (id, title, text) and a file of questions (question,
answers, gold, ...), as `docs/training.md` describes them. Every line is checked; a fault is one
line that names the file, the line and what was expected.
"""

from __future__ import annotations

import difflib
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from msa.errors import InputError
from msa.types import Document

CORPUS_FILE = "corpus.jsonl.gz"
QUESTION_FILES = ("questions.train.jsonl.gz", "questions.all.jsonl.gz")

OnError = Literal["raise", "skip"]

_DOCUMENT_KEYS = ("id", "title", "text", "metadata")
_QUESTION_KEYS = (
    *("id", "question", "answers", "gold", "hops", "unanswerable", "context_doc"),
    *("history", "rewrite", "scenario", "story", "title_hint", "evidence", "answer_kind"),
)
# Keys of known sets that are spelt almost like one that is read, and mean something else.
_OTHER_KEYS = ("evidences", "answerability")


@dataclass(frozen=True, slots=True)
class TrainingQuestion:
    """A question with what is right.

    Attributes:
        id: as stored; `FILE:LINE` where the row has none.
        question: as it is asked: the scenario or the story's title in front, where there is one.
        answers: accepted answers, the first is the one to learn; empty where none is known.
        gold: ids of the documents needed, in reading order where the set knows one.
        hops: steps of reasoning, at least the 1 that finds a document; 0 when unanswerable.
        unanswerable: no document of the set answers it; `gold` is empty.
        context: ids of documents that an unanswerable question was asked about.
        history: earlier turns of a conversation, oldest first.
        rewrite: the question made independent of its history.
        scenario, story: what `question` begins with.
        title_hint: title of the document that the asker had in mind; not part of `question`.
        evidence: sentences that decide the answer.
        answer_kind: "" for short answers, else as the set names it ("sentence", "long").
    """

    id: str
    question: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    hops: int = 1
    unanswerable: bool = False
    context: tuple[str, ...] = ()
    history: tuple[str, ...] = ()
    rewrite: str | None = None
    scenario: str | None = None
    story: str | None = None
    title_hint: str | None = None
    evidence: tuple[str, ...] = ()
    answer_kind: str = ""


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Documents and the questions asked of them.

    Attributes:
        name: the folder's name.
        documents: id -> document, in the file's order. Empty for sets that teach rewriting only.
        questions: in the file's order.
        skipped: one line for everything that was left out (only with `on_error="skip"`).
    """

    name: str
    documents: Mapping[str, Document]
    questions: tuple[TrainingQuestion, ...]
    skipped: tuple[str, ...] = ()

    @classmethod
    def load(
        cls, folder: str | Path, questions: str | None = None, *, on_error: OnError = "raise"
    ) -> QuestionSet:
        """Read and check a folder.

        Args:
            folder: holds `corpus.jsonl.gz` and the questions; both may be uncompressed (`.jsonl`).
            questions: file name; by default `questions.train.jsonl.gz`, or
                `questions.all.jsonl.gz` in a set without splits.
            on_error: "raise", or "skip" to leave out faulty lines and name them in `skipped`.

        Raises:
            InputError: a file is missing or damaged, or (unless skipped) a line is faulty.
        """
        folder = Path(folder)
        faults = _Faults(on_error)
        documents: dict[str, Document] = {}
        for where, row in _rows(_find(folder, (CORPUS_FILE,)), _DOCUMENT_KEYS, faults):
            try:
                document = _document(row)
                if document.id in documents:
                    raise _Fault(f"the document id {document.id!r} was used before; ids are unique")
                documents[document.id] = document
            except _Fault as fault:
                faults.add(where, fault)
        path = _find(folder, (questions,) if questions else QUESTION_FILES)
        kept = []
        for where, row in _rows(path, _QUESTION_KEYS, faults):
            try:
                kept.append(_question(row, documents, where))
            except _Fault as fault:
                faults.add(where, fault)
        if not kept:
            raise InputError(f"{path}: holds no usable question; expected one JSON object a line")
        return cls(folder.name, documents, tuple(kept), tuple(faults.lines))


class _Fault(Exception):  # noqa: N818 - never leaves this file
    """What is wrong with one line."""


class _Faults:
    """Raises the first fault, or collects all of them."""

    def __init__(self, on_error: OnError) -> None:
        if on_error not in ("raise", "skip"):
            raise InputError(f"on_error={on_error!r}: expected 'raise' or 'skip'")
        self.on_error = on_error
        self.lines: list[str] = []

    def add(self, where: str, fault: _Fault) -> None:
        if self.on_error == "raise":
            raise InputError(f"{where}: {fault}") from None
        self.lines.append(f"{where}: {fault}")


def _find(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of these files that is there, compressed or not."""
    for name in names:
        for candidate in (folder / name, folder / name.removesuffix(".gz")):
            if candidate.is_file():
                return candidate
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one with {CORPUS_FILE}")
    there = sorted(p.name for p in folder.iterdir() if ".jsonl" in p.name)
    raise InputError(
        f"{folder}: holds no {' or '.join(names)}; the JSONL files there are: "
        f"{', '.join(there) or 'none'}"
    )


def _rows(
    path: Path, keys: tuple[str, ...], faults: _Faults
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """`FILE:LINE` and the object of every line that is not blank."""
    checked: set[str] = set()
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                where = f"{path}:{number}"
                try:
                    yield where, _object(line, keys, checked)
                except _Fault as fault:
                    faults.add(where, fault)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}:{number + 1}: cannot be read ({error}); copy or make the file again"
        ) from error


def _object(line: bytes, keys: tuple[str, ...], checked: set[str]) -> Mapping[str, Any]:
    """The object of a line, its keys checked for slips of the pen.

    Other keys than `keys` are allowed and unread, unless they look like one that is absent.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _Fault(f"not valid JSON ({error}); expected one object a line") from None
    if not isinstance(row, dict):
        raise _Fault(f"a JSON {type(row).__name__}; expected an object")
    if not checked.issuperset(row):
        for key in row.keys() - checked - set(keys) - set(_OTHER_KEYS):
            near = difflib.get_close_matches(key, [k for k in keys if k not in row], 1, 0.75)
            if near:
                raise _Fault(f"unknown key {key!r}; did you mean {near[0]!r}?")
        checked |= row.keys()
    return row


def _document(row: Mapping[str, Any]) -> Document:
    title = _text(row, "title", required=False)
    return Document(_text(row, "id") or "", _text(row, "text") or "", title or None)


def _question(
    row: Mapping[str, Any], documents: Mapping[str, Document], where: str
) -> TrainingQuestion:
    text = _text(row, "question") or ""
    answers, gold, context = _texts(row, "answers"), _texts(row, "gold"), _texts(row, "context_doc")
    unanswerable = row.get("unanswerable", bool(context) and not answers and not gold)
    if not isinstance(unanswerable, bool):
        raise _Fault(f"unanswerable is {unanswerable!r}; expected true or false")
    if unanswerable and gold:
        raise _Fault(f"unanswerable, but gold names {gold[0]!r}; leave one of them out")
    if not gold and not unanswerable and documents:
        raise _Fault("gold is empty; name the documents needed, or set unanswerable to true")
    for key in (*gold, *context):
        if key not in documents:
            raise _Fault(f"the document {key!r} is not in the corpus; add it or correct the id")
    hops = row.get("hops")
    if hops is not None and (not isinstance(hops, int) or hops < 0):
        raise _Fault(f"hops is {hops!r}; expected a whole number")
    scenario, story = _text(row, "scenario", required=False), _text(row, "story", required=False)
    if scenario:
        text = f"{scenario} {text}"
    if story:
        text = f"{story}: {text}"
    return TrainingQuestion(
        id=_text(row, "id", required=False) or where,
        question=text,
        answers=answers,
        gold=tuple(dict.fromkeys(gold)),
        hops=0 if unanswerable else hops or max(len(gold), 1),
        unanswerable=unanswerable,
        context=context,
        history=_texts(row, "history"),
        rewrite=_text(row, "rewrite", required=False),
        scenario=scenario,
        story=story,
        title_hint=_text(row, "title_hint", required=False),
        evidence=_texts(row, "evidence"),
        answer_kind=_text(row, "answer_kind", required=False) or "",
    )


def _text(row: Mapping[str, Any], key: str, *, required: bool = True) -> str | None:
    value = row.get(key)
    if value is None and not required:
        return None
    if not isinstance(value, str) or (required and not value.strip()):
        given = repr(value)[:60] if key in row else "missing"
        raise _Fault(f"{key} is {given}; expected a text")
    return value


def _texts(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = row.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise _Fault(f"{key} is {value!r:.60}; expected a list of texts")
    return tuple(value)
