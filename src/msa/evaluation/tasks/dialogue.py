"""Memory of conversations in several sessions: what was said, by whom, when, what changed since.

Two people talk in eight sessions on different days; a session is a document. The questions of one
conversation share its documents. What changed in a later session is asked as it is now, and the
earlier value is `Question.wrong`; what was never said is to be refused. Sentences are in
`data/dialogue.txt`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from msa.evaluation.question_sets import Question
from msa.evaluation.tasks.base import Task
from msa.evaluation.tasks.beyond import beyond_task
from msa.evaluation.tasks.haystacks import Item, own
from msa.evaluation.tasks.words import Names, draw_dates, rows, say_date

SESSIONS = 8
TALK = 3
"""Sentences that say nothing, by each in every session."""
KINDS = ("what was said", "who said it", "when", "changed", "never said")
TITLE = "Conversation of {day} between {one} and {other}"


class Conversation:
    """Sessions that are being filled, and questions about them.

    Args:
        number: of the conversation.
        rng: source.
        people: full names of the two.
    """

    def __init__(self, number: int, rng: random.Random, people: tuple[str, str]) -> None:
        self.number, self.rng, self.people = number, rng, people
        self.days = [say_date(day) for day in draw_dates(rng, SESSIONS)]
        talk = [line for (line,) in rows("dialogue")["talk"]]
        self._turns = [
            [(i % 2, line) for i, line in enumerate(rng.sample(talk, 2 * TALK))] for _ in self.days
        ]
        self._asked: list[tuple[Question, tuple[int, ...]]] = []

    def tell(self, who: int, said: str, session: int) -> None:
        """One of them says something, anywhere in a session."""
        turns = self._turns[session]
        turns.insert(self.rng.randint(0, len(turns)), (who, said))

    def ask(
        self,
        kind: str,
        text: str,
        *answers: str,
        needs: tuple[int, ...] = (),
        wrong: tuple[str, ...] = (),
    ) -> None:
        """A question, and the sessions that are needed."""
        self._asked.append((Question(text, answers, (), kind=kind, wrong=wrong), needs))

    def any_session(self) -> int:
        """One of the sessions."""
        return self.rng.randrange(SESSIONS)

    def items(self) -> Iterator[Item]:
        """The questions, with all sessions as their documents."""
        one, other = self.people
        titles = [TITLE.format(day=day, one=one, other=other) for day in self.days]
        short = [name.split()[0] for name in self.people]
        texts = ["\n".join(f"{short[who]}: {said}" for who, said in turns) for turns in self._turns]
        documents = tuple(own(f"c{self.number}", texts, titles))
        for i, (question, needs) in enumerate(self._asked):
            gold = tuple(documents[session].id for session in needs)
            yield Item(replace(question, id=f"c{self.number}.{i}", gold=gold), documents)


def story(number: int, rng: random.Random, names: Names) -> Iterator[Item]:
    """One conversation, and a question of each kind about it."""
    one, other = names.first_names(2)
    people = f"{one} {names.surname()}", f"{other} {names.surname()}"
    conversation = Conversation(number, rng, people)
    said, said_by, dated, never = rng.sample(rows("dialogue")["facts"], 4)
    _ask_what(conversation, said)
    _ask_who(conversation, said_by)
    _ask_when(conversation, dated)
    _ask_now(conversation, rng.choice(rows("dialogue")["changes"]))
    who = rng.randrange(2)
    conversation.ask(KINDS[4], never[5].format(who=people[who]))
    yield from conversation.items()


def _ask_what(conversation: Conversation, row: tuple[str, ...]) -> None:
    """What one said; the other said the like."""
    who = conversation.rng.randrange(2)
    value, others = conversation.rng.sample(row[6].split(", "), 2)
    session = conversation.any_session()
    conversation.tell(who, row[1].format(value=value), session)
    conversation.tell(1 - who, row[1].format(value=others), conversation.any_session())
    text = row[2].format(who=conversation.people[who])
    conversation.ask(KINDS[0], text, value, needs=(session,))


def _ask_who(conversation: Conversation, row: tuple[str, ...]) -> None:
    """Which of them said something."""
    who, session = conversation.rng.randrange(2), conversation.any_session()
    value, others = conversation.rng.sample(row[6].split(", "), 2)
    conversation.tell(who, row[1].format(value=value), session)
    conversation.tell(1 - who, row[1].format(value=others), conversation.any_session())
    one, other = conversation.people
    name = conversation.people[who]
    text = f"In the conversations of {one} and {other}, {row[3].format(value=value)}"
    conversation.ask(KINDS[1], text, name, *name.split(), needs=(session,))


def _ask_when(conversation: Conversation, row: tuple[str, ...]) -> None:
    """On which day a speaker said something."""
    who, session = conversation.rng.randrange(2), conversation.any_session()
    value = conversation.rng.choice(row[6].split(", "))
    conversation.tell(who, row[1].format(value=value), session)
    name, listener = conversation.people[who], conversation.people[1 - who]
    text = f"On which day did {name} tell {listener} about {row[4]}?"
    conversation.ask(KINDS[2], text, conversation.days[session], needs=(session,))


def _ask_now(conversation: Conversation, row: tuple[str, ...]) -> None:
    """What holds since a speaker said that it changed."""
    who = conversation.rng.randrange(2)
    old, new = conversation.rng.sample(row[4].split(", "), 2)
    before, after = sorted(conversation.rng.sample(range(SESSIONS), 2))
    conversation.tell(who, row[1].format(value=old), before)
    conversation.tell(who, row[2].format(value=new), after)
    text = row[3].format(who=conversation.people[who])
    conversation.ask(KINDS[3], text, new, needs=(after,), wrong=(old,))


TASKS: tuple[Task, ...] = (
    beyond_task("dialogue", "Memory of conversations in several sessions", story),
)
