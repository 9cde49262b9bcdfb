"""Data types of the synthetic worlds."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class WorldDocument:
    """A short text about one invented entity.

    Attributes:
        key: Identifier, unique within the world, such as ``"person-12"``.
        title: The full name of the entity; the first sentence of the text contains it.
        text: The text, usually two to six sentences.
    """

    key: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class WorldQuestion:
    """A question about a world with its answer and the documents that hold it.

    Attributes:
        question: The question; it names one entity by its full name.
        answer: An exact substring of the text of the last gold document.
        aliases: Other accepted answers.
        gold: Document keys in reading order, one for each hop.
        relation: The relation asked for; the hops of a path are joined by ``>``.
        hops: Number of documents that have to be read in turn (1 or 2).
    """

    question: str
    answer: str
    aliases: tuple[str, ...]
    gold: tuple[str, ...]
    relation: str
    hops: int


@dataclass(frozen=True, slots=True)
class World:
    """A set of documents with the questions that they answer."""

    documents: tuple[WorldDocument, ...]
    questions: tuple[WorldQuestion, ...]


@dataclass(slots=True, eq=False)
class Entity:
    """An invented thing before it is written down.

    Attributes:
        kind: One of ``person``, ``place``, ``work``, ``organisation``, ``needle``.
        name: Full name.
        gender: ``m`` or ``f`` for people, ``n`` for everything else.
        year: Year of birth, of founding or of completion (0 where it has none).
        key: Document key; empty for an entity without a document of its own.
        words: Kind-dependent words for the phrase tables (``type``, ``maker`` and so on).
        values: Surface form of every fact that may be told.
        aliases: Other accepted surface forms of a value.
        links: The entities that some of the facts name.
        told: The relations that the document tells, in no particular order.
    """

    kind: str
    name: str
    gender: str = "n"
    year: int = 0
    key: str = ""
    words: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    links: dict[str, Entity] = field(default_factory=dict)
    told: tuple[str, ...] = ()

    @property
    def surname(self) -> str:
        """The last word of the name."""
        return self.name.rsplit(" ", 1)[-1]

    def link(self, relation: str, other: Entity) -> None:
        """Record that ``relation`` of this entity is ``other``."""
        self.links[relation] = other
        self.values[relation] = other.name
