"""Tasks that are folders of --data: question answering, its scaling curve, retrieval (BEIR).

Every folder with `corpus.jsonl.gz` and a held-out split of questions is the task `qa/NAME`: its
whole corpus is the memory. The same questions in a haystack of a given size are `curve/NAME`. A
folder in BEIR's format is `beir/NAME`: documents are ranked, and nothing is answered.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from msa.errors import InputError
from msa.evaluation.beir import is_beir, read_beir
from msa.evaluation.metrics import ndcg
from msa.evaluation.question_sets import Question, QuestionSet, hash_of, read_question_set
from msa.evaluation.tasks.base import Request, Task, answer_scores
from msa.evaluation.tasks.haystacks import DOCUMENT_TOKENS, text_haystack

if TYPE_CHECKING:
    from msa.evaluation.systems import Outcome

HELD_OUT = ("test", "dev")
UNANSWERABLE_EVERY = 5
"""One more question without an answer is asked for so many that have one."""
BEIR_DEPTH = 100
NUMBERS = ("no", "one", "two", "three", "four")


def folder_tasks(data: Path) -> tuple[Task, ...]:
    """Tasks of a folder of question sets, or of one that is a set itself.

    Raises:
        InputError: there is no set in it.
    """
    if not data.is_dir():
        raise InputError(f"{data}: no such folder; --data takes a folder of question sets")
    folders = [data] if _is_set(data) else sorted(p for p in data.iterdir() if _is_set(p))
    found: list[Task] = []
    for folder in folders:
        name = folder.resolve().name
        if is_beir(folder):
            found.append(BeirTask(folder).task(name))
        elif any(_has(folder, split) for split in HELD_OUT):
            found.append(
                Task(
                    f"qa/{name}",
                    f"questions about the whole corpus of {name}",
                    partial(load_answers, folder),
                    answer_scores,
                    "F1",
                )
            )
            found.append(
                Task(
                    f"curve/{name}",
                    f"questions of {name} in a haystack of real text",
                    partial(load_curve, folder),
                    answer_scores,
                    "F1",
                    grows=True,
                )
            )
    if not found:
        raise InputError(
            f"{data}: holds no set with a split {' or '.join(HELD_OUT)}; expected folders with "
            "corpus.jsonl.gz and questions.dev.jsonl.gz, or in BEIR's format"
        )
    return tuple(found)


def held_out(folder: Path, split: str) -> str:
    """The split asked for; "dev" in a set that has no "test"."""
    return "dev" if split == "test" and not _has(folder, split) else split


def load_answers(folder: Path, request: Request) -> QuestionSet:
    """Questions over the whole corpus of a set, a few without an answer among them.

    Those are of the file `questions.SPLIT_unanswerable`, where there is one; else some questions
    are asked a second time without their gold documents.
    """
    found = _questions(folder, request)
    count = max(1, len(found.questions) // UNANSWERABLE_EVERY)
    more: list[Question] = []
    if all(question.answers for question in found.questions):
        name = f"{found.split}_unanswerable"
        if _has(folder, name):
            drawn = read_question_set(folder, name, count=count, seed=request.seed)
            more = [
                replace(q, id=f"{q.id}/unanswerable", kind="no answer") for q in drawn.questions
            ]
        else:
            more = [
                replace(
                    q, id=f"{q.id}/hidden", answers=(), gold=(), hidden=q.gold, kind="taken out"
                )
                for q in found.questions[:count]
            ]
    return replace(found, questions=(*found.questions, *more))


def load_curve(folder: Path, request: Request) -> QuestionSet:
    """The same questions in `request.size` tokens: their gold documents, the rest of the corpus
    in an order drawn by the seed, and then text of `request.texts`.

    A larger haystack begins with the documents of a smaller one. The gold documents are all there,
    also where they are more than the size.
    """
    found = _questions(folder, request)
    gold = {i for question in found.questions for i in question.gold}
    first = [d for d in found.documents if d.id in gold]
    others = [d for d in found.documents if d.id not in gold]
    random.Random(request.seed).shuffle(others)
    left = request.size - sum(request.count_tokens(d.content) for d in first)
    for document in others:
        left -= request.count_tokens(document.content)
        if left < 0:
            break
        first.append(document)
    if left > DOCUMENT_TOKENS:
        taken = {d.id for d in first}
        texts = text_haystack(replace(request, size=left))
        first += [d for d in texts if d.id not in taken]
    documents = tuple(first)
    return replace(
        found,
        name=f"{found.name} in {request.size} tokens",
        documents=documents,
        data_hash=hash_of([*documents, *found.questions]),
    )


class BeirTask:
    """Ranking the documents of a folder in BEIR's format.

    Args:
        folder: of the set.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._grades: Mapping[str, Mapping[str, float]] = {}

    def task(self, name: str) -> Task:
        """As one of the registry."""
        title = f"documents of {name} found, in BEIR's format"
        return Task(f"beir/{name}", title, self.load, self.score, "nDCG@10", ranks=BEIR_DEPTH)

    def load(self, request: Request) -> QuestionSet:
        """The queries with their relevant documents."""
        split = request.split
        if split == "test" and not (self._folder / "qrels" / "test.tsv").is_file():
            split = "dev"
        found = read_beir(self._folder, split, count=request.count, seed=request.seed)
        self._grades = found.grades
        return found.questions

    def score(self, question: Question, outcome: Outcome) -> dict[str, float]:
        """BEIR's figures of a ranking, of a set that was loaded."""
        grades = self._grades[question.id]
        found = {
            f"recall@{k}": len(set(outcome.ranked[:k]) & set(grades)) / len(grades)
            for k in (1, 10, BEIR_DEPTH)
        }
        best = ndcg(outcome.ranked, grades, 10)
        return {"score": best, "ndcg@10": best, **found}


def _questions(folder: Path, request: Request) -> QuestionSet:
    split = held_out(folder, request.split)
    found = read_question_set(folder, split, count=request.count, seed=request.seed)
    questions = tuple(replace(q, kind=_kind(q)) for q in found.questions)
    return replace(found, questions=questions)


def _kind(question: Question) -> str:
    if not question.answers:
        return "no answer"
    count = len(question.gold)
    number = NUMBERS[count] if count < len(NUMBERS) else str(count)
    return f"{number} document" + ("" if count == 1 else "s")


def _is_set(folder: Path) -> bool:
    return folder.is_dir() and bool(_first(folder, "corpus"))


def _has(folder: Path, split: str) -> bool:
    return bool(_first(folder, f"questions.{split}"))


def _first(folder: Path, name: str) -> Path | None:
    names = (f"{name}.jsonl.gz", f"{name}.jsonl")
    return next((folder / n for n in names if (folder / n).is_file()), None)
