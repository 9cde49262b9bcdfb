"""The demo's documents, its questions, and what must come of them.

A folder of this package holds `documents.jsonl` (id, title, text) and `questions.jsonl`, a row per
step in the order in which they are shown:

| key | |
|---|---|
| `step` | "ask"; or "add", "update" or "delete": the memory changes first |
| `question` | asked then |
| `answers` | accepted answers, the first is the one shown; empty where a refusal is right |
| `cited` | ids of the documents that the answer must cite, in reading order |
| `refused` | true: the answer must be that the memory does not hold it, and cite nothing; false: it must be one of `answers`; null: anything |
| `document` | what is added, or takes the place of the document of its id |
| `deleted` | id of the document that is deleted |
| `never` | what the answer may not say any more |
| `source` | where the question comes from |
"""  # noqa: E501 - a table

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from msa.errors import InputError
from msa.evaluation.metrics import exact_match, normalize_answer
from msa.text.prompts import PromptTemplate
from msa.types import Answer, Document

FOLDERS = ("real", "worlds")
KINDS = ("ask", "add", "update", "delete")


@dataclass(frozen=True, slots=True)
class Step:
    """A question, what happens to the memory before it, and what must come of it.

    Attributes:
        kind: one of `KINDS`.
        question: asked after the change.
        answers, cited, refused, document, deleted, never: as the head of this file says.
    """

    kind: str
    question: str
    answers: tuple[str, ...] = ()
    cited: tuple[str, ...] = ()
    refused: bool | None = False
    document: Document | None = None
    deleted: str | None = None
    never: tuple[str, ...] = ()

    def difference(self, answer: Answer, template: PromptTemplate) -> str | None:
        """What differs from what must come of it, in a few words; None if nothing does.

        Args:
            answer: to this question.
            template: of the model; it knows how a refusal reads.
        """
        said = f"'{answer.text}'"
        for old in self.never:
            if f" {normalize_answer(old)} " in f" {normalize_answer(answer.text)} ":
                return f"{said} holds '{old}', which is not true any more"
        if self.refused:
            if not is_refused(answer, template):
                return f"{said}, where no document answers it"
            if answer.citations:
                return f"refused, but {answer.citations[0].id} is cited"
        elif self.refused is False:
            if exact_match(answer.text, self.answers) < 1:
                return f"{said} instead of '{self.answers[0]}'"
            missing = sorted(set(self.cited) - {citation.id for citation in answer.citations})
            if missing:
                return f"{said} is right, but {missing[0]} is not cited"
        return None


@dataclass(frozen=True, slots=True)
class Material:
    """What the demo works on.

    Attributes:
        documents: in the memory from the start.
        steps: in the order in which they are shown.
    """

    documents: tuple[Document, ...]
    steps: tuple[Step, ...]


def is_refused(answer: Answer, template: PromptTemplate) -> bool:
    """Whether an answer is that the memory does not hold one."""
    from msa.evaluation.reader import is_refusal

    return answer.stopped == "not_found" or is_refusal(answer.text, template)


def load_material(name: str) -> Material:
    """Documents and steps that ship with the package.

    Args:
        name: one of `FOLDERS`.

    Raises:
        InputError: they are missing or damaged.
    """
    folder = resources.files("msa") / "demo" / name
    try:
        documents = _rows((folder / "documents.jsonl").read_text(encoding="utf-8"))
        steps = _rows((folder / "questions.jsonl").read_text(encoding="utf-8"))
        return Material(tuple(map(_document, documents)), tuple(map(step_of_row, steps)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the demo's documents cannot be read ({error}); install the package again"
        ) from error


def step_of_row(row: Mapping[str, Any]) -> Step:
    """A step as it stands in `questions.jsonl`.

    Raises:
        ValueError, KeyError, TypeError: the row is not what the head of this file says.
    """
    document = row.get("document")
    step = Step(
        kind=row["step"],
        question=row["question"],
        answers=tuple(row["answers"]),
        cited=tuple(row["cited"]),
        refused=row["refused"],
        document=None if document is None else _document(document),
        deleted=row.get("deleted"),
        never=tuple(row.get("never", ())),
    )
    needed = {"ask": True, "delete": step.deleted is not None}
    if step.kind not in KINDS or not needed.get(step.kind, step.document is not None):
        raise ValueError(f"step {step.kind!r} of {step.question!r} is not complete")
    if step.refused is False and not step.answers:
        raise ValueError(f"{step.question!r} has no answer")
    return step


def _rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n") if line]  # splitlines knows more ends


def _document(row: Mapping[str, Any]) -> Document:
    return Document(id=row["id"], text=row["text"], title=row.get("title"))
