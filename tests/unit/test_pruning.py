"""A pruned scan selects what a full scan selects."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bank_tools import LAYERS, make_documents
from msa.errors import InputError
from msa.memory.bank import MemoryBank
from msa.memory.loaded.loaded_bank import LoadedBank
from msa.memory.search import clustered_index
from msa.memory.search.clustered_index import (
    BlockScan,
    ClusteredIndex,
    PruningSettings,
    cluster_order,
    describe_blocks,
)
from msa.memory.search.layer_index import FlatIndex
from msa.memory.search.layer_keys import LayerKeys
from msa.ops.routing import TopDocuments, route_documents, selection_scores
from routing_twins import same

GROUPS, DIM = 2, 8


def make(seed, documents, *, kinds=0, largest=5, groups=GROUPS, dim=DIM):
    """Keys of unit length per head (around `kinds` points, if not 0) and chunk counts."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, largest + 1, (documents,), generator=generator)
    chunks = int(counts.sum())
    keys = torch.randn(chunks, groups, dim, generator=generator)
    if kinds:
        points = torch.randn(kinds, groups, dim, generator=generator)
        which = torch.randint(0, kinds, (chunks,), generator=generator)
        keys = points[which] + 0.05 * keys
    return F.normalize(keys, dim=-1), counts


def questions(seed, batch, tokens, width=GROUPS * DIM):
    generator = torch.Generator().manual_seed(seed + 1)
    vectors = torch.randn(batch, tokens, width, generator=generator) / 8
    return vectors, torch.rand(batch, tokens, generator=generator) < 0.7


def build(keys, counts, settings=None, *, documents=None, scales=None):
    """An index of all documents, whose blocks were made of the first ones; the others are its tail.

    Blocks are not built again, however long the tail is.
    """
    first = len(counts) if documents is None else documents
    end = int(counts[:first].sum())
    few = None if scales is None else scales[:end]
    made = ClusteredIndex.build(LayerKeys(keys[:end], counts[:first], scales=few), settings)
    return ClusteredIndex(LayerKeys(keys, counts, scales=scales), made.settings, made.blocks)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Steps and samples so small that little banks have many of each."""
    monkeypatch.setattr(clustered_index, "SCAN_ROWS", 16)
    monkeypatch.setattr(clustered_index, "FIRST_ROWS", 4)
    monkeypatch.setattr(clustered_index, "BRANCHES", 4)
    monkeypatch.setattr(clustered_index, "SAMPLE", 8)
    monkeypatch.setattr(clustered_index, "BUILD_ROWS", 50)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    documents=st.integers(1, 120),
    kinds=st.sampled_from([0, 1, 3, 12]),
    top_k=st.sampled_from([1, 3, 16, 500]),
    block_size=st.sampled_from([1, 4, 32]),
    masked=st.booleans(),
    tail=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_exact_pruning_is_the_full_scan(
    seed, documents, kinds, top_k, block_size, masked, tail, dtype
):
    keys, counts = make(seed, documents + tail, kinds=kinds)
    keys = keys.to(dtype)
    vectors, routes = questions(seed, 3, 6)
    mask = None
    if masked:
        mask = torch.rand(len(counts), generator=torch.Generator().manual_seed(seed)) < 0.5
    chosen = PruningSettings(block_size=block_size, seed=seed)
    pruned = build(keys, counts, chosen, documents=documents)
    expected = route_documents(vectors, routes, keys, counts, top_k, mask)
    same(pruned.search(vectors, routes, top_k, mask), expected)


@pytest.mark.parametrize("kinds", [0, 5])
def test_a_filter_for_every_question(kinds):
    keys, counts = make(3, 80, kinds=kinds)
    vectors, routes = questions(3, 4, 5)
    mask = torch.rand(4, 80, generator=torch.Generator().manual_seed(0)) < 0.2
    mask[2] = False
    pruned = build(keys, counts, documents=70)
    got = pruned.search(vectors, routes, 7, mask)
    same(got, route_documents(vectors, routes, keys, counts, 7, mask))
    assert got.documents[2].tolist() == [-1] * 7


@pytest.mark.parametrize("slack", [0.0, 0.5, 1.0])
def test_equal_keys_are_given_in_order(slack):
    keys, counts = make(0, 90)
    keys = keys[:1].expand(len(keys), -1, -1).contiguous()
    vectors, routes = questions(0, 2, 4)
    routes[:] = True
    pruned = build(keys, counts, PruningSettings(slack=slack, block_size=4))
    got = pruned.search(vectors, routes, 16)
    same(got, route_documents(vectors, routes, keys, counts, 16))
    assert got.documents[0].tolist() == list(range(16))


def test_a_tie_with_the_tail_goes_to_the_lower_row():
    keys, counts = make(1, 20, largest=1)
    vectors, routes = questions(1, 1, 3)
    routes[:] = True
    both = torch.cat([keys, keys]), torch.cat([counts, counts])
    pruned = build(*both, documents=20)
    same(pruned.search(vectors, routes, 9), route_documents(vectors, routes, *both, 9))


def test_int8_keys():
    keys, counts = make(4, 60, kinds=6)
    scales = keys.flatten(1).abs().amax(1) / 127
    small = (keys / scales[:, None, None]).round().to(torch.int8)
    vectors, routes = questions(4, 3, 6)
    chosen = PruningSettings(block_size=8)
    pruned = build(small, counts, chosen, documents=50, scales=scales)
    expected = route_documents(vectors, routes, small, counts, 16, scales=scales)
    same(pruned.search(vectors, routes, 16), expected)


def test_no_documents_and_rows_that_do_not_route():
    keys, counts = make(0, 10)
    vectors, routes = questions(0, 2, 4)
    empty = build(keys[:0], counts[:0])
    assert empty.search(vectors, routes, 3).documents.shape == (2, 0)
    grown = build(keys, counts, documents=0)
    same(grown.search(vectors, routes, 3), route_documents(vectors, routes, keys, counts, 3))
    routes[1] = False
    got = grown.search(vectors, routes, 3)
    assert got.documents[1].tolist() == [-1] * 3
    assert got.scores[1].tolist() == [-torch.inf] * 3


def test_nan_counts_as_the_lowest_score():
    keys, counts = make(2, 40)
    keys[7] = torch.nan
    vectors, routes = questions(2, 2, 4)
    pruned = build(keys, counts, PruningSettings(block_size=4))
    same(pruned.search(vectors, routes, 50), route_documents(vectors, routes, keys, counts, 50))


def test_an_order_holds_every_key_once_in_blocks_of_bounded_size():
    keys, _ = make(5, 200, kinds=4)
    order, sizes = cluster_order(keys.flatten(1), 8, seed=0)
    assert order.sort().values.tolist() == list(range(len(keys)))
    assert int(sizes.sum()) == len(keys)
    assert int(sizes.min()) >= 1
    assert int(sizes.max()) <= 8 * clustered_index.LARGEST


def test_alike_keys_become_neighbours():
    """Blocks of a bank with kinds of keys are much narrower than those of the order given."""
    keys, _ = make(6, 300, kinds=10)
    flat = keys.flatten(1)
    order, sizes = cluster_order(flat, 8, seed=0)
    narrow, wide = describe_blocks(flat[order], sizes)[1], describe_blocks(flat, sizes)[1]
    assert float(narrow.mean()) < 0.3 * float(wide.mean())


def test_a_bound_is_never_below_a_score():
    keys, counts = make(7, 150)
    pruned = build(keys, counts, PruningSettings(block_size=8))
    blocks = pruned.blocks
    vectors, _ = questions(7, 1, 9)
    scores = selection_scores(vectors, torch.ones(1, 9, dtype=torch.bool), blocks.keys[:, None])[0]
    best = torch.full((len(blocks.ends),), -torch.inf)
    sizes = blocks.ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
    best.scatter_reduce_(0, torch.repeat_interleave(sizes), scores, reduce="amax")
    assert bool((blocks.bounds(vectors[0], 1.0) >= best).all())
    assert not bool((blocks.bounds(vectors[0], 0.0) >= best).all())


def test_less_slack_reads_less_and_keeps_most():
    keys, counts = make(8, 1500, kinds=60)
    pruned = build(keys, counts, PruningSettings(block_size=16))
    read, kept = {}, {}
    generator = torch.Generator().manual_seed(9)
    vectors = keys.flatten(1)[torch.randint(0, len(keys), (20, 2), generator=generator)] / 2
    every = torch.ones(20, 2, dtype=torch.bool)
    expected = route_documents(vectors, every, keys, counts, 16)
    for slack in (1.0, 0.4):
        got = pruned.with_slack(slack).search(vectors, every, 16)
        found = (got.documents[:, :, None] == expected.documents[:, None]).any(1)
        kept[slack] = float(found.float().mean())
        scans = [BlockScan(pruned.blocks, v, TopDocuments(1, 16, len(counts))) for v in vectors]
        for scan in scans:
            scan.run(slack)
        read[slack] = sum(scan.rows_read for scan in scans) / (20 * len(keys))
    assert kept[1.0] == 1.0
    assert kept[0.4] > 0.95
    assert read[0.4] <= read[1.0] < 0.5


def test_fewer_documents_pass_a_filter_than_are_wanted():
    """Without slack too, a scan goes on until it has k documents or has seen every block."""
    keys, counts = make(9, 200)
    mask = torch.zeros(200, dtype=torch.bool)
    mask[[3, 77, 150]] = True
    vectors, routes = questions(9, 2, 4)
    routes[:] = True
    pruned = build(keys, counts, PruningSettings(slack=0.0, block_size=4))
    got = pruned.search(vectors, routes, 16, mask)
    same(got, route_documents(vectors, routes, keys, counts, 16, mask))
    assert sorted(got.documents[0].tolist()) == [-1] * 13 + [3, 77, 150]


def test_an_index_is_not_changed_by_documents_added_later():
    keys, counts = make(10, 30)
    end = int(counts[:27].sum())
    before = build(keys[:end], counts[:27])
    after = before.followed(LayerKeys(keys, counts))
    assert after.blocks is before.blocks
    assert after.num_bytes - keys.nbytes == before.num_bytes - keys[:end].nbytes > keys[:end].nbytes
    vectors, routes = questions(10, 1, 4)
    assert int(before.search(vectors, routes, 99).documents.max()) < 27
    assert int(after.search(vectors, routes, 99).documents.max()) == 29


def test_an_index_of_a_layer_that_grows():
    """New documents are a tail until they are a quarter; then all blocks are built again."""
    keys, counts = make(11, 100, kinds=7)
    vectors, routes = questions(11, 2, 4)
    blocked = []
    flat, pruned = FlatIndex(LayerKeys(keys[:0], counts[:0])), None
    for documents in (60, 62, 70, 100):
        some = LayerKeys(keys[: counts[:documents].sum()], counts[:documents])
        settings = PruningSettings(block_size=4)
        pruned = pruned.followed(some) if pruned else ClusteredIndex.build(some, settings)
        flat = flat.followed(some)
        blocked.append(pruned.blocks.num_documents)
        for index in (flat, pruned):
            same(
                index.search(vectors, routes, 9),
                route_documents(vectors, routes, some.keys, some.counts, 9),
            )
        assert flat.num_bytes == some.num_bytes
        assert pruned.num_bytes == some.num_bytes + pruned.blocks.num_bytes
    assert blocked == [60, 60, 60, 100]


class Dtypes(TorchDispatchMode):
    """The dtypes of all tensors that operations made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        some = out if isinstance(out, (tuple, list)) else [out]
        self.seen |= {tensor.dtype for tensor in some if torch.is_tensor(tensor)}
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_search_needs_no_float64(dtype):
    """There is none on Apple's GPUs."""
    keys, counts = make(13, 80)
    keys = keys.to(dtype)
    for index in (build(keys, counts), FlatIndex(LayerKeys(keys, counts))):
        with Dtypes() as dtypes:
            index.search(*questions(13, 2, 4), 9)
        assert torch.float32 in dtypes.seen
        assert torch.float64 not in dtypes.seen


def test_scores_stay_float32_under_autocast():
    keys, counts = make(12, 80)
    vectors, routes = questions(12, 2, 4)
    expected = route_documents(vectors, routes, keys, counts, 9)
    for index in (build(keys, counts), FlatIndex(LayerKeys(keys, counts))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = index.search(vectors, routes, 9)
        same(found, expected)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda k, c: PruningSettings(slack=1.5), "slack=1.5: expected 0 to 1"),
        (lambda k, c: PruningSettings(block_size=0), "block_size=0: expected at least 1"),
        (lambda k, c: ClusteredIndex.build(LayerKeys(k, c[1:])), "chunk_counts add up to"),
        (lambda k, c: build(k[:, 0], c), "expected [C, G, D]"),
        (lambda k, c: build(k.to(torch.int8), c), "expected scales for int8"),
        (lambda k, c: build(k.to("meta"), c), "pruning works on the CPU"),
        (lambda k, c: build(k, c).search(*questions(0, 1, 2), 0), "top_k=0"),
        (lambda k, c: build(k, c).search(*questions(0, 1, 2, 5), 1), "expected the"),
        (
            lambda k, c: build(k, c).search(*questions(0, 1, 2), 1, c[1:] > 0),
            "document_mask of shape",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(what, message):
    keys, counts = make(0, 5)
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        what(keys, counts)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
def test_a_resident_bank_may_be_pruned(tmp_path, tiny_model, tiny_tokenizer, queries, dtype):
    """What is added, deleted, filtered and compacted is selected as without pruning."""
    with MemoryBank.create(tmp_path / "bank", tiny_model, tiny_tokenizer) as bank:
        bank.add(make_documents(60))
        plain = LoadedBank(bank, dtype=dtype)
        pruned = LoadedBank(bank, dtype=dtype, pruning=PruningSettings(block_size=4))

        def compare(**options):
            one, other = plain.view(**options), pruned.view(**options)
            for layer in LAYERS:
                same(other.route(layer, *queries), one.route(layer, *queries))

        compare()
        assert pruned.num_bytes > 1.9 * plain.num_bytes
        old = pruned.view()
        before = old.route(LAYERS[0], *queries)
        for change in (
            lambda: bank.add(make_documents(5, "more")),
            lambda: bank.delete([f"doc{i}" for i in range(0, 60, 3)]),
            lambda: bank.add(make_documents(40, "many")),
            bank.compact,
        ):
            change()
            same(old.route(LAYERS[0], *queries), before)
            assert plain.refresh()
            assert pruned.refresh()
            compare()
            compare(filter=lambda metadata: metadata["seed"] is None, top_k=2)
