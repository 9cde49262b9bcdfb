"""Which file each document came from, and the folder that their paths start at: the root.

Both are for indexing files (`msa index`): a file is the same document however its path was
typed, and files that are gone, or gave more documents before, are noticed. Banks that remember no
root, of earlier versions or made through the API, get one when files are first indexed into them.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from msa.memory.store.database import Database
from msa.text.normalization import spellings

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) "
    "WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS origins (document TEXT PRIMARY KEY, path TEXT NOT NULL) "
    "WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS origins_path ON origins (path)",
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a stored document came from.

    Attributes:
        document: its id.
        path: the file's, below the root.
    """

    document: str
    path: str


class Origins:
    """The origins of a bank's documents.

    Args:
        database: the catalog's.
        writing: opens a transaction of the catalog; its argument says what for.
    """

    def __init__(
        self,
        database: Database,
        writing: Callable[[str], AbstractContextManager[sqlite3.Connection]],
    ) -> None:
        self._database = database
        self._writing = writing

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        with self._database.reading() as db:
            yield db if is_kept(db) else None

    def root(self) -> str | None:
        """The folder that paths start at, absolute; None if none is remembered."""
        with self._reading() as db:
            return None if db is None else _setting(db, "root")

    def remember_root(self, root: str) -> None:
        """Let paths start at this folder. The first time, documents that are there count as old."""
        with self._writing("remember the root of") as db:
            for statement in _SCHEMA:
                db.execute(statement)
            if _setting(db, "root") is None:
                query = "SELECT value FROM counters WHERE name = 'next_number'"
                (first_new,) = db.execute(query).fetchone()
                db.execute("INSERT INTO settings VALUES ('first_new', ?)", (str(first_new),))
            db.execute("INSERT OR REPLACE INTO settings VALUES ('root', ?)", (root,))

    def held_as(self, path: str, old_id: str, content_hash: bytes | None) -> bool:
        """Whether an old document of this id is that of this file.

        Old are those that were there before a root was remembered.

        Args:
            path: of the file, below the root.
            old_id: the id that an earlier version gave it.
            content_hash: of the document, if it must be the same; None if only the id matters.
        """
        with self._database.reading() as db:
            query = "SELECT number, content_hash FROM documents WHERE source = ? LIMIT 1"
            rows = (db.execute(query, (name,)).fetchone() for name in spellings(old_id))
            found = next((row for row in rows if row is not None), None)
            if found is None or content_hash not in (None, found[1]):
                return False
            if not is_kept(db):
                return True
            query = "SELECT path FROM origins WHERE document = ?"
            owner = db.execute(query, (old_id,)).fetchone()
            if owner is not None:
                return bool(owner[0] == path)
            return int(found[0]) < int(_setting(db, "first_new") or 0)

    def record(self, origins: Mapping[Origin, bytes]) -> None:
        """Say where documents came from; an id that is known gets its new origin.

        Args:
            origins: origin -> content hash of the document that the file gave. If the bank holds
                another under that id, that one did not come from the file, and nothing is noted.
        """
        query = (
            "INSERT OR REPLACE INTO origins SELECT ?, ? "
            "WHERE EXISTS (SELECT 1 FROM documents WHERE source = ? AND content_hash = ?)"
        )
        rows = [(o.document, o.path, o.document, content) for o, content in origins.items()]
        if rows:
            with self._writing("write the origins of documents to") as db:
                db.executemany(query, rows)

    def has_old(self) -> bool:
        """Whether there are documents from before a root was remembered."""
        with self._database.reading() as db:
            first_new = _setting(db, "first_new") if is_kept(db) else None
            query = "SELECT 1 FROM documents WHERE ? IS NULL OR number < ? LIMIT 1"
            values = (first_new, int(first_new or 0))
            return db.execute(query, values).fetchone() is not None

    def adopt_records(self, path: str, old_id: str) -> None:
        """Old documents that are named by their line in a file (`old_id:7`) came from it."""
        with self._writing("write the origins of documents to") as db:
            db.execute(
                "INSERT OR IGNORE INTO origins SELECT DISTINCT source, ? FROM documents "
                "WHERE number < ? AND substr(source, 1, ?) = ? "
                "AND substr(source, ?) NOT GLOB '*[^0-9]*'",
                (
                    path,
                    int(_setting(db, "first_new") or 0),
                    *(len(old_id) + 1, f"{old_id}:", len(old_id) + 2),
                ),
            )

    def below(self, path: str) -> list[Origin]:
        """Documents of the bank that came from this file, or from files in this folder."""
        inside = f"{path}/"
        ups = inside.count("../") if not inside.replace("../", "").strip("./") else None
        query = (
            "SELECT document, path FROM origins WHERE (? OR path = ? OR substr(path, 1, ?) = ?) "
            "AND EXISTS (SELECT 1 FROM documents WHERE source = document) ORDER BY path, document"
        )
        with self._reading() as db:
            if db is None:
                return []
            values = (ups is not None, path, len(inside), inside)
            found = [Origin(*row) for row in db.execute(query, values)]
        if ups is None:
            return found
        # a folder that holds the root
        return [origin for origin in found if _ups(origin.path) <= ups]


def _ups(path: str) -> int:
    """How many folders a path leads up from the root."""
    parts = path.split("/")
    return next((i for i, part in enumerate(parts) if part != ".."), len(parts))


def is_kept(db: sqlite3.Connection) -> bool:
    """True when the bank remembers a root."""
    query = "SELECT COUNT(*) FROM sqlite_master WHERE name IN ('origins', 'settings')"
    return bool(db.execute(query).fetchone()[0] == 2)


def forget(db: sqlite3.Connection, numbers: Iterable[int]) -> None:
    """Documents are deleted: what is stored under their ids later did not come from their files."""
    if is_kept(db):
        query = (
            "DELETE FROM origins WHERE document = (SELECT source FROM documents WHERE number = ?)"
        )
        db.executemany(query, ((number,) for number in numbers))


def _setting(db: sqlite3.Connection, name: str) -> str | None:
    row = db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
    return None if row is None else str(row[0])
