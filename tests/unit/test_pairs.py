"""Pairs made from texts alone: every query leads to its passage, and the seed decides all."""

from __future__ import annotations

import gzip
import json
import random

import pytest

from msa.errors import ConfigError, InputError
from msa.training.pairs import make_pairs, read_documents, split_passages
from msa.training.questions import question_from, sentences
from msa.training.router_settings import PairSettings
from msa.types import Document

TEXT = (
    "The fortress of Halden was built in 1661 by Erik Watts. He had 1,200 soldiers in Norway! "
    'Timber from the forests was sold to England for many years. "It is a fine town," Dr. A. Lie '
    "wrote in his diary after the visit. The railway station has been open since 1879."
)


def passages(count: int = 40) -> list[Document]:
    texts = [TEXT.replace(".", f" of town {i}.").replace("!", f" {i}!") for i in range(count)]
    return [Document(f"d{i}", text, f"Town {i}") for i, text in enumerate(texts)]


def made(seed: int = 0, **settings: float):
    return make_pairs(passages(), seed=seed, settings=PairSettings(**settings))


def test_every_query_has_a_gold_document_of_the_set():
    pairs = made()
    assert len(pairs.documents) == 40
    assert pairs.questions
    for question in pairs.questions:
        assert question.gold
        assert set(question.gold) <= set(pairs.documents)
    assert len({q.id for q in pairs.questions}) == len(pairs.questions)


def test_a_sentence_that_is_asked_is_taken_out_of_its_passage_as_often_as_wanted():
    for removed in (0.0, 1.0):
        pairs = made(removed=removed, question=0, title=0)
        assert len(pairs.questions) == 40
        for question in pairs.questions:
            text = " ".join(pairs.documents[question.gold[0]].text.split())
            assert (question.question in text) == (removed == 0)
            assert len(text.split()) > 20


def test_what_would_be_asked_of_two_passages_in_the_same_words_is_not_asked():
    twins = [Document("a", TEXT), Document("b", TEXT), *passages(1)]
    found = make_pairs(twins, settings=PairSettings(question=0, title=0))
    golds = [q.gold[0] for q in found.questions]
    texts = [q.question for q in found.questions]
    assert "d0" in golds
    assert len(set(texts)) == len(texts)


def test_a_title_that_is_asked_does_not_stand_in_front_of_its_passage():
    pairs = made(title=1, sentence=0, question=0)
    assert {q.question for q in pairs.questions} == {f"Town {i}" for i in range(40)}
    assert all(d.title is None for d in pairs.documents.values())


def test_a_title_with_several_passages_leads_to_all_and_one_with_many_to_none():
    def of_title(count: int) -> list[tuple[str, ...]]:
        documents = [Document(str(i), TEXT, "The town of Halden") for i in range(count)]
        found = make_pairs(documents, settings=PairSettings(title=1, question=0))
        return [q.gold for q in found.questions if q.question == "The town of Halden"]

    assert of_title(3) == [("0", "1", "2")]
    assert of_title(9) == []


def test_a_markdown_heading_counts_as_a_title():
    document = Document("a", f"# Halden and its fortress\n\n{TEXT}")
    found = make_pairs([document], settings=PairSettings(title=1, question=0, sentence=0))
    assert found.questions[0].question == "Halden and its fortress"
    assert "# Halden" not in found.documents["a"].text


def test_the_seed_decides_everything():
    assert made(seed=1) == made(seed=1)
    assert made(seed=1) != made(seed=2)
    some = make_pairs(passages(), seed=1, limit=10)
    assert len(some.documents) == 10
    assert some == make_pairs(passages(), seed=1, limit=10)


def test_a_short_passage_is_a_distractor_and_texts_without_sentences_are_refused():
    short = Document("short", "See above.")
    pairs = make_pairs([*passages(2), short])
    assert "short" in pairs.documents
    assert all("short" not in q.gold for q in pairs.questions)
    with pytest.raises(InputError, match="no pairs can be made from 1 passages"):
        make_pairs([short])
    with pytest.raises(ConfigError, match="removed: expected 1"):
        PairSettings(removed=2)


def test_long_documents_are_cut_into_parts_named_as_in_a_bank():
    parts = list(split_passages([Document("a", f"{TEXT}\n\n{TEXT}", "T"), Document("b", TEXT)], 60))
    assert [p.id for p in parts] == ["a#1", "a#2", "b"]
    assert parts[0].title == "T"
    assert all(len(p.text.split()) <= 60 for p in parts)


def test_what_gives_no_document_is_named(tmp_path):
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write(json.dumps({"id": "a", "title": "T", "text": TEXT}) + "\n{}\n")
    documents, failures = read_documents([tmp_path])
    assert [d.id for d in documents] == ["a"]
    assert len(failures) == 1
    assert "x.jsonl.gz:2" in failures[0]


def test_sentences_stand_as_in_the_text():
    found = sentences('Dr. A. Lie came on 3.5. He left! "Why?" she asked\nof him.\n\nNo one knew')
    assert found[0] == "Dr. A. Lie came on 3.5."
    assert found[1] == "He left!"
    assert found[-1] == "No one knew"
    assert sentences("一つ。二つ。") == ["一つ。", "二つ。"]
    assert all(s in " ".join(TEXT.split()) for s in sentences(TEXT))
    assert sentences("") == []


def all_of(sentence: str) -> set[tuple[str, str]]:
    found = (question_from(sentence, random.Random(i)) for i in range(40))
    return {f for f in found if f}


def test_questions_ask_for_who_when_where_how_many_and_what():
    assert all_of("Erik Watts was born near Halden in 1661.") == {
        ("Who was born near Halden in 1661?", "Erik Watts"),
        ("When was Erik Watts born near Halden?", "1661"),
        ("Where was Erik Watts born in 1661?", "Halden"),
    }
    assert ("How many soldiers did the fortress of Halden held at that time?", "1,200") in all_of(
        "The fortress of Halden held 1,200 soldiers at that time."
    )
    assert ("What was the old fortress of Halden?", "a ruin") in all_of(
        "The old fortress of Halden was a ruin, which nobody visited."
    )


@pytest.mark.parametrize("text", ["Who came to the town of Halden in 1661?", "", "It was fine."])
def test_what_is_no_statement_gives_no_question(text):
    assert all_of(text) == set()
