from __future__ import annotations

import sqlite3
import threading

import pytest

from msa import Document
from msa.errors import BankCorruptError, BankError, StorageError
from msa.memory.store.catalog import Catalog, CatalogRow
from msa.memory.store.records import SegmentEntry


def entry(segment, documents=1):
    return SegmentEntry(segment, 100, "a" * 64, 50, "b" * 64, documents, documents)


def row(number, name=None, source=None, part=0, parts=1, text="text"):
    name = name or f"d{number}"
    document = Document(name, text, metadata={})
    return CatalogRow(number, document, source or name, part, parts, b"hash", "{}", 7, 1)


@pytest.fixture
def catalog(tmp_path):
    catalog = Catalog.create(tmp_path)
    yield catalog
    catalog.close()


def test_it_syncs_every_commit_in_wal_mode(catalog, tmp_path):
    assert catalog._db.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert catalog._db.connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_commit_is_seen_by_a_reader_at_once_and_whole(catalog, tmp_path):
    reader = Catalog(tmp_path, read_only=True)
    assert reader.counter("generation") == 0
    catalog.commit([(entry(1, 2), (1, 2))], [row(1), row(2)])
    assert reader.counter("generation") == 1
    assert reader.count() == 2
    assert reader.by_id("d2").number == 2
    reader.close()


class InterruptedConnection:
    """A connection; Ctrl-C comes right after the n-th statement has been executed."""

    def __init__(self, connection, statement):
        self._connection = connection
        self._left = statement

    def execute(self, *words):
        found = self._connection.execute(*words)
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        return found

    def __getattr__(self, name):
        return getattr(self._connection, name)


@pytest.mark.parametrize("statement", range(1, 7))
@pytest.mark.parametrize("doing", ["count", "commit"])
def test_ctrl_c_after_any_statement_leaves_a_catalog_that_works(
    catalog, tmp_path, doing, statement
):
    catalog.commit([(entry(1), (1,))], [row(1)])
    whole = catalog._db.connection
    catalog._db.connection = InterruptedConnection(whole, statement)
    try:
        for _ in range(6):  # a reading has three statements, the last of which ends it
            catalog.count() if doing == "count" else catalog.commit([(entry(2), (2,))], [row(2)])
    except KeyboardInterrupt:
        interrupted = True
    else:
        interrupted = False
    catalog._db.connection = whole
    assert interrupted
    stored = catalog.count()
    assert stored == catalog.counter("generation")  # the interrupted commit is there whole, or not
    other = Catalog(tmp_path)
    other.commit([(entry(stored + 1), (stored + 1,))], [row(stored + 1)])  # nothing holds the lock
    assert catalog.count() == stored + 1
    other.close()


def test_a_failing_commit_changes_nothing(catalog):
    catalog.commit([(entry(1, 2), (1, 2))], [row(1), row(2)])
    with pytest.raises(BankError, match="UNIQUE"):
        catalog.commit([(entry(2, 2), (3, 4))], [row(3, "d1"), row(4, "d2")], replaced=[1])
    assert catalog.counter("generation") == 1
    assert [e.segment for e in catalog.segments()] == [1]
    assert list(catalog.by_numbers([1, 2, 3, 4])) == [1, 2]
    assert catalog.counter("next_number") == 3


def test_a_replaced_document_leaves_a_dead_number_behind(catalog):
    catalog.commit([(entry(1, 2), (1, 2))], [row(1), row(2)])
    catalog.commit([(entry(2), (3,))], [row(3, "d1", text="new")], replaced=[1])
    assert catalog.by_id("d1").number == 3
    assert catalog.dead_counts() == {1: 1}
    assert catalog.live_in(1) == {2: 1}
    first, second = catalog.snapshot(), catalog.snapshot(1, 1)
    assert [e.segment for e in first.segments] == [1, 2]
    assert [e.segment for e in second.segments] == [2]
    assert first.dead == second.dead == (1,)


def test_a_segment_without_live_documents_need_not_be_loaded(catalog):
    catalog.commit([(entry(1, 2), (1, 2))], [row(1), row(2)])
    catalog.commit([(entry(2), (3,))], [row(3)])
    catalog.delete([1, 2])
    assert [e.segment for e in catalog.snapshot().segments] == [2]


def test_replacing_segments_moves_documents_and_raises_the_layout(catalog):
    catalog.commit([(entry(1, 2), (1, 2))], [row(1), row(2)])
    catalog.commit([(entry(2), (3,))], [row(3)])
    catalog.delete([2])
    catalog.replace_segments([1, 2], [(entry(3, 2), (1, 3))])
    assert catalog.live_in(3) == {1: 1, 3: 1}
    assert catalog.dead_counts() == {}
    assert catalog.counter("layout") == 1
    assert catalog.counter("next_segment") == 4
    assert catalog.problems() == []


def test_counters_never_go_back(catalog):
    catalog.commit([(entry(1, 3), (1, 2, 3))], [row(1), row(2), row(3)])
    catalog.delete([1, 2, 3])
    assert catalog.counter("next_number") == 4
    catalog.replace_segments([1], [])
    assert (catalog.counter("next_number"), catalog.counter("next_segment")) == (4, 2)


def test_deleted_texts_are_erased_from_the_file(catalog, tmp_path):
    secret = "the secret sentence that must go"
    catalog.commit([(entry(1), (1,))], [row(1, text=secret)])
    catalog.delete([1])
    catalog.shrink()
    catalog.close()
    for path in tmp_path.iterdir():
        assert secret.encode() not in path.read_bytes(), path
    Catalog(tmp_path).close()


def test_known_tells_documents_from_parts(catalog):
    parts = [row(1, "book#1", "book", 1, 2), row(2, "book#2", "book", 2, 2)]
    catalog.commit([(entry(1, 2), (1, 2))], parts)
    assert catalog.known("book").numbers == (1, 2)
    assert catalog.known("book#2").part_of == "book"
    assert catalog.known("other").numbers == ()
    assert [s.document.id for s in catalog.by_source("book")] == ["book#1", "book#2"]
    assert catalog.by_id("book#2").part_ids == ("book#1", "book#2")


def test_problems_names_what_does_not_fit_together(catalog):
    catalog.commit([(entry(1, 2), (1, 2))], [row(1), row(2)])
    assert catalog.problems() == []
    catalog._db.connection.execute("DELETE FROM texts WHERE number = 1")
    catalog._db.connection.execute("UPDATE documents SET segment = 9 WHERE number = 2")
    found = "\n".join(catalog.problems())
    assert "1 documents without text" in found
    assert "1 documents in a segment that does not exist" in found


def test_a_full_disk_is_a_storage_error_and_changes_nothing(catalog):
    catalog.commit([(entry(1), (1,))], [row(1)])
    pages = catalog._db.connection.execute("PRAGMA page_count").fetchone()[0]
    catalog._db.connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageError, match="full"):
        catalog.commit([(entry(2), (2,))], [row(2, text="x" * 100_000)])
    catalog._db.connection.execute("PRAGMA max_page_count = 1000000")
    assert catalog.count() == 1
    catalog.commit([(entry(2), (2,))], [row(2, text="x" * 100_000)])
    assert catalog.count() == 2


def test_a_read_only_catalog_refuses_to_change(catalog, tmp_path):
    reader = Catalog(tmp_path, read_only=True)
    with pytest.raises(StorageError, match="readonly"):
        reader.delete([1])
    reader.close()


def test_a_file_that_is_no_database_is_corrupt(tmp_path):
    (tmp_path / "catalog.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(BankCorruptError, match="not a database"):
        Catalog(tmp_path)
    (tmp_path / "catalog.sqlite").unlink()
    with pytest.raises(BankCorruptError, match="lost"):
        Catalog(tmp_path)
    sqlite3.connect(tmp_path / "catalog.sqlite").close()
    with pytest.raises(BankCorruptError, match="no such table"):
        Catalog(tmp_path)


def test_threads_share_one_catalog(catalog):
    errors = []

    def work(base):
        try:
            for i in range(base, base + 20):
                catalog.commit([(entry(i), (i,))], [row(i)])
                assert catalog.by_id(f"d{i}") is not None
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(base,)) for base in (1, 101, 201)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert catalog.count() == 60
