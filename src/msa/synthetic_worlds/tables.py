"""Word lists and phrases of the synthetic worlds, read once from the files in `data/`.

`words.json` has lists of words. `KIND.txt` has the phrases about one kind of entity, a section
each for the first sentence (`intro`), for several facts at once (`pair`), for no fact (`filler`),
and for every relation as a statement (`document`), a question (`question`) and the target of a
link in a two-hop question (`link`). Earlier phrases are the plainer ones: a narrow world uses the
first of each section only.

Slots of a phrase: `{N}` the full name, `{S}`/`{s}` the subject, `{P}`/`{p}` its possessive,
`{o}` the object form; `{he}`, `{his}`, `{him}`, `{himself}` pronouns; `{is}`, `{has}`, `{works}`,
`{plays}`, `{enjoys}`, `{holds}` verbs in the tense that suits; `{v}` the value and `{av}` with its
indefinite article; the name of a relation, or of one of the entity's own words (`{type}`,
`{maker}`, `{spouse_word}`), stands for its value, and with `a_` for that with its article. In a
link `{e}` is the first entity and `{t}` the type of the target; in phrases about sites `{n}` is the
name. A statement that begins with a lower-case word or a verb's slot is a predicate: it follows a
subject and can be joined to another one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

__all__ = ["Phrases", "connectives", "pairs", "phrases_about", "words", "words_by_type"]

Table = dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Phrases:
    """The phrases about one kind of entity, each tuple from plain to elaborate.

    Attributes:
        intros: First sentences.
        pairs: Sentences that tell several facts.
        filler: Sentences without facts.
        document: Relation -> sentences or predicates.
        question: Relation -> questions.
        links: Relation -> noun phrases for the entity that it leads to.
    """

    intros: tuple[str, ...]
    pairs: tuple[str, ...]
    filler: tuple[str, ...]
    document: Table
    question: Table
    links: Table


def _read(name: str) -> str:
    return (files("msa.synthetic_worlds") / "data" / name).read_text(encoding="utf-8")


def _sections(name: str) -> Table:
    """A text file as its sections: `# name` opens one, every other line is a phrase."""
    table: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, _read(name).splitlines())):
        if line.startswith("#"):
            table[section := line.removeprefix("#").strip()] = []
        else:
            table[section].append(line)
    return {title: tuple(lines) for title, lines in table.items()}


@cache
def phrases_about(kind: str) -> Phrases:
    """The phrases about a kind: `person`, `place`, `work`, `organisation` or `needle`."""
    sections = _sections(f"{kind}.txt")

    def by_relation(part: str) -> Table:
        start = part + " "
        return {
            title.removeprefix(start): lines
            for title, lines in sections.items()
            if title.startswith(start)
        }

    return Phrases(
        intros=sections["intro"],
        pairs=sections.get("pair", ()),
        filler=sections["filler"],
        document=by_relation("document"),
        question=by_relation("question"),
        links=by_relation("link"),
    )


@cache
def connectives() -> Table:
    """What goes around a predicate: `opener` before the subject, `tail` at the end."""
    return _sections("connectives.txt")


@cache
def _lists() -> dict[str, Any]:
    lists: dict[str, Any] = json.loads(_read("words.json"))
    return lists


@cache
def words(name: str) -> tuple[str, ...]:
    """A list of words or short phrases."""
    return tuple(_lists()[name])


def words_by_type(name: str) -> Table:
    """Lists of words by the type of a work or an organisation: type -> words."""
    return {kind: tuple(values) for kind, values in _lists()[name].items()}


def pairs(name: str) -> tuple[tuple[str, str], ...]:
    """A list of pairs, such as countries with their adjectives."""
    return tuple((first, second) for first, second in _lists()[name])
