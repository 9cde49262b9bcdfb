"""What a task of the evaluation is: documents, questions about them, scores of answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msa.errors import MissingMaterialError
from msa.evaluation.metrics import exact_match, token_f1
from msa.evaluation.question_sets import Question, QuestionSet
from msa.types import Document

if TYPE_CHECKING:
    from msa.evaluation.systems import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is wanted of a task.

    Attributes:
        split: of the questions; "test" is never trained on.
        seed: of everything that is drawn.
        size: tokens of the haystack, for tasks that grow; 0 for none.
        count: questions, at most.
        texts: folder of text that haystacks are made of; None where a task brings its own.
        data: folder of question sets, or a folder in BEIR's format.
        count_tokens: tokens of a text, by the model's tokenizer.
    """

    count_tokens: Callable[[str], int]
    split: str = "test"
    seed: int = 0
    size: int = 0
    count: int = 100
    texts: Path | None = None
    data: Path | None = None

    def text_folder(self) -> Path:
        """The folder of text.

        Raises:
            MissingMaterialError: none was given.
        """
        if self.texts is None:
            raise MissingMaterialError(
                "this task hides its documents in real text; give --texts FOLDER"
            )
        return self.texts

    def data_folder(self) -> Path:
        """The folder of question sets.

        Raises:
            MissingMaterialError: none was given.
        """
        if self.data is None:
            raise MissingMaterialError("this task reads question sets; give --data FOLDER")
        return self.data


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a memory.

    Attributes:
        id: of the document.
        document: it is added or replaced by this one (of the same id); None deletes it.
    """

    id: str
    document: Document | None = None


@dataclass(frozen=True, slots=True)
class Changed:
    """A memory that changed, and what is right from then on.

    Attributes:
        changes: in the order in which they are made.
        questions: the same questions (of the same ids) with what is now right, and in `wrong` what
            was right before. A question whose fact was deleted has no answers.
    """

    changes: tuple[Change, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        name: such as "ruler/niah_single_1".
        title: a line for the report.
        load: documents and questions.
        score: figures of an answer by name, from 0 to 1; at least "score".
        metric: what "score" is, for the report.
        grows: whether the haystack has `Request.size` tokens.
        change: what happens when that share (0 to 1) of its documents changes; for tasks of a
            memory that changes. A share of 0 changes nothing.
        ranks: documents that a ranking lists, for tasks of retrieval alone; above 0 nothing is
            answered.
    """

    name: str
    title: str
    load: Callable[[Request], QuestionSet]
    score: Callable[[Question, Outcome], Mapping[str, float]]
    metric: str
    grows: bool = False
    change: Callable[[Request, float], Changed] | None = None
    ranks: int = 0


def answer_scores(question: Question, outcome: Outcome) -> dict[str, float]:
    """Exact match, F1 and, as the score, F1; without an answer a refusal is right."""
    if not question.answers:
        right = float(outcome.refused)
        return {"score": right, "em": right, "f1": right}
    f1 = token_f1(outcome.answer, question.answers)
    return {"score": f1, "em": exact_match(outcome.answer, question.answers), "f1": f1}
