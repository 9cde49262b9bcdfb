from __future__ import annotations

import random
import re
from itertools import islice

import pytest

from msa.training.worlds import (
    World,
    WorldQuestion,
    generate_world,
    is_held_out,
    iter_world_documents,
)
from msa.training.worlds import phrases_organisations as organisations
from msa.training.worlds import phrases_people as people
from msa.training.worlds import phrases_places as places
from msa.training.worlds import phrases_works as works
from msa.training.worlds.community import RELATIONS
from msa.training.worlds.compose import _PREDICATE
from msa.training.worlds.names import name_parts
from msa.training.worlds.needles import DOCUMENT as NEEDLE_DOCUMENT
from msa.training.worlds.needles import QUESTION as NEEDLE_QUESTION

WORLDS = [
    generate_world(seed, size, breadth=breadth, split=split)
    for seed, size, breadth, split in [
        (1, 64, 0.0, "train"),
        (2, 64, 0.4, "train"),
        (3, 640, 1.0, "train"),
        (4, 300, 1.0, "test"),
        (5, 7, 1.0, "train"),
    ]
]
MODULES = {"person": people, "place": places, "work": works, "organisation": organisations}


@pytest.fixture(params=range(len(WORLDS)))
def world(request: pytest.FixtureRequest) -> World:
    return WORLDS[request.param]


def shape(question: WorldQuestion, titles: list[str]) -> str:
    """The question with the name of its entity blanked out."""
    text = question.question
    for title in sorted(titles, key=len, reverse=True):
        text = text.replace(title, "X")
    return text


def test_the_same_seed_gives_the_same_world() -> None:
    assert generate_world(7, 100) == generate_world(7, 100)
    assert generate_world(7, 100) != generate_world(8, 100)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 10, 64, 65, 200])
def test_the_world_has_the_size_asked_for(size: int) -> None:
    world = generate_world(1, size)
    assert len(world.documents) == size


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="split"):
        generate_world(1, 10, split="validation")
    with pytest.raises(ValueError, match="breadth"):
        generate_world(1, 10, breadth=1.5)
    with pytest.raises(ValueError, match="num_documents"):
        generate_world(1, -1)


def test_keys_and_titles_are_unique(world: World) -> None:
    assert len({document.key for document in world.documents}) == len(world.documents)
    assert len({document.title for document in world.documents}) == len(world.documents)


def test_the_first_sentence_names_the_entity(world: World) -> None:
    for document in world.documents:
        position = document.text.find(document.title)
        assert 0 <= position < 90, document


def test_answers_are_substrings_of_the_last_gold_document(world: World) -> None:
    documents = {document.key: document for document in world.documents}
    for question in world.questions:
        assert question.hops == len(question.gold)
        assert question.answer
        assert question.answer in documents[question.gold[-1]].text, question
        assert len(question.answer.split()) <= 7, question


def test_questions_name_their_first_entity(world: World) -> None:
    documents = {document.key: document for document in world.documents}
    for question in world.questions:
        assert documents[question.gold[0]].title in question.question
        assert question.question[0].isupper()
        assert question.question[-1] in "?."


def test_two_hop_questions_need_the_first_document(world: World) -> None:
    documents = {document.key: document for document in world.documents}
    for question in world.questions:
        if question.hops == 2:
            first, second = (documents[key] for key in question.gold)
            assert first != second
            assert second.title in first.text
            assert second.title not in question.question
            assert question.answer not in question.question


def test_a_relation_of_an_entity_has_one_answer(world: World) -> None:
    answers: dict[tuple[str, str], str] = {}
    for question in world.questions:
        place = (question.gold[0], question.relation)
        assert answers.setdefault(place, question.answer) == question.answer


def test_symmetric_relations_agree() -> None:
    world = WORLDS[2]
    documents = {document.key: document.title for document in world.documents}
    for relation in ("spouse", "sibling", "twin_town"):
        pairs = {documents[q.gold[0]]: q.answer for q in world.questions if q.relation == relation}
        assert pairs
        assert all(pairs.get(other, name) == name for name, other in pairs.items())


def test_texts_are_well_formed(world: World) -> None:
    for document in world.documents:
        assert "{" not in document.text
        assert "  " not in document.text
        assert document.text.endswith(".")
        assert not re.search(r"\b[Aa] ([aeio]|[AIO]|E[^u])[a-z]", document.text), document.text
        assert not re.search(r"\b(to|for|of|that employed|gave) (he|she)\b", document.text)
        assert not re.search(r"\.\.|,,|, \.|,\.", document.text)
    for question in world.questions:
        assert "{" not in question.question
        assert not re.search(
            r"\b20(1[1-9]|[2-9]\d)\b", question.answer
        ) or question.relation not in (
            "year",
            "founding_year",
            "birth_date",
            "death_date",
        )


def test_there_are_enough_questions() -> None:
    world = WORLDS[2]
    two_hop = sum(question.hops == 2 for question in world.questions)
    assert two_hop >= 0.9 * len(world.documents)
    assert len(world.questions) - two_hop >= 4 * len(world.documents)
    assert {q.relation for q in world.questions if q.hops == 1} == {
        relation for relations in RELATIONS.values() for relation in relations
    }
    words = sum(len(document.text.split()) for document in world.documents)
    assert 45 <= words / len(world.documents) <= 65


def test_breadth_widens_the_language() -> None:
    counts = []
    for breadth in (0.0, 0.5, 1.0):
        world = generate_world(9, 320, breadth=breadth)
        titles = [document.title for document in world.documents]
        one_hop = [question for question in world.questions if question.hops == 1]
        counts.append(len({(q.relation, shape(q, titles)) for q in one_hop}))
    assert counts[0] * 2 < counts[1] < counts[2]
    assert counts[0] <= 100


def test_every_relation_has_many_phrases() -> None:
    for kind, relations in RELATIONS.items():
        document = NEEDLE_DOCUMENT if kind == "needle" else MODULES[kind].DOCUMENT
        question = NEEDLE_QUESTION if kind == "needle" else MODULES[kind].QUESTION
        assert document.keys() == relations.keys() == question.keys()
        for relation in relations:
            assert len(set(document[relation])) >= 12, relation
            assert len(set(question[relation])) >= 8, relation
            if kind != "needle":
                assert any(_PREDICATE.match(phrase) for phrase in document[relation][:2])
                assert any("{p}" not in phrase for phrase in question[relation][:2])


def test_test_names_are_never_seen_in_training() -> None:
    train, test = name_parts("train"), name_parts("test")
    for part in ("surnames", "stems", "words", "adjectives", "nouns", "rare_male", "rare_female"):
        assert not set(getattr(train, part)) & set(getattr(test, part)), part
        assert len(getattr(test, part)) >= 5, part
    trained = {document.title for document in generate_world(11, 1000).documents}
    tested = {document.title for document in generate_world(11, 1000, split="test").documents}
    assert not trained & tested
    for document in generate_world(12, 300, split="test").documents:
        if document.key.startswith("person"):
            assert is_held_out(document.title.split()[-1])
    for document in generate_world(12, 300).documents:
        if document.key.startswith("person"):
            assert not is_held_out(document.title.split()[-1])


@pytest.mark.parametrize("split", ["train", "test"])
def test_ten_thousand_documents_have_unique_titles(split: str) -> None:
    world = generate_world(13, 10_000, split=split)
    assert len({document.title for document in world.documents}) == 10_000


def test_documents_can_be_streamed() -> None:
    stream = iter_world_documents(14, 1_000_000)
    first = list(islice(stream, 500))
    assert len({document.key for document in first}) == 500
    assert first == list(islice(iter_world_documents(14, 1_000_000), 500))
    avoid = {document.title for document in first}
    second = list(islice(iter_world_documents(14, 1_000_000, avoid=avoid), 500))
    assert not avoid & {document.title for document in second}


def test_aliases_are_other_forms_of_the_answer() -> None:
    questions = [question for question in WORLDS[2].questions if question.aliases]
    assert {"birth_date", "population"} <= {question.relation for question in questions}
    for question in random.Random(0).sample(questions, 50):
        assert question.answer not in question.aliases
