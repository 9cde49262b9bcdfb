"""The catalog: ids, numbers, texts, metadata, and which segments count. SQLite, WAL, full sync.

What is not in the catalog does not exist. Every change is one transaction that also raises
`generation`; `layout` rises when segments are replaced, so that a reader knows whether it can go on
from what it has loaded. All methods may be called from several threads.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from msa.errors import BankCorruptError, BankLockedError, InputError
from msa.memory.store import metadata_index, origins, word_index
from msa.memory.store.database import Database, guard
from msa.memory.store.filters import Filter
from msa.memory.store.lifetime import NotPickled
from msa.memory.store.records import SegmentEntry
from msa.memory.store.reports import StoredDocument
from msa.text.normalization import spellings
from msa.types import Document, whole_number

CATALOG_FILE = "catalog.sqlite"
_IDS_PER_QUERY = 500
_LARGEST = 2**63 - 1  # that SQLite can hold

_SCHEMA = """
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO counters VALUES ('generation', 0), ('layout', 0), ('next_number', 1),
    ('next_segment', 1);
CREATE TABLE segments (
    segment INTEGER PRIMARY KEY, size_bytes INTEGER NOT NULL, sha256 TEXT NOT NULL,
    routing_bytes INTEGER NOT NULL, routing_sha256 TEXT NOT NULL,
    num_documents INTEGER NOT NULL, num_chunks INTEGER NOT NULL);
CREATE TABLE documents (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, source TEXT NOT NULL,
    part INTEGER NOT NULL, num_parts INTEGER NOT NULL, content_hash BLOB NOT NULL,
    metadata TEXT NOT NULL, num_tokens INTEGER NOT NULL, num_chunks INTEGER NOT NULL,
    segment INTEGER NOT NULL);
CREATE INDEX documents_source ON documents (source);
CREATE INDEX documents_segment ON documents (segment);
CREATE TABLE texts (number INTEGER PRIMARY KEY, title TEXT, text TEXT NOT NULL);
-- deleted documents whose states still lie in a segment
CREATE TABLE dead (number INTEGER PRIMARY KEY, segment INTEGER NOT NULL,
    generation INTEGER NOT NULL);
CREATE INDEX dead_generation ON dead (generation);
CREATE INDEX dead_segment ON dead (segment);
"""

_STORED = """SELECT d.number, d.id, d.source, d.part, d.num_parts, d.metadata, d.num_tokens,
    d.num_chunks, t.title, t.text FROM documents d JOIN texts t USING (number) """


@dataclass(frozen=True, slots=True)
class CatalogRow:
    """A document to be stored: everything but the segment.

    Attributes:
        number: assigned.
        document: as stored (a part carries its part id).
        source: id that the caller gave; differs from `document.id` for a part.
        part, num_parts: 0 and 1 for a whole document.
        content_hash: of the source's title and text.
        metadata: JSON text.
        num_tokens, num_chunks: as encoded.
    """

    number: int
    document: Document
    source: str
    part: int
    num_parts: int
    content_hash: bytes
    metadata: str
    num_tokens: int
    num_chunks: int


@dataclass(frozen=True, slots=True)
class Known:
    """What the catalog knows of one id.

    Attributes:
        numbers: documents stored under this source id (several for a split one); empty if none.
        content_hash, metadata: of them.
        part_of: the source, when the id names a part of another document.
    """

    numbers: tuple[int, ...] = ()
    content_hash: bytes = b""
    metadata: str = ""
    part_of: str | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a reader must load: one consistent state of the catalog.

    Attributes:
        generation, layout: of that state.
        segments: after the segment asked for, without those that hold no live document.
        dead: numbers deleted after the generation asked for.
    """

    generation: int
    layout: int
    segments: tuple[SegmentEntry, ...]
    dead: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts over the live documents, and of the dead ones that still have states."""

    num_documents: int
    num_ids: int
    num_tokens: int
    num_chunks: int
    num_deleted: int


class Catalog(NotPickled):
    """An open catalog.

    Args:
        folder: the bank's folder.
        read_only: never write, not even to recover.

    Attributes:
        origins: which files the documents came from.

    Raises:
        BankCorruptError: the file is missing or no SQLite database of ours.
        StorageError: it cannot be read.
    """

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        path = folder / CATALOG_FILE
        if not path.is_file():
            raise BankCorruptError(
                f"Bank '{folder}' has lost its {CATALOG_FILE}; restore it from a copy, or remove "
                "the folder and index again"
            )
        self._db = Database(path, read_only=read_only)
        self.origins = origins.Origins(self._db, self._side_transaction)
        self._writer = 0
        if not read_only:
            self._writer = self._become_writer()
            word_index.keep(self._db)
            metadata_index.keep(self._db)

    @classmethod
    def create(cls, folder: Path) -> Catalog:
        """Make an empty catalog in a folder that has none."""
        path = folder / CATALOG_FILE
        with guard(path, "create"):
            connection = sqlite3.connect(path, isolation_level=None)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
            connection.close()
        return cls(folder)

    def close(self) -> None:
        """Close the database; a writer folds its log into it."""
        self._db.close()

    @contextlib.contextmanager
    def _transaction(self, doing: str) -> Iterator[sqlite3.Connection]:
        """One durable transaction that raises the generation, or no change at all.

        Raises:
            BankLockedError: another writer has opened the bank since; nothing is changed.
        """
        with self._db.transaction(doing) as db:
            self._check_writer(db, doing)
            db.execute("UPDATE counters SET value = value + 1 WHERE name = 'generation'")
            metadata_index.follow(db)
            yield db

    @contextlib.contextmanager
    def _side_transaction(self, doing: str) -> Iterator[sqlite3.Connection]:
        """A durable transaction about what no reader loads; the generation stays."""
        with self._db.transaction(doing) as db:
            self._check_writer(db, doing)
            yield db

    def _become_writer(self) -> int:
        """A number for this writer; one with a lower number can commit no more."""
        with self._db.transaction("open") as db:
            db.execute("INSERT OR IGNORE INTO counters VALUES ('writer', 0)")
            db.execute("UPDATE counters SET value = value + 1 WHERE name = 'writer'")
            return _counter(db, "writer")

    def _check_writer(self, db: sqlite3.Connection, doing: str) -> None:
        if not self._db.read_only and _counter(db, "writer") != self._writer:
            raise BankLockedError(
                f"cannot {doing} {self._db.path}: another process has opened the bank for "
                "writing since (was writer.lock removed?); close this one and open it again"
            )

    # ---- writing

    def check_writer(self) -> None:
        """Refuse before anything is written what no transaction would take.

        Raises:
            BankError: another writer has opened the bank since, or it was moved or replaced.
        """
        with self._db.reading() as db:
            self._check_writer(db, "write to")

    def commit(
        self,
        segments: Sequence[tuple[SegmentEntry, Sequence[int]]],
        rows: Sequence[CatalogRow],
        replaced: Iterable[int] = (),
        metadata: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Name new segments and their documents, and drop the documents that they replace.

        Args:
            segments: each with the numbers of its documents.
            rows: those documents.
            replaced: numbers of documents that cease to exist.
            metadata: (source id, JSON text) of documents of which only the metadata changes.
        """
        place = {n: entry.segment for entry, numbers in segments for n in numbers}
        with self._transaction("commit documents to") as db:
            _bury(db, _numbers(replaced))
            for source, text in metadata:
                _change_metadata(db, source, text)
            _insert_segments(db, [entry for entry, _ in segments])
            db.executemany(
                "INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    (
                        *(r.number, r.document.id, r.source, r.part, r.num_parts, r.content_hash),
                        *(r.metadata, r.num_tokens, r.num_chunks, place[r.number]),
                    )
                    for r in rows
                ),
            )
            db.executemany(
                "INSERT INTO texts VALUES (?, ?, ?)",
                ((r.number, r.document.title, r.document.text) for r in rows),
            )
            metadata_index.add(db, ((r.number, r.metadata) for r in rows))
            if rows:
                _raise_counter(db, "next_number", max(r.number for r in rows) + 1)

    def delete(self, numbers: Iterable[int]) -> None:
        """Documents cease to exist; their states stay in their segments until `compact`."""
        wanted = _numbers(numbers)
        with self._transaction("delete documents from") as db:
            origins.forget(db, wanted)
            _bury(db, wanted)

    def replace_segments(
        self, removed: Sequence[int], added: Sequence[tuple[SegmentEntry, Sequence[int]]]
    ) -> None:
        """Segments take the place of others, with all live documents of those.

        Args:
            removed: numbers of the segments that cease to exist.
            added: new segments, each with the numbers of its documents.
        """
        with self._transaction("rewrite segments of") as db:
            _insert_segments(db, [entry for entry, _ in added])
            for entry, numbers in added:
                db.executemany(
                    "UPDATE documents SET segment = ? WHERE number = ?",
                    ((entry.segment, n) for n in numbers),
                )
            for segment in removed:
                db.execute("DELETE FROM dead WHERE segment = ?", (segment,))
                db.execute("DELETE FROM segments WHERE segment = ?", (segment,))
                query = "SELECT number FROM documents WHERE segment = ? LIMIT 1"
                left = db.execute(query, (segment,)).fetchone()
                assert left is None, f"document {left} would lose its segment"
            db.execute("UPDATE counters SET value = value + 1 WHERE name = 'layout'")

    def shrink(self) -> None:
        """Give the room of deleted texts back to the file system."""
        word_index.shrink(self._db)  # the words of deleted texts go with them
        with self._db.alone("shrink") as db:
            db.execute("VACUUM")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # ---- reading

    def counter(self, name: str) -> int:
        """Value of "generation", "layout", "next_number" or "next_segment"."""
        with self._db.reading() as db:
            return _counter(db, name)

    def count(self) -> int:
        """Number of live documents."""
        with self._db.reading() as db:
            return int(db.execute("SELECT COUNT(*) FROM documents").fetchone()[0])

    def totals(self) -> Totals:
        """Counts for `info`."""
        with self._db.reading() as db:
            live = db.execute(
                "SELECT COUNT(*), COUNT(*) FILTER (WHERE part <= 1), TOTAL(num_tokens), "
                "TOTAL(num_chunks) FROM documents"
            ).fetchone()
            dead = db.execute("SELECT COUNT(*) FROM dead").fetchone()
        return Totals(*(int(v) for v in (*live, *dead)))

    def known(self, document_id: str) -> Known:
        """What is stored under an id that the caller gave."""
        _check_id(document_id)
        if not _is_unicode(document_id):
            return Known()
        with self._db.reading() as db:
            for name in spellings(document_id):
                rows = db.execute(
                    "SELECT number, content_hash, metadata FROM documents WHERE source = ? "
                    "ORDER BY part",
                    (name,),
                ).fetchall()
                if rows:
                    return Known(tuple(r[0] for r in rows), rows[0][1], rows[0][2])
                query = "SELECT source FROM documents WHERE id = ?"
                part = db.execute(query, (name,)).fetchone()
                if part:
                    return Known(part_of=part[0])
        return Known()

    def by_id(self, document_id: str) -> StoredDocument | None:
        """The document or part with this id."""
        _check_id(document_id)
        if not _is_unicode(document_id):
            return None
        found = (self._stored("WHERE d.id = ?", (name,)) for name in spellings(document_id))
        return next((stored[0] for stored in found if stored), None)

    def by_source(self, source: str) -> list[StoredDocument]:
        """The document given under this id, or all its parts in order."""
        _check_id(source)
        if not _is_unicode(source):
            return []
        query = "WHERE d.source = ? ORDER BY d.part"
        found = (self._stored(query, (name,)) for name in spellings(source))
        return next((stored for stored in found if stored), [])

    def by_numbers(self, numbers: Iterable[int]) -> dict[int, StoredDocument]:
        """Number -> document, for those that exist.

        Raises:
            InputError: what was given are no whole numbers.
        """
        wanted = _numbers(numbers)
        found: dict[int, StoredDocument] = {}
        for start in range(0, len(wanted), _IDS_PER_QUERY):
            some = wanted[start : start + _IDS_PER_QUERY]
            marks = ",".join("?" * len(some))
            for stored in self._stored(f"WHERE d.number IN ({marks})", some):
                found[stored.number] = stored
        return found

    def ids(self, numbers: Iterable[int]) -> dict[int, str]:
        """Number -> id, for those that exist; texts are not read.

        Raises:
            InputError: what was given are no whole numbers.
        """
        wanted = _numbers(numbers)
        found: dict[int, str] = {}
        with self._db.reading() as db:
            for start in range(0, len(wanted), _IDS_PER_QUERY):
                some = wanted[start : start + _IDS_PER_QUERY]
                marks = ",".join("?" * len(some))
                found.update(
                    db.execute(f"SELECT number, id FROM documents WHERE number IN ({marks})", some)
                )
        return found

    def copies(self, asked: Sequence[tuple[Iterable[int], Iterable[int]]]) -> list[set[int]]:
        """Which documents have the text of others, for several questions at once.

        Args:
            asked: numbers of documents, and of those that they may be copies of.

        Returns:
            For each pair, the first numbers whose text one of the second has; no second number.
        """
        pairs = [(set(_numbers(numbers)), set(_numbers(of))) for numbers, of in asked]
        pairs = [(numbers - of if of else set(), of) for numbers, of in pairs]
        copied = self._equal_texts(
            sorted(set().union(*(numbers for numbers, _ in pairs))),
            sorted(set().union(*(of for _, of in pairs))),
        )
        return [{n for n in numbers if copied.get(n, set()) & of} for numbers, of in pairs]

    def _equal_texts(self, numbers: Sequence[int], others: Sequence[int]) -> dict[int, set[int]]:
        """Number -> those of the others that have its text; only if there are any."""
        found: dict[int, set[int]] = {}
        with self._db.reading() as db:
            for start in range(0, len(numbers), _IDS_PER_QUERY):
                for first in range(0, len(others), _IDS_PER_QUERY):
                    some = numbers[start : start + _IDS_PER_QUERY]
                    rest = others[first : first + _IDS_PER_QUERY]
                    query = (
                        "SELECT a.number, b.number FROM texts a JOIN texts b ON a.text = b.text "
                        f"WHERE a.number IN ({','.join('?' * len(some))}) "
                        f"AND b.number IN ({','.join('?' * len(rest))})"
                    )
                    for number, other in db.execute(query, (*some, *rest)):
                        found.setdefault(number, set()).add(other)
        return found

    def page(self, limit: int, offset: int, after: int = 0) -> list[StoredDocument]:
        """Documents after a number in the order of their numbers; a negative limit means all."""
        given = (("after", after), ("limit", limit), ("offset", offset))
        values = [min(whole_number(value, name), _LARGEST) for name, value in given]
        return self._stored("WHERE d.number > ? ORDER BY d.number LIMIT ? OFFSET ?", values)

    def sources(self, prefix: str) -> list[str]:
        """Ids as passed to `add`, of those documents whose id begins so; sorted."""
        if not _is_unicode(prefix):
            return []
        query = "SELECT DISTINCT source FROM documents WHERE source >= ? AND source < ? ORDER BY 1"
        with self._db.reading() as db:
            found = db.execute(query, (prefix, prefix + chr(0x10FFFF)))
            return [row[0] for row in found]

    def _stored(self, where: str, values: Sequence[object]) -> list[StoredDocument]:
        with self._db.reading() as db:
            rows = db.execute(_STORED + where, values).fetchall()
        return [_stored_document(row) for row in rows]

    def passing(self, filter: Filter) -> list[int]:
        """Numbers of the live documents that pass a filter, in order; see
        `msa.memory.store.filters`.

        Raises:
            InputError: the filter is neither a mapping that can be read nor a function.
        """
        with self._db.reading() as db:
            return metadata_index.passing(db, filter)

    def segments(self) -> list[SegmentEntry]:
        """All segments, in the order they were written."""
        with self._db.reading() as db:
            return _segments(db, "ORDER BY segment", ())

    def dead_counts(self) -> dict[int, int]:
        """Segment -> number of its documents that are deleted."""
        with self._db.reading() as db:
            return dict(db.execute("SELECT segment, COUNT(*) FROM dead GROUP BY segment"))

    def live_in(self, segment: int) -> dict[int, int]:
        """Number -> number of chunks, for the live documents of a segment."""
        with self._db.reading() as db:
            return dict(
                db.execute("SELECT number, num_chunks FROM documents WHERE segment = ?", (segment,))
            )

    def snapshot(self, after_segment: int = 0, after_generation: int = -1) -> Snapshot:
        """What has changed since a reader last looked; everything by default."""
        with self._db.reading() as db:
            return Snapshot(
                _counter(db, "generation"),
                _counter(db, "layout"),
                tuple(
                    _segments(
                        db,
                        "WHERE segment > ? AND num_documents > (SELECT COUNT(*) FROM dead "
                        "WHERE dead.segment = segments.segment) ORDER BY segment",
                        (after_segment,),
                    )
                ),
                tuple(
                    row[0]
                    for row in db.execute(
                        "SELECT number FROM dead WHERE generation > ?", (after_generation,)
                    )
                ),
            )

    def problems(self) -> list[str]:
        """What SQLite itself and the tables' relations to each other say is wrong."""
        checks = {
            "documents without text": "SELECT COUNT(*) FROM documents WHERE number NOT IN "
            "(SELECT number FROM texts)",
            "texts without document": "SELECT COUNT(*) FROM texts WHERE number NOT IN "
            "(SELECT number FROM documents)",
            "documents in a segment that does not exist": "SELECT COUNT(*) FROM documents WHERE "
            "segment NOT IN (SELECT segment FROM segments)",
            "documents both live and deleted": "SELECT COUNT(*) FROM documents JOIN dead "
            "USING (number)",
            "split documents with a part missing": "SELECT COUNT(*) FROM (SELECT 1 FROM documents "
            "GROUP BY source HAVING COUNT(*) <> MAX(num_parts))",
            "numbers at or above the next one": "SELECT COUNT(*) FROM documents WHERE number >= "
            "(SELECT value FROM counters WHERE name = 'next_number')",
        }
        with self._db.reading() as db:
            answer = [row[0] for row in db.execute("PRAGMA integrity_check(10)")]
            found = [] if answer == ["ok"] else [f"{CATALOG_FILE}: {line}" for line in answer]
            for words, query in checks.items():
                count = db.execute(query).fetchone()[0]
                if count:
                    found.append(f"{CATALOG_FILE}: {count} {words}")
            lines = word_index.problems(db) + metadata_index.problems(db)
        return found + [f"{CATALOG_FILE}: {line}" for line in lines]

    def repair_indexes(self) -> None:
        """Build the index of words or of metadata again if it is damaged."""
        with self._db.reading() as db:
            words, metadata = word_index.problems(db), metadata_index.problems(db)
        if words:
            word_index.build(self._db)
        if metadata:
            metadata_index.build(self._db)


def _numbers(given: Iterable[int]) -> list[int]:
    """Document numbers as SQLite binds them, each once; without those that cannot exist."""
    if not isinstance(given, Iterable):
        raise InputError(
            f"the document numbers are a {type(given).__name__}: expected several whole numbers"
        )
    numbers = dict.fromkeys(whole_number(n, "document number") for n in given)
    return [n for n in numbers if 0 < n <= _LARGEST]


def _check_id(document_id: object) -> None:
    if not isinstance(document_id, str):
        raise InputError(
            f"the document id {document_id!r} is a {type(document_id).__name__}: expected text, "
            "as it was given to add()"
        )


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which SQLite cannot be asked for (and `add` does not let in)."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _stored_document(row: Sequence[Any]) -> StoredDocument:
    """From the columns of `_STORED`."""
    number, name, source, part, num_parts, metadata, num_tokens, num_chunks, title, text = row
    document = Document(name, text, title, json.loads(metadata))
    part_of = source if part else None
    return StoredDocument(document, number, num_tokens, num_chunks, part_of, part, num_parts)


def _change_metadata(db: sqlite3.Connection, source: str, text: str) -> None:
    query = "SELECT number, metadata FROM documents WHERE source = ?"
    for name in spellings(source):
        old = db.execute(query, (name,)).fetchall()
        metadata_index.remove(db, old)
        metadata_index.add(db, ((number, text) for number, _ in old))
        db.execute("UPDATE documents SET metadata = ? WHERE source = ?", (text, name))


def _bury(db: sqlite3.Connection, numbers: Iterable[int]) -> None:
    generation = _counter(db, "generation")
    query = "SELECT number, metadata FROM documents WHERE number = ?"
    for number in numbers:
        metadata_index.remove(db, db.execute(query, (number,)).fetchall())
        db.execute(
            "INSERT INTO dead SELECT number, segment, ? FROM documents WHERE number = ?",
            (generation, number),
        )
        db.execute("DELETE FROM documents WHERE number = ?", (number,))
        db.execute("DELETE FROM texts WHERE number = ?", (number,))


def _insert_segments(db: sqlite3.Connection, entries: Sequence[SegmentEntry]) -> None:
    columns = tuple(f.name for f in fields(SegmentEntry))
    db.executemany(
        f"INSERT INTO segments ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",
        ([getattr(e, name) for name in columns] for e in entries),
    )
    if entries:
        _raise_counter(db, "next_segment", max(e.segment for e in entries) + 1)


def _raise_counter(db: sqlite3.Connection, name: str, value: int) -> None:
    db.execute("UPDATE counters SET value = MAX(value, ?) WHERE name = ?", (value, name))


def _counter(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute("SELECT value FROM counters WHERE name = ?", (name,)).fetchone()[0])


def _segments(db: sqlite3.Connection, where: str, values: Sequence[object]) -> list[SegmentEntry]:
    query = (
        "SELECT segment, size_bytes, sha256, routing_bytes, routing_sha256, num_documents, "
        "num_chunks FROM segments " + where
    )
    return [SegmentEntry(*row) for row in db.execute(query, values)]
