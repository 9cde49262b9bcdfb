"""Questions that share no content word with the passage that answers them (NoLiMa's idea).

"Who has been to Dresden?" is answered by "... rents two rooms right beside the Semper Opera.". The
passages and the questions are ours, in `data/no_shared_words.txt`. Three passages of the same kind
about other people stand beside the right one. Words of the question may well occur in the text
around, which misleads systems that match words.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from msa.evaluation.question_sets import Question
from msa.evaluation.tasks.base import Task
from msa.evaluation.tasks.beyond import beyond_task
from msa.evaluation.tasks.haystacks import Item, own
from msa.evaluation.tasks.words import Names, rows

KINDS = ("place", "trade", "condition")
PASSAGES = 4
PLACES_TOLD = (
    "{name} rents two rooms right beside {cue}.",
    "From the desk of {name} one looks straight at {cue}.",
    "Every morning {name} sweeps the pavement in front of {cue}.",
    "There is a snapshot of {name} eating cherries under {cue}.",
)
PLACES_ASKED = ("Who has been to {place}?", "Who has spent time in {place}?")


def story(number: int, rng: random.Random, names: Names) -> Iterator[Item]:
    """One question, and passages about four people."""
    kind = KINDS[number % len(KINDS)]
    drawn = rng.sample(rows("no_shared_words")[kind], PASSAGES)
    people = [names.person() for _ in drawn]
    asked, told = drawn[0]
    if kind == "place":
        asked = rng.choice(PLACES_ASKED).format(place=asked)
    texts = []
    for (_, told), name in zip(drawn, people, strict=True):
        passage = rng.choice(PLACES_TOLD).replace("{cue}", told) if kind == "place" else told
        texts.append(passage.format(name=name))
    order = rng.sample(range(PASSAGES), PASSAGES)
    documents = own(f"q{number}", (texts[i] for i in order))
    person = people[0]
    question = Question(
        asked,
        answers=(person, person.split()[-1]),
        gold=(documents[order.index(0)].id,),
        id=f"q{number}",
        kind=kind,
    )
    yield Item(question, tuple(documents))


TASKS: tuple[Task, ...] = (
    beyond_task("no_shared_words", "Questions that share no word with their passage", story),
)
