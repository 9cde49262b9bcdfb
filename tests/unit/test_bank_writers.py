"""Who may write to a bank, and what happens to the others."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import threading
import time

import numpy
import pytest

from bank_tools import folder_state, ids_of, make_document, make_documents
from lost_documents import together
from msa.errors import BankError, BankLockedError, InputError, StorageError
from msa.memory.bank import MemoryBank
from msa.memory.loaded.loaded_bank import LoadedBank
from msa.memory.store.catalog import Catalog
from msa.memory.store.durable_files import publish, write_file

# ---- threads of one process


def test_threads_that_add_take_turns(bank):
    tasks = [lambda i=i: bank.add(make_documents(4, f"t{i}-")) for i in range(6)]
    together(*tasks)
    assert sorted(ids_of(bank)) == sorted(f"t{i}-{j}" for i in range(6) for j in range(4))
    report = bank.verify()
    assert report.ok, report.problems
    assert report.orphans == ()


@pytest.mark.parametrize("trial", range(3))
def test_what_one_thread_deletes_while_another_compacts_stays_deleted(bank, trial):
    for i in range(4):
        bank.add(make_documents(3, f"t{i}-"))
    together(bank.compact, *(lambda i=i: bank.delete(f"t{i}-{trial}") for i in range(4)))
    assert sorted(ids_of(bank)) == sorted(
        f"t{i}-{j}" for i in range(4) for j in range(3) if j != trial
    )
    assert bank.verify().ok


def test_a_bank_is_closed_when_the_thread_that_writes_has_ended(bank):
    going, go_on = threading.Event(), threading.Event()

    def slow():
        yield make_document("a")
        going.set()
        go_on.wait(10)
        yield make_document("b")

    thread = threading.Thread(target=bank.add, args=(slow(),))
    thread.start()
    going.wait(10)
    closing = threading.Thread(target=bank.close)
    closing.start()
    go_on.set()
    thread.join()
    closing.join()
    with MemoryBank.open(bank.path) as again:
        assert ids_of(again) == ["a", "b"]


@pytest.mark.parametrize("doing", ["add", "delete", "update", "compact", "close"])
@pytest.mark.parametrize("where", ["documents", "progress"])
def test_what_gives_add_its_documents_cannot_change_the_bank(bank, doing, where):
    bank.add([make_document("old")])
    change = {
        "add": lambda: bank.add([make_document("other")]),
        "delete": lambda: bank.delete("old"),
        "update": lambda: bank.update(make_document("old", 1)),
        "compact": bank.compact,
        "close": bank.close,
    }[doing]

    def documents():
        yield make_document("new")
        if where == "documents":
            change()

    with pytest.raises(BankError, match=r"written by this very thread.*before or after"):
        bank.add(documents(), progress=lambda _: where == "progress" and change())
    assert ids_of(bank) in (["old"], ["old", "new"])
    assert bank.add([make_document("later")]).added == 1
    assert bank.verify().ok


# ---- the folder


def test_a_relative_path_means_the_folder_that_it_meant_first(
    tmp_path, tiny_model, tiny_tokenizer, monkeypatch
):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with MemoryBank.create("bank", tiny_model, tiny_tokenizer) as bank:
            bank.add(make_documents(2, name))
    other = folder_state(tmp_path / "two" / "bank")
    monkeypatch.chdir(tmp_path / "one")
    with MemoryBank.open("bank", tiny_model, tiny_tokenizer) as bank:
        monkeypatch.chdir(tmp_path / "two")
        bank.add(make_documents(2, "more"))
        bank.compact()
        assert bank.path == tmp_path / "one" / "bank"
        assert bank.lexical_search(["more0"], 3)[0]
        assert bank.verify().ok
    assert folder_state(tmp_path / "two" / "bank") == other


@pytest.mark.parametrize("how", ["moved", "removed", "replaced", "copied over"])
def test_a_bank_that_is_not_there_any_more_is_noticed(bank, path, how):
    bank.add(make_documents(2))
    copy = path.with_name("copy")
    shutil.copytree(path, copy)
    if how == "moved":
        path.rename(path.with_name("moved"))
    elif how == "copied over":
        shutil.copytree(copy, path, copy_function=shutil.copyfile, dirs_exist_ok=True)
    else:
        shutil.rmtree(path)
    if how == "replaced":
        copy.rename(path)
        before = folder_state(path)
    for use in (
        lambda: bank.add(make_documents(1, "more")),
        lambda: bank.delete("doc0"),
        bank.compact,
        bank.documents,
        lambda: bank.generation,
        lambda: bank.lexical_search(["river"], 2),
    ):
        with pytest.raises(BankError, match=r"moved, removed or replaced .* open it again"):
            use()
    if how == "replaced":
        assert folder_state(path) == before
    bank.close()


def test_a_bank_that_is_replaced_amid_an_add_gets_no_file(bank, path):
    bank.add(make_documents(2))
    copy = path.with_name("copy")
    shutil.copytree(path, copy)
    before = folder_state(copy)

    def documents():
        yield make_document("late")
        shutil.rmtree(path)
        copy.rename(path)

    with pytest.raises(BankError, match="moved, removed or replaced"):
        bank.add(documents())
    assert folder_state(path) == before


def test_an_older_state_that_was_copied_over_a_catalog_is_noticed(tmp_path):
    catalog = Catalog.create(tmp_path)
    catalog.delete([])
    assert catalog.counter("generation") == 1
    db = catalog._db.connection  # as a backup that was restored into the same file
    db.execute("UPDATE counters SET value = 0 WHERE name = 'generation'")
    for use in (catalog.count, lambda: catalog.delete([])):
        with pytest.raises(BankError, match=r"older state \(generation 0, 1 was read .* open"):
            use()
    catalog.close()


# ---- nothing that was written is overwritten


def test_a_writer_whose_lock_was_removed_commits_no_more(bank, path, tiny_model, tiny_tokenizer):
    bank.add(make_documents(3))
    (path / "writer.lock").unlink()
    with MemoryBank.open(path, tiny_model, tiny_tokenizer) as second:
        second.add(make_documents(3, "second"))
        before, held = folder_state(path), ids_of(second)
        for write in (
            lambda: bank.add(make_documents(2, "first")),
            lambda: bank.delete("doc0"),
            bank.compact,
            bank.repair,
        ):
            with pytest.raises(BankError, match=r"another process has opened the bank .* again"):
                write()
        assert folder_state(path) == before
        assert ids_of(second) == ids_of(bank) == held
        assert second.verify().ok


def test_a_writer_that_is_overtaken_amid_an_add_stores_nothing(
    bank, path, tiny_model, tiny_tokenizer
):
    bank.add(make_documents(2))

    def documents():
        yield make_document("late")
        (path / "writer.lock").unlink()
        with MemoryBank.open(path, tiny_model, tiny_tokenizer) as second:
            second.add(make_documents(2, "second"))

    with pytest.raises(BankError):
        bank.add(documents())
    with MemoryBank.open(path, tiny_model, tiny_tokenizer) as third:
        assert ids_of(third) == ["doc0", "doc1", "second0", "second1"]
        assert third.verify().ok


def test_a_file_is_never_written_over_another(tmp_path):
    path = tmp_path / "file"
    write_file(path, [b"first"])
    with pytest.raises(FileExistsError):
        write_file(path, [b"second"])
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_links_serves_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    write_file(tmp_path / "file", [b"first"])
    (tmp_path / "other").write_bytes(b"second")
    with pytest.raises(FileExistsError):
        publish(tmp_path / "other", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "other"]


def test_an_existing_segment_is_not_replaced(bank, path):
    (path / "segments" / "000001.safetensors").write_bytes(b"somebody's")
    with pytest.raises(StorageError, match="File exists"):
        bank.add(make_documents(1))
    assert (path / "segments" / "000001.safetensors").read_bytes() == b"somebody's"
    assert len(bank) == 0


# ---- processes


def test_a_writer_that_nobody_holds_any_more_frees_the_lock(path, tiny_model, tiny_tokenizer):
    MemoryBank.create(path, tiny_model, tiny_tokenizer)
    gc.collect()
    MemoryBank.open(path).close()


def forked(work):
    """Run a function in a forked process; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def test_a_forked_process_neither_writes_nor_reads_nor_keeps_the_lock(bank, path):
    bank.add(make_documents(2))
    read_end, write_end = os.pipe()

    def child():
        for use in (lambda: bank.delete("doc0"), bank.documents):
            with pytest.raises(BankError, match="open the bank again in this process"):
                use()
        bank.close()
        os.write(write_end, b"ready")
        time.sleep(30)

    pid = forked(child)
    try:
        os.close(write_end)
        assert os.read(read_end, 10) == b"ready"
        with pytest.raises(BankLockedError):
            MemoryBank.open(path)  # the child's close() has not let go of the parent's lock
        bank.close()
        with MemoryBank.open(path) as again:
            assert ids_of(again) == ["doc0", "doc1"]
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(read_end)


# ---- the catalog


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda bank: bank.get_many([2.5]), r"document number=2\.5 is a float: expected a whole"),
        (lambda bank: bank.get_many(["1"]), r"document number='1' is a str: expected a whole"),
        (lambda bank: bank.ids([True]), r"document number=True is a bool: expected a whole"),
        (lambda bank: bank.get_many(1), r"numbers are a int: expected several"),
        (lambda bank: bank.get_number("doc0"), r"document number='doc0' is a str"),
        (lambda bank: bank.documents(limit=1.5), r"limit=1\.5 is a float: expected a whole"),
        (lambda bank: bank.documents(offset=-1), r"offset=-1: expected at least 0"),
        (lambda bank: bank.get(1), r"document id 1 is a int: expected text"),
        (lambda bank: bank.parts(None), r"document id None is a NoneType: expected text"),
        (lambda bank: bank.delete(1), r"delete\(\) was given a int: expected an id, or several"),
        (lambda bank: bank.delete(["doc0", 1]), r"document id 1 is a int: expected text"),
        (lambda bank: bank.update("doc0"), r"update\(\) was given a str: expected one msa.Doc"),
        (lambda bank: bank.add(make_document("x")), r"add\(\) was given a Document: expected sev"),
        (lambda bank: bank.add(7), r"add\(\) was given a int: expected several msa.Document"),
        (lambda bank: bank.lexical_search(["river"], 2.0), r"top_k=2\.0 is a float"),
        (lambda bank: LoadedBank(bank, top_k="3"), r"top_k='3' is a str: expected a whole"),
        (lambda bank: LoadedBank(bank).view(top_k=0), r"top_k=0: expected at least 1"),
    ],
)
def test_what_is_of_another_type_is_refused_in_one_line(bank, use, message):
    bank.add(make_documents(2))
    with pytest.raises(InputError, match=message) as caught:
        use(bank)
    assert "\n" not in str(caught.value)
    assert ids_of(bank) == ["doc0", "doc1"]


def test_numbers_may_be_numpys(bank):
    bank.add(make_documents(4))
    numbers = numpy.array([2, 3], dtype=numpy.int64)
    assert sorted(bank.get_many(numbers)) == [2, 3]
    assert bank.get_number(numpy.int32(4)).document.id == "doc3"
    assert [s.number for s in bank.documents(numpy.int64(2), numpy.uint8(1))] == [2, 3]
    bank.catalog.delete(numbers)
    assert ids_of(bank) == ["doc0", "doc3"]
    assert bank.ids(numbers) == {}
    assert bank.ids(numpy.array([1, 4])) == {1: "doc0", 4: "doc3"}
    assert bank.get_many([2**70, -1, 4]).keys() == {4}


def test_compact_works_after_an_interrupted_transaction(bank):
    bank.add(make_documents(2))
    bank.delete("doc0")
    bank.catalog._db.connection.execute("BEGIN IMMEDIATE")
    bank.catalog.shrink()
    bank.catalog._db.connection.execute("BEGIN IMMEDIATE")
    assert bank.compact().dropped == 1


def test_a_reader_that_could_not_follow_once_goes_on_later(bank, path, monkeypatch):
    bank.add(make_documents(2))
    reader = Catalog(path, read_only=True)
    reader._db._frozen = (0, 0)  # as in a folder that it may not write to
    with monkeypatch.context() as patch:

        def refuse():
            raise StorageError("too many open files")

        patch.setattr(reader._db, "_connect", refuse)
        with pytest.raises(StorageError):
            reader.count()
    assert reader.count() == 2
    reader.close()
