"""The bank against SIGKILL, at random instants and at every single system call that matters.

A writer runs in a forked process and tells what it begins and what was acknowledged through a pipe.
After each kill the bank is opened again and must hold every acknowledged document, and of the
operation that was under way all or nothing (of a long `add`: whole commits).
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sqlite3
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from bank_tools import LAYERS, ids_of, make_document, states_of
from conftest import routing_vectors_of
from msa import Document
from msa.errors import BankLockedError
from msa.memory.bank import MemoryBank
from msa.memory.ingest.encoder import DocumentEncoder
from msa.memory.loaded.loaded_bank import LoadedBank
from msa.memory.store import word_index

KILLS = 20
MAX_TOKENS = 96  # so that the longer documents are split


def version(name: str, number: int) -> Document:
    """The document of this name in its n-th version; some have to be split."""
    words = 40 if name.endswith(("3", "7")) else 6
    return make_document(name, number, words=words)


class Child:
    """A forked process; what it says comes back line by line."""

    def __init__(self, work) -> None:
        read_end, write_end = os.pipe()
        gc.collect()  # what the parent no longer needs is not the child's to finalize
        self.pid = os.fork()
        if self.pid == 0:
            gc.freeze()
            os.close(read_end)
            torch.set_num_threads(1)  # the parent's threads are not there after a fork
            code = 1
            try:
                work(lambda *message: os.write(write_end, json.dumps(message).encode() + b"\n"))
                code = 0
            except BaseException as error:
                os.write(write_end, json.dumps(["error", repr(error)]).encode() + b"\n")
            finally:
                os._exit(code)
        os.close(write_end)
        self.pipe = os.fdopen(read_end)

    def wait_for(self, word: str) -> list:
        message = self.next()
        assert message[0] == word, message
        return message

    def next(self) -> list:
        return json.loads(self.pipe.readline())

    def kill(self) -> list[list]:
        """Kill it; all that it has said."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        with self.pipe:
            return [json.loads(line) for line in self.pipe if line.endswith("\n")]

    def finish(self) -> tuple[int, list[list]]:
        """Wait until it ends; its signal or exit code, and all that it has said."""
        with self.pipe:
            said = [json.loads(line) for line in self.pipe]
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), said


@dataclass
class Expected:
    """What the bank must hold: id -> version."""

    documents: dict[str, int] = field(default_factory=dict)
    owners: dict[int, str] = field(default_factory=dict)  # number -> what it was first seen with

    def after(self, said: list[list]) -> list[dict[str, int]]:
        """States that are allowed, given what the writer has said; the last one is in flight."""
        state = dict(self.documents)
        allowed = [dict(state)]
        for i, (word, *rest) in enumerate(said):
            if word == "begin":
                operation, arguments = rest
                allowed = [dict(state)]
                acknowledged = 0
                for later in said[i + 1 :]:
                    if later[0] != "ack":
                        break
                    acknowledged = later[1]
                done = ["done"] in said[i + 1 :]
                if operation in ("add", "update"):
                    steps = [dict(state)]
                    for name, number in arguments:
                        steps.append({**steps[-1], name: number})
                    state = steps[-1]
                    allowed = steps[acknowledged:] if operation == "add" else [steps[0], state]
                elif operation == "delete":
                    state = {k: v for k, v in state.items() if k not in arguments}
                    allowed.append(dict(state))
                if done:
                    allowed = [dict(state)]
            assert word != "error", rest
        return allowed

    def check(self, path: Path, said: list[list], model, tokenizer) -> None:
        """Open the bank as the next writer does, compare everything, and go on from there."""
        with MemoryBank.open(path, model, tokenizer) as bank:
            report = bank.verify()
            assert report.ok, report.problems
            assert report.orphans == ()
            held = {s.part_of or s.document.id for s in bank.documents()}
            versions = {
                name: bank.parts(name)[0].document.metadata["seed"] for name in sorted(held)
            }
            allowed = self.after(said)
            assert versions in allowed, (versions, allowed, said[-3:])
            self.documents = versions
            for name, number in versions.items():
                text = " ".join(p.document.text for p in bank.parts(name))
                assert text == version(name, number).text
            self._check_states(bank, model, tokenizer)
            self._check_words(bank)

    def _check_words(self, bank: MemoryBank) -> None:
        """Every live document is in the word index, as its text stands, and no other."""
        stored = {s.number: s.document for s in bank.documents()}
        names = [d.text.split(":")[0].split()[0] for d in stored.values()]
        found = bank.lexical_search([*names, "river stone lamp coat seven"], 1000)
        for number, hits in zip(stored, found, strict=False):
            assert number in dict(hits)
        assert {n for hits in found for n, _ in hits} <= stored.keys()
        with bank.catalog._db.transaction("check") as db:  # SQLite's own opinion
            db.execute("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")
            rows = db.execute("SELECT id FROM words_docsize ORDER BY id").fetchall()
        assert [number for (number,) in rows] == sorted(stored)

    def _check_states(self, bank: MemoryBank, model, tokenizer) -> None:
        stored = {s.number: s for s in bank.documents()}
        for number, document in stored.items():
            owner = f"{document.document.id}/{document.document.metadata['seed']}"
            assert self.owners.setdefault(number, owner) == owner, "a number was used twice"
        states = states_of(bank)
        assert states.keys() == stored.keys()
        expected = encoded(stored, model, tokenizer)
        for number, layers in states.items():
            for layer, tensors in layers.items():
                for old, new in zip(tensors, expected[number][layer], strict=True):
                    torch.testing.assert_close(old, new, atol=1e-4, rtol=1e-3)


_ENCODED: dict[tuple[int, str | None, str], dict[int, list[torch.Tensor]]] = {}


def encoded(stored, model, tokenizer) -> dict[int, dict[int, list[torch.Tensor]]]:
    """States of documents by number and layer. Each is encoded once; all tests have one model."""
    keys = {n: (n, s.document.title, s.document.text) for n, s in stored.items()}
    new = [(n, s.document) for n, s in stored.items() if keys[n] not in _ENCODED]
    for batch in DocumentEncoder(model, tokenizer).encode(new):
        counts = batch.states.chunk_counts.tolist()
        for layer in LAYERS:
            states = batch.states.layers[layer]
            tensors = (states.routing_keys, states.pooled_keys, states.pooled_values)
            for number, *parts in zip(
                batch.numbers, *(torch.split(t, counts) for t in tensors), strict=True
            ):
                _ENCODED.setdefault(keys[number], {})[layer] = parts
    return {n: _ENCODED[key] for n, key in keys.items()}


def restless_writer(path: Path, seed: int, model, tokenizer, known: dict[str, int]):
    """A process that adds, updates, deletes and compacts until it is killed."""

    def work(say) -> None:
        rng = random.Random(seed)
        documents = dict(known)
        bank = MemoryBank.open(path, model, tokenizer)
        say("ready")
        for step in range(10_000):
            operation = rng.choice(["add", "add", "update", "delete", "compact"])
            names = rng.sample(sorted(documents), min(len(documents), 3))
            if operation == "add" and len(documents) < 30:
                new = [(f"s{seed}-{step}-{i}", step) for i in range(rng.randint(1, 12))]
                say("begin", "add", new)
                bank.add(
                    (version(*n) for n in new),
                    commit_tokens=150,
                    progress=lambda p: say("ack", p.added),
                )
                documents |= dict(new)
            elif operation == "update" and names:
                new = [(name, 1000 * seed + step) for name in names]
                say("begin", "update", new)
                bank.add([version(*n) for n in new], on_duplicate="update")
                documents |= dict(new)
            elif operation == "delete" and len(documents) > 12:
                say("begin", "delete", names)
                bank.delete(names)
                for name in names:
                    documents.pop(name)
            elif operation == "compact":
                say("begin", "compact", [])
                bank.compact()
            else:
                continue
            say("done")

    return work


@pytest.fixture
def new_bank(tmp_path, tiny_model, tiny_tokenizer):
    path = tmp_path / "bank"
    MemoryBank.create(path, tiny_model, tiny_tokenizer, max_document_tokens=MAX_TOKENS).close()
    return path


def test_killed_at_random_instants_every_acknowledged_document_is_there_and_no_other(
    new_bank, tiny_model, tiny_tokenizer
):
    expected = Expected()
    rng = random.Random(0)
    in_flight = set()
    for seed in range(1, KILLS + 1):
        writer = restless_writer(new_bank, seed, tiny_model, tiny_tokenizer, expected.documents)
        child = Child(writer)
        child.wait_for("ready")
        said = [child.next() for _ in range(rng.randint(0, 25))]
        time.sleep(rng.uniform(0, 0.03))
        said += child.kill()
        if said and said[-1] != ["done"]:
            in_flight.add(next(m[1] for m in reversed(said) if m[0] == "begin"))
        expected.check(new_bank, said, tiny_model, tiny_tokenizer)
    assert len(expected.owners) > 30, "the writers got nothing done"
    assert len(in_flight) >= 2, "the kills hit nothing"


class KillingConnection:
    """A SQLite connection that counts its commits among the system calls."""

    def __init__(self, connection: sqlite3.Connection, count) -> None:
        self._connection = connection
        self._count = count

    def __getattr__(self, name):
        return getattr(self._connection, name)

    def execute(self, sql, *rest):
        changes = sql == "VACUUM" or (sql == "COMMIT" and self._connection.total_changes)
        if not changes:
            return self._connection.execute(sql, *rest)
        self._count(f"before {sql}")
        result = self._connection.execute(sql, *rest)
        self._count(f"after {sql}")
        return result


def kill_inside(path: Path, part: float, model, tokenizer, operation) -> tuple[int, list[list]]:
    """Run an operation in a process that kills itself amid SQLite's work, after a part of it."""

    def work(say) -> None:
        bank = MemoryBank.open(path, model, tokenizer)
        total = 0

        def count() -> int:
            nonlocal total
            total += 1
            if total == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return 0

        limit = 0
        copy = path.with_name(path.name + "-whole")  # first the whole of it, to see how long it is
        shutil.copytree(path, copy)
        with MemoryBank.open(copy, model, tokenizer) as other:
            other.catalog._db.connection.set_progress_handler(count, 5)
            operation(other, lambda *message: None)
        shutil.rmtree(copy)
        limit, total = max(1, int(total * part)), 0
        bank.catalog._db.connection.set_progress_handler(count, 5)
        operation(bank, say)

    return Child(work).finish()


def kill_at_call(path: Path, call: int, model, tokenizer, operation) -> tuple[int, list[list]]:
    """Run an operation in a process that kills itself at its n-th write, sync, link, ..."""

    def work(say) -> None:
        bank = MemoryBank.open(path, model, tokenizer)
        calls = 0
        saying = os.write

        def tell(*message) -> None:
            os.write = saying
            say(*message)
            os.write = counted["write"]

        def count(_name) -> None:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)

        def counting(name):
            real = getattr(os, name)

            def counted_call(*rest, **more):
                count(name)
                if name == "write" and len(rest[1]) > 1 and calls % 2:
                    return real(rest[0], rest[1][: len(rest[1]) // 2])  # torn writes too
                return real(*rest, **more)

            return counted_call

        counted = {name: counting(name) for name in ("write", "fsync", "link", "unlink")}
        for name, function in counted.items():
            setattr(os, name, function)
        bank.catalog._db.connection = KillingConnection(bank.catalog._db.connection, count)
        operation(bank, tell)
        os.write = saying

    return Child(work).finish()


FIRST = [("a", 0), ("b3", 0), ("c", 0), ("d7", 0)]


def add_some(bank, tell):
    new = [("e", 0), ("f3", 0)]
    tell("begin", "add", new)
    bank.add([version(*n) for n in new])
    tell("done")


def update_some(bank, tell):
    new = [("b3", 1), ("c", 1)]
    tell("begin", "update", new)
    bank.add([version(*n) for n in new], on_duplicate="update")
    tell("done")


def delete_some(bank, tell):
    tell("begin", "delete", ["a", "b3"])
    bank.delete(["a", "b3"])
    tell("done")


def compact(bank, tell):
    tell("begin", "compact", [])
    bank.compact()
    tell("done")


def index_words(bank, tell):
    """As when a bank is opened for writing that has no word index."""
    tell("begin", "index", [])
    word_index.build(bank.catalog._db)
    tell("done")


@pytest.mark.parametrize("operation", [add_some, update_some, delete_some, compact, index_words])
def test_killed_amid_the_work_of_the_catalog(
    new_bank, tmp_path, tiny_model, tiny_tokenizer, operation
):
    with MemoryBank.open(new_bank, tiny_model, tiny_tokenizer) as bank:
        bank.add([version(*n) for n in FIRST])
        bank.add([version("gone", 0)])
        bank.delete("gone")
    for step in range(5):
        copy = tmp_path / f"copy{step}"
        shutil.copytree(new_bank, copy)
        code, said = kill_inside(copy, (step + 1) / 6, tiny_model, tiny_tokenizer, operation)
        assert code == -signal.SIGKILL, said
        Expected(dict(FIRST)).check(copy, said, tiny_model, tiny_tokenizer)
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    ("operation", "least"),
    [(add_some, 12), (update_some, 12), (delete_some, 2), (compact, 14), (index_words, 2)],
)
def test_killed_at_every_call_that_changes_the_disk(
    new_bank, tmp_path, tiny_model, tiny_tokenizer, operation, least
):
    with MemoryBank.open(new_bank, tiny_model, tiny_tokenizer) as bank:
        bank.add([version(*n) for n in FIRST])
        bank.add([version("gone", 0)])
        bank.delete("gone")
    for call in range(1, 200):
        copy = tmp_path / f"copy{call}"
        shutil.copytree(new_bank, copy)
        code, said = kill_at_call(copy, call, tiny_model, tiny_tokenizer, operation)
        Expected(dict(FIRST)).check(copy, said, tiny_model, tiny_tokenizer)
        shutil.rmtree(copy)
        if code == 0:
            assert said[-1] == ["done"]
            break
        assert code == -signal.SIGKILL
    assert call > least


def test_killed_while_a_bank_is_made_it_can_be_made_again(tmp_path, tiny_model, tiny_tokenizer):
    path = tmp_path / "bank"
    for delay in (0.001, 0.005, 0.01, 0.02):
        child = Child(
            lambda say: (
                say("ready"),
                MemoryBank.create(path, tiny_model, tiny_tokenizer).close(),
                say("done"),
            )
        )
        child.wait_for("ready")
        time.sleep(delay)
        if ["done"] in child.kill() or (path / "bank.json").exists():
            with MemoryBank.open(path, tiny_model, tiny_tokenizer) as bank:
                assert bank.verify().ok
            shutil.rmtree(path)
    MemoryBank.create(path, tiny_model, tiny_tokenizer).close()


def test_a_writer_that_dies_frees_its_lock(new_bank, tiny_model, tiny_tokenizer):
    def hold(say) -> None:
        bank = MemoryBank.open(new_bank, tiny_model, tiny_tokenizer)
        say("ready", bank.path.name)
        time.sleep(60)

    child = Child(hold)
    child.wait_for("ready")
    with pytest.raises(BankLockedError, match=rf"process {child.pid} on "):
        MemoryBank.open(new_bank)
    MemoryBank.open(new_bank, read_only=True).close()
    child.kill()
    MemoryBank.open(new_bank).close()


def test_a_reader_that_asks_while_documents_come_and_go_never_sees_half_a_document(
    new_bank, tiny_model, tiny_tokenizer
):
    vectors, mask = routing_vectors_of(2, 4, seed=1)
    encoder = DocumentEncoder(tiny_model, tiny_tokenizer)
    child = Child(restless_writer(new_bank, 7, tiny_model, tiny_tokenizer, {}))
    child.wait_for("ready")
    asked = changes = 0
    try:
        with MemoryBank.open(new_bank, tiny_model, tiny_tokenizer, read_only=True) as bank:
            resident = LoadedBank(bank)
            end = time.monotonic() + 2.5
            while time.monotonic() < end or asked < 20:
                changes += resident.refresh()
                view = resident.view()
                if not len(view):
                    continue
                _check_listing(bank)
                selection = view.route(3, vectors, mask)
                numbers = view.rows_to_numbers(selection.documents)
                asked += 1
                for row in range(2):
                    number = int(numbers[row, 0])
                    stored = bank.get_many([number]).get(number)
                    if stored is None:
                        continue  # deleted since the refresh
                    best = type(selection)(
                        selection.documents[row : row + 1, :1], selection.scores[row : row + 1, :1]
                    )
                    content = view.content(3, best)
                    (batch,) = encoder.encode([(number, stored.document)])
                    wanted = batch.states.layers[3]
                    torch.testing.assert_close(
                        content.keys[0], wanted.pooled_keys, atol=1e-4, rtol=1e-3
                    )
                    torch.testing.assert_close(
                        content.values[0], wanted.pooled_values, atol=1e-4, rtol=1e-3
                    )
    finally:
        said = child.kill()
    assert all(m[0] != "error" for m in said), said[-1]
    assert changes > 5
    Expected().check(new_bank, said, tiny_model, tiny_tokenizer)


def _check_listing(bank: MemoryBank) -> None:
    """Every split document has all its parts, of one version, and their texts give the whole."""
    parts: dict[str, list] = {}
    for stored in bank.documents():
        parts.setdefault(stored.part_of or stored.document.id, []).append(stored)
    for name, found in parts.items():
        assert len(found) == found[0].num_parts
        seed = found[0].document.metadata["seed"]
        assert " ".join(s.document.text for s in found) == version(name, seed).text


def test_an_add_that_was_killed_goes_on_where_it_was(new_bank, tiny_model, tiny_tokenizer):
    documents = [version(f"doc{i}", 0) for i in range(60)]

    def add(say) -> None:
        with MemoryBank.open(new_bank, tiny_model, tiny_tokenizer) as bank:
            bank.add(
                documents,
                on_duplicate="skip",
                commit_tokens=100,
                progress=lambda p: say("ack", p.added + p.unchanged),
            )

    acknowledged = 0
    for _ in range(3):
        child = Child(add)
        for _ in range(4):
            acknowledged = max(acknowledged, child.wait_for("ack")[1])
        for message in child.kill():
            acknowledged = max(acknowledged, message[1])
    with MemoryBank.open(new_bank, tiny_model, tiny_tokenizer) as bank:
        report = bank.add(documents, on_duplicate="skip")
        assert report.unchanged >= acknowledged > 0
        assert report.added + report.unchanged == 60
        assert report.failed == ()
        assert [i for i in ids_of(bank) if "#" not in i] == [
            d.id for d in documents if not d.id.endswith(("3", "7"))
        ]
        assert bank.verify().ok
