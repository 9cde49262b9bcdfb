from __future__ import annotations

import errno
import hashlib
import os

import pytest
import torch
from safetensors.torch import load_file

from msa.errors import BankCorruptError, StorageError
from msa.memory.store.records import EncodedBatch
from msa.memory.store.segments import (
    Segment,
    SegmentMissingError,
    SegmentWriter,
    chunk_offsets,
    write_segment,
)
from msa.types import LatentStates, LayerStates

LAYERS = (1, 3)


def make_batch(numbers, counts, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    chunks = sum(counts)

    def tensor():
        return torch.randn(chunks, 2, 4, generator=generator).to(dtype)

    layers = {i: LayerStates(tensor(), tensor(), tensor()) for i in LAYERS}
    return EncodedBatch(tuple(numbers), LatentStates(torch.tensor(counts), layers))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "bank" / "segments"
    folder.mkdir(parents=True)
    return folder


def read_all(segment, part, rows, layer):
    starts = chunk_offsets(part.chunk_counts)
    column = segment.layers.index(layer)
    return segment.read(
        layer, rows, part.chunk_counts[rows], starts[rows], part.checksums[rows, column]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_written_is_read_back_bit_for_bit(folder, dtype):
    batches = [
        make_batch([4, 9], [3, 1], dtype, seed=1),
        make_batch([2, 7, 5], [1, 2, 5], dtype, seed=2),
    ]
    entry = write_segment(folder, 12, batches)
    segment = Segment(folder, entry, LAYERS)
    part = segment.routing_part()
    assert part.numbers.tolist() == [4, 9, 2, 7, 5]
    assert part.chunk_counts.tolist() == [3, 1, 1, 2, 5]
    for layer in LAYERS:
        states = [b.states.layers[layer] for b in batches]
        assert torch.equal(part.routing_keys[layer], torch.cat([s.routing_keys for s in states]))
        keys, values = read_all(segment, part, torch.arange(5), layer)
        assert torch.equal(keys, torch.cat([s.pooled_keys for s in states]))
        assert torch.equal(values, torch.cat([s.pooled_values for s in states]))
        some, _ = read_all(segment, part, torch.tensor([1, 3]), layer)
        assert torch.equal(some, keys[[3, 5, 6]])
    segment.verify()


def test_the_file_is_plain_safetensors_and_the_entry_describes_it(folder):
    entry = write_segment(folder, 1, [make_batch([1, 2, 3], [2, 2, 1])])
    path = folder / "000001.safetensors"
    tensors = load_file(path)
    assert tensors["1.pooled_keys"].shape == (5, 2, 4)
    assert tensors["checksums"].shape == (3, 2)
    data = path.read_bytes()
    assert entry.size_bytes == len(data)
    assert entry.sha256 == hashlib.sha256(data).hexdigest()
    assert entry.routing_sha256 == hashlib.sha256(data[: entry.routing_bytes]).hexdigest()
    assert (entry.num_documents, entry.num_chunks) == (3, 5)


def test_selected_documents_can_be_written_again_unchanged(folder):
    batch = make_batch([1, 2, 3], [2, 3, 1])
    segment = Segment(folder, write_segment(folder, 1, [batch]), LAYERS)
    again = segment.select(torch.tensor([0, 2]), segment.routing_part())
    assert again.numbers == (1, 3)
    assert again.states.chunk_counts.tolist() == [2, 1]
    for layer in LAYERS:
        for name in ("routing_keys", "pooled_keys", "pooled_values"):
            whole = getattr(batch.states.layers[layer], name)
            assert torch.equal(getattr(again.states.layers[layer], name), whole[[0, 1, 5]])


def test_a_truncated_grown_or_missing_file_does_not_open(folder):
    entry = write_segment(folder, 1, [make_batch([1], [4])])
    path = folder / entry.name
    data = path.read_bytes()
    for wrong in (data[:-1], data[:100], b"", data + b"\0"):
        path.write_bytes(wrong)
        with pytest.raises(BankCorruptError, match=r"000001.safetensors.*msa bank verify"):
            Segment(folder, entry, LAYERS)
    path.unlink()
    with pytest.raises(SegmentMissingError, match="missing"):
        Segment(folder, entry, LAYERS)


def test_every_flipped_bit_is_found_before_the_state_is_used(folder):
    """One flip in every 7th byte: header, routing part and content; none gets through."""
    entry = write_segment(folder, 1, [make_batch([1, 2], [2, 1])])
    path = folder / entry.name
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)

        def use():
            segment = Segment(folder, entry, LAYERS)
            part = segment.routing_part()
            for layer in LAYERS:
                read_all(segment, part, torch.arange(2), layer)

        with pytest.raises(BankCorruptError, match=r"000001.safetensors"):
            use()


def test_a_flipped_bit_in_one_document_leaves_the_others_readable(folder):
    entry = write_segment(folder, 1, [make_batch([1, 2], [2, 1])])
    path = folder / entry.name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the last value of the second document, in the last layer
    path.write_bytes(data)
    segment = Segment(folder, entry, LAYERS)
    part = segment.routing_part()
    read_all(segment, part, torch.tensor([0]), 3)
    read_all(segment, part, torch.tensor([1]), 1)
    with pytest.raises(BankCorruptError, match="in layer 3"):
        read_all(segment, part, torch.tensor([1]), 3)
    with pytest.raises(BankCorruptError, match="checksum"):
        segment.verify()


def test_a_map_outlives_its_file(folder):
    batch = make_batch([1], [3])
    segment = Segment(folder, write_segment(folder, 1, [batch]), LAYERS)
    part = segment.routing_part()
    segment.path.unlink()
    keys, _ = read_all(segment, part, torch.tensor([0]), 1)
    assert torch.equal(keys, batch.states.layers[1].pooled_keys)


def test_data_then_name_then_folder_reach_the_disk_in_this_order(folder, monkeypatch):
    calls = []
    for name in ("write", "fsync", "link"):
        real = getattr(os, name)

        def spy(first, *rest, name=name, real=real):
            if name == "link":
                calls.append(f"link {os.path.basename(rest[0])}")
            elif os.path.isdir(f"/proc/self/fd/{first}"):
                calls.append(f"{name} folder")
            else:
                calls.append(name)
            return real(first, *rest)

        monkeypatch.setattr(os, name, spy)
    write_segment(folder, 1, [make_batch([1], [1])])
    writes = calls.count("write")
    assert calls == ["write"] * writes + ["fsync", "link 000001.safetensors", "fsync folder"]


@pytest.mark.parametrize("call", ["write", "fsync", "link"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_refused_write_leaves_nothing_and_says_why(folder, monkeypatch, call, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StorageError, match=rf"{os.strerror(code)}.*as it was before"):
        write_segment(folder, 1, [make_batch([1], [1])])
    assert list(folder.iterdir()) == []


def test_short_writes_are_continued(folder, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:17]))
    entry = write_segment(folder, 1, [make_batch([1, 2], [3, 4])])
    Segment(folder, entry, LAYERS).verify()


def test_a_stream_of_batches_is_cut_into_segments_of_bounded_size(folder, monkeypatch):
    batches = [make_batch([i], [2], seed=i) for i in range(1, 8)]
    monkeypatch.setattr("msa.memory.store.segments.SEGMENT_BYTES", 2 * batches[0].num_bytes)
    written = SegmentWriter(folder, 5).write_all(iter(batches))
    assert [numbers for _, numbers in written] == [(1, 2), (3, 4), (5, 6), (7,)]
    assert [entry.segment for entry, _ in written] == [5, 6, 7, 8]
    assert sorted(p.name for p in folder.iterdir()) == [entry.name for entry, _ in written]


def test_when_a_later_segment_fails_the_earlier_ones_are_removed(folder, monkeypatch):
    monkeypatch.setattr("msa.memory.store.segments.SEGMENT_BYTES", 1)

    def batches():
        yield make_batch([1], [1])
        yield make_batch([2], [1])
        raise RuntimeError("the encoder failed")

    with pytest.raises(RuntimeError):
        SegmentWriter(folder, 1).write_all(batches())
    assert list(folder.iterdir()) == []
