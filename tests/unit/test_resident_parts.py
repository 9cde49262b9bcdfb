"""A loaded bank in shares, with keys in int8, and on a device without memory."""

from __future__ import annotations

import pytest
import torch

from bank_tools import LAYERS, make_documents, routed
from conftest import routing_vectors_of
from msa import Document
from msa.errors import BankCorruptError, BudgetError, InputError
from msa.memory.bank import MemoryBank
from msa.memory.loaded.loaded_bank import LoadedBank

# ---- a share of a bank


def shares(bank, world, **options):
    return [LoadedBank(bank, shard=(rank, world), **options) for rank in range(world)]


def assert_shares_are_the_whole(readers, whole, queries):
    """Consecutive rows, none twice, none missing; the best of all shares are the best of all."""
    views = [reader.view() for reader in readers]
    numbers = torch.cat([view._rows.numbers for view in views])
    assert torch.equal(numbers, whole.view()._rows.numbers)
    first = 0
    for view in views:
        assert view.first_row == first
        first += len(view._rows.numbers)
    assert sum(len(view) for view in views) == len(whole)
    for layer in LAYERS:
        wanted = whole.route(layer, *queries)
        found = [view.route(layer, *queries) for view in views]
        scores = torch.cat([s.scores for s in found], dim=1)
        rows = torch.cat(
            [s.documents + view.first_row for s, view in zip(found, views, strict=True)], dim=1
        )
        best, places = scores.sort(dim=1, descending=True, stable=True)
        best, places = best[:, : wanted.scores.shape[1]], places[:, : wanted.scores.shape[1]]
        torch.testing.assert_close(best, wanted.scores, atol=1e-6, rtol=1e-6)
        assert torch.equal(rows.gather(1, places), wanted.documents)
        for view, selection in zip(views, found, strict=True):
            content = view.content(layer, selection)
            here = selection.documents.flatten()
            here = here[here >= 0]
            assert int(content.mask.sum()) == int(view._rows.chunk_counts[here].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_with_one_vector_per_question_shares_are_the_whole(bank, dtype):
    """Whatever the others of a batch ask."""
    bank.add(make_documents(40))
    vectors, mask = routing_vectors_of(4, 1)
    mask[2] = False
    whole, parts = LoadedBank(bank, dtype=dtype), shares(bank, 3, dtype=dtype)
    assert_shares_are_the_whole(parts, whole, (vectors, mask))
    together = whole.route(LAYERS[0], vectors, mask)
    for row in range(4):
        alone = whole.route(LAYERS[0], vectors[row : row + 1], mask[row : row + 1])
        assert torch.equal(alone.documents[0], together.documents[row])
        torch.testing.assert_close(alone.scores[0], together.scores[row], atol=1e-5, rtol=0)
    found = [part.route(LAYERS[0], vectors, mask).scores for part in parts]
    best = torch.cat(found, dim=1).sort(dim=1, descending=True).values
    best = best[:, : together.scores.shape[1]]
    torch.testing.assert_close(best, together.scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("segments", [1, 4])
def test_shares_together_are_the_whole(bank, queries, world, segments):
    documents = make_documents(24)
    for start in range(0, 24, 24 // segments):
        bank.add(documents[start : start + 24 // segments])
    bank.delete(["doc3", "doc17"])
    readers = shares(bank, world)
    assert_shares_are_the_whole(readers, LoadedBank(bank), queries)
    counts = torch.cat([r.view()._rows.chunk_counts for r in readers])
    for reader in readers:
        size = int(reader.view()._rows.chunk_counts.sum())
        assert abs(size - counts.sum() / world) <= counts.max()


def test_shares_follow_the_bank(bank, queries):
    bank.add(make_documents(10))
    readers = shares(bank, 3)
    for step in range(3):
        bank.add(make_documents(6, f"more{step}-"))
        bank.delete([f"doc{step}", f"more{step}-1"])
        if step == 2:
            bank.compact()
        old = readers[1].view()
        numbers, scores = routed(old, queries)
        assert all(reader.refresh() for reader in readers)
        assert not any(reader.refresh() for reader in readers)
        whole = LoadedBank(bank)
        assert_shares_are_the_whole(readers, whole, queries)
        assert_shares_are_the_whole(shares(bank, 3), whole, queries)
        assert torch.equal(routed(old, queries)[0], numbers)
        assert torch.equal(routed(old, queries)[1], scores)
    bank.delete("doc5")  # deletions alone: nothing is read again
    buffers = [reader._buffers for reader in readers]
    for reader in readers:
        reader.refresh()
    assert all(a is r._buffers for a, r in zip(buffers, readers, strict=True))
    assert_shares_are_the_whole(readers, LoadedBank(bank), queries)


def test_more_shares_than_documents_leaves_some_empty(bank, queries):
    for reader in shares(bank, 3):  # a bank without documents
        assert reader.route(2, *queries).documents.shape == (3, 0)
    bank.add(make_documents(2))
    readers = shares(bank, 5)
    assert sorted(len(r) for r in readers) == [0, 0, 0, 1, 1]
    assert_shares_are_the_whole(readers, LoadedBank(bank), queries)
    empty = next(r for r in readers if not len(r))
    selection = empty.route(2, *queries)
    assert selection.documents.shape == selection.scores.shape == (3, 0)
    assert empty.content(2, selection).mask.shape == (3, 0)
    assert empty.rows_to_numbers(selection.documents).shape == (3, 0)


def test_a_filter_passes_its_documents_in_all_shares(bank, queries):
    documents = make_documents(20)
    bank.add([Document(d.id, d.text, metadata={"u": i % 4}) for i, d in enumerate(documents)])
    views = [r.view(lambda m: m["u"] == 1) for r in shares(bank, 3)]
    assert sum(len(v) for v in views) == 5
    nothing = shares(bank, 3)[0].view(lambda m: False)
    assert len(nothing) == 0
    assert nothing.route(2, *queries).documents.shape == (3, 0)


@pytest.mark.parametrize("shard", [(0, 0), (2, 2), (-1, 3)])
def test_a_share_that_is_none_is_refused(bank, shard):
    with pytest.raises(InputError, match=r"expected \(rank, world\)"):
        LoadedBank(bank, shard=shard)


# ---- keys in int8


def assert_same_route(one, other, queries):
    for layer in LAYERS:
        mine, wanted = one.route(layer, *queries), other.route(layer, *queries)
        assert torch.equal(mine.documents, wanted.documents)
        torch.testing.assert_close(mine.scores, wanted.scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_int8_keys_are_scored_by_those_on_disk(
    tmp_path, tiny_model, tiny_tokenizer, queries, stored
):
    path = tmp_path / "stored"
    with MemoryBank.create(path, tiny_model, tiny_tokenizer, dtype=stored) as bank:
        for start in range(0, 60, 20):
            bank.add(make_documents(60)[start : start + 20])
        exact, small = LoadedBank(bank, dtype=stored), LoadedBank(bank, dtype=torch.int8)
        assert small.num_bytes * 1.5 < exact.num_bytes
        assert_same_route(small, exact, queries)
        vectors, mask = queries
        mask = mask.clone()
        mask[1] = False
        assert_same_route(small, exact, (vectors, mask))
        kept = [r.view(lambda m: m["seed"] is None, top_k=70) for r in (small, exact)]
        assert_same_route(*kept, queries)


def test_int8_keys_follow_the_bank(bank, queries):
    bank.add(make_documents(10))
    small = LoadedBank(bank, dtype=torch.int8)
    for step in range(4):
        old = small.view()
        numbers, _ = routed(old, queries)
        bank.add(make_documents(9, f"more{step}-"))
        bank.delete([f"doc{step}", f"more{step}-3"])
        if step == 2:
            bank.compact()
        assert small.refresh()
        assert_same_route(small, LoadedBank(bank, dtype=torch.float32), queries)
        assert torch.equal(routed(old, queries)[0], numbers)


def test_shares_of_int8_keys_are_the_whole(bank, queries):
    bank.add(make_documents(40))
    bank.delete("doc7")
    assert_shares_are_the_whole(shares(bank, 3, dtype=torch.int8), LoadedBank(bank), queries)


def test_keys_that_change_on_disk_after_loading_are_noticed(bank, path, queries):
    bank.add(make_documents(6))
    small = LoadedBank(bank, dtype=torch.int8)
    small.route(3, *queries)
    segment = path / "segments" / "000001.safetensors"
    with segment.open("r+b") as file:  # in place: the map sees it
        file.seek(bank.catalog.segments()[0].routing_bytes - 1)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x40]))
    with pytest.raises(BankCorruptError, match=r"000001.safetensors.*changed since it was loaded"):
        small.view(top_k=6).route(3, *queries)


# ---- a device without memory


def allocations_that_fail(monkeypatch, fails):
    """Let the memory for routing keys run out where `fails(dtype, device)` says so."""
    from msa.memory.search import layer_keys

    real = layer_keys._allocated

    def allocated(shape, dtype, device):
        if fails(dtype, device):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
        return real(shape, dtype, device)

    monkeypatch.setattr(layer_keys, "_allocated", allocated)


def test_without_memory_for_the_plan_the_next_tier_is_taken(bank, queries, monkeypatch, caplog):
    bank.add(make_documents(40))
    exact = LoadedBank(bank)
    assert exact.dtype == torch.float32
    sizes = []

    def fails(dtype, device):  # in the middle: the first layer still fits; scales are float32 too
        sizes.append(dtype)
        return sizes == [torch.float32, torch.float32]

    allocations_that_fail(monkeypatch, fails)
    small = LoadedBank(bank, plan=exact.plan)
    assert small.plan.keys_dtype == "int8"
    assert_same_route(small, exact, queries)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "in float32; they are held on 'cpu' in int8" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_without_memory_for_any_tier_there_is_one_error(bank, queries, monkeypatch):
    bank.add(make_documents(10))
    resident = LoadedBank(bank)
    numbers, _ = routed(resident, queries)
    bank.add(make_documents(90, "more"))
    allocations_that_fail(monkeypatch, lambda dtype, device: True)
    for attempt in (lambda: LoadedBank(bank), resident.refresh):
        with pytest.raises(BudgetError, match=r"no memory on 'cpu' .* in int8; free") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    with pytest.raises(BudgetError, match=r"in bfloat16; free"):
        LoadedBank(bank, dtype=torch.bfloat16)  # what was asked for is not changed
    assert torch.equal(routed(resident, queries)[0], numbers)  # the old state stays in use
    monkeypatch.undo()
    assert bank.verify().ok
    assert resident.refresh()
    assert resident.dtype == torch.float32
    assert len(resident) == 100


def test_a_bank_that_outgrows_its_plan_changes_its_tiers(bank, queries, monkeypatch):
    from msa.memory.loaded import memory_plan

    bank.add(make_documents(10))
    resident, old = LoadedBank(bank), None
    assert resident.plan.content == "held"
    old = resident.view()
    numbers, _ = routed(old, queries)
    monkeypatch.setattr(memory_plan, "HELD_BYTES", 0)
    bank.add(make_documents(1, "one"))
    resident.refresh()
    assert resident.plan.content == "held"  # little has changed
    bank.add(make_documents(20, "more"))
    resident.refresh()
    assert resident.plan.content == "mapped"
    assert resident.plan.num_documents == 31
    assert_same_route(resident, LoadedBank(bank), queries)
    assert torch.equal(routed(old, queries)[0], numbers)
