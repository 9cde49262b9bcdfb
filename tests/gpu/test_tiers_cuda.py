"""Tiers on a GPU: whatever lies where, answers are the same; a device that runs out of memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bank_tools import LAYERS, make_documents
from msa.memory.bank import MemoryBank
from msa.memory.loaded import memory_plan
from msa.memory.loaded.loaded_bank import LoadedBank
from msa.types import Selection

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def bank(tmp_path, tiny_model, tiny_tokenizer):
    with MemoryBank.create(tmp_path / "bank", tiny_model, tiny_tokenizer) as bank:
        for start in range(0, 60, 20):
            bank.add(make_documents(60)[start : start + 20])
        yield bank


def assert_same_content(mine, wanted):
    assert mine.keys.is_cuda
    assert torch.equal(mine.mask.cpu(), wanted.mask)
    assert torch.equal(mine.keys.cpu()[wanted.mask], wanted.keys[wanted.mask])
    assert torch.equal(mine.values.cpu()[wanted.mask], wanted.values[wanted.mask])


@pytest.mark.parametrize("tier", ["held", "mapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tier_gives_the_content_of_the_processor(bank, tier, dtype):
    plain = LoadedBank(bank, content_dtype=dtype)
    plan = memory_plan.plan(bank, "cuda", content=tier, content_dtype=dtype)
    assert plan.prefetch
    resident = LoadedBank(bank, "cuda", plan=plan, content_dtype=dtype)
    held = resident.view()._content._held
    assert len(held) == (3 if tier == "held" else 0)
    assert all(t.is_pinned() for h in held for pair in h.layers.values() for t in pair)
    generator = torch.Generator().manual_seed(1)
    work = torch.randn(2000, 2000, device="cuda")
    for step in range(50):
        rows = torch.randint(-1, 60, (2, 4), generator=generator)
        for layer in LAYERS:
            work = (work @ work).clamp(-1, 1)  # the device is behind: copies have to be waited for
            if step % 2:  # as layers do: some are the same as in the layer before
                rows[:, 0] = torch.randint(-1, 60, (2,), generator=generator)
            selection = Selection(rows.clone(), torch.zeros(2, 4))
            mine = resident.content(layer, Selection(rows.cuda(), torch.zeros(2, 4).cuda()))
            assert_same_content(mine, plain.content(layer, selection))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("keys_device", ["cuda:0", "cpu"])
def test_keys_on_the_device_and_in_memory_give_the_same(bank, queries, dtype, keys_device):
    exact = LoadedBank(bank)
    plan = memory_plan.plan(bank, "cuda:0", dtype=dtype)
    assert plan.keys_device == "cuda:0"
    resident = LoadedBank(bank, "cuda:0", plan=replace(plan, keys_device=keys_device))
    assert str(resident.view()._indexes[2].keys.keys.device) == keys_device
    for layer in LAYERS:
        mine = resident.route(layer, *(q.cuda() for q in queries))
        wanted = exact.route(layer, *queries)
        assert mine.documents.is_cuda
        assert torch.equal(mine.documents.cpu(), wanted.documents)
        torch.testing.assert_close(mine.scores.cpu(), wanted.scores, atol=1e-5, rtol=0)
        assert_same_content(resident.content(layer, mine), exact.content(layer, wanted))


def test_a_device_that_runs_out_falls_back_a_tier(bank, queries, caplog):
    plan = memory_plan.plan(bank, "cuda:0")
    assert plan.device_available <= torch.cuda.mem_get_info()[0] + (1 << 30)
    small = LoadedBank(bank, "cuda:0", plan=replace(plan, growth=1e9))  # what no device has
    assert small.plan.keys_dtype == "int8"
    (record,) = caplog.records
    assert "they are held on 'cuda:0' in int8" in record.getMessage()
    wanted = LoadedBank(bank).route(2, *queries)
    mine = small.route(2, *(q.cuda() for q in queries))
    assert torch.equal(mine.documents.cpu(), wanted.documents)
    assert bank.verify().ok
