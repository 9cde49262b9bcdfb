"""Writes the documents and the questions of a community."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from msa.synthetic_worlds.community import RELATIONS, article
from msa.synthetic_worlds.schema import Entity, WorldQuestion
from msa.synthetic_worlds.tables import connectives, phrases_about

__all__ = ["compose_document", "one_hop_questions", "render_question", "two_hop_questions"]

MAX_SENTENCES: Final = 6
_SLOT: Final = re.compile(r"\{(\w+)\}")
_PREDICATE: Final = re.compile(r"[a-z]|\{(is|has|works|plays|enjoys|holds)\}")
_LIVING: Final = {
    "is": "is",
    "has": "has",
    "works": "works",
    "plays": "plays",
    "enjoys": "enjoys",
    "holds": "holds",
}
_DEAD: Final = {
    "is": "was",
    "has": "had",
    "works": "worked",
    "plays": "played",
    "enjoys": "enjoyed",
    "holds": "held",
}
_PRONOUNS: Final = {
    "m": {"he": "he", "his": "his", "him": "him", "himself": "himself"},
    "f": {"he": "she", "his": "her", "him": "her", "himself": "herself"},
    "n": {"he": "it", "his": "its", "him": "it", "himself": "itself"},
}
# Second hops whose answer follows from the first document or repeats the starting point.
_SHORTCUTS: Final = frozenset(
    {
        ("father", "spouse"),
        ("mother", "spouse"),
        ("spouse", "spouse"),
        ("sibling", "sibling"),
        ("sibling", "father"),
        ("sibling", "mother"),
        ("twin_town", "twin_town"),
    }
)


@dataclass(frozen=True, slots=True)
class _Phrases:
    """The phrases of one kind of entity at one breadth."""

    intros: tuple[tuple[frozenset[str], str], ...]
    pairs: tuple[tuple[frozenset[str], str], ...]
    document: dict[str, tuple[str, ...]]
    predicates: dict[str, tuple[str, ...]]
    question: dict[str, tuple[str, ...]]
    nested_question: dict[str, tuple[str, ...]]
    links: dict[str, tuple[str, ...]]


def _share(phrases: tuple[str, ...], breadth: float, least: int = 2) -> tuple[str, ...]:
    """The part of a list of phrases that a breadth admits."""
    return phrases[: max(least, round(len(phrases) * breadth))]


def _needs(kind: str, phrase: str) -> frozenset[str]:
    """The relations that a phrase tells."""
    slots = {slot.removeprefix("a_") for slot in _SLOT.findall(phrase)}
    return frozenset(slots & RELATIONS[kind].keys())


@lru_cache(maxsize=64)
def _phrases(kind: str, breadth: float) -> _Phrases:
    every = phrases_about(kind)
    document = {name: _share(found, breadth) for name, found in every.document.items()}
    question = {name: _share(found, breadth) for name, found in every.question.items()}
    admitted = {name for name, least in RELATIONS[kind].items() if least <= breadth}

    def told(phrases: tuple[str, ...], least: int) -> tuple[tuple[frozenset[str], str], ...]:
        usable = tuple(phrase for phrase in phrases if _needs(kind, phrase) <= admitted)
        return tuple((_needs(kind, p), p) for p in _share(usable, breadth, least))

    return _Phrases(
        intros=told(every.intros, 4),
        pairs=told(every.pairs, 2) if breadth > 0.1 else (),
        document=document,
        predicates={
            name: tuple(phrase for phrase in found if _PREDICATE.match(phrase))
            for name, found in document.items()
        },
        question=question,
        nested_question={
            name: tuple(phrase for phrase in found if "{p}" not in phrase)
            for name, found in question.items()
        },
        links={name: _share(found, breadth) for name, found in every.links.items()},
    )


class _Writer:
    """Writes one document sentence by sentence."""

    def __init__(self, entity: Entity, rng: random.Random, breadth: float) -> None:
        self.entity = entity
        self.rng = rng
        self.breadth = breadth
        self.phrases = _phrases(entity.kind, breadth)
        self.sentences: list[str] = []
        self.last: tuple[str, ...] = ()
        self.after_filler = False
        tense = _DEAD if entity.words.get("dead") else _LIVING
        slots = {**tense, **_PRONOUNS[entity.gender], **entity.words, "N": entity.name}
        for name in entity.told:
            value = entity.values[name]
            slots[name] = value
            if name in ("occupation", "nationality", "genre"):
                slots["a_" + name] = article(value)
        self.slots = slots

    def _mention(self, named_only: bool) -> tuple[str, bool]:
        """Choose how to name the subject; also tells whether it is a pronoun."""
        entity, rng = self.entity, self.rng
        named = [entity.links[name] for name in self.last if name in entity.links]
        draw = rng.random()
        if entity.kind == "person":
            others = [other for other in named if other.kind == "person"]
            confusable = any(other.gender == entity.gender for other in others)
            if not (confusable or named_only or self.after_filler) and draw < 0.55:
                return self.slots["he"], True
            if draw > 0.85 or any(other.surname == entity.surname for other in others):
                return entity.name, False
            return entity.surname, False
        if any(other.kind == entity.kind for other in named) or draw < 0.25:
            return entity.name, False
        unclear = named_only or self.after_filler
        if unclear or any(other.kind != "person" for other in named) or draw < 0.6:
            return "the " + entity.words["type"], False
        return "it", True

    def _put(self, sentence: str, relations: tuple[str, ...]) -> None:
        self.sentences.append(sentence)
        self.last = relations
        self.after_filler = False

    def _name_subject(self, phrase: str = "") -> tuple[str, bool]:
        """Fill the slots of the subject in a way that suits a phrase."""
        mention, pronoun = self._mention("of {s}" in phrase)
        slots = self.slots
        possessive = slots["his"] if pronoun else mention + "'s"
        slots["s"], slots["p"] = mention, possessive
        slots["o"] = slots["him"] if pronoun else mention
        slots["S"] = mention[0].upper() + mention[1:]
        slots["P"] = possessive[0].upper() + possessive[1:]
        return mention, pronoun

    def _fill(self, phrase: str, relation: str) -> str:
        value = self.entity.values[relation]
        slots = self.slots
        slots["v"] = value
        if "{av}" in phrase:
            slots["av"] = article(value)
        return phrase.format_map(slots)

    def intro(self, left: list[str]) -> None:
        """Write the first sentence."""
        have = frozenset(left)
        options = [option for option in self.phrases.intros if option[0] <= have]
        if not options:
            relation = left.pop(0)
            self.slots["S"] = self.slots["s"] = self.slots["o"] = self.entity.name
            self.slots["P"] = self.slots["p"] = self.entity.name + "'s"
            phrase = self.rng.choice(self.phrases.predicates[relation])
            self._put(f"{self.entity.name} {self._fill(phrase, relation)}.", (relation,))
            return
        needs, phrase = self.rng.choice(options)
        self._put(phrase.format_map(self.slots), tuple(needs))
        left[:] = [name for name in left if name not in needs]

    def pair(self, left: list[str]) -> None:
        """Perhaps write a sentence that tells several facts at once."""
        have = frozenset(left)
        options = [option for option in self.phrases.pairs if option[0] <= have]
        if options:
            needs, phrase = self.rng.choice(options)
            self._name_subject(phrase)
            self._put(phrase.format_map(self.slots), tuple(needs))
            left[:] = [name for name in left if name not in needs]

    def single(self, relation: str) -> None:
        """Write a sentence about one fact."""
        rng = self.rng
        phrase = rng.choice(self.phrases.document[relation])
        mention, _ = self._name_subject(phrase)
        if not _PREDICATE.match(phrase):
            self._put(self._fill(phrase, relation), (relation,))
            return
        predicate = self._fill(phrase, relation)
        draw = rng.random() if self.breadth > 0.3 else 1.0
        if draw < 0.18:
            opener = rng.choice(connectives()["opener"])
            self._put(f"{opener} {mention} {predicate}.", (relation,))
        elif draw < 0.4:
            tail = rng.choice(connectives()["tail"])
            self._put(f"{self.slots['S']} {predicate}, {tail}.", (relation,))
        else:
            self._put(f"{self.slots['S']} {predicate}.", (relation,))

    def joined(self, first: str, second: str) -> None:
        """Write a sentence about two facts."""
        rng, entity = self.rng, self.entity
        _, pronoun = self._name_subject()
        subject = self.slots["S"]
        one = self._fill(rng.choice(self.phrases.predicates[first]), first)
        two = self._fill(rng.choice(self.phrases.predicates[second]), second)
        draw = rng.random() if self.breadth > 0.3 else 1.0
        link = entity.links.get(first)
        if draw < 0.25 and not pronoun:
            who = "who" if entity.kind == "person" else "which"
            sentence = f"{subject}, {who} {one}, {two}."
        elif draw < 0.5 and (link is None or link.kind != entity.kind):
            sentence = f"{subject} {one}, and {self.slots['he']} {two}."
        else:
            sentence = f"{subject} {one}{',' if ', ' in one else ''} and {two}."
        self._put(sentence, (first, second))

    def filler(self) -> None:
        """Write a sentence without facts."""
        filler = self.rng.choice(_share(phrases_about(self.entity.kind).filler, self.breadth, 3))
        if filler not in self.sentences:
            self._put(filler, ())
        self.after_filler = True

    def write(self) -> str:
        """Write the whole document."""
        rng, breadth = self.rng, self.breadth
        left = list(self.entity.told)
        if rng.random() < breadth:
            rng.shuffle(left)
            if rng.random() < 0.85:
                left.sort(key=lambda name: name.startswith("death"))
        self.intro(left)
        if rng.random() < 0.45:
            self.pair(left)
        fillers = self._count_fillers(len(left))
        if fillers and rng.random() < 0.4:
            fillers -= 1
            self.filler()
        room = MAX_SENTENCES - len(self.sentences) - fillers
        index = 0
        while index < len(left):
            rest = len(left) - index
            if rest >= 2 and (rest > room or rng.random() < 0.25) and self._joinable(left, index):
                self.joined(left[index], left[index + 1])
                index += 2
            else:
                self.single(left[index])
                index += 1
            room -= 1
        for _ in range(fillers):
            self.filler()
        return " ".join(self.sentences)

    def _joinable(self, left: list[str], index: int) -> bool:
        """Tell whether two facts fit in one sentence; may reorder the facts to make them fit."""
        first, second = left[index], left[index + 1]
        if first[:5] == second[:5] and first[:5] in ("birth", "death"):
            if len(left) == index + 2:
                return False
            left[index + 1], left[index + 2] = left[index + 2], second
            second = left[index + 1]
        predicates = self.phrases.predicates
        return bool(predicates[first] and predicates[second])

    def _count_fillers(self, facts: int) -> int:
        """Draw the number of sentences without facts."""
        room = MAX_SENTENCES - len(self.sentences) - (facts + 1) // 2
        wanted = self.rng.choice((0, 1, 1, 1, 2, 2) if self.breadth > 0.5 else (0, 1))
        return max(0, min(room, wanted))


def _compose_needle(entity: Entity, rng: random.Random, breadth: float) -> str:
    """Hide the facts of a needle among filler."""
    site = phrases_about("needle")
    facts = []
    for relation in entity.told:
        value = entity.values[relation]
        phrase = rng.choice(_share(site.document[relation], breadth))
        facts.append(phrase.format(n=entity.name, v=value, av=article(value)))
    filler = rng.sample(_share(site.filler, breadth, 8), rng.randint(2, 5))
    opening = rng.choice(_share(site.intros, breadth)).format(n=entity.name)
    sentences = [*facts, *filler[: MAX_SENTENCES - 1 - len(facts)]]
    rng.shuffle(sentences)
    return " ".join([opening, *sentences])


def compose_document(entity: Entity, rng: random.Random, breadth: float) -> str:
    """Write the document of an entity.

    Args:
        entity: An entity whose told facts are settled.
        rng: Source of randomness.
        breadth: From 0 (two phrases per relation) to 1 (all phrases).

    Returns:
        Two to six sentences; the first one contains the entity's name.
    """
    if entity.kind == "needle":
        return _compose_needle(entity, rng, breadth)
    return _Writer(entity, rng, breadth).write()


def render_question(
    entity: Entity, relation: str, rng: random.Random, breadth: float, subject: str | None = None
) -> str:
    """Ask for a relation of an entity.

    Args:
        entity: The entity asked about.
        relation: One of its relations.
        rng: Source of randomness.
        breadth: From 0 (two phrases per relation) to 1 (all phrases).
        subject: A description to use in place of the name, such as "the father of Ann Lee".

    Returns:
        The question.
    """
    if entity.kind == "needle":
        phrase = rng.choice(_share(phrases_about("needle").question[relation], breadth))
        return phrase.format(n=entity.name)
    phrases = _phrases(entity.kind, breadth)
    table = phrases.question if subject is None else phrases.nested_question
    slots = {**entity.words, "s": subject or entity.name, "p": entity.name + "'s"}
    question = rng.choice(table[relation]).format_map(slots)
    return question[0].upper() + question[1:]


def one_hop_questions(entity: Entity, rng: random.Random, breadth: float) -> list[WorldQuestion]:
    """Ask for everything that the document of an entity tells.

    Args:
        entity: An entity with a document.
        rng: Source of randomness.
        breadth: From 0 (two phrases per relation) to 1 (all phrases).

    Returns:
        One question for each told relation.
    """
    return [
        WorldQuestion(
            question=render_question(entity, relation, rng, breadth),
            answer=entity.values[relation],
            aliases=entity.aliases.get(relation, ()),
            gold=(entity.key,),
            relation=relation,
            hops=1,
        )
        for relation in entity.told
    ]


def two_hop_questions(
    entities: list[Entity], rng: random.Random, breadth: float
) -> list[WorldQuestion]:
    """Ask questions that need two documents, about as many as there are documents.

    Args:
        entities: The entities of a community, all with documents.
        rng: Source of randomness.
        breadth: From 0 (two phrases per relation) to 1 (all phrases).

    Returns:
        Questions with distinct pairs of entity and path.
    """
    paths = [
        (entity, link, relation)
        for entity in entities
        for link in entity.told
        if link in entity.links
        for relation in entity.links[link].told
        if (link, relation) not in _SHORTCUTS
    ]
    rng.shuffle(paths)
    questions: list[WorldQuestion] = []
    for entity, link, relation in paths:
        if len(questions) >= len(entities):
            break
        bridge = entity.links[link]
        answer = bridge.values[relation]
        links = _phrases(entity.kind, breadth).links[link]
        slots = {**entity.words, "e": entity.name, "t": bridge.words.get("type", "person")}
        subject = rng.choice(links).format_map(slots)
        text = render_question(bridge, relation, rng, breadth, subject)
        if bridge.name in text or answer in text:
            continue
        questions.append(
            WorldQuestion(
                question=text,
                answer=answer,
                aliases=bridge.aliases.get(relation, ()),
                gold=(entity.key, bridge.key),
                relation=f"{link}>{relation}",
                hops=2,
            )
        )
    return questions
