"""What a loaded bank will take, said before it is loaded: which tier holds what, in bytes.

Routing keys lie where the scoring runs: on the device, or in RAM. They are held as they are stored,
or in int8 where there is no room for that. Content lies in RAM or is mapped from disk. `plan`
chooses, says why, and refuses with advice when nothing fits. The model's weights are not counted;
load the model first, and what is free is what is left beside it.

All sizes are in bytes; GB in messages is 1e9.
"""

from __future__ import annotations

import ctypes
import math
import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from msa.errors import BudgetError, InputError
from msa.memory.bank import MemoryBank
from msa.memory.loaded.reservations import RESERVATIONS, Reserver
from msa.memory.search.clustered_index import PruningSettings
from msa.memory.store.document_table import Partition
from msa.memory.store.manifest import DTYPES, Manifest
from msa.memory.store.mapped_pages import WINDOW_BYTES
from msa.memory.store.records import SegmentEntry
from msa.ops.kernels.routing_cpu import SCANNED_FROM
from msa.ops.quantization import is_supported, packed_width

# Not all that is free is to be had: allocators waste some, and others want some too.
USABLE = 0.9
# Room for documents to come, on a device; RAM that is not written to costs nothing.
GROWTH = 1.25
# Content on a GPU machine may take this share of RAM.
HELD_SHARE = 0.5
# Without a GPU the page cache holds content as well; less than this is soon read, and held.
HELD_BYTES = 128 << 20
# Questions asked together, for their working set (`AskOptions.batch_size`).
_BATCH = 16
_SCAN_BYTES = 32 << 20
# The compiler of scans, loaded for a layer's keys of so many bytes.
_COMPILER_BYTES = 128 << 20
_KEY_DTYPES = {**DTYPES, "int8": torch.int8}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where everything is to lie. Made by `plan`; `LoadedBank` follows it.

    Attributes:
        bank: its folder.
        device: where questions are asked.
        shard: (rank, world) of the share that is planned for.
        num_documents, num_chunks: of the share, deleted documents included.
        keys_dtype: of the routing keys in memory: "float32", "bfloat16", "float16" or "int8".
        keys_device: where they are scored.
        keys_bytes: what they take there, scales and room for growth included.
        pruned_bytes: of their copy in blocks, for a pruned scan; 0 without one.
        growth: room for so many times the present documents.
        content: "held" in RAM or "mapped" from disk.
        content_bytes: of all content, held or mapped.
        prefetch: whether content is fetched ahead for the next layer.
        rows_bytes: numbers, places and checksums of the documents, in RAM.
        question_bytes: working set of a batch of questions: their content twice over (when it is
            fetched and when it is attended to), blocks of scores and what scans them, pages of
            mapped files.
        loading_bytes: for a while, when the bank is loaded.
        memory_available: RAM that this process can still have, without what other banks that it
            has loaded will still take.
        device_available: the same of `device`; None on a CPU.
        why: reasons, in words.
    """

    bank: str
    device: str
    shard: tuple[int, int] = (0, 1)
    num_documents: int
    num_chunks: int
    keys_dtype: str
    keys_device: str
    keys_bytes: int
    pruned_bytes: int = 0
    growth: float = 1.0
    content: str
    content_bytes: int
    prefetch: bool
    rows_bytes: int
    question_bytes: int
    loading_bytes: int
    memory_available: int
    device_available: int | None
    why: tuple[str, ...] = ()

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the routing keys in memory."""
        return _KEY_DTYPES[self.keys_dtype]

    @property
    def memory_bytes(self) -> int:
        """RAM that the bank takes, at most: after loading, with a batch of questions."""
        keys = self.keys_bytes + self.pruned_bytes if self.keys_device == "cpu" else 0
        held = self.content_bytes if self.content == "held" else 0
        return keys + held + self.rows_bytes + max(self.question_bytes, self.loading_bytes)

    @property
    def device_bytes(self) -> int:
        """Memory of the device that the bank takes, at most; 0 on a CPU."""
        if self.device_available is None:
            return 0
        keys = self.keys_bytes if self.keys_device != "cpu" else 0
        return keys + self.question_bytes


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What follows from bank and share alone.

    Attributes:
        num_documents, num_chunks: of the share.
        numbers: of one chunk in all routing layers: R * G * D.
        layers: R.
        longest: chunks of the longest document there may be.
        largest: bytes of the largest routing part.
        deleted: documents that wait for `compact`, in the whole bank.
    """

    manifest: Manifest
    num_documents: int
    num_chunks: int
    largest: int
    deleted: int

    @property
    def layers(self) -> int:
        return len(self.manifest.routing_layers)

    @property
    def numbers(self) -> int:
        return self.layers * self.manifest.num_key_value_heads * self.manifest.head_dim

    @property
    def rows(self) -> int:
        # numbers, counts, segment, first chunk; checksums; live; once more where they are scored
        return self.num_documents * (4 * 8 + 4 * self.layers + 1 + 8 + 1)

    @property
    def loading(self) -> int:
        # the routing part read, a layer's keys in float32 while they are converted, rows joined
        return 2 * self.largest + self.rows

    def keys(self, dtype: str) -> int:
        """Routing keys in memory."""
        scales = 4 * self.layers if dtype == "int8" else 0
        return self.num_chunks * (self.numbers * _KEY_DTYPES[dtype].itemsize + scales)

    def pruned(self, dtype: str, settings: PruningSettings) -> int:
        """A copy of the routing keys in blocks, at most or so."""
        blocks = 2 * math.ceil(self.num_chunks / settings.block_size)
        outline = 4 * (self.numbers // self.layers + 1) + 8
        return self.keys(dtype) + self.layers * (4 * self.num_chunks + blocks * outline)

    def content(self, dtype: torch.dtype) -> int:
        """Pooled keys and values as they are held: packed as on disk, or in a dtype."""
        manifest = self.manifest
        row = manifest.head_dim * dtype.itemsize
        if manifest.packed:
            row = packed_width(manifest.head_dim, manifest.packed)
        return 2 * self.num_chunks * self.layers * manifest.num_key_value_heads * row

    def question(self, dtype: torch.dtype) -> int:
        """Working set of a batch of questions, without pages of mapped files."""
        manifest = self.manifest
        longest = math.ceil(manifest.max_document_tokens / manifest.chunk_size)
        chunks = min(_BATCH * manifest.top_k_documents * longest, _BATCH * self.num_chunks)
        return 2 * (2 * chunks * self.numbers * dtype.itemsize) + _SCAN_BYTES

    @property
    def compiler(self) -> int:
        """What compiles the scan of keys on a CPU."""
        layer = 4 * self.num_chunks * self.numbers // self.layers  # float32, the widest there is
        return _COMPILER_BYTES if layer >= SCANNED_FROM else 0


@dataclass(slots=True)
class _Draft:
    """A plan in the making."""

    sizes: _Sizes
    device: str
    memory: int
    device_memory: int | None
    content_dtype: torch.dtype
    world: int
    pruning: PruningSettings | None
    reserved: int = 0
    why: list[str] = field(default_factory=list)

    @property
    def question(self) -> int:
        return self.sizes.question(self.content_dtype)

    @property
    def loading(self) -> int:
        """What loading takes for a while; parting keys into blocks takes several orders of them."""
        parting = 6 * 8 * self.sizes.num_chunks if self.pruning is not None else 0
        return self.sizes.loading + parting

    @property
    def base(self) -> int:
        """RAM that is taken in any case."""
        asking = self.question + WINDOW_BYTES + self.sizes.compiler
        return self.sizes.rows + max(asking, self.loading)

    def keys(self, dtype: str) -> int:
        """Routing keys on the CPU, with their copy in blocks if there is to be one."""
        return self.sizes.keys(dtype) + self.pruned(dtype)

    def pruned(self, dtype: str) -> int:
        return self.sizes.pruned(dtype, self.pruning) if self.pruning is not None else 0

    def memory_holds(self, num_bytes: int) -> bool:
        return num_bytes + self.base <= USABLE * self.memory

    def device_holds(self, num_bytes: int) -> bool:
        assert self.device_memory is not None
        return num_bytes + self.question <= USABLE * self.device_memory

    def say(self, reason: str) -> None:
        self.why.append(reason)


def plan(
    bank: MemoryBank,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    content_dtype: torch.dtype | None = None,
    content: str | None = None,
    pruning: PruningSettings | None = None,
    shard: tuple[int, int] = (0, 1),
    memory: int | None = None,
    device_memory: int | None = None,
    entries: Sequence[SegmentEntry] | None = None,
    reserver: Reserver | None = None,
    in_use: int = 0,
) -> MemoryPlan:
    """Which tier will hold what of a bank, before anything is loaded.

    On a GPU: keys there as stored, else in int8, else in RAM; content pinned in RAM, else mapped.
    On a CPU: keys as stored, else in int8; content held if there is little of it, else mapped (the
    page cache holds it).

    Args:
        bank: open.
        device: where questions are asked.
        dtype: of the routing keys; the plan's choice by default.
        content_dtype: of the content that is returned; as stored by default.
        content: "held" or "mapped"; the plan's choice by default.
        pruning: keys on a CPU have a copy in such blocks.
        shard: (rank, world), for a share of the bank.
        memory, device_memory: bytes to plan for, instead of what is free now and not reserved by
            banks that this process has loaded.
        entries: segments to plan for, instead of the bank's.
        reserver: the loaded bank that the plan is for, whose own reservation does not count.
        in_use: RAM that it has taken already, which counts as free.

    Raises:
        BudgetError: it does not fit; the message says what would.
        InputError: an argument is not valid, or there is no such device.
    """
    manifest = bank.manifest
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in _KEY_DTYPES:
        raise InputError(f"dtype={name}: routing keys are held in {', '.join(_KEY_DTYPES)}")
    if content not in (None, "held", "mapped"):
        raise InputError(f"content={content!r}: expected 'held' or 'mapped'")
    for given in (memory, device_memory):
        if given is not None and given <= 0:
            raise InputError(f"memory of {given} bytes: expected more than 0")
    target = torch.device(device)
    reserved, device_reserved = RESERVATIONS.total(target, reserver)
    if device_memory is None and (free := _free_on(target)) is not None:
        device_memory = max(1, free - device_reserved)
    draft = _Draft(
        sizes=_sizes_of(bank, Partition(*shard), entries),
        device=str(target),
        memory=memory or max(1, available_memory() + in_use - reserved),
        device_memory=device_memory,
        content_dtype=content_dtype or manifest.torch_dtype,
        world=shard[1],  # shares may well be on one machine
        pruning=pruning,
        reserved=0 if memory else reserved,
    )
    if target.type == "cpu":
        draft.device_memory = None
    keys_device, keys_dtype, growth = _place_keys(draft, bank, target, name)
    sizes = draft.sizes
    keys_bytes = int(sizes.keys(keys_dtype) * growth)
    pruned_bytes = draft.pruned(keys_dtype) if keys_device == "cpu" else 0
    left = draft.memory - (keys_bytes + pruned_bytes if keys_device == "cpu" else 0)
    held = _holds_content(draft, bank, content, left)
    content_bytes = sizes.content(draft.content_dtype)
    prefetch = target.type != "cpu" or (not held and content_bytes > left / 2)
    window = 0 if held and keys_dtype != "int8" else WINDOW_BYTES
    compiler = sizes.compiler if keys_device == "cpu" else 0
    return MemoryPlan(
        bank=str(bank.path),
        device=str(target),
        shard=shard,
        num_documents=sizes.num_documents,
        num_chunks=sizes.num_chunks,
        keys_dtype=keys_dtype,
        keys_device=keys_device,
        keys_bytes=keys_bytes,
        pruned_bytes=pruned_bytes,
        growth=growth,
        content="held" if held else "mapped",
        content_bytes=content_bytes,
        prefetch=prefetch,
        rows_bytes=sizes.rows,
        question_bytes=draft.question + window + compiler,
        loading_bytes=draft.loading,
        memory_available=draft.memory,
        device_available=draft.device_memory,
        why=tuple(draft.why),
    )


def lower(
    given: MemoryPlan, bank: MemoryBank, reserver: Reserver | None = None
) -> MemoryPlan | None:
    """The plan to go on with when the device had no memory for this one; None when there is none.

    One tier down: from keys as stored to int8, from int8 on a device to RAM. The reserver is that
    of `plan`.
    """
    sizes = _sizes_of(bank, Partition(*given.shard), None)
    if given.keys_dtype != "int8":
        return replace(
            given,
            keys_dtype="int8",
            keys_bytes=sizes.keys("int8"),
            growth=1.0,
        )
    if given.keys_device == "cpu":
        return None
    on_cpu = plan(bank, "cpu", shard=given.shard, content=given.content, reserver=reserver)
    return replace(
        given,
        keys_device="cpu",
        keys_dtype=on_cpu.keys_dtype,
        keys_bytes=on_cpu.keys_bytes,
        growth=on_cpu.growth,
    )


def _sizes_of(bank: MemoryBank, shard: Partition, entries: Sequence[SegmentEntry] | None) -> _Sizes:
    if entries is None:
        entries = bank.catalog.snapshot().segments
    total = sum(e.num_chunks for e in entries)
    low, high = shard.range(total)
    documents = sum(e.num_documents for e in entries)
    share = math.ceil(documents * (high - low) / total) if total else 0
    largest = max((e.routing_bytes for e in entries), default=0)
    deleted = bank.catalog.totals().num_deleted
    return _Sizes(bank.manifest, share, high - low, largest, deleted)


def _place_keys(
    draft: _Draft, bank: MemoryBank, device: torch.device, name: str | None
) -> tuple[str, str, float]:
    """Device, dtype and growth of the routing keys."""
    stored = bank.manifest.dtype
    choices = [name] if name is not None else [stored, "int8"]
    sizes = draft.sizes
    if draft.device_memory is not None:
        on_device = [c for c in choices if is_supported(_KEY_DTYPES[c], device)]
        for lacking in sorted(set(choices) - set(on_device)):
            draft.say(f"{device} has no {lacking}")
        for choice in on_device:
            for growth in (GROWTH, 1.0):
                if draft.device_holds(int(sizes.keys(choice) * growth)):
                    draft.say(f"routing keys fit on {device} in {choice}{_not(choice, stored)}")
                    return str(device), choice, growth
        draft.say(f"routing keys do not fit on {device}, so they are scored on the CPU")
    for choice in choices:
        if draft.memory_holds(draft.keys(choice)):
            draft.say(f"routing keys fit in RAM in {choice}{_not(choice, stored)}")
            return "cpu", choice, 1.0
    raise BudgetError(_refusal(draft, bank, choices))


def _not(choice: str, stored: str) -> str:
    return f", not in {stored}" if choice == "int8" != stored else ""


def _holds_content(draft: _Draft, bank: MemoryBank, wanted: str | None, left: int) -> bool:
    """Whether content is held in RAM, of which so much is left beside the keys."""
    size = draft.sizes.content(draft.content_dtype)
    room = USABLE * left - draft.base
    if wanted == "held":
        if size > room:
            raise BudgetError(
                f"content of bank '{bank.path}' takes {_gb(size)}, {_gb(max(room, 0))} of RAM are "
                "left beside the routing keys; take content='mapped', or hold shares of the bank "
                "in several processes"
            )
        draft.say("content is held in RAM, as asked for")
        return True
    if wanted == "mapped":
        draft.say("content is mapped, as asked for")
        return False
    if draft.device_memory is None:
        limit = min(HELD_BYTES, int(room))
        reason = "is soon read" if size <= limit else "stays on disk and in the page cache"
    else:
        limit = min(int(HELD_SHARE * left / draft.world), int(room))
        share = "less" if size <= limit else "more"
        reason = f"takes {share} than half of the RAM that is left"
    draft.say(f"content {reason}, so it is {'held' if size <= limit else 'mapped'}")
    return size <= limit


def _refusal(draft: _Draft, bank: MemoryBank, choices: Sequence[str]) -> str:
    smallest = choices[-1]
    needed = draft.keys(smallest)
    where = "RAM" if draft.device_memory is None else f"RAM, and {_gb(draft.device_memory)} on "
    where += "" if draft.device_memory is None else draft.device
    advice = []
    shares = _shares(draft, smallest)
    if shares:
        advice.append(f"hold it in {shares} shares, on machines or GPUs of their own")
    if smallest != "int8":
        advice.append("take dtype=torch.int8")
    if draft.sizes.deleted:
        advice.append(
            f"compact it ({draft.sizes.deleted:,} deleted documents still take room): msa bank "
            f"compact {bank.path}"
        )
    if draft.reserved:
        advice.append(
            f"close another bank that this process has loaded (they have planned for "
            f"{_gb(draft.reserved)} more)"
        )
    advice.append("or free memory")
    return (
        f"bank '{bank.path}' does not fit: its routing keys take {_gb(needed)} in {smallest}, and "
        f"{_gb(draft.base)} go to rows and questions; there are {_gb(draft.memory)} of {where}. "
        f"What helps: {'; '.join(advice)}"
    )


def _shares(draft: _Draft, dtype: str) -> int | None:
    """The fewest shares of which each fits into the RAM there is; None if that is no way out."""
    for count in range(2, 1025):
        sizes = replace(
            draft.sizes,
            num_documents=math.ceil(draft.sizes.num_documents / count),
            num_chunks=math.ceil(draft.sizes.num_chunks / count),
        )
        share = replace(draft, sizes=sizes)
        if share.memory_holds(share.keys(dtype)):
            return count * draft.world
    return None


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _free_on(device: torch.device) -> int | None:
    if device.type == "cuda":
        try:
            return int(torch.cuda.mem_get_info(device)[0])
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"device '{device}' cannot be used: {reason}") from error
    return None if device.type == "cpu" else available_memory()  # others share the RAM


# ---- what is free


def available_memory(root: Path = Path("/")) -> int:
    """RAM that this process can still have without swapping, in bytes.

    Linux: what the kernel calls available, or what is left below the limit of the control group
    (version 1 or 2), caches of files not counted, if that is less. Windows: free physical memory.
    Elsewhere: free pages if the system tells, else half of all.

    Args:
        root: of the file system, for tests.
    """
    limits = [left for left in (_kernel_available(root), _group_left(root)) if left is not None]
    if limits:
        return max(min(limits), 0)
    if sys.platform == "win32":
        return _windows_available()
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        return page * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return page * os.sysconf("SC_PHYS_PAGES") // 2


def _kernel_available(root: Path) -> int | None:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _windows_available() -> int:
    """Free physical memory as `GlobalMemoryStatusEx` tells it."""
    # MEMORYSTATUSEX: its size and the load in percent, then total and free physical memory, ...
    status = struct.pack("II7Q", 64, *[0] * 8)
    buffer = ctypes.create_string_buffer(status, 64)
    ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(buffer)  # type: ignore[attr-defined]
    return int(struct.unpack("II7Q", buffer.raw)[3])


def _group_left(root: Path) -> int | None:
    """What the tightest limit of this process's control groups leaves."""
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        base = root / "sys/fs/cgroup"
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = base / "memory"
            names = (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        # in a container the path is often that of the host, and the files lie at the top
        parts = [p for p in path.split("/") if p and p != ".."]
        for depth in range(len(parts) + 1):
            left = _left_in(base.joinpath(*parts[:depth]), *names)
            if left is not None:
                found.append(left)
    return min(found, default=None)


def _left_in(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
    if not most.isdigit() or not used.isdigit() or int(most) >= 1 << 60:
        return None
    cached = 0
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == cache and value.strip().isdigit():
            cached = int(value)
    return int(most) - max(int(used) - cached, 0)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
