from __future__ import annotations

import sqlite3
import threading

import numpy
import pytest

from bank_tools import make_documents
from msa import Document
from msa.errors import InputError, LexicalIndexError
from msa.memory.bank import MemoryBank
from msa.memory.store import word_index
from msa.memory.store.word_index import LexicalQuery

PLANETS = [
    Document("earth", "Our planet has one moon and much water.", "Earth", {"kind": "rock"}),
    Document("mars", "The red planet has two moons, Phobos and Deimos.", "Mars", {"kind": "rock"}),
    Document("saturn", "A gas giant with rings of ice.", "Saturn", {"kind": "gas"}),
    Document(
        "cafe", "Caf\u00e9 M\u00fcnchen serves cr\u00e8me br\u00fbl\u00e9e.", None, {"kind": "food"}
    ),
]


@pytest.fixture
def planets(bank):
    bank.add(PLANETS)
    return bank


def found(bank, query, top_k=16, **options):
    """Ids that a query finds, best first."""
    (hits,) = bank.lexical_search([query], top_k, **options)
    return [bank.get_number(number).document.id for number, _ in hits]


def test_it_finds_words_of_text_and_title_in_any_form(planets):
    assert found(planets, "Which planet has two moons?")[0] == "mars"
    assert found(planets, "SATURN") == ["saturn"]
    assert found(planets, "ring") == ["saturn"]
    assert found(planets, "cafe munchen creme BRULEE") == ["cafe"]
    assert found(planets, "nothing like that") == []


def test_scores_are_positive_best_first_and_equal_ones_by_number(bank):
    bank.add([Document(f"d{i}", "same words in all of them") for i in range(5)])
    bank.add([Document("more", "words words words"), *make_documents(20)])
    (hits,) = bank.lexical_search(["words same"], 16)
    scores = [score for _, score in hits]
    assert scores == sorted(scores, reverse=True)
    assert min(scores) > 0
    assert [n for n, _ in hits] == [1, 2, 3, 4, 5, 6]
    assert bank.lexical_search(["words same"], 2) == [hits[:2]]


def test_queries_of_a_batch_are_answered_each_for_itself(planets):
    queries = ["moons", "", "rings", LexicalQuery("water"), "moons"]
    together = planets.lexical_search(queries, 3)
    assert together == [planets.lexical_search([query], 3)[0] for query in queries]
    assert together[1] == []
    assert together[0] == together[4]
    assert planets.lexical_search([], 3) == []


def test_the_scores_of_given_numbers_are_those_of_the_search(planets):
    (hits,) = planets.lexical_search(["a red planet with rings and one moon"], 16)
    numbers = [n for n, _ in hits]
    asked = [99, *reversed(numbers), 4, numbers[0]]
    scores = planets.lexical_scores("a red planet with rings and one moon", asked)
    assert scores == [dict(hits).get(n, 0.0) for n in asked]
    assert planets.lexical_scores("red", numpy.array([2, 1])) == planets.lexical_scores(
        "red", [2, 1]
    )
    assert planets.lexical_scores("xyzzy", [1, 2]) == [0.0, 0.0]
    assert planets.lexical_scores("red", []) == []
    many = list(range(1, 1200))
    assert sum(score > 0 for score in planets.lexical_scores("planet", many)) == 2


def test_a_question_is_covered_by_the_words_that_stand_in_what_was_read(planets):
    def covered(question, *texts):
        return planets.lexical_coverage(question, ["\n".join(texts)])[0]

    assert covered("Which planet has two moons?", "The PLANET which has moon two.") == 1
    assert covered("caf\u00e9", "Cafe Mu\u0308nchen") == 1
    assert covered("rings and moons", "ring", "and", "moon") == 1  # in any of the texts
    assert covered("rings", "moons") == covered("rings") == 0
    assert covered("?", "moons") == covered("", "moons") == 1  # nothing was asked
    # A word that stands in fewer documents counts more, one that stands in none most.
    question, words = "planet, rings, zeppelins", ("planet", "ring", "zeppelin")
    planet, rings, zeppelins = (covered(question, word) for word in words)
    assert 0 < planet < rings < zeppelins < 1
    assert planet + rings + zeppelins == pytest.approx(1)
    each = planets.lexical_coverage(question, ["ring, zeppelin", "", "planet"])
    assert each == pytest.approx([rings + zeppelins, 0, planet])
    assert planets.lexical_coverage(question, []) == []


def test_a_title_can_count_more(bank):
    bank.add([Document("text", "gold gold and silver"), Document("title", "silver", "gold")])
    assert found(bank, "gold") == ["text", "title"]
    assert found(bank, "gold", title_weight=5) == ["title", "text"]
    assert bank.lexical_scores("gold", [2], title_weight=0) == [0.0]


@pytest.mark.parametrize(
    "query",
    [
        'two "moons', "moons AND NOT (", "NEAR(moons", "moons*", "^moons", "title:moons", "-moons",
        "{title text}: moons", "moons\0moons", "moons; DROP TABLE texts; --", "moons \ud800",
        "moons + moons", "\N{FULL MOON SYMBOL} moons \N{RINGED PLANET}", "'moons'", "[moons]\\",
        "moons OR", "moons \N{COMBINING ACUTE ACCENT}\N{ZERO WIDTH JOINER}",
        " ".join(f"w{i}" for i in range(10_000)) + " moons",
    ],
)  # fmt: skip
def test_nothing_in_a_query_is_an_operator(planets, query):
    assert "mars" in found(planets, query)
    assert planets.lexical_scores(query, [2])[0] > 0


@pytest.mark.parametrize("query", ["", " ", "?!", '"', "\0", "\N{FULL MOON SYMBOL}", "()*:^-"])
def test_a_query_without_words_finds_nothing(planets, query):
    assert found(planets, query) == []


def test_text_without_spaces_is_one_word_up_to_the_next_mark(bank):
    bank.add([Document("zh", "\u706b\u661f\u6709\u4e24\u9897\u536b\u661f\u3002\u5730\u7403\u3002")])
    assert found(bank, "\u5730\u7403") == ["zh"]
    assert found(bank, "\u536b\u661f") == []


def test_a_filter_leaves_the_best_that_pass(planets):
    assert found(planets, "planet with rings", filter={"kind": "gas"}) == ["saturn"]
    assert found(planets, "planet", 1, filter=lambda metadata: metadata["kind"] == "rock") in (
        ["earth"],
        ["mars"],
    )
    assert found(planets, "planet", filter={"kind": "food"}) == []
    assert found(planets, "planet", filter={"other": 1}) == []
    with pytest.raises(InputError, match="filter is list"):
        found(planets, "planet", filter=["kind"])


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_and_counts_that_make_no_sense_are_refused(planets, weight):
    with pytest.raises(InputError, match="title_weight"):
        planets.lexical_search(["moon"], 3, title_weight=weight)
    with pytest.raises(InputError, match="title_weight"):
        planets.lexical_scores("moon", [1], title_weight=weight)
    with pytest.raises(InputError, match="top_k=0"):
        planets.lexical_search(["moon"], 0)


# ---- which words are looked for


def test_frequent_words_are_dropped_when_there_are_rarer_ones(bank, monkeypatch):
    monkeypatch.setattr(word_index, "FREQUENT_DOCUMENTS", 0)
    bank.add([Document(f"d{i}", f"the town number{i}") for i in range(10)])
    assert found(bank, "the number3 town") == ["d3"]
    assert len(found(bank, "the town")) == 10


def test_work_is_bounded_rarest_words_first(bank, monkeypatch):
    bank.add([Document(f"d{i}", f"common {'half' * (i % 2)} number{i}") for i in range(10)])
    assert len(found(bank, "common half number4")) == 10
    monkeypatch.setattr(word_index, "MAX_PAIRS", 6)
    assert len(found(bank, "common half number4")) == 6
    assert len(found(bank, "common")) == 10
    monkeypatch.setattr(word_index, "MAX_TERMS", 1)
    assert found(bank, "common half number4") == ["d4"]


def test_a_second_hop_follows_the_rare_words_of_what_was_read(bank):
    bank.add(
        [
            Document("film", "Night Harbor is a film directed by Ines Valdemar.", "Night Harbor"),
            Document("woman", "Ines Valdemar was born in Porto.", "Ines Valdemar"),
            Document("city", "A harbor city where many films are shown at night.", "Harbor"),
            *make_documents(10),
        ]
    )
    question = "Where was the woman who directed Night Harbor born?"
    assert found(bank, question)[0] == "film"
    read = bank.get("film").document.content
    assert found(bank, LexicalQuery(question, (read,)))[:2] == ["film", "woman"]
    # several texts, and none, are good too
    assert found(bank, LexicalQuery(question, ())) == found(bank, question)
    assert "woman" in found(bank, LexicalQuery("?", (read, "Porto")))


# ---- in step with the bank


def in_step(bank):
    report = bank.verify()
    assert report.ok, report.problems
    for stored in bank.documents():
        word = stored.document.text.split()[0]
        assert stored.document.id in found(bank, word, 1000)


def test_it_follows_add_update_delete_compact_and_a_new_opening(
    bank, path, tiny_model, tiny_tokenizer
):
    bank.add([*PLANETS, *make_documents(6)])
    in_step(bank)
    bank.update(Document("mars", "The god of war."))
    assert found(bank, "Phobos") == []
    assert found(bank, "war") == ["mars"]
    bank.update(Document("earth", PLANETS[0].text, "Earth", {"kind": "home"}))
    assert found(bank, "moon", filter={"kind": "home"}) == ["earth"]
    bank.delete(["saturn", "doc1"])
    assert found(bank, "rings") == []
    in_step(bank)
    bank.compact()
    in_step(bank)
    bank.close()
    with MemoryBank.open(path, tiny_model, tiny_tokenizer) as again:
        assert found(again, "war") == ["mars"]
        again.add([Document("late", "A comet came late.")])
        assert found(again, "comets") == ["late"]
        in_step(again)


def test_parts_of_a_long_document_are_found_each(path, tiny_model, tiny_tokenizer):
    words = " ".join(f"word{i}" for i in range(60))
    with MemoryBank.create(path, tiny_model, tiny_tokenizer, max_document_tokens=96) as bank:
        bank.add([Document("book", words)])
        (first,), (last,) = found(bank, "word0"), found(bank, "word59")
        assert first == "book#1"
        assert last != first
        in_step(bank)


def test_a_reader_searches_what_is_committed_and_waits_for_no_writer(planets, path):
    with MemoryBank.open(path, read_only=True) as reader:
        assert found(reader, "rings") == ["saturn"]
        planets.delete("saturn")
        assert found(reader, "rings") == []
        with planets.catalog._transaction("test") as db:
            db.execute("DELETE FROM texts WHERE number = 1")
            for bank in (reader, planets):
                ((hit,),) = bank.lexical_search(["water"], 3)
                assert hit[0] == 1
            db.execute("INSERT INTO texts VALUES (1, 'Earth', ?)", (PLANETS[0].text,))
        in_step(planets)


def test_threads_search_while_documents_come_and_go(bank):
    bank.add(PLANETS)
    errors, stop = [], threading.Event()

    def search():
        try:
            while not stop.is_set():
                (hits,) = bank.lexical_search(["planet"], 4)
                assert [n for n, _ in hits][:2] in ([1, 2], [2, 1])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(10):
        bank.add([Document(f"n{i}", "another gas giant")])
        bank.delete(f"n{i}")
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    in_step(bank)


# ---- banks without an index, and damaged ones


def without_index(path):
    """Make the bank one that was written before there was an index."""
    db = sqlite3.connect(path / "catalog.sqlite")
    for statement in ("TRIGGER texts_indexed", "TRIGGER texts_unindexed", "TABLE words"):
        db.execute(f"DROP {statement}")
    db.commit()
    db.close()


def test_an_older_bank_gets_its_index_when_it_is_opened_for_writing(planets, path):
    planets.close()
    without_index(path)
    with MemoryBank.open(path, read_only=True) as reader:
        assert reader.verify().ok
        why = rf"bank '{path}' has no word index .*'msa bank compact {path}' builds it"
        with pytest.raises(LexicalIndexError, match=why):
            reader.lexical_search(["moon"], 3)
        with pytest.raises(LexicalIndexError, match=why):
            reader.lexical_scores("moon", [1])
        assert "msa bank compact" in reader.lexical_missing()
        MemoryBank.open(path).close()
        assert reader.lexical_missing() is None
        assert found(reader, "rings") == ["saturn"]
        in_step(reader)


def test_an_index_that_missed_changes_is_built_again(planets, path):
    """As after a writer whose SQLite has no FTS5, which gives the triggers up."""
    planets.close()
    db = sqlite3.connect(path / "catalog.sqlite")
    db.execute("DROP TRIGGER texts_unindexed")
    db.commit()
    db.close()
    with MemoryBank.open(path, read_only=True) as reader:
        assert "no word index" in reader.lexical_missing()
    with MemoryBank.open(path) as bank:
        bank.delete("mars")
        in_step(bank)


def test_without_fts5_the_bank_works_and_says_why_it_is_not_searched(
    planets, path, tiny_model, tiny_tokenizer, monkeypatch
):
    planets.close()
    monkeypatch.setattr(word_index, "has_fts5", lambda db: False)
    with MemoryBank.open(path, tiny_model, tiny_tokenizer) as bank:
        bank.delete("mars")
        bank.add([Document("venus", "Hot and cloudy.")])
        bank.compact()
        assert bank.verify().ok
        with pytest.raises(LexicalIndexError, match=r"SQLite 3\.[\d.]+ of this Python has no FTS5"):
            bank.lexical_search(["moon"], 3)
        with pytest.raises(LexicalIndexError, match="no FTS5"):
            bank.lexical_coverage("moon", ["moon"])
    monkeypatch.undo()
    with MemoryBank.open(path, read_only=True) as reader:
        assert "no word index" in reader.lexical_missing()
    with MemoryBank.open(path) as bank:
        in_step(bank)
        assert found(bank, "CLOUDY") == ["venus"]


def spoil(path, how):
    """Change the index behind the bank's back."""
    db = sqlite3.connect(path / "catalog.sqlite")
    if how == "missing":
        db.execute("INSERT INTO words (words, rowid, title, text) VALUES ('delete', 3, ?, ?)",
                   (PLANETS[2].title, PLANETS[2].text))  # fmt: skip
    elif how == "unknown":
        db.execute("INSERT INTO words (rowid, title, text) VALUES (77, 'x', 'y')")
    elif how == "differs":
        db.execute("INSERT INTO words (words, rowid, title, text) VALUES ('delete', 3, ?, ?)",
                   (PLANETS[2].title, PLANETS[2].text))  # fmt: skip
        db.execute("INSERT INTO words (rowid, title, text) VALUES (3, 'Saturn', 'other words')")
    elif how == "swapped":
        for number, document in ((1, 2), (2, 1)):
            old, new = PLANETS[number - 1], PLANETS[document - 1]
            db.execute("INSERT INTO words (words, rowid, title, text) VALUES ('delete', ?, ?, ?)",
                       (number, old.title, old.text))  # fmt: skip
            db.execute("INSERT INTO words (rowid, title, text) VALUES (?, ?, ?)",
                       (number, new.title, new.text))  # fmt: skip
    else:
        db.execute("UPDATE words_data SET block = zeroblob(length(block)) WHERE id > 10")
    db.commit()
    db.close()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "1 documents are missing from the word index"),
        ("unknown", "1 documents of the word index do not exist"),
        ("differs", "the word index differs from the texts"),
        ("swapped", "the word index differs from the texts"),
        ("zeros", "word index"),
    ],
)
def test_verify_finds_a_damaged_index_and_repair_builds_it_again(
    planets, path, tiny_model, tiny_tokenizer, how, words
):
    planets.close()
    spoil(path, how)
    with MemoryBank.open(path, read_only=True) as reader:
        report = reader.verify()
        assert not report.ok
        assert words in report.problems[0]
        assert "'msa bank repair' builds it again" in report.problems[0]
    with MemoryBank.open(path, tiny_model, tiny_tokenizer) as bank:
        assert not bank.verify().ok
        assert bank.repair() == 0
        in_step(bank)
