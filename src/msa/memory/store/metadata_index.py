"""The metadata of all documents as rows of the catalog, so that a filter is one SQL query.

The table `fields` has a row per document and value. Every transaction of this version keeps it and
raises its counter with the generation; a writer of an older version raises the generation alone,
and so the table is known to be stale. Readers then test each document's metadata instead: slower,
and the same.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterable

from msa.errors import StorageError
from msa.memory.store.database import Database
from msa.memory.store.filters import Filter, check_mapping, fields, parse, text_test

_log = logging.getLogger(__name__)

# Of another name than that of the versions before texts were compared in NFC: a table that one of
# them wrote counts as stale here, and one that is written here as stale there.
_COUNTER = "fields_nfc"
_SCHEMA = """CREATE TABLE fields (key TEXT NOT NULL, value NOT NULL, number INTEGER NOT NULL,
    PRIMARY KEY (key, value, number)) WITHOUT ROWID"""


def is_kept(db: sqlite3.Connection) -> bool:
    """True when the table is there and no transaction has passed it by."""
    counters = dict(db.execute("SELECT name, value FROM counters"))
    return bool(counters.get(_COUNTER) == counters["generation"])


def keep(database: Database) -> None:
    """Build the table of a bank that has none, or an old one, before anything is written to it."""
    with database.reading() as db:
        if is_kept(db):
            return
    try:
        build(database)
    except StorageError as error:
        _log.warning("%s; until then filters are slower", error)


def build(database: Database) -> None:
    """Build the table from the documents, in place of the one that is there."""
    with database.transaction("index the metadata of") as db:
        db.execute("DROP TABLE IF EXISTS fields")
        db.execute(_SCHEMA)
        _insert(db, db.execute("SELECT number, metadata FROM documents"))
        db.execute(
            "INSERT OR REPLACE INTO counters SELECT ?, value FROM counters "
            "WHERE name = 'generation'",
            (_COUNTER,),
        )


def follow(db: sqlite3.Connection) -> None:
    """Raise the counter, in a transaction that raises the generation."""
    db.execute("UPDATE counters SET value = value + 1 WHERE name = ?", (_COUNTER,))


def add(db: sqlite3.Connection, rows: Iterable[tuple[int, str]]) -> None:
    """Documents were added: their numbers and metadata as JSON text."""
    if is_kept(db):
        _insert(db, rows)


def _insert(db: sqlite3.Connection, rows: Iterable[tuple[int, str]]) -> None:
    db.executemany(
        "INSERT OR IGNORE INTO fields VALUES (?, ?, ?)",
        ((*field, number) for number, text in rows for field in fields(json.loads(text))),
    )


def remove(db: sqlite3.Connection, rows: Iterable[tuple[int, str]]) -> None:
    """Documents go: their numbers and the metadata that they had, as JSON text."""
    if is_kept(db):
        db.executemany(
            "DELETE FROM fields WHERE key = ? AND value = ? AND number = ?",
            ((*field, number) for number, text in rows for field in fields(json.loads(text))),
        )


def passing(db: sqlite3.Connection, filter: Filter) -> list[int]:
    """Numbers of the documents that pass a filter, in order.

    Raises:
        InputError: the filter is neither a mapping that can be read nor a function.
    """
    if not callable(filter) and is_kept(db):
        condition, values = parse(check_mapping(filter)).sql()
        query = f"SELECT number FROM documents WHERE {condition} ORDER BY number"
        return [number for (number,) in db.execute(query, values)]
    passes = text_test(filter)
    rows = db.execute("SELECT number, metadata FROM documents ORDER BY number")
    return [number for number, text in rows if passes(text)]


def problems(db: sqlite3.Connection) -> list[str]:
    """How the table differs from the documents' metadata; a stale one, or none, is no problem."""
    if not is_kept(db):
        return []
    cure = "'msa bank repair' builds it again"
    (left,) = db.execute("SELECT COUNT(*) FROM fields").fetchone()
    for number, text in db.execute("SELECT number, metadata FROM documents"):
        for key, value in dict.fromkeys(fields(json.loads(text))):
            query = "SELECT 1 FROM fields WHERE key = ? AND value = ? AND number = ?"
            if db.execute(query, (key, value, number)).fetchone() is None:
                return [f"the index of metadata lacks values; {cure}"]
            left -= 1
    return [f"the index of metadata has values of no document; {cure}"] if left else []
