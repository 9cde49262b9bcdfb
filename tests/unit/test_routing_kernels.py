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
from msa.ops.kernels import key_scan, routing_cpu
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


@pytest.fixture
def scanned(monkeypatch):
    """Banks of any size are scanned, by threads that each have a part and little room."""
    monkeypatch.setattr(routing_cpu, "SCANNED_FROM", 0)
    monkeypatch.setattr(routing_cpu, "MIN_BLOCK", 7)
    monkeypatch.setattr(key_scan, "SHARE", 1)
    monkeypatch.setattr(key_scan, "ROOM", 3)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


SCANNED = [n for n, case in CASES.items() if case["routing_keys"].dtype in routing_cpu.SCANNED]


@pytest.mark.usefixtures("scanned")
@pytest.mark.parametrize("name", SCANNED)
def test_the_compiled_scan_is_a_twin(name):
    check(kernels.route_documents, CASES[name])


@pytest.mark.usefixtures("scanned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_score_depends_on_question_and_key_alone(dtype):
    """Not on other questions, other keys, threads, or where a scan stops: to the last bit."""
    case = make(ragged(5, 200, 6), batch=5, tokens=1, dtype=dtype)
    together = kernels.route_documents(**case)
    torch.set_num_threads(1)
    for row in range(5):
        part = slice(row, row + 1)
        alone = changed(case, vectors=lambda v, p=part: v[p], routing_mask=lambda m, p=part: m[p])
        found = kernels.route_documents(**alone)
        assert found.documents[0].tolist() == together.documents[row].tolist()
        assert found.scores[0].tolist() == together.scores[row].tolist()


@pytest.mark.usefixtures("scanned")
def test_equal_keys_have_equal_scores_wherever_they_lie():
    case = changed(make([1] * 64, top_k=64), routing_keys=lambda k: k[:1].expand_as(k).contiguous())
    found = kernels.route_documents(**case)
    assert found.documents.tolist() == [list(range(64))] * 2
    assert found.scores.unique(dim=1).shape[1] == 1


def test_what_is_not_cpu_memory_in_order_or_is_small_is_not_scanned():
    keys, vectors = torch.zeros(1 << 13, 192), torch.zeros(4, 192)
    can = routing_cpu._can_scan
    assert can(keys, vectors)
    assert not can(keys[: 1 << 11], vectors)
    assert not can(keys.T.contiguous().T, vectors)
    assert not can(keys.half(), vectors)
    assert not can(keys.to("meta"), vectors)
    assert not can(keys, torch.zeros(100, 192))


def test_a_scan_leaves_torch_its_number_of_threads():
    """Numba makes the pool that torch uses, too, with as many threads as there are cores."""
    code = """
import torch
from msa.ops.kernels import key_scan
torch.set_num_threads(2)
key_scan.SHARE = 1
scan = key_scan.KeyScan(torch.randn(64, 8), None, None, torch.randn(1, 8))
places, scores, stop = scan(0, 64, torch.tensor([-torch.inf]))
print(len(places), stop, torch.get_num_threads())
"""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "4"}
    environment["PYTHONPATH"] = str(TESTS.parent / "src")
    command = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == ["64", "64", "2"], run.stderr


def test_a_scan_is_compiled_where_nothing_may_be_written(monkeypatch):
    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (function, options)

    monkeypatch.setattr(key_scan, "njit", njit)
    assert key_scan._compiled(nogil=True)(len) == (len, {"nogil": True})


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


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("share", [None, 0.9, 0.01])
def test_memory_does_not_grow_with_the_bank(scan, dtype, share, monkeypatch):
    monkeypatch.setattr(routing_cpu, "BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(routing_cpu, "SCANNED_FROM", 0 if scan else torch.inf)
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
    product, scan = routing_cpu._Product.__call__, key_scan.KeyScan.__call__

    def multiplied(self, chunks, size):
        rows.append(size)
        return product(self, chunks, size)

    def scanned(self, start, end, thresholds):
        found = scan(self, start, end, thresholds)
        rows.append(found[-1] - start)
        return found

    monkeypatch.setattr(routing_cpu._Product, "__call__", multiplied)
    monkeypatch.setattr(key_scan.KeyScan, "__call__", scanned)
    mask = torch.zeros(2000, dtype=torch.bool)
    mask[::100] = True
    for smallest in (0, torch.inf):
        monkeypatch.setattr(routing_cpu, "SCANNED_FROM", smallest)
        kernels.route_documents(**make([3] * 2000, document_mask=mask))
        assert sum(rows) == 3 * 20
        rows.clear()
        kernels.route_documents(**make([3] * 2000))
        assert sum(rows) == 3 * 2000
        rows.clear()


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
