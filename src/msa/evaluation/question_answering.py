"""Questions about generated worlds, and how many are routed, named and answered right."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from msa.errors import InputError
from msa.evaluation.metrics import exact_match, mean, recall, token_f1
from msa.evaluation.question_sets import Question
from msa.types import Answer, Document

if TYPE_CHECKING:
    from msa.inference.engine import MemoryEngine


@dataclass(frozen=True, slots=True)
class QAFigures:
    """Figures over a set of questions; shares from 0 to 1.

    Attributes:
        questions: how many were asked.
        routed: the first gold document is among those that some routing layer selected in round 1.
        routed_all: every gold document was selected by some layer in some round.
        named: the first document read is the first gold document.
        named_all: every gold document was read.
        exact_match, f1: of the answers.
        seconds_per_question: wall time, asked in batches.
    """

    questions: int
    routed: float
    routed_all: float
    named: float
    named_all: float
    exact_match: float
    f1: float
    seconds_per_question: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def ask_all(
    engine: MemoryEngine,
    questions: Sequence[Question],
    *,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> tuple[QAFigures, list[Answer]]:
    """Ask every question and score the answers.

    Args:
        engine: over the bank that holds the gold documents.
        questions: at least one.
        progress: called with the number of questions answered so far.
        **options: of `MemoryEngine.ask`.
    """
    if not questions:
        raise InputError("no questions were given; give at least one")
    answers: list[Answer] = []
    began = time.perf_counter()
    for start in range(0, len(questions), 16):
        batch = [q.text for q in questions[start : start + 16]]
        answers += engine.ask(batch, **options)
        if progress is not None:
            progress(len(answers))
    seconds = (time.perf_counter() - began) / len(questions)
    return score(questions, answers, seconds), answers


def score(
    questions: Sequence[Question], answers: Sequence[Answer], seconds_per_question: float = 0.0
) -> QAFigures:
    """Figures of answers that were given to questions.

    Args:
        questions: what was asked.
        answers: one for each question.
        seconds_per_question: as measured; the times in the answers are those of whole batches.
    """
    routed, routed_all, named, named_all = [], [], [], []
    for question, answer in zip(questions, answers, strict=True):
        rounds = [
            {entry.id for layer in round_.routed.values() for entry in layer}
            for round_ in answer.rounds
        ]
        read = [citation.id for citation in answer.citations]
        seen = set().union(*rounds) if rounds else set()
        routed.append(float(bool(rounds) and question.gold[0] in rounds[0]))
        routed_all.append(float(recall(sorted(seen), question.gold) == 1.0))
        named.append(float(read[:1] == [question.gold[0]]))
        named_all.append(float(recall(read, question.gold) == 1.0))
    pairs = list(zip(questions, answers, strict=True))
    return QAFigures(
        questions=len(questions),
        routed=mean(routed),
        routed_all=mean(routed_all),
        named=mean(named),
        named_all=mean(named_all),
        exact_match=mean([exact_match(a.text, q.answers) for q, a in pairs]),
        f1=mean([token_f1(a.text, q.answers) for q, a in pairs]),
        seconds_per_question=seconds_per_question,
    )


def world_questions(
    seed: int, num_documents: int, per_kind: int, *, breadth: float = 1.0
) -> tuple[list[Document], list[Question], list[Question]]:
    """A generated world that no training run has seen: held-out names, another seed.

    Args:
        seed: of the world and of the draw.
        num_documents: documents of the world, all of them for the bank.
        per_kind: one-hop and two-hop questions drawn, at most.
        breadth: of the language.

    Returns:
        Documents, one-hop questions, two-hop questions.
    """
    from msa.synthetic_worlds import generate_world

    world = generate_world(seed, num_documents, breadth=breadth, split="test")
    documents = [Document(id=d.key, text=d.text, title=d.title) for d in world.documents]
    rng = random.Random(seed)
    by_hops: dict[int, list[Question]] = {1: [], 2: []}
    for q in world.questions:
        by_hops[len(q.gold)].append(Question(q.question, (q.answer, *q.aliases), q.gold))
    one, two = (rng.sample(qs, min(per_kind, len(qs))) for qs in by_hops.values())
    return documents, one, two
