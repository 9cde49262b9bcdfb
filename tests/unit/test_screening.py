"""Routing that reads keys in int8 first selects what the reference selects, to the last bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bank_tools import LAYERS, make_documents
from msa.memory.loaded import memory_plan
from msa.memory.loaded.loaded_bank import LoadedBank
from msa.ops import routing
from msa.ops.kernels import screening
from msa.ops.kernels.screening import Screen

pytestmark = pytest.mark.skipif(
    not screening.is_available(), reason="torch has no int8 product here, or one is not needed"
)
TOP_K = 9


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    sizes = {"BLOCK": 300, "SMALLEST": 100, "TAIL": 40, "GROUP": 16, "EXACT_NUMBERS": 32 * 50}
    sizes["FEW"] = 1  # however many candidates there are, they are picked out
    sizes["PLAIN"] = 0
    for name, value in sizes.items():
        monkeypatch.setattr(screening, name, value)


def make_layer(seed, shape=(2, 16), documents=200, dtype=torch.float32):
    """Keys of unit heads and how many each document has."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 9, (documents,), generator=generator)
    keys = torch.randn(int(counts.sum()), *shape, generator=generator)
    return F.normalize(keys, dim=-1).to(dtype), counts


def make_queries(seed, width, rows=3, tokens=7):
    generator = torch.Generator().manual_seed(1000 + seed)
    vectors = torch.randn(rows, tokens, width, generator=generator)
    return vectors, torch.rand(rows, tokens, generator=generator) > 0.3


def assert_twin(screen, vectors, mask, keys, counts, document_mask=None, top_k=TOP_K):
    found = screen.search(vectors, mask, keys, counts, top_k, document_mask)
    wanted = routing.route_documents(vectors, mask, keys, counts, top_k, document_mask)
    assert torch.equal(found.documents, wanted.documents)
    assert torch.equal(found.scores, wanted.scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 16), (3, 32), (1, 7), (8, 32)])
def test_it_is_the_reference(shape, dtype):
    keys, counts = make_layer(0, shape, dtype=dtype)
    screen = Screen.followed(None, keys, counts)
    assert len(screen._blocks) > 2
    assert_twin(screen, *make_queries(0, shape[0] * shape[1]), keys, counts)


@pytest.mark.parametrize("tokens", [1, 48, 49, 150])
def test_any_number_of_tokens(tokens):
    keys, counts = make_layer(1)
    assert_twin(Screen.followed(None, keys, counts), *make_queries(1, 32, 2, tokens), keys, counts)


@pytest.mark.parametrize("kind", ["one for all", "each its own", "few", "fewer than k", "none"])
def test_documents_that_must_not_be_chosen(kind):
    keys, counts = make_layer(2)
    vectors, mask = make_queries(2, 32)
    generator = torch.Generator().manual_seed(2)
    allowed = torch.rand(3, 200, generator=generator) > 0.5
    if kind == "few":
        allowed = torch.rand(200, generator=generator) > 0.9
    elif kind == "one for all":
        allowed = allowed[0]
    elif kind != "each its own":
        allowed = torch.zeros(200, dtype=torch.bool)
        allowed[[3, 77, 199][: 3 if kind == "fewer than k" else 0]] = True
    assert_twin(Screen.followed(None, keys, counts), vectors, mask, keys, counts, allowed)


def test_thousands_of_equal_documents():
    """Every one of them is a candidate; the lower rows win."""
    keys, counts = make_layer(3, documents=400)
    keys = keys[torch.arange(len(keys)) % 3]
    assert_twin(Screen.followed(None, keys, counts), *make_queries(3, 32), keys, counts)


def test_keys_of_very_different_lengths_and_zeros():
    keys, counts = make_layer(4)
    keys = keys * torch.logspace(-6, 6, len(keys))[:, None, None]
    keys[::5] = 0
    vectors, mask = make_queries(4, 32)
    vectors[0] *= 1e-8
    vectors[1] = 0
    assert_twin(Screen.followed(None, keys, counts), vectors, mask, keys, counts)


def test_a_row_without_routing_tokens_and_a_batch_without_rows():
    keys, counts = make_layer(5)
    screen = Screen.followed(None, keys, counts)
    vectors, mask = make_queries(5, 32)
    mask[1] = False
    assert_twin(screen, vectors, mask, keys, counts)
    assert_twin(screen, vectors[:0], mask[:0], keys, counts)


def test_more_wanted_than_there_are():
    keys, counts = make_layer(6, documents=60)
    screen = Screen.followed(None, keys, counts)
    assert_twin(screen, *make_queries(6, 32), keys, counts, top_k=100)


def test_questions_that_do_not_fit_together_are_bounded_one_after_the_other(monkeypatch):
    monkeypatch.setattr(screening, "BOUNDS_BYTES", 1)
    keys, counts = make_layer(7)
    assert_twin(Screen.followed(None, keys, counts), *make_queries(7, 32, 5), keys, counts)


def test_a_screen_follows_a_layer_that_grows():
    keys, counts = make_layer(8, documents=400)
    queries = make_queries(8, 32)
    screen, made = None, []
    for documents in (10, 30, 100, 105, 110, 300, 400):
        chunks = int(counts[:documents].sum())
        screen = Screen.followed(screen, keys[:chunks], counts[:documents])
        if screen is not None:
            assert chunks - screen.num_chunks < screening.TAIL
            assert_twin(screen, *queries, keys[:chunks], counts[:documents])
        made.append(screen)
    assert made[0] is None
    assert made[3] is made[2]  # a few more: scored in full
    assert made[-1]._blocks[0] is made[-2]._blocks[0]  # whole blocks stay


def test_keys_that_are_not_finite_get_no_screen():
    keys, counts = make_layer(9)
    for value in (torch.nan, torch.inf):
        keys[5, 0, 0] = value
        assert Screen.followed(None, keys, counts) is None


@pytest.mark.parametrize("plain", [0, 1 << 20])
@pytest.mark.parametrize("masked", [None, "one for all", "each its own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_questions_of_one_vector_are_multiplied_together(work, monkeypatch, dtype, masked, plain):
    monkeypatch.setattr(screening, "PLAIN", plain)
    monkeypatch.setattr(screening, "TOKENS", 4)
    keys, counts = make_layer(15, (3, 32), dtype=dtype)
    vectors, mask = make_queries(15, 96, rows=7, tokens=1)
    mask[:] = True
    mask[2] = False
    allowed = torch.rand(7, len(counts), generator=torch.Generator().manual_seed(15)) > 0.4
    allowed = {None: None, "one for all": allowed[0], "each its own": allowed}[masked]
    screen = Screen.followed(None, keys, counts)
    assert_twin(screen, vectors, mask, keys, counts, allowed)
    assert work.count("product") == 2 * len(screen._blocks)  # six questions, four at a time
    assert_twin(screen, vectors[:1], mask[:1], keys, counts, None if masked else allowed)


def test_documents_of_many_alike_chunks_leave_room_for_others():
    """More chunks of one document than are looked at first stand above those of the others."""
    keys, counts = make_layer(16)
    counts = torch.cat([torch.tensor([700]), counts])
    keys = torch.cat([keys[:1] + 1e-3 * torch.randn(700, 2, 16), keys])
    vectors = keys[None, :1].flatten(2)
    screen = Screen.followed(None, keys, counts)
    assert_twin(screen, vectors, torch.ones(1, 1, dtype=torch.bool), keys, counts)


@pytest.fixture
def work(monkeypatch):
    """What is done: "product" per int8 product, the number of keys per call of the exact kernel."""
    done = []
    exact, product = screening.routing_cpu.route_documents, screening._product

    def watched_exact(vectors, mask, keys, *rest, **named):
        done.append(len(keys))
        return exact(vectors, mask, keys, *rest, **named)

    def watched_product(*arguments):
        done.append("product")
        return product(*arguments)

    monkeypatch.setattr(screening.routing_cpu, "route_documents", watched_exact)
    monkeypatch.setattr(screening, "_product", watched_product)
    return done


def test_little_is_scored_exactly(work):
    """The point of it: the exact kernel gets few keys."""
    keys, counts = make_layer(10, (3, 32), documents=3000)
    screen = Screen.followed(None, keys, counts)
    assert_twin(screen, *make_queries(10, 96), keys, counts)
    scored = [each for each in work if each != "product"]
    assert len(scored) >= 3
    assert sum(scored) < 3 * len(keys) / 20


@pytest.mark.parametrize("masked", [None, "one for all", "each its own"])
def test_questions_that_leave_too_many_chunks_are_scored_together_and_in_full(
    work, monkeypatch, masked
):
    monkeypatch.setattr(screening, "FEW", 16)
    keys, counts = make_layer(12, (3, 32), documents=3000)
    vectors, mask = make_queries(12, 96, rows=5, tokens=9)
    for row in (0, 3, 4):  # like one key: few others come near it
        vectors[row] = 20 * keys[100 * row].flatten() + 0.1 * vectors[row]
    vectors[2] *= 0
    allowed = torch.rand(5, 3000, generator=torch.Generator().manual_seed(12)) > 0.3
    allowed = {None: None, "one for all": allowed[0], "each its own": allowed}[masked]
    screen = Screen.followed(None, keys, counts)
    assert_twin(screen, vectors, mask, keys, counts, allowed)
    assert work.count(len(keys)) == 1
    assert sum(each not in ("product", len(keys)) for each in work) >= 3


def test_a_copy_that_leaves_too_many_is_soon_asked_rarely(work, monkeypatch):
    monkeypatch.setattr(screening, "FEW", 16)
    monkeypatch.setattr(screening, "RETRY", 10)
    keys, counts = make_layer(13, (3, 32), documents=400)
    hard, mask = torch.zeros(1, 2, 96), torch.ones(1, 2, dtype=torch.bool)
    easy = keys[None, :2].flatten(2)
    screen = Screen.followed(None, keys, counts)

    def asked(vectors):
        work.clear()
        assert_twin(screen, vectors, mask, keys, counts)
        return "product" in work

    assert [asked(hard) for _ in range(17)] == [True] * 3 + [False] * 9 + [True] + [False] * 4
    assert [asked(easy) for _ in range(8)] == [False] * 5 + [True] * 3  # worth its time again
    assert asked(hard)
    assert asked(easy)


def test_a_layer_that_grows_keeps_its_record(monkeypatch):
    monkeypatch.setattr(screening, "FEW", 16)
    keys, counts = make_layer(14, documents=400)
    half = int(counts[:200].sum())
    screen = Screen.followed(None, keys[:half], counts[:200])
    hard, mask = torch.zeros(1, 2, 32), torch.ones(1, 2, dtype=torch.bool)
    for _ in range(screening.PATIENCE):
        assert_twin(screen, hard, mask, keys[:half], counts[:200])
    assert not Screen.followed(screen, keys, counts)._record.asks()


def test_wide_keys_have_smaller_blocks(monkeypatch):
    monkeypatch.setattr(screening, "BLOCK_NUMBERS", 32 * 100)
    keys, counts = make_layer(11)
    screen = Screen.followed(None, keys, counts)
    assert all(100 <= block.num_chunks < 110 for block in screen._blocks[:-1])
    assert_twin(screen, *make_queries(11, 32), keys, counts)


# ---- in a bank


def many(bank, count=60):
    bank.add(make_documents(count))
    return bank


def assert_same(one, other, queries):
    for layer in LAYERS:
        mine, wanted = one.route(layer, *queries), other.route(layer, *queries)
        assert torch.equal(mine.documents, wanted.documents)
        assert torch.equal(mine.scores, wanted.scores)


@pytest.mark.parametrize("shard", [(0, 1), (0, 2), (1, 2)])
def test_a_loaded_bank_is_screened_and_follows(bank, queries, shard):
    many(bank)
    loaded = LoadedBank(bank, shard=shard)
    plain = LoadedBank(bank, plan=memory_plan.plan(bank, screen=False, shard=shard), shard=shard)
    for step in range(4):
        assert loaded.plan.screened
        assert not plain.plan.screened
        assert all(keys.screen is not None for keys in loaded.view()._layer_keys.values())
        assert_same(loaded, plain, queries)
        assert_same(
            loaded.view(lambda m: m["seed"] is None),
            plain.view(lambda m: m["seed"] is None),
            queries,
        )
        bank.add(make_documents(20, f"more{step}-"))
        bank.delete([f"doc{step}"])
        if step == 2:
            bank.compact()
        assert loaded.refresh()
        assert plain.refresh()


def test_what_is_planned_for_the_copy_is_what_it_takes(bank):
    many(bank)
    loaded = LoadedBank(bank)
    made = loaded.plan
    copies = sum(keys.screen.num_bytes for keys in loaded.view()._layer_keys.values())
    assert made.screen_bytes == copies
    assert loaded.num_bytes == made.keys_bytes + made.screen_bytes
    without = memory_plan.plan(bank, screen=False)
    assert made.memory_bytes > without.memory_bytes + made.screen_bytes


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
@pytest.mark.parametrize("width", [96, 1024])
def test_the_copy_takes_no_more_memory_than_said(width):
    script = f"""
import torch
from pathlib import Path
from msa.memory.store.mapped_pages import release_heap
from msa.ops.kernels import screening
def resident():
    release_heap()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024
screening.is_available()
for count in (1 << 13, 1 << 16):
    keys, counts = torch.rand(count, 1, {width}), torch.full((count // 8,), 8)
    before = resident()
    screen = screening.Screen.followed(None, keys, counts)
    print(resident() - before, screen.num_bytes)
"""
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300
    )
    taken, said = map(int, found.stdout.splitlines()[-1].split())
    assert taken < 1.1 * said


def test_without_room_for_the_copy_there_is_none(bank, monkeypatch):
    many(bank)
    small = memory_plan.plan(bank, dtype=torch.int8)
    assert not small.screened
    plain = memory_plan.plan(bank, screen=False, content="held")
    enough = plain.keys_bytes + plain.rows_bytes + plain.question_bytes + memory_plan.WINDOW_BYTES
    tight = memory_plan.plan(bank, memory=int(enough / memory_plan.USABLE) + 2)
    assert not tight.screened
    assert tight.keys_dtype == plain.keys_dtype
    assert memory_plan.plan(bank, memory=10**9).screened
    monkeypatch.setattr(memory_plan, "HELD_SHARE", 1e-6)
    assert not memory_plan.plan(bank, memory=10**9).screened


def test_where_torch_lacks_the_product_there_is_none(bank, monkeypatch):
    many(bank)
    monkeypatch.setattr(screening, "is_available", lambda: False)
    assert not memory_plan.plan(bank).screened
    assert all(keys.screen is None for keys in LoadedBank(bank).view()._layer_keys.values())


def test_the_product_is_tried_before_it_is_trusted(monkeypatch):
    def absent(*arguments):
        raise RuntimeError("no such operator")

    screening.is_available.cache_clear()
    try:
        monkeypatch.setattr(screening, "_pack", absent)
        assert not screening.is_available()
        monkeypatch.undo()
        screening.is_available.cache_clear()
        monkeypatch.setattr(screening, "_product", lambda queries, keys: torch.zeros(2, 3))
        assert not screening.is_available()
    finally:
        screening.is_available.cache_clear()
