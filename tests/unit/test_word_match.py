"""How well a document fits a query word by word."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa import Document
from msa.errors import InputError
from msa.memory.store import word_index
from msa.memory.store.word_index import LexicalQuery
from msa.memory.store.word_match import Sought, word_score

texts = st.lists(st.sampled_from("abcdef"), max_size=8)


def sought(question: str, *read: str, **rarity: float) -> Sought:
    return Sought.of(
        question.split(), [text.split() for text in read], lambda term: rarity.get(term, 1.0)
    )


def overlap(some: Sought, document: str) -> float:
    return some.overlap(dict(enumerate(document.split())))


def ranked(bank, query, top_k=16, **options):
    """Ids and scores, best first."""
    (hits,) = bank.lexical_ranking([query], top_k, **options)
    return {bank.get_number(number).document.id: score for number, score in hits}


@settings(deadline=None)
@given(texts, st.lists(texts, max_size=2), texts)
def test_an_overlap_is_a_share_and_whole_for_the_question_itself(question, read, document):
    some = Sought.of(question, read, lambda term: 1.0 + ord(term))
    assert 0 <= some.overlap(dict(enumerate(document))) <= 1 + 1e-9
    whole = some.overlap(dict(enumerate(question)))
    assert whole == pytest.approx(((len(some.terms) > 0) + (len(some.pairs) > 0)) / 2)


def test_rare_words_count_more_and_pairs_only_in_their_order():
    assert overlap(sought("red dwarf star", star=2.0), "star") == pytest.approx((2 / 4 + 0) / 2)
    assert overlap(sought("red dwarf star"), "star red dwarf") == pytest.approx((1 + 2 / 4) / 2)
    assert overlap(sought("red dwarf star"), "dwarf red star") == pytest.approx(1 / 2)
    assert overlap(sought("red"), "red") == pytest.approx(1 / 2)  # there are no pairs
    assert overlap(sought(""), "red") == 0


def test_a_second_hop_looks_for_what_no_text_read_holds():
    some = sought("where was the painter born", "the painter was ill", "a painter")
    assert set(some.terms) == {"where", "born"}
    assert set(some.pairs) == {("where", "was"), ("was", "the"), ("painter", "born")}


def test_a_title_is_named_word_for_word_in_the_question_or_in_what_was_read():
    some = sought("who led anna karlsen", "she met tom bell in oslo")
    assert some.names(["anna", "karlsen"])
    assert some.names(["tom", "bell"])
    assert some.names(["oslo"])
    assert not some.names(["karlsen", "she"])  # not across two texts
    assert not some.names(["bell", "tom"])
    assert not some.names(["anna", "bell"])
    assert not some.names(["ann"])
    assert not some.names([])


def test_the_score_is_the_mean_of_the_three():
    assert word_score(3.0, 6.0, 0.25, True) == pytest.approx((0.5 + 0.25 + 1) / 3)


def test_of_documents_with_the_same_words_the_one_with_the_phrases_is_first(bank):
    bank.add(
        [
            Document("scattered", "Stove, kitchen: old, moved. North."),
            Document("together", "They moved the old stove out of the north kitchen in spring."),
            *(Document(f"n{i}", f"The garden of house {i} is large.") for i in range(8)),
        ]
    )
    question = "When was the old stove moved out of the north kitchen?"
    assert bank.lexical_search([question], 1)[0][0][0] == 1
    scores = ranked(bank, question)
    assert next(iter(scores)) == "together"
    assert all(0 < score <= 1 for score in scores.values())
    assert list(scores.values()) == sorted(scores.values(), reverse=True)


def test_a_title_in_what_was_read_leads_the_second_hop(bank):
    film = Document("film", "Quiet Harbor is a film by Edith Rowan.", "Quiet Harbor")
    bank.add(
        [
            film,
            Document("rowan", "She was born in Tromso.", "Edith Rowan (artist)"),
            Document("other", "Edith and Rowan: films of a quiet harbor, by and by.", "Towns"),
            *(Document(f"n{i}", f"She was born in town {i}, and who made it?") for i in range(8)),
        ]
    )
    question = "Who made the film Quiet Harbor, and where was she born?"
    assert next(iter(ranked(bank, question))) == "film"
    second = ranked(bank, LexicalQuery(question, (film.content,)))
    assert next(iter(second)) == "rowan"
    assert "film" not in second  # it was read


def test_other_parts_of_what_was_read_are_not_named_by_their_common_title(bank):
    one, two, news = (
        Document("p1", "The first part of the story.", "Quiet Harbor"),
        Document("p2", "The second part of the story.", "Quiet Harbor"),
        Document("news", "They talk of the story of the Quiet Harbor.", "News"),
    )
    bank.add([one, two, news])
    after = {
        some.id: ranked(bank, LexicalQuery("What is the story?", (some.content,)))
        for some in (one, news)
    }
    assert after["news"]["p2"] > 1 / 3 > after["p1"]["p2"] - 1 / 3
    assert after["news"]["p2"] - after["p1"]["p2"] > 0.2


def test_a_title_of_frequent_words_names_nothing(bank, monkeypatch):
    bank.add([Document(f"d{i}", f"what was done on day {i}", "Notes") for i in range(6)])
    question = "What do the notes say of day 3?"
    named = ranked(bank, question)["d3"]
    monkeypatch.setattr(word_index, "FREQUENT_DOCUMENTS", 2)
    assert ranked(bank, question)["d3"] < named - 0.3


def test_a_ranking_holds_what_the_search_finds_and_no_more(bank):
    bank.add(
        [Document(f"d{i}", f"same words {i}", metadata={"even": i % 2 == 0}) for i in range(9)]
    )
    (hits,) = bank.lexical_search(["same words"], 4)
    assert [n for n, _ in bank.lexical_ranking(["same words"], 4)[0]] == [n for n, _ in hits]
    assert set(ranked(bank, "same words", filter={"even": True})) == {
        f"d{i}" for i in (0, 2, 4, 6, 8)
    }
    together = bank.lexical_ranking(["same words", "", "nothing like it", "words 3"], 4)
    assert together[1:3] == [[], []]
    assert together[3] == bank.lexical_ranking(["words 3"], 4)[0]
    assert bank.lexical_ranking([], 4) == []
    with pytest.raises(InputError, match="top_k"):
        bank.lexical_ranking(["same"], 0)


def test_more_documents_than_one_query_takes_are_ranked(bank):
    count = word_index._NUMBERS_PER_QUERY + 30
    bank.add([Document(f"d{i}", f"pebble {i}") for i in range(count)])
    assert len(bank.lexical_ranking(["a pebble"], count)[0]) == count
