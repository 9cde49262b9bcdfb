from __future__ import annotations

import ctypes
import json
import re
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bank_tools import make_documents
from msa.cli.main import main
from msa.errors import BudgetError, InputError
from msa.memory.bank import MemoryBank
from msa.memory.loaded import memory_plan
from msa.memory.loaded.loaded_bank import LoadedBank
from msa.memory.loaded.memory_plan import available_memory, lower, plan
from msa.memory.search.clustered_index import PruningSettings

GB = 10**9


@pytest.fixture
def bank(tmp_path, tiny_model, tiny_tokenizer):
    with MemoryBank.create(tmp_path / "bank", tiny_model, tiny_tokenizer) as bank:
        bank.add(make_documents(30))
        yield bank


@pytest.fixture
def half(tmp_path, tiny_model, tiny_tokenizer):
    folder = tmp_path / "half"
    with MemoryBank.create(folder, tiny_model, tiny_tokenizer, dtype=torch.bfloat16) as bank:
        bank.add(make_documents(30))
        yield bank


@pytest.fixture
def large(bank, monkeypatch):
    """The bank's catalog, as if it held a million times what it holds."""
    real = bank.catalog.snapshot

    def snapshot(*args):
        found = real(*args)
        million = tuple(
            replace(e, num_chunks=e.num_chunks * 10**6, num_documents=e.num_documents * 10**6)
            for e in found.segments
        )
        return replace(found, segments=million)

    monkeypatch.setattr(bank.catalog, "snapshot", snapshot)
    return bank


def keys_of(bank, dtype):
    chunks = bank.info().num_chunks
    scales = 4 * 2 if dtype == torch.int8 else 0
    return chunks * (2 * 2 * 16 * dtype.itemsize + scales)


# ---- what is said


def test_a_small_bank_is_held_as_it_is_stored(bank):
    made = plan(bank, memory=8 * GB)
    assert made.keys_dtype == "float32"
    assert made.keys_device == "cpu"
    assert made.keys_bytes == keys_of(bank, torch.float32)
    assert made.content == "held"
    assert made.content_bytes == 2 * keys_of(bank, torch.float32)
    assert not made.prefetch
    assert made.device_bytes == 0
    assert made.memory_available == 8 * GB
    assert 0 < made.memory_bytes < GB
    assert made.num_documents == 30
    assert made.why


def test_what_is_planned_is_what_is_taken(bank, half):
    for some in (bank, half):
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            made = plan(some, dtype=dtype, content="held", content_dtype=torch.float32)
            resident = LoadedBank(some, plan=made, content_dtype=torch.float32)
            assert resident.dtype == dtype
            assert resident.num_bytes == made.keys_bytes
            assert resident.view()._content.num_bytes == made.content_bytes
            rows = resident.view()._rows
            names = ("numbers", "chunk_counts", "segment", "first_chunk", "checksums", "live")
            taken = sum(getattr(rows, name).nbytes for name in names)
            assert taken <= made.rows_bytes <= 2 * taken


def test_the_copy_for_a_pruned_scan_is_planned_for(bank):
    bank.add(make_documents(300, "more"))
    settings = PruningSettings(block_size=16)
    made = plan(bank, pruning=settings)
    loaded = LoadedBank(bank, pruning=settings)
    copies = loaded.num_bytes - made.keys_bytes
    assert 0.6 * made.pruned_bytes < copies <= made.pruned_bytes
    plain = plan(bank)
    assert plain.pruned_bytes == 0
    assert made.memory_bytes >= plain.memory_bytes + made.pruned_bytes
    assert loaded.plan.pruned_bytes == made.pruned_bytes


def test_shares_add_up_to_the_bank(bank):
    whole = plan(bank)
    parts = [plan(bank, shard=(rank, 4)) for rank in range(4)]
    assert sum(p.keys_bytes for p in parts) == whole.keys_bytes
    assert sum(p.num_chunks for p in parts) == whole.num_chunks


def test_keys_in_another_dtype_give_the_same_selection(half, queries):
    stored = LoadedBank(half).route(2, *queries)
    assert plan(half).keys_dtype == "bfloat16"
    wide = LoadedBank(half, dtype=torch.float32).route(2, *queries)
    assert torch.equal(stored.documents, wide.documents)
    torch.testing.assert_close(stored.scores, wide.scores, atol=1e-5, rtol=0)


# ---- what is chosen when there is less and less


def test_with_less_memory_keys_go_to_int8_and_content_to_disk(large):
    full = plan(large, memory=10**12, content="mapped")
    assert full.keys_dtype == "float32"
    int8 = full.keys_bytes * 72 // 256
    tight = plan(large, memory=int((full.keys_bytes + int8) / 2 + 2 * (full.rows_bytes + 4e8)))
    assert tight.keys_dtype == "int8"
    assert tight.keys_bytes == int8
    assert tight.content == "mapped"
    assert tight.prefetch
    assert "routing keys fit in RAM in int8, not in float32" in tight.why


def test_a_bank_that_is_too_large_is_refused_with_advice(large):
    large.delete("doc3")
    with pytest.raises(BudgetError) as caught:
        plan(large, memory=3 * GB)
    message = str(caught.value)
    assert "\n" not in message
    for words in ("does not fit", "in int8", "3.0 GB of RAM", "1 deleted", "msa bank compact"):
        assert words in message, words
    shares = int(re.search(r"hold it in (\d+) shares", message)[1])
    assert shares > 2
    for rank in range(shares):  # what was advised works, and it takes no less
        assert plan(large, memory=3 * GB, shard=(rank, shares)).keys_dtype == "int8"
    with pytest.raises(BudgetError, match=f"hold it in {2 * (shares - 1)} shares"):
        plan(large, memory=3 * GB, shard=(1, shares - 1))


def test_a_dtype_that_is_asked_for_and_does_not_fit_is_refused(large):
    with pytest.raises(BudgetError, match=r"in bfloat16.*take dtype=torch.int8"):
        plan(large, memory=12 * GB, dtype=torch.bfloat16)
    with pytest.raises(BudgetError, match=r"content of bank .* take content='mapped'"):
        plan(large, memory=60 * GB, dtype=torch.int8, content="held")


def test_a_bank_that_does_not_fit_is_not_loaded(bank, monkeypatch):
    monkeypatch.setattr(memory_plan, "available_memory", lambda: 10**6)
    with pytest.raises(BudgetError, match="does not fit"):
        LoadedBank(bank)
    monkeypatch.undo()
    assert len(LoadedBank(bank)) == 30
    assert bank.verify().ok


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": torch.int64}, "dtype=int64"),
        ({"dtype": torch.float8_e4m3fn}, "dtype=float8_e4m3fn"),
        ({"content": "disk"}, "content='disk'"),
        ({"memory": 0}, "0 bytes"),
        ({"shard": (2, 2)}, r"shard=\(2, 2\)"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_line(bank, arguments, words):
    with pytest.raises(InputError, match=words):
        plan(bank, **arguments)
    if "dtype" in arguments:
        with pytest.raises(InputError, match=words):
            LoadedBank(bank, dtype=arguments["dtype"])


def test_a_plan_and_a_dtype_together_are_refused(bank):
    with pytest.raises(InputError, match="plan and dtype are both given"):
        LoadedBank(bank, plan=plan(bank), dtype=torch.float32)


# ---- a device; none is needed to plan for one


def device_plan(bank, device_memory, monkeypatch, **options):
    monkeypatch.setattr(memory_plan, "is_supported", options.pop("supported", lambda *a: True))
    return plan(bank, "cuda:0", device_memory=device_memory, **options)


def test_what_compiles_a_scan_is_counted_where_the_cpu_scans(large, monkeypatch):
    options = {"dtype": torch.int8, "content": "mapped"}
    on_device = device_plan(large, 1000 * GB, monkeypatch, memory=500 * GB, **options)
    on_cpu = plan(large, memory=500 * GB, **options)
    assert (on_device.keys_device, on_cpu.keys_device) == ("cuda:0", "cpu")
    assert on_cpu.question_bytes - on_device.question_bytes == memory_plan._COMPILER_BYTES


def test_on_a_device_with_room_keys_lie_there_and_content_is_pinned(bank, monkeypatch):
    made = device_plan(bank, 80 * GB, monkeypatch, memory=8 * GB)
    assert (made.keys_device, made.keys_dtype) == ("cuda:0", "float32")
    assert made.keys_bytes == int(keys_of(bank, torch.float32) * memory_plan.GROWTH)
    assert made.content == "held"
    assert made.prefetch
    assert made.keys_bytes < made.device_bytes < GB
    assert made.memory_bytes < GB


def test_on_a_device_with_less_keys_go_to_int8_then_to_ram(large, monkeypatch):
    keys = plan(large, memory=10**12).keys_bytes
    tiers = [
        device_plan(large, int(keys * share) + GB, monkeypatch, memory=10**12)
        for share in (1.5, 1.15, 0.5, 0.01)
    ]
    found = [(p.keys_device, p.keys_dtype, p.growth) for p in tiers]
    assert found[0] == ("cuda:0", "float32", 1.25)
    assert found[1] == ("cuda:0", "float32", 1.0)
    assert found[2] == ("cuda:0", "int8", 1.25)
    assert found[3] == ("cpu", "float32", 1.0)
    assert "routing keys do not fit on cuda:0, so they are scored on the CPU" in tiers[3].why
    with pytest.raises(BudgetError, match=r"3.0 GB of RAM, and 1.0 GB on cuda:0"):
        device_plan(large, GB, monkeypatch, memory=3 * GB)


def test_a_precision_that_the_device_lacks_is_not_chosen(half, monkeypatch):
    made = device_plan(
        half, 80 * GB, monkeypatch, supported=lambda dtype, device: dtype != torch.bfloat16
    )
    assert (made.keys_device, made.keys_dtype) == ("cuda:0", "int8")
    assert "cuda:0 has no bfloat16" in made.why


def test_a_device_without_float64_takes_the_routing_keys(half, monkeypatch):
    made = device_plan(
        half, 80 * GB, monkeypatch, supported=lambda dtype, device: dtype != torch.float64
    )
    assert (made.keys_device, made.keys_dtype) == ("cuda:0", "bfloat16")


def test_one_tier_after_the_other(half, monkeypatch):
    first = device_plan(half, 80 * GB, monkeypatch)
    second = lower(first, half)
    third = lower(second, half)
    assert (first.keys_device, first.keys_dtype) == ("cuda:0", "bfloat16")
    assert (second.keys_device, second.keys_dtype) == ("cuda:0", "int8")
    assert third.keys_device == "cpu"
    assert third.keys_dtype in ("float32", "bfloat16")
    assert lower(replace(third, keys_dtype="int8"), half) is None


# ---- what is free


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_free_memory_is_the_least_of_what_kernel_and_group_leave(tmp_path):
    write(tmp_path, "proc/meminfo", "MemTotal: 100 kB\nMemFree: 5 kB\nMemAvailable:   5000 kB\n")
    assert available_memory(tmp_path) == 5000 * 1024
    write(tmp_path, "proc/self/cgroup", "0::/user/job\n")
    assert available_memory(tmp_path) == 5000 * 1024
    write(tmp_path, "sys/fs/cgroup/user/memory.max", "max\n")
    write(tmp_path, "sys/fs/cgroup/user/memory.current", "77\n")
    assert available_memory(tmp_path) == 5000 * 1024
    write(tmp_path, "sys/fs/cgroup/user/job/memory.max", "1000000\n")
    write(tmp_path, "sys/fs/cgroup/user/job/memory.current", "400000\n")
    assert available_memory(tmp_path) == 600_000
    write(tmp_path, "sys/fs/cgroup/user/job/memory.stat", "anon 3\ninactive_file 150000\n")
    assert available_memory(tmp_path) == 750_000
    write(tmp_path, "sys/fs/cgroup/user/job/memory.current", "1400000\n")
    assert available_memory(tmp_path) == 0


def test_free_memory_with_control_groups_of_the_first_version(tmp_path):
    write(tmp_path, "proc/meminfo", "MemAvailable: 5000 kB\n")
    write(tmp_path, "proc/self/cgroup", "5:cpu:/\n4:memory:/docker/abc\n")
    folder = "sys/fs/cgroup/memory/"  # of a container: its own files lie at the top
    write(tmp_path, folder + "memory.limit_in_bytes", "2000000\n")
    write(tmp_path, folder + "memory.usage_in_bytes", "500000\n")
    write(tmp_path, folder + "memory.stat", "total_inactive_file 100000\n")
    assert available_memory(tmp_path) == 1_600_000
    write(tmp_path, folder + "memory.limit_in_bytes", "9223372036854771712\n")  # none
    assert available_memory(tmp_path) == 5000 * 1024


def test_free_memory_on_windows_is_what_the_system_tells(tmp_path, monkeypatch):
    class Kernel:
        def __init__(self, name):
            assert name == "kernel32"

        def GlobalMemoryStatusEx(self, status):  # noqa: N802 - Windows' own name
            assert struct.unpack_from("I", status.raw)[0] == len(status.raw) == 64
            struct.pack_into("QQ", status, 8, 16_000_000, 9_000_000)  # total and free
            return 1

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "WinDLL", Kernel, raising=False)
    assert available_memory(tmp_path) == 9_000_000


def test_free_memory_where_there_is_no_proc(tmp_path):
    assert 0 < available_memory(tmp_path) < 1 << 50
    assert available_memory() > 0


# ---- msa bank info --plan


@pytest.fixture
def run(bank, capsys):
    def run(*words):
        with pytest.raises(SystemExit) as ended:
            main(["bank", "info", str(bank.path), *words])
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


def test_the_command_prints_the_plan(bank, run):
    code, out, err = run("--plan", "--memory", "8GB")
    assert (code, err) == (0, "")
    for words in (r"routing keys +[\d.]+ kB on cpu, float32", "held in RAM", "8.0 GB are free"):
        assert re.search(words, out), words
    code, out, _ = run("--plan", "--memory", "8 GiB", "--json")
    shown = json.loads(out)
    made = plan(bank, memory=8 * 2**30)
    assert shown["keys_bytes"] == made.keys_bytes
    assert shown["memory_bytes"] == made.memory_bytes
    assert shown["memory_available"] == 8 * 2**30
    assert code == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--plan", "--memory", "1MB"), 1, "does not fit"),
        (("--plan", "--memory", "much"), 2, "'much' is no size such as 8GB"),
        (("--plan", "--memory", "1.2.3GB"), 2, "'1.2.3GB' is no size"),
        (("--plan", "--device", "cuda:99"), 1, "device 'cuda:99' cannot be used"),
        (("--memory", "8GB"), 2, "goes with --plan only"),
        (("--device", "cpu"), 2, "goes with --plan only"),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_line(run, words, code, message):
    ended, out, err = run(*words)
    assert (ended, out) == (code, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


# ---- the plan holds


def large_bank(path, model, tokenizer, num_segments, documents_each, chunks_each):
    """A bank of random states in bfloat16, alike in all segments; no document is encoded."""
    from msa.memory.store.catalog import CatalogRow
    from msa.memory.store.records import EncodedBatch
    from msa.types import Document, LatentStates, LayerStates

    bank = MemoryBank.create(path, model, tokenizer, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    counts = torch.full((documents_each,), chunks_each)
    shape = (documents_each * chunks_each, bank.manifest.num_key_value_heads, model.config.head_dim)
    layers = {}
    for layer in bank.manifest.routing_layers:
        states = [torch.randn(shape, generator=generator) for _ in range(3)]
        states[2] = torch.nn.functional.normalize(states[2], dim=-1)
        layers[layer] = LayerStates(*(t.bfloat16() for t in states))
    for start in range(1, num_segments * documents_each, documents_each):
        numbers = tuple(range(start, start + documents_each))
        written = bank._writer.write_all([EncodedBatch(numbers, LatentStates(counts, layers))])
        rows = [
            CatalogRow(n, Document(f"d{n}", "text"), f"d{n}", 0, 1, b"", "{}", 9, chunks_each)
            for n in numbers
        ]
        bank.catalog.commit(written, rows)
    return bank


ASKING = """
import json, re, sys
from pathlib import Path

import torch

from msa.memory.bank import MemoryBank
from msa.memory.loaded.memory_plan import plan
from msa.memory.search.clustered_index import PruningSettings
from msa.memory.loaded.loaded_bank import LoadedBank
from msa.types import Selection


def status(name):
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\\s+(\\d+) kB", text)[1]) * 1024


bank = MemoryBank.open(sys.argv[1], read_only=True)
made = plan(bank, memory=int(sys.argv[2]))


def ask(resident, generator):
    for start in range(0, len(resident), 500):
        rows = torch.arange(start, start + 500)[None]
        for layer in (2, 3):
            resident.content(layer, Selection(rows, torch.zeros(rows.shape)))
        if start % 20_000 == 0:
            vectors = torch.randn(1, 4, 32, generator=generator)
            resident.route(2, vectors, torch.ones(1, 4, dtype=torch.bool))


generator = torch.Generator().manual_seed(1)
small = plan(bank, dtype="int8", shard=(0, 16))
ask(LoadedBank(bank, plan=small, shard=(0, 16)), generator)  # loads code, warms the allocator
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = status("VmRSS")
ask(LoadedBank(bank, plan=made), generator)
print(json.dumps([made.keys_dtype, made.content, status("VmHWM") - before]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells and resets peaks")
def test_a_bank_larger_than_memory_is_asked_within_its_plan(tmp_path, tiny_model, tiny_tokenizer):
    """All of it is read through maps while it is asked; the process holds a window of it.

    In a process of its own: what other tests have left in this one's heap would count, too.
    """
    memory = 500_000_000
    with large_bank(tmp_path / "large", tiny_model, tiny_tokenizer, 16, 10_000, 10) as bank:
        assert bank.info().segment_bytes > memory
        made = plan(bank, memory=memory)
    command = [sys.executable, "-c", ASKING, str(tmp_path / "large"), str(memory)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    keys_dtype, content, peak = json.loads(found.stdout)
    assert (keys_dtype, content) == ("int8", "mapped")
    assert made.keys_bytes < peak < made.memory_bytes
