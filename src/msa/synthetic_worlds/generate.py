"""Generates worlds."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Final

from msa.errors import InputError
from msa.synthetic_worlds.community import build_community
from msa.synthetic_worlds.compose import (
    compose_document,
    one_hop_questions,
    two_hop_questions,
)
from msa.synthetic_worlds.names import NameBook
from msa.synthetic_worlds.schema import Entity, World, WorldDocument, WorldQuestion

__all__ = ["COMMUNITY_SIZE", "generate_world", "iter_world_documents"]

COMMUNITY_SIZE: Final = 64


def _communities(
    seed: int,
    num_documents: int,
    breadth: float,
    split: str,
    *,
    taken: set[str] | None = None,
    avoid: frozenset[str] = frozenset(),
) -> Iterator[tuple[random.Random, list[Entity]]]:
    """Invent communities; without ``taken``, names are unique within each community only."""
    if num_documents < 0:
        raise InputError(f"num_documents={num_documents}: expected 0 or more")
    if not 0.0 <= breadth <= 1.0:
        raise InputError(f"breadth={breadth}: expected a number from 0 to 1")
    first = 0
    count = max(1, round(num_documents / COMMUNITY_SIZE))
    for index in range(count):
        last = num_documents * (index + 1) // count
        rng = random.Random(f"{seed}/{split}/{index}")
        names = NameBook(rng, split, set() if taken is None else taken, avoid)
        entities = build_community(rng, names, last - first, breadth) if last > first else []
        for offset, entity in enumerate(entities):
            entity.key = f"{entity.kind}-{first + offset}"
        yield rng, entities
        first = last


def _document(entity: Entity, rng: random.Random, breadth: float) -> WorldDocument:
    return WorldDocument(entity.key, entity.name, compose_document(entity, rng, breadth))


def generate_world(
    seed: int, num_documents: int, *, breadth: float = 1.0, split: str = "train"
) -> World:
    """Generate a world of invented documents and the questions that they answer.

    The same arguments give the same world. Entities refer only to entities of their own community
    of about 64 documents; titles are unique in the whole world.

    Args:
        seed: Seed of the randomness.
        num_documents: Number of documents.
        breadth: Variety of the language and of the relations, from 0 (about two phrases for each
            of a few relations) to 1 (everything).
        split: ``"train"``, or ``"test"`` for names that no training world contains.

    Returns:
        The world.

    Raises:
        InputError: an argument is out of range.
    """
    taken: set[str] = set()
    documents: list[WorldDocument] = []
    questions: list[WorldQuestion] = []
    for rng, entities in _communities(seed, num_documents, breadth, split, taken=taken):
        documents.extend(_document(entity, rng, breadth) for entity in entities)
        for entity in entities:
            questions.extend(one_hop_questions(entity, rng, breadth))
        questions.extend(two_hop_questions(entities, rng, breadth))
    return World(tuple(documents), tuple(questions))


def iter_world_documents(
    seed: int,
    num_documents: int,
    *,
    breadth: float = 1.0,
    split: str = "train",
    avoid: Iterable[str] = (),
) -> Iterator[WorldDocument]:
    """Generate documents one after the other in constant memory, for banks of any size.

    Args:
        seed: Seed of the randomness.
        num_documents: Number of documents.
        breadth: Variety of the language and of the relations, from 0 to 1.
        split: ``"train"`` or ``"test"``.
        avoid: Titles that no document may have, such as those of a world whose questions are
            asked of the bank. Titles are unique within each community of about 64 documents, but
            may recur in distant ones.

    Yields:
        The documents; their keys are unique.

    Raises:
        InputError: an argument is out of range.
    """
    for rng, entities in _communities(seed, num_documents, breadth, split, avoid=frozenset(avoid)):
        for entity in entities:
            yield _document(entity, rng, breadth)
