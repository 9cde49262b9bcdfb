from __future__ import annotations

import errno
import os
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from bank_tools import folder_state, ids_of, make_documents, same_states, states_of
from msa import Document
from msa.errors import (
    BankCorruptError,
    StorageError,
)
from msa.memory.bank import MemoryBank

# ---- damage


def damage(path, how, index=0):
    segment = sorted((path / "segments").iterdir())[index]
    data = bytearray(segment.read_bytes())
    if how == "flip":
        data[len(data) * 3 // 4] ^= 16
    segment.write_bytes(data[: len(data) // 2] if how == "truncate" else data)
    if how == "remove":
        segment.unlink()
    return segment.name


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_verify_names_a_damaged_segment_and_its_documents_and_repair_heals_it(bank, path, how):
    bank.add(make_documents(3, "a"))
    bank.add(make_documents(3, "b"))
    bank.delete("a1")
    before = states_of(bank)
    assert bank.verify().ok
    name = damage(path, how)
    report = bank.verify()
    assert not report.ok
    assert report.damaged_segments == (name,)
    assert report.damaged_ids == ("a0", "a2")
    assert name in report.problems[0]
    assert bank.repair() == 2
    assert bank.verify().ok
    after = states_of(bank)
    assert after.keys() == before.keys()
    for number, layers in before.items():
        for layer, tensors in layers.items():
            for old, new in zip(tensors, after[number][layer], strict=True):
                torch.testing.assert_close(new, old, atol=1e-5, rtol=1e-4)


def test_compact_never_copies_damage_and_drops_a_damaged_segment_that_is_all_deleted(bank, path):
    bank.add(make_documents(3, "a"))
    bank.add(make_documents(3, "b"))
    bank.delete("a1")
    damage(path, "flip")
    before = folder_state(path)
    with pytest.raises(BankCorruptError, match=r"000001.safetensors.*damaged"):
        bank.compact()
    assert folder_state(path) == before
    bank.delete(["a0", "a2"])
    bank.compact()
    assert bank.verify().ok
    assert ids_of(bank) == ["b0", "b1", "b2"]


def test_files_that_no_commit_names_are_removed_when_a_writer_opens(
    bank, path, tiny_model, tiny_tokenizer
):
    bank.add(make_documents(2))
    bank.close()
    (path / "segments" / "000002.safetensors").write_bytes(b"half")
    (path / "segments" / "000003.safetensors.tmp").write_bytes(b"half")
    with MemoryBank.open(path, read_only=True) as reader:
        report = reader.verify()
        assert report.ok
        assert report.orphans == ("000002.safetensors", "000003.safetensors.tmp")
    with MemoryBank.open(path, tiny_model, tiny_tokenizer) as writer:
        assert list(folder_state(path)) == ["000001.safetensors"]
        writer.add(make_documents(2, "new"))
        assert writer.verify().ok


# ---- a disk that refuses


@pytest.mark.parametrize("call", ["write", "fsync", "link"])
def test_a_full_disk_leaves_the_bank_as_it_was_and_usable(bank, path, monkeypatch, call):
    bank.add(make_documents(3))
    before, states = folder_state(path), states_of(bank)

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(StorageError, match="No space left"):
            bank.add(make_documents(3, "more"))
        bank.delete("doc1")  # needs the catalog only
        with pytest.raises(StorageError, match="No space left"):
            bank.compact()
    assert folder_state(path) == before
    states.pop(2)
    assert same_states(states_of(bank), states)
    assert bank.verify().ok
    assert bank.add(make_documents(3, "more")).added == 3


def test_a_full_disk_in_the_catalog_keeps_the_old_state(bank, path):
    bank.add(make_documents(3))
    db = bank.catalog._db.connection
    db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(StorageError, match="full"):
        bank.add([Document("x", "text", metadata={"large": "x" * 100_000})])
    db.execute("PRAGMA max_page_count = 1000000")
    assert len(bank) == 3
    assert bank.verify().ok
    assert bank.add(make_documents(3, "more")).added == 3


@pytest.fixture
def open_folder():
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def as_nobody(work):
    """What `work` returns when it is called without root's rights, in a process of its own."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            os.write(write_end, str(work()).encode())
        except BaseException as error:
            os.write(write_end, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


@pytest.mark.skipif(os.geteuid() != 0, reason="dropping rights needs root")
@pytest.mark.parametrize("writer_runs", [False, True])
def test_without_write_permission_a_bank_can_be_read_but_not_written(
    open_folder, tiny_model, tiny_tokenizer, writer_runs
):
    path = open_folder / "bank"
    bank = MemoryBank.create(path, tiny_model, tiny_tokenizer)
    bank.add(make_documents(3))
    if not writer_runs:
        bank.close()

    def read():
        with MemoryBank.open(path, read_only=True) as reader:
            return len(reader), reader.verify().ok, reader.get("doc1").number

    assert as_nobody(read) == "(3, True, 2)"
    refused = as_nobody(lambda: MemoryBank.open(path))
    assert refused.startswith("StorageError: cannot open bank")
    assert "Permission denied" in refused
    assert "read_only=True" in refused
    refused = as_nobody(lambda: MemoryBank.create(path / "new", tiny_model, tiny_tokenizer))
    assert refused.startswith("StorageError: cannot make bank")
    bank.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="dropping rights needs root")
def test_a_reader_without_write_permission_follows_a_writer_that_comes_later(
    open_folder, tiny_model, tiny_tokenizer
):
    path = open_folder / "bank"
    MemoryBank.create(path, tiny_model, tiny_tokenizer).close()
    to_child, from_parent = os.pipe()

    def read():
        with MemoryBank.open(path, read_only=True) as reader:
            before = len(reader)
            os.read(to_child, 1)
            return before, len(reader)

    def write():
        with MemoryBank.open(path, tiny_model, tiny_tokenizer) as bank:
            bank.add(make_documents(3))
            os.write(from_parent, b"x")
            time.sleep(0.3)

    thread = threading.Timer(0.3, write)
    thread.start()
    assert as_nobody(read) == "(0, 3)"
    thread.join()
