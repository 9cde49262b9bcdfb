from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bank_tools import LAYERS, make_documents
from msa.errors import BankCorruptError, BudgetError
from msa.memory.bank import MemoryBank
from msa.memory.loaded import content_store, memory_plan
from msa.memory.loaded.content_store import CONTENT_READ, Arena, Fetched
from msa.memory.loaded.loaded_bank import LoadedBank
from msa.memory.store import mapped_pages
from msa.memory.store.mapped_pages import PageWindow, drop_pages
from msa.types import Selection


@pytest.fixture
def bank(path, tiny_model, tiny_tokenizer):
    with MemoryBank.create(path, tiny_model, tiny_tokenizer) as bank:
        for start in range(0, 40, 10):
            bank.add(make_documents(40)[start : start + 10])
        yield bank


def loaded(bank, tier, *, prefetch=False, **options):
    made = memory_plan.plan(bank, content=tier, content_dtype=options.get("content_dtype"))
    return LoadedBank(bank, plan=replace(made, prefetch=prefetch), **options)


def same(one, other):
    return (
        torch.equal(one.mask, other.mask)
        and torch.equal(one.keys[one.mask], other.keys[other.mask])
        and torch.equal(one.values[one.mask], other.values[other.mask])
    )


def selections():
    """Rows in any order, some twice, some rows of the batch empty; of all segments."""
    return [
        Selection(torch.tensor(rows), torch.zeros(len(rows), len(rows[0])))
        for rows in ([[5, 0, 39], [11, -1, -1]], [[12, 30, 2], [5, 39, 31]], [[-1, -1, -1]])
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefetch", [False, True])
def test_every_tier_gives_the_same_content(bank, dtype, prefetch):
    plain = loaded(bank, "mapped", content_dtype=dtype)
    held = loaded(bank, "held", prefetch=prefetch, content_dtype=dtype)
    mapped = loaded(bank, "mapped", prefetch=prefetch, content_dtype=dtype)
    assert held.view()._content.num_bytes > 0
    assert mapped.view()._content.num_bytes == 0
    for _ in range(3):  # with prefetch, the second layer finds some, all or none of it there
        for first in selections():
            for second in selections():
                for layer, chosen in zip(LAYERS, (first, second), strict=True):
                    wanted = plain.content(layer, chosen)
                    assert wanted.keys.dtype == dtype
                    assert same(held.content(layer, chosen), wanted)
                    assert same(mapped.content(layer, chosen), wanted)


@pytest.mark.parametrize("tier", ["held", "mapped"])
def test_what_is_fetched_is_counted(bank, tier):
    resident = loaded(bank, tier)
    chosen = selections()[0]
    before = CONTENT_READ.total
    content = resident.content(2, chosen)  # rows 0, 5, 11 and 39, each of them once
    whole = content.keys[content.mask].nbytes + content.values[content.mask].nbytes
    assert CONTENT_READ.total == before + whole
    resident.content(2, selections()[2])  # of nothing
    assert CONTENT_READ.total == before + whole


@pytest.mark.parametrize("tier", ["held", "mapped"])
def test_what_the_last_layer_chose_is_fetched_ahead(bank, tier, monkeypatch):
    resident = loaded(bank, tier, prefetch=True)
    read, real = [], content_store.ContentStore._copied

    def noted(store, rows, layer, chosen):
        ahead = threading.current_thread() is not threading.main_thread()
        read.append((ahead, layer, chosen.tolist()))
        return real(store, rows, layer, chosen)

    monkeypatch.setattr(content_store.ContentStore, "_copied", noted)
    first, second, _ = selections()
    resident.content(2, first)
    pending = resident.view()._content._prefetcher._pending
    pending[3].result()
    resident.content(3, second)
    assert read == [
        (False, 2, [0, 5, 11, 39]),
        (True, 3, [0, 5, 11, 39]),
        (False, 3, [2, 12, 30, 31]),  # 5 and 39 were there
    ]
    assert not pending  # there is no layer after the last one


def test_damage_found_ahead_is_told_to_who_asks(bank, path):
    segment = sorted((path / "segments").iterdir())[-1]
    data = bytearray(segment.read_bytes())
    data[-1] ^= 1  # values of the last document, in layer 3
    segment.write_bytes(data)
    for tier in ("held", "mapped"):
        resident = loaded(bank, tier, prefetch=True)
        good, bad = selections()[1], selections()[0]
        resident.content(2, bad)
        with pytest.raises(BankCorruptError, match=r"000004.safetensors.*checksum"):
            resident.content(3, bad)
        resident.content(2, good)
        with pytest.raises(BankCorruptError, match=r"000004.safetensors.*checksum"):
            resident.content(3, good)
        fine = Selection(torch.tensor([[0, 31]]), torch.zeros(1, 2))  # beside the damaged one
        assert resident.content(3, fine).mask.any()


@pytest.mark.parametrize("tier", ["held", "mapped"])
def test_a_segment_deleted_under_a_reader_stays_readable(bank, path, queries, tier):
    resident = loaded(bank, tier)
    int8 = LoadedBank(bank, dtype=torch.int8)
    view = resident.view()
    before = {i: view.content(i, view.route(i, *queries)) for i in LAYERS}
    for segment in (path / "segments").iterdir():
        segment.unlink()
    for layer, wanted in before.items():
        assert same(view.content(layer, view.route(layer, *queries)), wanted)
        assert same(int8.content(layer, int8.route(layer, *queries)), wanted)
    with pytest.raises(BankCorruptError, match=r"000001.safetensors.*missing") as caught:
        loaded(bank, tier)
    assert "\n" not in str(caught.value)


def test_held_content_follows_the_bank(bank, queries):
    resident = loaded(bank, "held")
    old = resident.view()
    wanted = old.content(2, old.route(2, *queries))
    for step in range(3):
        bank.add(make_documents(7, f"more{step}-"))
        bank.delete(f"doc{step}")
        if step == 2:
            bank.compact()
        resident.refresh()
        fresh = loaded(bank, "mapped")
        for layer in LAYERS:
            selection = fresh.route(layer, *queries)
            assert same(resident.content(layer, selection), fresh.content(layer, selection))
        assert same(old.content(2, old.route(2, *queries)), wanted)


def test_a_failed_refresh_leaves_held_content_in_order(bank, path, queries):
    resident = loaded(bank, "held")
    bank.add(make_documents(3, "more"))
    bank.add(make_documents(3, "again"))
    last = path / "segments" / "000006.safetensors"
    data = last.read_bytes()
    last.write_bytes(data[:200] + b"x" + data[201:])  # after the fifth was taken up
    with pytest.raises(BankCorruptError):
        resident.refresh()
    last.write_bytes(data)
    assert resident.refresh()
    fresh = loaded(bank, "mapped")
    every = Selection(torch.arange(46)[None], torch.zeros(1, 46))
    assert same(resident.content(3, every), fresh.content(3, every))


def test_a_share_holds_its_own_content(bank):
    whole = LoadedBank(bank)
    for rank in range(3):
        made = memory_plan.plan(bank, content="held", shard=(rank, 3))
        resident = LoadedBank(bank, plan=made, shard=(rank, 3))
        view = resident.view()
        rows = torch.arange(len(view))[None]
        zeros = torch.zeros(rows.shape)
        mine = view.content(3, Selection(rows, zeros))
        assert same(mine, whole.content(3, Selection(rows + view.first_row, zeros)))
    held = [LoadedBank(bank, shard=(r, 3)).view()._content.num_bytes for r in range(3)]
    assert sum(held) == whole.view()._content.num_bytes


def test_running_out_of_memory_in_the_middle_is_one_clear_line(bank, queries, monkeypatch):
    resident = LoadedBank(bank)
    selection = resident.route(2, *queries)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr(content_store.ContentStore, "fetch", full)
    with pytest.raises(BudgetError, match=r"'cpu' ran out of memory while fetching") as caught:
        resident.content(2, selection)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("msa.memory.search.layer_index.route_documents", full)
    with pytest.raises(BudgetError, match=r"while routing; ask fewer"):
        resident.route(2, *queries)
    monkeypatch.undo()
    assert torch.equal(resident.route(2, *queries).documents, selection.documents)
    assert bank.verify().ok


def test_an_arena_gives_memory_of_its_own_to_everyone(monkeypatch):
    monkeypatch.setattr(content_store, "BLOCK_BYTES", 1000)
    arena = Arena()
    shapes = [(3, 2, 4), (5, 1, 7), (0, 2, 4), (40, 2, 4), (11, 2, 4), (2, 2, 2)]
    taken = []
    for number, shape in enumerate(shapes):
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            taken.append((number, arena.take(shape, dtype).fill_(number)))
            assert taken[-1][1].shape == shape
            assert taken[-1][1].dtype == dtype
    for number, tensor in taken:
        assert bool((tensor == number).all())


def test_without_pinned_memory_plain_memory_is_taken(monkeypatch, caplog):
    real = torch.empty

    def empty(*args, **kwargs):
        if kwargs.get("pin_memory"):
            raise RuntimeError("CUDA error: out of memory\nmore about it")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    arena = Arena(pinned=True)
    assert arena.take((2, 3, 4), torch.float32).shape == (2, 3, 4)
    assert not arena.pinned
    (record,) = caplog.records
    assert record.getMessage().startswith("no pinned memory (CUDA error: out of memory);")


def test_places_of_rows_in_what_was_fetched():
    empty = torch.empty(0, 2, 4)
    fetched = Fetched(torch.tensor([7, 2, 9]), torch.tensor([1, 1, 1]), empty, empty)
    assert fetched.places(torch.tensor([[2, -1], [9, 7]])).tolist() == [[1, -1], [2, 0]]
    nothing = Fetched(torch.tensor([], dtype=torch.int64), torch.tensor([]), empty, empty)
    assert nothing.places(torch.tensor([[-1, -1]])).tolist() == [[-1, -1]]


def mapped_kilobytes(path):
    """Resident pages of the bank's segments in this process."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            ours = str(path) in line and ".safetensors" in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(not mapped_pages._MAPS.exists(), reason="only Linux tells what is mapped")
def test_pages_are_let_go_of_and_read_again(bank, path):
    resident = loaded(bank, "mapped")
    every = Selection(torch.arange(40)[None], torch.zeros(1, 40))
    wanted = resident.content(3, every)
    assert mapped_kilobytes(path) > 0
    other = torch.arange(5.0)
    assert drop_pages([other]) == 0  # not a file: nothing is lost
    assert other.tolist() == [0, 1, 2, 3, 4]
    assert drop_pages(s.mapped_tensor for s in resident.view()._rows.segments) > 0
    assert mapped_kilobytes(path) == 0
    assert same(resident.content(3, every), wanted)


def test_a_window_lets_go_when_it_has_seen_enough(monkeypatch):
    gone = []
    monkeypatch.setattr(mapped_pages, "drop_pages", lambda maps: gone.append(list(maps)))
    window = PageWindow(limit=3 * mapped_pages._AROUND)
    window.touched(1, 10, ["a"])
    window.touched(1, 10, ["b"])
    assert gone == []
    window.touched(1, 10, ["c"])
    window.touched(1, 10, ["d"])
    assert gone == [["c"]]
