"""A memory that changes: facts whose documents are replaced or deleted.

Every question is about one document; all documents are seen by all questions. When a share of the
documents changes, every second of those is deleted and the others are replaced: a fact by the same
with another value, a document of the haystack by itself with a remark at its end. From then on the
new value is right, a deleted fact is to be refused, and what was right before is
`Question.wrong`. A larger share changes what a smaller one does, and more.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from msa.errors import InputError
from msa.evaluation.question_sets import Question, QuestionSet, hash_of
from msa.evaluation.tasks.base import Change, Changed, Request, Task
from msa.evaluation.tasks.beyond import METRIC, short_answer
from msa.evaluation.tasks.conflicts import SITES, attributes, draw_values
from msa.evaluation.tasks.haystacks import drawing, text_haystack
from msa.evaluation.tasks.words import Names
from msa.types import Document

NAME = "changing/facts"
FACT = "The {what} of the {site} is {value}."
ASKED = "What is the {what} of the {site}?"
REMARK = "This page was looked through once more."
UNCHANGED, REPLACED, DELETED = "unchanged", "replaced", "deleted"


def load(request: Request) -> QuestionSet:
    """Facts and a question about each, in real text."""
    hay = text_haystack(request)
    documents, questions, _ = _facts(request, hay)
    whole = (*hay, *documents)
    return QuestionSet(NAME, request.split, whole, questions, hash_of([*whole, *questions]))


def change(request: Request, share: float) -> Changed:
    """What happens to that share of the documents of `load`, and what is right then.

    Raises:
        InputError: the share is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise InputError(f"a share of {share} of the documents; expected 0 to 1")
    hay = text_haystack(request)
    documents, questions, later = _facts(request, hay)
    changed = [
        *_changes(hay, [replace(d, text=f"{d.text} {REMARK}") for d in hay], share),
        *_changes(documents, later, share),
    ]
    drawing(request, f"{NAME}/order").shuffle(changed)
    by_id = {one.id: one for one in changed}
    news = {document.id: _value(document) for document in later}
    return Changed(tuple(changed), tuple(_now(q, by_id, news) for q in questions))


def _facts(
    request: Request, hay: Sequence[Document]
) -> tuple[list[Document], tuple[Question, ...], list[Document]]:
    """Documents about what is not in the haystack, their questions, and what may replace them."""
    rng = drawing(request, NAME)
    names = Names(rng, (document.text for document in hay))
    documents, questions, later = [], [], []
    for number in range(request.count):
        what = rng.choice(attributes())
        site = f"{names.surname()} {rng.choice(SITES)}"
        old, new = draw_values(rng, what, 2)
        one = Document(f"fact-{number}", FACT.format(what=what, site=site, value=old))
        documents.append(one)
        later.append(replace(one, text=FACT.format(what=what, site=site, value=new)))
        text = ASKED.format(what=what, site=site)
        questions.append(Question(text, (old,), (one.id,), id=f"q{number}", kind=UNCHANGED))
    return documents, tuple(questions), later


def _changes(
    documents: Sequence[Document], later: Sequence[Document], share: float
) -> list[Change]:
    """A share of the documents, deleted and replaced by turns."""
    order = random.Random(len(documents)).sample(range(len(documents)), len(documents))
    return [
        Change(documents[row].id, None if turn % 2 else later[row])
        for turn, row in enumerate(order[: round(share * len(order))])
    ]


def _now(question: Question, changes: dict[str, Change], news: dict[str, str]) -> Question:
    (gold,) = question.gold
    if gold not in changes:
        return question
    if changes[gold].document is None:
        return replace(question, answers=(), gold=(), kind=DELETED, wrong=question.answers)
    return replace(question, answers=(news[gold],), kind=REPLACED, wrong=question.answers)


def _value(document: Document) -> str:
    return document.text.rpartition(" is ")[2].removesuffix(".")


TASKS: tuple[Task, ...] = (
    Task(
        NAME,
        "Facts of a memory whose documents are replaced and deleted",
        load,
        short_answer,
        METRIC,
        grows=True,
        change=change,
    ),
)
