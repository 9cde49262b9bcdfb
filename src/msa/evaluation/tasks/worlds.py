"""Questions about invented people in a haystack of invented documents, of any size.

No model has seen these names, and no text has to be at hand: the scaling curve up to sizes for
which there is no real text.
"""

from __future__ import annotations

from dataclasses import replace

from msa.evaluation.question_answering import world_questions
from msa.evaluation.question_sets import QuestionSet, hash_of
from msa.evaluation.tasks.base import Request, Task, answer_scores
from msa.types import Document

WORLD_DOCUMENTS = 200
"""Of the world that is asked about: about 16K tokens."""
MOST_DOCUMENTS = 10_000_000
BREADTH = 0.15
KINDS = ("one hop", "two hops")


def load_worlds(request: Request) -> QuestionSet:
    """Half the questions take one document, half two; a larger haystack begins with a smaller."""
    from msa.synthetic_worlds import iter_world_documents

    half = max(1, request.count // 2)
    documents, *asked = world_questions(request.seed, WORLD_DOCUMENTS, half, breadth=BREADTH)
    questions = tuple(
        replace(question, id=f"{kind}/{i}", kind=kind)
        for kind, some in zip(KINDS, asked, strict=True)
        for i, question in enumerate(some)
    )
    left = request.size - sum(request.count_tokens(d.content) for d in documents)
    titles = {d.title for d in documents if d.title}
    others = iter_world_documents(
        request.seed + 1, MOST_DOCUMENTS, breadth=BREADTH, split="test", avoid=titles
    )
    for i, other in enumerate(others):
        document = Document(f"made-{i}", other.text, other.title)
        left -= request.count_tokens(document.content)
        if left < 0:
            break
        documents.append(document)
    digest = hash_of([*documents, *questions])
    return QuestionSet("worlds", request.split, tuple(documents), questions, digest)


TASKS = (
    Task(
        "curve/worlds",
        "questions about invented people in a haystack of invented documents",
        load_worlds,
        answer_scores,
        "F1",
        grows=True,
    ),
)
