"""What is open belongs to one process until it is closed, and says so to every other use."""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch

from bank_tools import make_documents
from msa import MemoryBank, MemoryEngine
from msa.errors import BankError, BudgetError, FetchError
from msa.inference.options import AskOptions
from msa.memory.ingest import encoder
from msa.memory.loaded import memory_plan
from msa.memory.loaded.loaded_bank import LoadedBank
from msa.memory.loaded.reservations import RESERVATIONS, Reservation, Reservations
from msa.model.home import made_whole

GB = 10**9


@pytest.fixture
def full(bank):
    bank.add(make_documents(6))
    return bank


def uses_of(bank, loaded, engine):
    """Every public way to use them, by class."""
    catalog = bank.catalog
    return {
        "MemoryBank": [
            lambda: bank.add(make_documents(1, "new")),
            lambda: bank.update(make_documents(1)[0]),
            lambda: bank.delete("doc0"),
            bank.compact,
            bank.repair,
            bank.verify,
            bank.info,
            bank.documents,
            bank.lexical_missing,
            lambda: bank.get("doc0"),
            lambda: bank.parts("doc0"),
            lambda: bank.get_number(1),
            lambda: bank.get_many([1]),
            lambda: bank.ids([1]),
            lambda: bank.lexical_search(["river"], 2),
            lambda: bank.lexical_scores("river", [1]),
            lambda: bank.generation,
            lambda: len(bank),
            lambda: "doc0" in bank,
            lambda: LoadedBank(bank),
            lambda: MemoryEngine(bank),
        ],
        "Catalog": [
            catalog.count,
            catalog.totals,
            catalog.segments,
            catalog.snapshot,
            catalog.dead_counts,
            catalog.problems,
            catalog.shrink,
            catalog.check_writer,
            catalog.repair_indexes,
            lambda: catalog.delete([1]),
            lambda: catalog.commit([], []),
            lambda: catalog.replace_segments([], []),
            lambda: catalog.passing({"seed": 1}),
            lambda: catalog.known("doc0"),
        ],
        "LoadedBank": [
            loaded.refresh,
            loaded.view,
            lambda: loaded.view({"seed": 1}),
            lambda: loaded.route(2, torch.zeros(1, 1, 32), torch.ones(1, 1, dtype=torch.bool)),
            lambda: loaded.rows_to_numbers(torch.tensor([0])),
        ],
        "MemoryEngine": [
            lambda: engine.ask("Where?"),
            lambda: engine.ask("Where?", stream=True),
            lambda: engine.retrieve("Where?"),
            lambda: engine.candidates(["Where?"]),
        ],
    }


def refusal(use) -> str:
    """The one line that it is refused with."""
    with pytest.raises(BankError) as caught:
        use()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_after_close_every_use_says_what_to_do(full):
    loaded, engine = LoadedBank(full), MemoryEngine(full)
    uses = uses_of(full, loaded, engine)
    for _ in range(2):
        engine.close()
        loaded.close()
    for name in ("LoadedBank", "MemoryEngine"):
        for use in uses[name]:
            said = refusal(use)
            assert "is closed; " in said
            assert {"LoadedBank": "load it again", "MemoryEngine": "make another"}[name] in said
    assert len(full) == 6  # which stays open
    full.close()
    for name in ("MemoryBank", "Catalog"):
        for use in uses[name]:
            assert "is closed; open it again (MemoryBank.open)" in refusal(use)


def test_an_open_engine_says_that_its_bank_was_closed(full):
    engine = MemoryEngine(full)
    full.close()
    assert "is closed; open it again (MemoryBank.open)" in refusal(lambda: engine.ask("Where?"))


def test_nothing_that_is_open_can_be_pickled_or_copied(full):
    loaded = LoadedBank(full)
    for item in (full, full.catalog, loaded, loaded.view(), MemoryEngine(full)):
        for use in (pickle.dumps, copy.copy, copy.deepcopy):
            said = refusal(lambda use=use, item=item: use(item))
            assert f"a {type(item).__name__} cannot be pickled or copied" in said
            assert "MemoryBank.open(folder, read_only=True)" in said


def test_a_forked_process_is_told_to_open_the_bank_itself(full):
    """Even with every lock held by a thread of the parent, which is not there in the child."""
    loaded, engine = LoadedBank(full), MemoryEngine(full)
    view = loaded.view()
    uses = [use for some in uses_of(full, loaded, engine).values() for use in some]
    uses.append(lambda: view.route(2, torch.zeros(1, 1, 32), torch.ones(1, 1, dtype=torch.bool)))
    held, done = threading.Event(), threading.Event()

    def hold():
        with full._turn, full.catalog._db._lock, loaded._lock, RESERVATIONS.lock:
            held.set()
            done.wait(60)

    threading.Thread(target=hold).start()
    held.wait(60)
    try:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                for use in uses:
                    assert "open the bank again in this process" in refusal(use)
                for item in (engine, loaded, full, full.catalog):
                    item.close()
                code = 0
            finally:
                os._exit(code)
    finally:
        done.set()
    assert os.waitpid(pid, 0)[1] == 0
    assert engine.retrieve("Where?", top_k=3)
    assert full.verify().ok


# ---- memory that is reserved


def test_a_bank_that_is_loaded_leaves_less_for_the_next_until_it_is_closed(full, monkeypatch):
    monkeypatch.setattr(memory_plan, "available_memory", lambda: GB)

    def left():
        return memory_plan.plan(full).memory_available

    gc.collect()  # what other tests left
    before = left()
    first = LoadedBank(full)
    reserved = first.reservation().memory
    assert reserved >= first.plan.question_bytes
    assert left() == before - reserved
    second = LoadedBank(full)
    assert second.plan.memory_available == before - reserved
    assert left() == before - reserved - second.reservation().memory
    assert first._new_plan().memory_available == before - second.reservation().memory  # not its own
    second.close()
    assert left() == before - reserved
    del first
    gc.collect()
    assert left() == before
    assert memory_plan.plan(full, memory=GB // 2).memory_available == GB // 2  # as told


def test_two_banks_do_not_plan_with_the_same_memory(full, monkeypatch):
    gc.collect()
    need = memory_plan.plan(full, content="mapped").memory_bytes / memory_plan.USABLE
    monkeypatch.setattr(memory_plan, "available_memory", lambda: int(need) + 5_000_000)
    with LoadedBank(full) as first:
        with pytest.raises(BudgetError, match="close another bank that this process has loaded"):
            LoadedBank(full)
        assert first.view().num_documents == 6
    assert len(LoadedBank(full)) == 6


def test_a_plan_that_comes_to_nothing_reserves_nothing(full, monkeypatch):
    gc.collect()
    before = RESERVATIONS.total(torch.device("cpu"))
    monkeypatch.setattr(
        LoadedBank, "refresh", lambda self: (_ for _ in ()).throw(BudgetError("no"))
    )
    with pytest.raises(BudgetError) as held:  # whose traceback holds the object
        LoadedBank(full)
    assert held.value.__traceback__ is not None
    assert RESERVATIONS.total(torch.device("cpu")) == before


def test_reservations_on_a_gpu_count_for_that_gpu():
    class Loaded:
        def __init__(self, device, num_bytes):
            self.held = Reservation(1, torch.device(device), num_bytes)

        def reservation(self):
            return self.held

    reservations = Reservations()
    loaded = [Loaded("cuda", 10), Loaded("cuda:0", 200), Loaded("cuda:1", 3000), Loaded("cpu", 0)]
    for one in loaded:
        reservations.enter(one)
    assert (
        reservations.total(torch.device("cuda:0"))
        == reservations.total(torch.device("cuda"))
        == (4, 210)
    )
    assert reservations.total(torch.device("cuda:1"), but=loaded[2]) == (3, 0)
    reservations.end(loaded.pop())
    del loaded[0], one
    assert reservations.total(torch.device("cuda")) == (2, 200)


# ---- devices and threads


def test_the_mask_of_a_filter_lies_where_the_keys_do(full):
    loaded = LoadedBank(full)
    loaded.device = torch.device("meta")  # as a GPU that had no room for the keys
    view = loaded.view({"seed": None})
    assert view._mask.device == view.keys_device == torch.device("cpu")
    assert view.num_documents == 6


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def threads_of_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_encoding_side_by_side_leaves_torchs_threads_to_all_others(
    four_threads, tiny_model, tiny_tokenizer
):
    made = encoder.DocumentEncoder(tiny_model, tiny_tokenizer)
    documents = list(enumerate(make_documents(12), start=1))
    one, two = (made.encode(documents, batch_tokens=64) for _ in range(2))
    next(one), next(two)
    assert threads_of_a_new_thread() == 4  # while both encode
    one.close()
    assert len(list(two)) > 1
    assert threads_of_a_new_thread() == torch.get_num_threads() == 4


# ---- options


def test_options_take_integers_of_any_kind_and_keep_pythons(tmp_path):
    import numpy

    options = AskOptions(max_rounds=numpy.int64(2), seed=numpy.uint8(3), batch_size=torch.tensor(4))
    assert (options.max_rounds, options.seed, options.batch_size) == (2, 3, 4)
    options.save(tmp_path)  # NumPy's cannot be written as JSON
    assert AskOptions.load(tmp_path) == options


def test_a_bank_takes_integers_of_any_kind(tmp_path, tiny_model, tiny_tokenizer):
    import numpy

    with MemoryBank.create(
        tmp_path / "bank", tiny_model, tiny_tokenizer, max_document_tokens=numpy.int32(64)
    ) as bank:
        bank.add(make_documents(3))
        assert MemoryEngine(bank).retrieve("Where?", top_k=numpy.int64(2))[1:]
    with MemoryBank.open(tmp_path / "bank") as again:
        assert again.manifest.max_document_tokens == 64


# ---- a failed overwrite leaves what was there


def test_options_that_cannot_be_written_leave_those_that_were_there(tmp_path, monkeypatch):
    AskOptions(max_rounds=2).save(tmp_path)

    def refuse(self, *_, **__):
        self.write_bytes(b"{")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", refuse)
        with pytest.raises(OSError, match="No space"):
            AskOptions().save(tmp_path)
    assert AskOptions.load(tmp_path).max_rounds == 2
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_made_whole_takes_the_place_of_what_was_there_or_leaves_it(
    tmp_path, monkeypatch, fails
):
    target = tmp_path / "model"
    target.mkdir()
    (target / "file").write_text("old")
    real = Path.rename

    def rename(self, other):
        if fails and (self / "file").read_text() == "new":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, other)

    monkeypatch.setattr(Path, "rename", rename)
    with contextlib.suppress(FetchError), made_whole(target) as folder:
        (folder / "file").write_text("new")
    assert (target / "file").read_text() == ("old" if fails else "new")
    assert list(tmp_path.iterdir()) == [target]
