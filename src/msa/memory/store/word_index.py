"""Lexical search: an FTS5 index over the documents' titles and texts, inside the catalog.

The index holds words and positions only; the texts stay in the table `texts` (external content).
Two triggers on that table keep it up to date within the very transaction that adds or deletes a
document, by any writer. The index counts as present if and only if the table and both triggers are
there as they are defined here.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msa.errors import InputError, LexicalIndexError, StorageError
from msa.memory.store.database import Database
from msa.memory.store.filters import Filter, text_test
from msa.memory.store.word_match import Sought, rarity, shares, word_score
from msa.text.normalization import nfc
from msa.types import Document, whole_number

TOKENIZER = "porter unicode61 remove_diacritics 2"
"""Runs of letters and digits, lower case, without diacritics, English endings removed."""

# A term is dropped when it stands in more than this part of the documents (and in more than so many
# documents), unless there is no rarer one: it costs most and tells least.
FREQUENT_PART = 5
FREQUENT_DOCUMENTS = 1_000
# Rarest first, terms are taken until so many (term, document) pairs have to be scored; about one
# microsecond each, so that a search stays well below a second in a bank of any size.
MAX_PAIRS = 200_000
MAX_TERMS = 64
# For a second hop: so many of the rarest terms of each text that was read, and the question's terms
# that none of them holds, twice; chosen on training questions of two hops (docs/bank.md).
READ_TERMS = 24
QUESTION_WEIGHT = 2
_NUMBERS_PER_QUERY = 500
_LAST_BRACKETS = re.compile(r"\s*\([^()]*\)\s*$")

_OBJECTS = {
    "words": "CREATE VIRTUAL TABLE words USING fts5(title, text, content='texts', "
    f"content_rowid='number', tokenize='{TOKENIZER}')",
    "texts_indexed": "CREATE TRIGGER texts_indexed AFTER INSERT ON texts BEGIN "
    "INSERT INTO words (rowid, title, text) VALUES (new.number, new.title, new.text); END",
    "texts_unindexed": "CREATE TRIGGER texts_unindexed AFTER DELETE ON texts BEGIN "
    "INSERT INTO words (words, rowid, title, text) "
    "VALUES ('delete', old.number, old.title, old.text); END",
}

_log = logging.getLogger(__name__)


# ---- upkeep


def has_fts5(db: sqlite3.Connection) -> bool:
    """True when this build of SQLite has the module."""
    query = "SELECT 1 FROM pragma_module_list WHERE name = 'fts5'"
    return db.execute(query).fetchone() is not None


def is_kept(db: sqlite3.Connection) -> bool:
    """True when the index is there and follows every change of the texts."""
    marks = ",".join("?" * len(_OBJECTS))
    query = f"SELECT name, sql FROM sqlite_master WHERE name IN ({marks})"
    return dict(db.execute(query, tuple(_OBJECTS))) == _OBJECTS


def keep(database: Database) -> None:
    """Build the index of a bank that has none, before anything is written to it.

    Without FTS5 an index that is there cannot follow and is given up; the next writer that has FTS5
    builds it again. If the disk is too full for it, the bank opens without, with a warning.
    """
    with database.reading() as db:
        able, kept = has_fts5(db), is_kept(db)
        (count,) = db.execute("SELECT COUNT(*) FROM texts").fetchone()
    if able == kept:
        return
    if not able:
        with database.transaction("drop the word index of") as db:
            _drop_triggers(db)
        return
    if count:
        _log.info("building the word index of %s: %d documents", database.path, count)
    try:
        build(database)
    except StorageError as error:
        _log.warning("%s; until then the bank cannot be searched by words", error)


def build(database: Database) -> None:
    """Build the index from the texts, in place of the one that is there."""
    with database.transaction("build the word index of") as db:
        _drop_triggers(db)
        db.execute("DROP TABLE IF EXISTS words")
        db.execute(_OBJECTS["words"])
        db.execute("INSERT INTO words (words) VALUES ('rebuild')")
        db.execute(_OBJECTS["texts_indexed"])
        db.execute(_OBJECTS["texts_unindexed"])


def _drop_triggers(db: sqlite3.Connection) -> None:
    db.execute("DROP TRIGGER IF EXISTS texts_indexed")
    db.execute("DROP TRIGGER IF EXISTS texts_unindexed")


def shrink(database: Database) -> None:
    """Merge the index into one piece, without what it still holds of deleted texts."""
    with database.reading() as db:
        kept = is_kept(db)
    if kept:
        with database.transaction("compact the word index of") as db:
            db.execute("INSERT INTO words (words) VALUES ('optimize')")


def problems(db: sqlite3.Connection) -> list[str]:
    """How the index differs from one that is rebuilt from the texts, in one line each.

    Reads only, so that it serves beside a writer. A bank without an index has no problem.
    """
    if not (has_fts5(db) and is_kept(db)):
        return []
    checks = {
        "documents are missing from the word index": "SELECT COUNT(*) FROM documents WHERE number "
        "NOT IN (SELECT id FROM words_docsize)",
        "documents of the word index do not exist": "SELECT COUNT(*) FROM words_docsize WHERE id "
        "NOT IN (SELECT number FROM documents)",
    }
    cure = "'msa bank repair' builds it again"
    found = []
    try:
        for words, query in checks.items():
            (count,) = db.execute(query).fetchone()
            if count:
                found.append(f"{count} {words}; {cure}")
        if not found and not _is_as_built_anew(db):
            found.append(f"the word index differs from the texts; {cure}")
    except sqlite3.Error as error:
        found.append(f"the word index cannot be read ({error}); {cure}")
    return found


def _is_as_built_anew(db: sqlite3.Connection) -> bool:
    """Compare term by term, and a sum over all (document, column, position).

    Leaves tables in the schema `temp`; the caller rolls its transaction back.
    """
    db.execute(
        f"CREATE VIRTUAL TABLE temp.again USING fts5(title, text, content='', "
        f"tokenize='{TOKENIZER}')"
    )
    db.execute(
        "INSERT INTO temp.again (rowid, title, text) SELECT number, title, text FROM main.texts"
    )
    sums, terms = [], []
    for schema, table in (("main", "words"), ("temp", "again")):
        for kind in ("row", "instance"):
            db.execute(
                f"CREATE VIRTUAL TABLE temp.{table}_{kind} USING "
                f"fts5vocab('{schema}', '{table}', '{kind}')"
            )
        terms.append(db.execute(f"SELECT term, doc, cnt FROM temp.{table}_row"))
        sums.append(
            db.execute(
                "SELECT COUNT(*), SUM((n * 7919 + offset) % 1000003 * (offset * 31 + n + m) % "
                "1000003) FROM (SELECT doc % 1000003 AS n, length(col) AS m, offset "
                f"FROM temp.{table}_instance)"
            ).fetchone()
        )
    pairs = itertools.zip_longest(*terms)
    return sums[0] == sums[1] and all(one == other for one, other in pairs)


# ---- search


@dataclass(frozen=True, slots=True)
class LexicalQuery:
    """What to look for, in words.

    Attributes:
        question: every word of it counts.
        read: texts that were read for the question already, for its second hop.
    """

    question: str
    read: tuple[str, ...] = ()


class LexicalIndex:
    """Searches a bank's word index over a connection of its own, beside any writer.

    Args:
        path: the catalog's file.
    """

    def __init__(self, path: Path) -> None:
        self._database = Database(path, read_only=True)
        self._words: Tokenizer | None = None
        self._generation = -1
        self._num_documents = 0
        self._counts: dict[str, int] = {}

    def close(self) -> None:
        """Close the connection."""
        self._database.close()

    def missing(self) -> str | None:
        """Why the bank cannot be searched by words, in one line; None when it can."""
        with self._database.reading() as db:
            return self._missing(db)

    def search(
        self,
        queries: Sequence[str | LexicalQuery],
        top_k: int,
        *,
        filter: Filter | None = None,
        title_weight: float = 1.0,
    ) -> list[list[tuple[int, float]]]:
        """See `MemoryBank.lexical_search`."""
        top_k = whole_number(top_k, "top_k", 1)
        _check_weight(title_weight)
        passes = None if filter is None else text_test(filter)
        with self._database.reading() as db:
            matches = self._matches(db, self._begin(db), queries)
            return [self._found(db, match, top_k, passes, title_weight) for match in matches]

    def rank(
        self, queries: Sequence[str | LexicalQuery], top_k: int, *, filter: Filter | None = None
    ) -> list[list[tuple[int, float]]]:
        """See `MemoryBank.lexical_ranking`."""
        top_k = whole_number(top_k, "top_k", 1)
        passes = None if filter is None else text_test(filter)
        with self._database.reading() as db:
            words = self._begin(db)
            matches = self._matches(db, words, queries)
            return [
                self._ranked(db, words, query, self._found(db, match, top_k, passes, 1.0))
                for query, match in zip(queries, matches, strict=True)
            ]

    def _found(
        self,
        db: sqlite3.Connection,
        match: str,
        top_k: int,
        passes: Callable[[str], bool] | None,
        title_weight: float,
    ) -> list[tuple[int, float]]:
        """The best documents of an FTS5 query, by BM25; none for an empty one."""
        if not match:
            return []
        if passes is None:
            query = (
                "SELECT rowid, -bm25(words, ?, 1.0) AS score FROM words "
                "WHERE words MATCH ? ORDER BY score DESC, rowid LIMIT ?"
            )
            return db.execute(query, (title_weight, match, top_k)).fetchall()
        query = (
            "SELECT words.rowid, -bm25(words, ?, 1.0) AS score, documents.metadata "
            "FROM words CROSS JOIN documents ON documents.number = words.rowid "
            "WHERE words MATCH ? ORDER BY score DESC, words.rowid"
        )
        rows = db.execute(query, (title_weight, match))
        passing = ((n, s) for n, s, text in rows if passes(text))
        return list(itertools.islice(passing, top_k))

    def _ranked(
        self,
        db: sqlite3.Connection,
        words: Tokenizer,
        query: str | LexicalQuery,
        found: Sequence[tuple[int, float]],
    ) -> list[tuple[int, float]]:
        """What was found, ranked by how well it fits word by word; what was read is left out."""
        query = _as_query(query)
        read = [nfc(text) for text in query.read]
        stored = _stored(db, [number for number, _ in found])
        known = {document.title for document in stored.values() if document.content in read}
        # a damaged index may name what is not there
        found = [(n, s) for n, s in found if n in stored and stored[n].content not in read]
        if not found:
            return []
        question, *texts = words.sequences([nfc(query.question), *read])
        sought = Sought.of(question, texts, lambda term: self._rarity(db, term))
        titles = words.sequences([_without_brackets(stored[n].title or "") for n, _ in found])
        places = words.places([stored[n].content for n, _ in found], sought.wanted)
        best = max(score for _, score in found)
        scores = []
        for (number, score), title, at in zip(found, titles, places, strict=True):
            named = (
                stored[number].title not in known
                and sought.names(title)
                and not all(self._is_frequent(db, term) for term in title)
            )
            scores.append((number, word_score(score, best, sought.overlap(at), named)))
        return sorted(scores, key=lambda one: (-one[1], one[0]))

    def scores(
        self, query: str | LexicalQuery, numbers: Sequence[int], *, title_weight: float = 1.0
    ) -> list[float]:
        """See `MemoryBank.lexical_scores`."""
        _check_weight(title_weight)
        wanted = [whole_number(n, "document number") for n in numbers]
        found: dict[int, float] = {}
        with self._database.reading() as db:
            (match,) = self._matches(db, self._begin(db), [query])
            for start in range(0, len(wanted) if match else 0, _NUMBERS_PER_QUERY):
                some = wanted[start : start + _NUMBERS_PER_QUERY]
                # The plus keeps SQLite from running the whole query once per number.
                query_text = (
                    "SELECT rowid, -bm25(words, ?, 1.0) FROM words WHERE words MATCH ? "
                    f"AND +rowid IN ({','.join('?' * len(some))})"
                )
                found.update(db.execute(query_text, (title_weight, match, *some)))
        return [found.get(n, 0.0) for n in wanted]

    def coverage(self, question: str, texts: Sequence[str]) -> list[float]:
        """See `MemoryBank.lexical_coverage`."""
        with self._database.reading() as db:
            words = self._begin(db)
            asked, *held = words.sequences([nfc(text) for text in (question, *texts)])
            return shares(asked, held, lambda term: self._rarity(db, term))

    def _rarity(self, db: sqlite3.Connection, term: str) -> float:
        return rarity(self._count(db, term), self._num_documents)

    # ---- from words to an FTS5 query

    def _missing(self, db: sqlite3.Connection) -> str | None:
        bank = self._database.path.parent
        if not has_fts5(db):
            return (
                f"bank '{bank}' cannot be searched by words: SQLite {sqlite3.sqlite_version} of "
                "this Python has no FTS5; use a Python that has it, or ask without"
            )
        if not is_kept(db):
            return (
                f"bank '{bank}' has no word index (it was written by an older version); "
                f"'msa bank compact {bank}' builds it"
            )
        return None

    def _matches(
        self, db: sqlite3.Connection, words: Tokenizer, queries: Sequence[str | LexicalQuery]
    ) -> list[str]:
        """An FTS5 query for each; empty when no document has any of the words."""
        asked = [_as_query(query) for query in queries]
        texts = [nfc(text) for q in asked for text in (q.question, *q.read)]
        terms = iter(words.terms(texts))
        matches = []
        for query in asked:
            question = next(terms)
            read = [next(terms) for _ in query.read]
            chosen = self._chosen(db, question, read)
            matches.append(" OR ".join(f'"{word}"' for word in chosen))
        return matches

    def _begin(self, db: sqlite3.Connection) -> Tokenizer:
        """Make ready to count terms in this transaction; what cuts texts into them."""
        reason = self._missing(db)
        if reason is not None:
            raise LexicalIndexError(reason)
        # for this transaction only: what is made in it goes with it
        db.execute("CREATE VIRTUAL TABLE temp.term_counts USING fts5vocab('main', 'words', 'row')")
        self._follow(db)
        if self._words is None:
            self._words = Tokenizer()
        return self._words

    def _chosen(
        self, db: sqlite3.Connection, question: Mapping[str, str], read: Sequence[Mapping[str, str]]
    ) -> list[str]:
        """The words to look for, rarest first; one that counts twice stands there twice.

        Args:
            db: in a transaction.
            question, read: terms of the question and of each text that was read, with their words.
        """
        words = {**question, **{t: w for text in read for t, w in text.items()}}
        weights = {t: 1 for text in read for t in self._rarest(db, text)[:READ_TERMS]}
        for term in self._rarest(db, question)[:MAX_TERMS]:
            open_question = bool(read) and not any(term in text for text in read)
            weights[term] = QUESTION_WEIGHT if open_question else 1
        chosen: list[str] = []
        pairs = 0
        for term in self._rarest(db, weights):
            pairs += self._count(db, term) * weights[term]
            if chosen and pairs > MAX_PAIRS:
                break
            chosen += [words[term]] * weights[term]
        return chosen

    def _rarest(self, db: sqlite3.Connection, terms: Iterable[str]) -> list[str]:
        """Those that some document holds, rarest first; frequent ones if there are no others."""
        counts = sorted((self._count(db, term), term) for term in terms)
        counts = [(count, term) for count, term in counts if count]
        rare = [term for _, term in counts if not self._is_frequent(db, term)]
        return rare or [term for _, term in counts]

    def _is_frequent(self, db: sqlite3.Connection, term: str) -> bool:
        most = max(self._num_documents // FREQUENT_PART, FREQUENT_DOCUMENTS)
        return self._count(db, term) > most

    def _follow(self, db: sqlite3.Connection) -> None:
        """Forget what is known of another generation."""
        (generation,) = db.execute(
            "SELECT value FROM counters WHERE name = 'generation'"
        ).fetchone()
        if generation != self._generation:
            self._generation = generation
            self._counts.clear()
            (self._num_documents,) = db.execute("SELECT COUNT(*) FROM documents").fetchone()

    def _count(self, db: sqlite3.Connection, term: str) -> int:
        """Number of documents that hold a term."""
        count = self._counts.get(term)
        if count is None:
            query = "SELECT doc FROM temp.term_counts WHERE term = ?"
            row = db.execute(query, (term,)).fetchone()
            count = self._counts[term] = row[0] if row else 0
        return count


class Tokenizer:
    """Cuts texts into the terms of the index, by FTS5's own tokenizers."""

    def __init__(self) -> None:
        self._db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        for table, tokenizer in (("terms", TOKENIZER), ("words", TOKENIZER.split(" ", 1)[1])):
            self._db.execute(
                f"CREATE VIRTUAL TABLE {table} USING fts5(text, content='', tokenize='{tokenizer}')"
            )
            self._db.execute(
                f"CREATE VIRTUAL TABLE {table}_found USING fts5vocab('{table}', 'instance')"
            )

    def terms(self, texts: Sequence[str]) -> list[dict[str, str]]:
        """Term -> a word of the text that it was made of, for each text.

        A term cannot be searched for: the stem of a stem is often another one.
        """
        self._take("terms", texts)
        self._take("words", texts)
        found: list[dict[str, str]] = [{} for _ in texts]
        words = {
            (doc, offset): word
            for doc, offset, word in self._db.execute("SELECT doc, offset, term FROM words_found")
        }
        for doc, offset, term in self._db.execute("SELECT doc, offset, term FROM terms_found"):
            found[doc].setdefault(term, words[doc, offset])
        return found

    def sequences(self, texts: Sequence[str]) -> list[list[str]]:
        """The terms of each text, in their order."""
        self._take("terms", texts)
        found: list[list[str]] = [[] for _ in texts]
        query = "SELECT doc, term FROM terms_found ORDER BY doc, offset"
        for doc, term in self._db.execute(query):
            found[doc].append(term)
        return found

    def places(self, texts: Sequence[str], wanted: Iterable[str]) -> list[dict[int, str]]:
        """Position -> term, where one of the wanted terms stands, for each text."""
        self._take("terms", texts)
        found: list[dict[int, str]] = [{} for _ in texts]
        query = "SELECT doc, offset FROM terms_found WHERE term = ?"
        for term in wanted:
            for doc, offset in self._db.execute(query, (term,)):
                found[doc][offset] = term
        return found

    def _take(self, table: str, texts: Sequence[str]) -> None:
        """Put these texts in the place of the last ones, numbered from 0."""
        self._db.execute(f"INSERT INTO {table} ({table}) VALUES ('delete-all')")
        self._db.executemany(
            f"INSERT INTO {table} (rowid, text) VALUES (?, ?)",
            ((i, text.encode(errors="replace").decode()) for i, text in enumerate(texts)),
        )


def _as_query(query: str | LexicalQuery) -> LexicalQuery:
    return LexicalQuery(query) if isinstance(query, str) else query


def _stored(db: sqlite3.Connection, numbers: Sequence[int]) -> dict[int, Document]:
    """Documents by number, with title and text alone."""
    found: dict[int, Document] = {}
    for start in range(0, len(numbers), _NUMBERS_PER_QUERY):
        some = numbers[start : start + _NUMBERS_PER_QUERY]
        query = (
            f"SELECT number, title, text FROM texts WHERE number IN ({','.join('?' * len(some))})"
        )
        rows = db.execute(query, some)
        found |= {number: Document("", text, title) for number, title, text in rows}
    return found


def _without_brackets(title: str) -> str:
    """A title without what tells it apart from others at its end: "Mercury (planet)"."""
    return _LAST_BRACKETS.sub("", title) or title


def _check_weight(title_weight: float) -> None:
    if not (math.isfinite(title_weight) and title_weight >= 0):
        raise InputError(f"title_weight={title_weight}: expected a number from 0")
