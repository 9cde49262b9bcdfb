"""The kernels of routing give what the reference gives."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from msa.errors import InputError
from msa.ops import kernels
from msa.ops.kernels import routing_cpu
from msa.ops.routing import (
    TopDocuments,
    document_scores,
    normalize,
    route_documents,
    routing_vectors,
    select_documents,
    selection_scores,
)
from msa.types import Selection
from routing_twins import cases, changed, check, make, poisoned, put, ragged, same

TESTS = Path(__file__).resolve().parents[1]
CASES = dict(cases())
# What a block may hold, and a piece of it, and the least number of keys in it.
NAMES = ("BLOCK_BYTES", "PIECE_BYTES", "MIN_BLOCK")
BLOCKS = [
    tuple(getattr(routing_cpu, name) for name in NAMES),
    (1, 1, 1),
    (1, 1, 7),
    (1 << 22, 1, 10),
]


@pytest.fixture(params=BLOCKS, ids=["whole", "single keys", "sevens", "in pieces"])
def blocks(request, monkeypatch):
    for name, value in zip(NAMES, request.param, strict=True):
        monkeypatch.setattr(routing_cpu, name, value)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("name", CASES)
def test_the_blocked_kernel_is_a_twin(name):
    check(kernels.route_documents, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_it_is_one_without_onednn_and_under_autocast(name, monkeypatch):
    monkeypatch.setattr(routing_cpu, "_has_onednn", lambda: False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(kernels.route_documents, CASES[name])


@pytest.mark.parametrize("wide", [1, 1000])
@pytest.mark.parametrize("name", [n for n in CASES if "float32" in n or "many" in n])
def test_it_is_one_whether_keys_are_multiplied_as_rows_or_as_columns(name, wide, monkeypatch):
    monkeypatch.setattr(routing_cpu, "WIDE", wide)
    monkeypatch.setattr(routing_cpu, "MIN_BLOCK", 10)
    check(kernels.route_documents, CASES[name])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("screens", [False, True])
@pytest.mark.parametrize("name", [n for n in CASES if "bfloat16" in n])
def test_it_is_one_with_a_screen_and_without(name, screens, monkeypatch):
    monkeypatch.setattr(routing_cpu, "_multiplies_bfloat16", lambda: screens)
    monkeypatch.setattr(routing_cpu, "WIDE", 1000)
    check(kernels.route_documents, CASES[name])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_a_screen_lets_every_key_pass_that_may_be_above(scale):
    """Keys as close together as bfloat16 can have them, thresholds in between."""
    torch.manual_seed(0)
    keys = (torch.randn(1, 192) + 0.01 * torch.randn(3000, 192)).bfloat16()
    vectors = scale * torch.randn(3, 192)
    scores = vectors.double() @ keys.double().T
    order = scores.sort(dim=1).values
    thresholds = (order[:, -20] + order[:, -21]).float() / 2
    passed = routing_cpu._Screen(vectors)(keys, thresholds)
    wanted = (scores > thresholds[:, None]).any(0).nonzero()[:, 0]
    assert set(wanted.tolist()) <= set(passed.tolist())
    assert len(passed) < 3000
    none = routing_cpu._Screen(vectors)(keys, 2 * order[:, -1].abs().float())
    assert len(none) == 0


@given(
    counts=st.lists(st.integers(0, 6), max_size=30),
    top_k=st.integers(1, 9),
    block=st.integers(1, 50),
    coarse=st.booleans(),
    share=st.sampled_from([None, 0.1, 0.6]),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_it_is_one_for_any_documents_and_blocks(counts, top_k, block, coarse, share, seed):
    case = make(counts, top_k=top_k, seed=seed)
    if coarse:
        case = changed(case, routing_keys=torch.round, vectors=torch.round)
    if share is not None:
        case["document_mask"] = torch.rand(2, len(counts)) < share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing_cpu, "BLOCK_BYTES", 1)
        patch.setattr(routing_cpu, "MIN_BLOCK", block)
        check(routing_cpu.route_documents, case)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernel_is_a_twin_in_the_interpreter():
    """In a process of its own: Triton decides at import whether it interprets."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)]),
        "TRITON_INTERPRET": "1",
    }
    command = [sys.executable, "-W", "ignore", str(TESTS / "routing_twins.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "all the same"


# ---- the reference


@pytest.mark.parametrize("score", ["cosine", "dot"])
def test_the_reference_follows_equation_2(score):
    """As `document_scores`, which is tested against the equation written out."""
    torch.manual_seed(0)
    queries, mask = torch.randn(2, 5, 4, 8), torch.rand(2, 5) < 0.7
    keys, counts = normalize(torch.randn(60, 2, 8)), torch.tensor([7, 1, 30, 20, 2])
    document_mask = torch.tensor([True, True, True, False, True])
    vectors = routing_vectors(queries, 2, score)
    expected = select_documents(document_scores(vectors, mask, keys, counts, document_mask), 3)
    found = route_documents(vectors, mask, keys, counts, 3, document_mask)
    assert found.documents.tolist() == expected.documents.tolist()
    assert torch.allclose(found.scores, expected.scores, atol=1e-6)


def test_int8_keys_count_as_their_values_times_their_scale():
    case = make(ragged(1, 20, 4), dtype=torch.int8)
    keys = case["routing_keys"].double() * case["scales"][:, None, None].double()
    scores = selection_scores(
        case["vectors"], case["routing_mask"], case["routing_keys"], case["scales"]
    )
    for row, mask in enumerate(case["routing_mask"]):
        products = case["vectors"][row][mask].double() @ keys.flatten(1).T
        assert torch.allclose(scores[row].double(), products.amax(0), atol=1e-6)


@given(
    batch=st.integers(1, 4),
    count=st.integers(1, 6),
    documents=st.integers(1, 12),
    offers=st.lists(st.integers(0, 30), max_size=4),
    seed=st.integers(0, 999),
)
@settings(max_examples=80, deadline=None)
def test_the_best_of_all_that_was_offered_are_kept(batch, count, documents, offers, seed):
    """As by a dictionary; few different scores, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    best = TopDocuments(batch, count, documents)
    known = [{} for _ in range(batch)]
    for size in offers:
        rows, names, scores = (
            torch.randint(0, high, (size,), generator=generator) for high in (batch, documents, 5)
        )
        best.offer(rows, names, scores.float())
        for row, name, score in zip(
            rows.tolist(), names.tolist(), scores.float().tolist(), strict=True
        ):
            known[row][name] = max(score, known[row].get(name, score))
        for row in range(batch):
            kept = sorted(known[row].items(), key=lambda found: (-found[1], found[0]))[:count]
            kept += [(-1, -torch.inf)] * (count - len(kept))
            found = best.selection(torch.device("cpu"))
            assert found.documents[row].tolist() == [document for document, _ in kept]
            assert found.scores[row].tolist() == [score for _, score in kept]
            assert float(best.thresholds[row]) == kept[-1][1]


# ---- a selection depends on question and keys alone


def test_a_question_gets_the_same_alone_and_in_a_batch():
    case = make(ragged(5, 200, 6), batch=5, tokens=9)
    together = kernels.route_documents(**case)
    for row in range(5):
        part = slice(row, row + 1)
        alone = changed(case, vectors=lambda v, p=part: v[p], routing_mask=lambda m, p=part: m[p])
        same(
            kernels.route_documents(**alone),
            Selection(together.documents[part], together.scores[part]),
        )


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_the_best_of_shards_are_the_best_of_the_whole(shards):
    """Documents with equal scores in different shards included."""
    counts = ragged(6, 90, 5)
    case = changed(make(counts, top_k=10), routing_keys=lambda k: k.repeat(1, 1, 1).round())
    documents, scores, start, chunk = [], [], 0, 0
    for some in counts.tensor_split(shards):
        chunks = slice(chunk, chunk + int(some.sum()))
        part = {**case, "routing_keys": case["routing_keys"][chunks], "chunk_counts": some}
        found = kernels.route_documents(**part)
        documents.append(found.documents + start)
        scores.append(found.scores)
        start, chunk = start + len(some), chunks.stop
    merged, order = torch.cat(scores, 1).sort(dim=1, descending=True, stable=True)
    chosen = torch.cat(documents, 1).gather(1, order)
    same(Selection(chosen[:, :10], merged[:, :10]), kernels.route_documents(**case))


# ---- what it costs


class Memory(TorchDispatchMode):
    """The largest storage that any operation made, in bytes."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known if torch.is_tensor(t)}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.largest = max(self.largest, storage.nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("share", [None, 0.9, 0.01])
def test_memory_does_not_grow_with_the_bank(dtype, share, monkeypatch):
    monkeypatch.setattr(routing_cpu, "BLOCK_BYTES", 1 << 14)
    case = make([3] * 7000, dtype=dtype, dim=16)
    if share is not None:
        case["document_mask"] = torch.rand(7000) < share
    with Memory(case.values()) as memory:
        kernels.route_documents(**case)
    offsets = 8 * 7000  # where documents end; with a filter that few pass, the chunks that are left
    assert 0 < memory.largest <= (offsets if share != 0.01 else 3 * offsets)


def test_a_filter_that_few_documents_pass_saves_the_product(monkeypatch):
    monkeypatch.setattr(routing_cpu, "BLOCK_BYTES", 1 << 14)
    rows = []
    product = routing_cpu._Product.__call__

    def counted(self, chunks, size):
        rows.append(size)
        return product(self, chunks, size)

    monkeypatch.setattr(routing_cpu._Product, "__call__", counted)
    mask = torch.zeros(2000, dtype=torch.bool)
    mask[::100] = True
    kernels.route_documents(**make([3] * 2000, document_mask=mask))
    assert sum(rows) == 3 * 20
    rows.clear()
    kernels.route_documents(**make([3] * 2000))
    assert sum(rows) == 3 * 2000


class Shapes(TorchDispatchMode):
    """Shapes of the keys that oneDNN multiplies."""

    def __init__(self):
        super().__init__()
        self.met = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_linear_pointwise" in str(func):
            self.met.add(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not routing_cpu._has_onednn(), reason="this torch has no oneDNN")
def test_a_growing_bank_gives_onednn_few_shapes():
    """It keeps code for every shape: a service whose bank changes must not fill memory with it."""
    with Shapes() as shapes:
        for documents in range(100, 4000, 97):
            kernels.route_documents(**make([3] * documents, tokens=40, dim=64))
    assert 0 < len(shapes.met) < 8


# ---- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k=0: expected at least 1"),
        ({"vectors": torch.zeros(2, 5, 15)}, "vectors of 15 numbers and keys of 16"),
        ({"chunk_counts": torch.tensor([2, 2])}, "add up to 4, but there are 3 keys"),
        ({"scales": torch.ones(3)}, "torch.float32 with scales: expected scales for int8 keys"),
        ({"routing_keys": torch.zeros(3, 2, 8, dtype=torch.int8)}, "int8 without scales"),
        (
            {"routing_keys": torch.zeros(3, 2, 8, dtype=torch.int8), "scales": torch.ones(2)},
            r"scales of shape \[2\]: expected one per key, \[3\]",
        ),
        ({"document_mask": torch.ones(3, 2) > 0}, r"\[3, 2\]: expected \[2\] or \[2, 2\]"),
    ],
)
@pytest.mark.parametrize("function", [route_documents, kernels.route_documents])
def test_bad_input_is_named(function, change, message):
    with pytest.raises(InputError, match=message):
        function(**{**make([1, 2]), **change})


def test_poison_shows_where_memory_is_read_before_it_is_written():
    """The check itself: a kernel that returns what it never wrote is caught."""

    def careless(**call):
        found = route_documents(**call)
        return Selection(found.documents, torch.empty(found.scores.shape))

    with pytest.raises(AssertionError):
        check(careless, make([1, 2, 3]))
    with poisoned():
        assert torch.empty(3).isnan().all()
    assert put(0, value=1.0)(torch.zeros(2)).tolist() == [1.0, 0.0]
