"""One bank made by several processes: the same as by one, and unharmed when one of them dies.

The ranks are forked, so that none of them has to import torch again; one test runs torchrun itself.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from importlib import resources
from pathlib import Path

import pytest
import torch

import bank_tools
from bank_tools import ids_of, make_document, make_documents, states_of
from msa import Document, MemoryEngine, load
from msa.cli import main
from msa.errors import DuplicateDocumentError, RankError
from msa.memory.bank import MemoryBank
from msa.memory.distributed.bulk_ingest import Coordinator
from msa.memory.distributed.torchrun_ingest import Follower, Lead, Place
from msa.memory.loaded.loaded_bank import LoadedBank

ROOT = Path(__file__).resolve().parents[2]
DEMO = resources.files("msa") / "demo" / "worlds"
PATIENCE = 240  # seconds; the machine may be busy


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def place(rank: int, world: int, port: int) -> Place:
    return Place(rank, world, rank, "localhost", port)


class Process:
    """A forked process; its output is in a file, its exit code comes from `wait`."""

    def __init__(self, folder: Path, work) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        gc.collect()  # what the parent no longer needs is not the child's to finalize
        self.pid = os.fork()
        if self.pid == 0:
            gc.freeze()
            torch.set_num_threads(1)  # the parent's threads are not there after a fork
            code = 1
            try:
                for number, name in ((1, "stdout"), (2, "stderr")):
                    file = (folder / name).open("w", encoding="utf-8")
                    os.dup2(file.fileno(), number)
                    setattr(sys, name, file)
                work()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def wait(self) -> int:
        """Its exit code, or minus the signal that ended it."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"it hangs; it said: {self.read('stdout')} {self.read('stderr')}")

    def read(self, name: str) -> str:
        return (self._folder / name).read_text(encoding="utf-8")


def index_in_ranks(folder: Path, world: int, *words: object) -> list[Process]:
    """`msa index` in so many ranks; they have ended."""
    port = free_port()

    def work(rank: int) -> None:
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
        where |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in where.items()})
        main.main(["index", *map(str, words), "--json"])

    ranks = [Process(folder / f"rank{i}", functools.partial(work, i)) for i in range(world)]
    for rank in ranks:
        rank.code = rank.wait()
    return ranks


def counts(rank: Process) -> dict[str, int]:
    (report,) = (json.loads(line) for line in rank.read("stdout").splitlines())
    return {name: report[name] for name in ("added", "updated", "unchanged", "failed")}


def only_the_first_spoke(ranks: list[Process]) -> None:
    assert [rank.read("stdout") + rank.read("stderr") for rank in ranks[1:]] == [""] * (
        len(ranks) - 1
    )


def sound(path: Path, *, orphans: bool | None = None) -> None:
    with MemoryBank.open(path, read_only=True) as bank:
        report = bank.verify()
        assert report.ok, report.problems
        if orphans is not None:
            assert bool(report.orphans) == orphans


@pytest.fixture(scope="module")
def loaded():
    return load("worlds")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    path.write_text((DEMO / "documents.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    return path


def documents_in(path: Path) -> list[Document]:
    return [Document(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def questions() -> list[str]:
    lines = (DEMO / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["question"] for line in lines]


@pytest.fixture(scope="module")
def made_by_one(corpus, loaded, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("one") / "bank"
    with MemoryBank.create(path, loaded) as bank:
        bank.add(documents_in(corpus))
    return path


def found(path: Path, loaded, questions: list[str], top_k: int) -> list[dict[str, float]]:
    """Id -> score for every question."""
    with MemoryBank.open(path, loaded, read_only=True) as bank:
        engine = MemoryEngine(bank)
        return [
            {hit.id: hit.score for hit in engine.retrieve(question, top_k=top_k)}
            for question in questions
        ]


@pytest.fixture
def small_windows(monkeypatch):
    """Many commits from few documents."""
    for kind in (Lead, Follower):
        monkeypatch.setattr(kind, "add", functools.partialmethod(kind.add, commit_tokens=400))


# ---- the same bank


@pytest.mark.parametrize("world", [2, 3])
def test_several_ranks_make_the_bank_that_one_process_makes(
    world, corpus, made_by_one, loaded, questions, tmp_path, monkeypatch
):
    path = tmp_path / "bank"
    ranks = index_in_ranks(tmp_path, world, corpus, "--bank", path)
    assert [rank.code for rank in ranks] == [0] * world, ranks[0].read("stderr")
    documents = documents_in(corpus)
    new = {"added": len(documents), "updated": 0, "unchanged": 0, "failed": 0}
    assert counts(ranks[0]) == new
    only_the_first_spoke(ranks)
    sound(path, orphans=False)
    with MemoryBank.open(path, read_only=True) as bank:
        assert len(bank.catalog.segments()) == world  # every rank has written one
        order = ids_of(bank)
        assert sorted(order) == sorted(d.id for d in documents)
    # other numbers, other texts to the letter: the first document of each question is the same
    found_here = found(path, loaded, questions, top_k=1)
    assert [set(f) for f in found_here] == [
        set(f) for f in found(made_by_one, loaded, questions, top_k=1)
    ]
    # the same numbers: the same states, the same scores
    by_id = {d.id: d for d in documents}
    again = tmp_path / "again"
    with MemoryBank.create(again, loaded) as bank:
        bank.add([by_id[name] for name in order])
        assert ids_of(bank) == order
        monkeypatch.setattr(bank_tools, "LAYERS", bank.manifest.routing_layers)
        states = states_of(bank)
    with MemoryBank.open(path, read_only=True) as bank:
        for number, layers in states_of(bank).items():
            for layer, tensors in layers.items():
                torch.testing.assert_close(tensors, states[number][layer], atol=1e-4, rtol=1e-4)
    for one, other in zip(
        found(path, loaded, questions, top_k=8),
        found(again, loaded, questions, top_k=8),
        strict=True,
    ):
        assert one == pytest.approx(other, abs=1e-4)
    # and it is a bank as any other: the same again changes nothing
    ranks = index_in_ranks(tmp_path / "more", world, corpus, "--bank", path)
    assert counts(ranks[0]) == {**new, "added": 0, "unchanged": len(documents)}


class Together:
    """Rank 0 here, rank 1 forked, with the tiny model."""

    def __init__(self, model, tokenizer, folder: Path) -> None:
        self.model, self.tokenizer, self.folder = model, tokenizer, folder
        self.path = folder / "bank"
        self.other: Process | None = None
        with MemoryBank.create(self.path, model, tokenizer, max_document_tokens=96):
            pass

    def open(self) -> MemoryBank:
        return MemoryBank.open(self.path, self.model, self.tokenizer)

    def follow(self, port: int, path: Path, documents, commit_tokens: int) -> None:
        with Follower(place(1, 2, port), 60.0) as follower:
            try:
                follower.add(
                    path, self.model, self.tokenizer, documents, commit_tokens=commit_tokens
                )
            except Exception as error:
                follower.tell(error)
                raise

    def add(
        self, documents, theirs=None, their_path=None, timeout=60.0, commit_tokens=500, **options
    ):
        """The report; `theirs` and `their_path` are what rank 1 is given, if it differs."""
        port = free_port()
        theirs = documents if theirs is None else theirs
        work = functools.partial(self.follow, port, their_path or self.path, theirs, commit_tokens)
        self.other = Process(self.folder / "rank1", work)
        with Lead(place(0, 2, port), timeout) as lead, self.open() as bank:
            return lead.add(bank, documents, commit_tokens=commit_tokens, **options)


@pytest.fixture
def together(tiny_model, tiny_tokenizer, tmp_path) -> Together:
    return Together(tiny_model, tiny_tokenizer, tmp_path)


def names_of(rank: int, count: int) -> list[str]:
    """Ids that belong to one of two ranks."""
    names = (f"n{i}" for i in range(10_000))
    return [n for n in names if zlib.crc32(n.encode()) % 2 == rank][:count]


@pytest.mark.parametrize("on_duplicate", ["update", "skip"])
def test_every_document_ends_as_with_one_process(
    on_duplicate, together, tiny_model, tiny_tokenizer, tmp_path
):
    first = [make_document(f"d{i}") for i in range(12)]
    first += [make_document("long", words=120), Document("m", "meta", metadata={"v": 1})]
    then = [
        *first[:4],  # unchanged
        *(make_document(f"d{i}", 1) for i in range(4, 8)),  # other text
        make_document("long", 1, words=200),  # other parts
        make_document("longer", words=150),
        Document("m", "meta", metadata={"v": 2}),
        *(make_document(f"e{i}") for i in range(12)),
        *(make_document(f"e{i}") for i in range(3)),  # twice, the same
        *(make_document(f"e{i}", 2) for i in range(3, 6)),  # twice, and not the same
        Document("long#2", "an id of a part"),
        Document("empty", " "),
        Document("broken", "\ud800"),
        Document("x", "text", "title " * 200),
    ]
    alone = tmp_path / "alone"
    with MemoryBank.create(alone, tiny_model, tiny_tokenizer, max_document_tokens=96) as bank:
        bank.add(first)
        one = bank.add(then, on_duplicate=on_duplicate)
        stored = {s.document.id: s for s in bank.documents()}
    with together.open() as bank:
        bank.add(first)
    two = together.add(then, on_duplicate=on_duplicate)
    assert together.other.wait() == 0
    for name in ("added", "updated", "unchanged", "parts"):
        assert getattr(two, name) == getattr(one, name), name
    assert sorted(two.failed) == sorted(one.failed)
    assert two.added + two.updated + two.unchanged + len(two.failed) == len(then)
    sound(together.path)
    with together.open() as bank:
        here = {s.document.id: s for s in bank.documents()}
        assert {i: s.document for i, s in here.items()} == {
            i: s.document for i, s in stored.items()
        }
        for name, part in here.items():
            assert (part.part_of, part.part, part.num_parts) == (
                stored[name].part_of,
                stored[name].part,
                stored[name].num_parts,
            )
        # what is stored is what its text and number give
        number = here["longer#2"].number
        (batch,) = bank._encoder("test").encode([(number, here["longer#2"].document)])
        for layer, tensors in states_of(bank)[number].items():
            theirs = batch.states.layers[layer]
            wanted = (theirs.routing_keys, theirs.pooled_keys, theirs.pooled_values)
            torch.testing.assert_close(tensors, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_id_with_other_content_raises_wherever_it_is_found(rank, together):
    name = names_of(rank, 1)[0]
    with together.open() as bank:
        bank.add([make_document(name)])
    with pytest.raises(DuplicateDocumentError, match=f"'{name}' is in the bank with other content"):
        together.add([*make_documents(6), make_document(name, 1)])
    assert together.other.wait() == 1
    sound(together.path)


def test_a_reader_sees_every_document_that_progress_has_counted(together):
    documents = [make_document(f"d{i}", words=2) for i in range(300)]  # none is split
    with MemoryBank.open(together.path, read_only=True) as reading:
        resident = LoadedBank(reading)
        seen = []

        def progress(said) -> None:
            resident.refresh()
            seen.append((said.added, int(resident.view()._rows.live.sum())))

        together.add(documents, progress=progress, commit_tokens=200)
    assert len(seen) > 4
    assert all(added == live for added, live in seen)
    assert seen[-1] == (300, 300)


# ---- ranks that die


def die_at(rank: int, commit: int, met: Path, monkeypatch) -> None:
    """Let a rank be killed when its states are on disk and its documents not yet stored.

    It dies after another rank has met rank 0 (`met` is there then), however late that one starts.
    """
    done = []
    enter = Follower.__enter__

    def meets(self):
        met.touch()
        return enter(self)

    monkeypatch.setattr(Follower, "__enter__", meets)

    def dies(self, worker, window, store):
        if worker == f"rank {rank}":
            done.append(worker)
            if len(done) == commit:
                until = time.monotonic() + 60
                while not met.exists() and time.monotonic() < until:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
        return store(self, worker, window)

    for kind in (Follower, Coordinator):
        if rank == 0 and kind is Follower:
            continue
        store = kind.commit
        monkeypatch.setattr(kind, "commit", functools.partialmethod(dies, store=store))
        if rank > 0:
            break


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_is_killed_and_the_same_command_goes_on(
    victim, corpus, tmp_path, monkeypatch, small_windows
):
    path = tmp_path / "bank"
    with monkeypatch.context() as patched:
        die_at(victim, 3, tmp_path / "met", patched)
        ranks = index_in_ranks(tmp_path, 2, corpus, "--bank", path, "--rank-timeout", 60)
    assert (ranks[victim].code, ranks[1 - victim].code) == (-9, 1)
    line = ranks[1 - victim].read("stderr")
    assert line.count("\n") == 1, line
    assert line.startswith(f"Error: rank {victim} ")
    assert "ended before" in line
    assert line.endswith("the same command goes on from there\n")
    assert ranks[1 - victim].read("stdout") == ""
    sound(path, orphans=True)
    with MemoryBank.open(path, read_only=True) as bank:
        stored = {s.document.id: s.number for s in bank.documents()}
    total = len(documents_in(corpus))
    assert 0 < len(stored) < total
    ranks = index_in_ranks(tmp_path / "more", 3, corpus, "--bank", path)
    assert [rank.code for rank in ranks] == [0, 0, 0]
    assert counts(ranks[0]) == {
        "added": total - len(stored),
        "updated": 0,
        "unchanged": len(stored),
        "failed": 0,
    }
    sound(path, orphans=False)
    with MemoryBank.open(path, read_only=True) as bank:
        now = {s.document.id: s.number for s in bank.documents()}
        assert sorted(now) == sorted(d.id for d in documents_in(corpus))
        assert stored.items() <= now.items()
        assert min(set(now.values()) - set(stored.values())) > max(stored.values())


def test_torchrun_says_in_one_line_which_rank_was_killed(corpus, tmp_path):
    path, script = tmp_path / "bank", tmp_path / "index.py"
    script.write_text(
        "import os, signal\n"
        "from msa.cli.main import main\n"
        "from msa.memory.distributed.torchrun_ingest import Follower\n"
        "Follower.commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main()\n"
    )
    words = ["--standalone", "--nproc-per-node", 2, script, "index", corpus, "--bank", path]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *map(str, words)],
        env=dict(os.environ, PYTHONPATH=str(ROOT / "src"), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode != 0
    assert run.stdout == ""
    lines = [line for line in run.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, run.stderr
    (line,) = lines
    assert line.startswith("Error: rank 1 of 2 ")
    assert "ended before it was done" in line
    sound(path, orphans=True)
    ranks = index_in_ranks(tmp_path, 2, corpus, "--bank", path)
    assert [rank.code for rank in ranks] == [0, 0]
    sound(path)


def test_a_rank_that_hangs_is_lost_after_the_timeout(together, monkeypatch):
    def hang(*_):
        os.kill(os.getpid(), signal.SIGSTOP)

    monkeypatch.setattr(Follower, "claim", hang)
    try:
        with pytest.raises(RankError, match=r"^rank 1 of 2 .* has said nothing for 2 s"):
            together.add(make_documents(20), timeout=2.0)
    finally:
        os.kill(together.other.pid, signal.SIGKILL)
        assert together.other.wait() == -9
    sound(together.path)


def test_a_rank_that_never_comes_is_lost_after_the_timeout(together):
    with (
        pytest.raises(RankError, match=r"^rank 1 of 2 has not come within 1 s"),
        Lead(place(0, 2, free_port()), 1.0) as lead,
        together.open() as bank,
    ):
        lead.add(bank, make_documents(8))
    sound(together.path)


# ---- ranks that see something else


def test_a_rank_that_reads_other_files_is_noticed(together):
    documents = make_documents(12)
    with pytest.raises(RankError, match=r"^rank 1 .* was given 11 documents, rank 0 12: all ranks"):
        together.add(documents, theirs=documents[:-1])
    shuffled = [*documents[1:], documents[0]]
    with pytest.raises(RankError, match=r"12 documents, rank 0 12 \(others, or in another order"):
        together.add(documents, theirs=shuffled)
    sound(together.path)


def test_a_rank_that_sees_another_disk_is_noticed(together, tiny_model, tiny_tokenizer, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    MemoryBank.create(elsewhere, tiny_model, tiny_tokenizer).close()
    with pytest.raises(RankError, match=r"^rank 1 of 2 .* a file system that all hosts share"):
        together.add(make_documents(12), their_path=elsewhere)
    assert together.other.wait() == 1
    sound(together.path)


def test_a_fault_of_a_rank_is_told_by_the_first(together, monkeypatch):
    monkeypatch.setattr(Follower, "claim", lambda *_: 1 / 0)
    with pytest.raises(RankError, match=r"^rank 1 of 2 .*: ZeroDivisionError: division by zero\."):
        together.add(make_documents(12))
    assert together.other.wait() == 1


def test_half_an_environment_is_one_line(monkeypatch, capsys, corpus, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    try:
        with pytest.raises(SystemExit) as stop:
            main.main(["index", str(corpus), "--bank", str(tmp_path / "bank")])
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(number, handler)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: WORLD_SIZE=2 is set, but RANK")
    assert error.count("\n") == 1
    assert not (tmp_path / "bank").exists()
