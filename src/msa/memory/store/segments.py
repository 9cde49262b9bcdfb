"""Immutable files of latent states: safetensors, checked, memory-mapped.

A segment holds the states of many documents. Its tensors, in the order of the file:

    numbers       [N] int64      the documents, in the order of their chunks
    chunk_counts  [N] int64
    checksums     [N, R] int32   CRC-32 of a document's pooled keys and values, per routing layer
    LAYER.routing_keys   [C, G, D]   for every routing layer     (end of the routing part)
    LAYER.pooled_keys    [C, G, D]   for every routing layer
    LAYER.pooled_values  [C, G, D]

Content of a lower precision is uint8 [C, G, packed width] instead, rows of
`msa.ops.quantization.pack`.

The routing part is read whole when a bank is loaded, and its SHA-256 is compared then. The content
is mapped and read for selected documents only, and their CRC-32 is compared at every read. So no
state that differs from what was encoded ever reaches an answer.

The file is written here and not by the safetensors library, so that it can be hashed and synced as
it is written, without a second copy in memory; the library reads it.

Shapes: N documents, R routing layers, C chunks, G KV heads, D head dim.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msa.errors import BankCorruptError, StorageError
from msa.memory.store.durable_files import storage_errors, write_file
from msa.memory.store.records import EncodedBatch, SegmentEntry, segment_name
from msa.ops.ragged import ragged_range
from msa.types import LatentStates, LayerStates

# Latent states per file: enough for few files, little enough to hold and to rewrite.
SEGMENT_BYTES = 64 << 20
_DTYPE_NAMES = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}

assert sys.byteorder == "little", "safetensors files are little-endian"


class SegmentMissingError(BankCorruptError):
    """The segment's file is not there."""


@dataclass(frozen=True, slots=True)
class RoutingPart:
    """The part of a segment that is held in memory for asking.

    Attributes:
        numbers, chunk_counts: [N] int64.
        checksums: [N, R] int32.
        routing_keys: routing layer -> [C, G, D].
    """

    numbers: Tensor
    chunk_counts: Tensor
    checksums: Tensor
    routing_keys: dict[int, Tensor]


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def chunk_offsets(counts: Tensor) -> Tensor:
    """First chunk of every document: [N] int64 for counts [N] int64."""
    return counts.cumsum(0) - counts


def content_checksums(keys: Tensor, values: Tensor, counts: Tensor) -> list[int]:
    """CRC-32 of every document's pooled keys and values in one layer, as signed 32-bit integers.

    Args:
        keys, values: [C, G, D] in their stored dtype.
        counts: [N] int64.
    """
    key_bytes, value_bytes = _bytes_of(keys), _bytes_of(values)
    row = key_bytes.nbytes // max(len(keys), 1)
    checksums, start = [], 0
    for count in counts.tolist():
        end = start + count * row
        crc = zlib.crc32(value_bytes[start:end], zlib.crc32(key_bytes[start:end]))
        checksums.append(crc - (1 << 32) if crc >= 1 << 31 else crc)
        start = end
    return checksums


def _batch_checksums(batch: EncodedBatch, layers: Sequence[int]) -> Tensor:
    counts = batch.states.chunk_counts
    columns = [
        content_checksums(
            batch.states.layers[i].pooled_keys, batch.states.layers[i].pooled_values, counts
        )
        for i in layers
    ]
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


def write_segment(folder: Path, segment: int, batches: Sequence[EncodedBatch]) -> SegmentEntry:
    """Write documents' states to a new segment; when this returns they are on disk.

    Args:
        folder: the bank's `segments` folder.
        segment: number of the segment.
        batches: at least one; states of equal shapes [*, G, D] and dtype, on the CPU.

    Returns:
        The entry to put into the catalog. Until it is there, the file does not count.

    Raises:
        StorageError: the disk refused; no file is left.
    """
    layers = sorted(batches[0].states.layers)
    numbers = torch.tensor([n for b in batches for n in b.numbers], dtype=torch.int64)
    counts = torch.cat([b.states.chunk_counts for b in batches])
    checksums = torch.cat([_batch_checksums(b, layers) for b in batches])
    tensors: list[tuple[str, list[Tensor]]] = [
        ("numbers", [numbers]),
        ("chunk_counts", [counts]),
        ("checksums", [checksums]),
    ]
    for i in layers:
        keys = [b.states.layers[i].routing_keys for b in batches]
        tensors.append((f"{i}.routing_keys", keys))
    routing_tensors = len(tensors)
    for i in layers:
        tensors.append((f"{i}.pooled_keys", [b.states.layers[i].pooled_keys for b in batches]))
        tensors.append((f"{i}.pooled_values", [b.states.layers[i].pooled_values for b in batches]))

    header, ends = _header(tensors)
    routing_bytes = len(header) + ends[routing_tensors - 1]
    whole, routing = hashlib.sha256(), hashlib.sha256()

    def pieces() -> Iterator[bytes | memoryview]:
        for index, piece in _file_pieces(header, tensors):
            whole.update(piece)
            if index < routing_tensors:
                routing.update(piece)
            yield piece

    path = folder / segment_name(segment)
    with storage_errors(f"write segment {path}"):
        write_file(path, pieces())
    return SegmentEntry(
        segment=segment,
        size_bytes=len(header) + ends[-1],
        sha256=whole.hexdigest(),
        routing_bytes=routing_bytes,
        routing_sha256=routing.hexdigest(),
        num_documents=len(numbers),
        num_chunks=int(counts.sum()),
    )


def _file_pieces(
    header: bytes, tensors: Sequence[tuple[str, list[Tensor]]]
) -> Iterator[tuple[int, bytes | memoryview]]:
    """The file in order, each piece with the index of its tensor (-1 for the header)."""
    yield -1, header
    for index, (_, parts) in enumerate(tensors):
        for part in parts:
            yield index, _bytes_of(part)


def _header(tensors: Sequence[tuple[str, list[Tensor]]]) -> tuple[bytes, list[int]]:
    """The safetensors header, padded to 8 bytes, and where each tensor's data ends after it."""
    fields: dict[str, object] = {"__metadata__": {"format": "msa-segment", "version": "1"}}
    ends: list[int] = []
    for name, parts in tensors:
        start = ends[-1] if ends else 0
        ends.append(start + sum(p.nbytes for p in parts))
        fields[name] = {
            "dtype": _DTYPE_NAMES[parts[0].dtype],
            "shape": [sum(len(p) for p in parts), *parts[0].shape[1:]],
            "data_offsets": [start, ends[-1]],
        }
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ends


class SegmentWriter:
    """Numbers new segments and cuts a stream of batches into segments of bounded size.

    Args:
        folder: the bank's `segments` folder.
        next_segment: the first number to use; one number is never used for two files.
        check: called before every file; raises when nothing may be written there any more.
    """

    def __init__(
        self, folder: Path, next_segment: int, check: Callable[[], None] | None = None
    ) -> None:
        self.folder = folder
        self._next = next_segment
        self._check = check

    def take(self) -> int:
        """The number of the next segment; the writer itself will not use it."""
        self._next += 1
        return self._next - 1

    def write_all(
        self, batches: Iterable[EncodedBatch]
    ) -> list[tuple[SegmentEntry, tuple[int, ...]]]:
        """Write all batches; memory holds no more than one segment of them.

        Returns:
            Entries to commit, each with the numbers of its documents.

        Raises:
            StorageError: the disk refused. As with any other error, the files written so far are
                removed.
        """
        written: list[tuple[SegmentEntry, tuple[int, ...]]] = []
        held: list[EncodedBatch] = []
        try:
            for batch in batches:
                held.append(batch)
                if sum(b.num_bytes for b in held) >= SEGMENT_BYTES:
                    written.append(self._write(held))
                    held = []
            if held:
                written.append(self._write(held))
        except BaseException:
            for entry, _ in written:
                with contextlib.suppress(OSError):
                    (self.folder / entry.name).unlink()
            raise
        return written

    def _write(self, batches: Sequence[EncodedBatch]) -> tuple[SegmentEntry, tuple[int, ...]]:
        if self._check is not None:
            self._check()
        entry = write_segment(self.folder, self.take(), batches)
        return entry, tuple(n for b in batches for n in b.numbers)


class Segment:
    """A segment opened for asking.

    Opening compares the file's size and reads its header; `routing_part` compares the hash of all
    that it returns; `read` compares the checksum of every document that it returns. The map stays
    valid when the file is removed by `compact`.

    Raises:
        SegmentMissingError: no such file.
        BankCorruptError: the file has another size than the catalog says, or no valid header.
    """

    def __init__(self, folder: Path, entry: SegmentEntry, layers: Sequence[int]) -> None:
        self.path = folder / entry.name
        self.entry = entry
        self.layers = tuple(layers)
        self._content: dict[int, tuple[Tensor, Tensor]] = {}
        with self._reading():
            size = self.path.stat().st_size
            if size != entry.size_bytes:
                raise self.corrupt(f"it has {size} bytes, the catalog says {entry.size_bytes}")
            with safe_open(self.path, framework="pt") as file:
                for i in self.layers:
                    self._content[i] = (
                        file.get_tensor(f"{i}.pooled_keys"),
                        file.get_tensor(f"{i}.pooled_values"),
                    )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise SegmentMissingError(_message(self.path, "it is missing")) from error
        except SafetensorError as error:
            raise self.corrupt(f"no valid header: {error}") from error
        except OSError as error:
            raise StorageError(f"cannot read {self.path}: {error.strerror or error}") from error

    def corrupt(self, what: str) -> BankCorruptError:
        """The error to raise when this segment cannot be trusted."""
        return BankCorruptError(_message(self.path, what))

    @property
    def mapped_tensor(self) -> Tensor:
        """One of the mapped tensors; who holds it holds the whole map."""
        return self._content[self.layers[0]][0]

    def routing_part(self, buffer: Tensor | None = None) -> RoutingPart:
        """Numbers, chunk counts, checksums and routing keys, read from disk and compared.

        Args:
            buffer: uint8, at least `routing_bytes` long, to read into; the routing keys stay in it.

        Raises:
            BankCorruptError: their hash is not the catalog's.
            SegmentMissingError: the file has been removed since it was opened.
        """
        if buffer is None:
            buffer = torch.empty(self.entry.routing_bytes, dtype=torch.uint8)
        data = buffer[: self.entry.routing_bytes]
        view = data.numpy().data
        with self._reading(), self.path.open("rb", buffering=0) as file:
            done = 0
            while done < len(view) and (step := file.readinto(view[done:])):
                done += step
        if hashlib.sha256(view).hexdigest() != self.entry.routing_sha256:
            raise self.corrupt("the checksum of its routing keys is wrong")
        length = int.from_bytes(view[:8], "little")
        fields = json.loads(bytes(view[8 : 8 + length]))
        body = data[8 + length :]

        def tensor(name: str) -> Tensor:
            start, end = fields[name]["data_offsets"]
            typed = body[start:end].view(_TORCH_DTYPES[fields[name]["dtype"]])
            return typed.view(fields[name]["shape"])

        return RoutingPart(
            # clones, so that the small tensors outlive the buffer
            tensor("numbers").clone(),
            tensor("chunk_counts").clone(),
            tensor("checksums").clone(),
            {i: tensor(f"{i}.routing_keys") for i in self.layers},
        )

    def read(
        self, layer: int, rows: Tensor, counts: Tensor, starts: Tensor, checksums: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pooled keys and values of some documents in one layer.

        Args:
            layer: index of the routing layer.
            rows: [U] int64, documents of this segment, for messages.
            counts, starts: [U] int64, number of chunks and first chunk of each.
            checksums: [U] int32, expected.

        Returns:
            Two [C, G, D], in the stored dtype, copied out of the map.

        Raises:
            BankCorruptError: a document's checksum is wrong.
        """
        keys, values = self._content[layer]
        index = ragged_range(starts, counts)
        keys, values = keys.index_select(0, index), values.index_select(0, index)
        found = content_checksums(keys, values, counts)
        if found != checksums.tolist():
            bad = next(i for i, c in enumerate(found) if c != int(checksums[i]))
            raise self.corrupt(
                f"the checksum of document row {int(rows[bad])} in layer {layer} is wrong"
            )
        return keys, values

    def verify(self) -> None:
        """Read the whole file and compare its hash.

        Raises:
            BankCorruptError: the hash is not the catalog's.
        """
        with self._reading(), self.path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.entry.sha256:
            raise self.corrupt("its checksum is wrong")

    def select(self, rows: Tensor, part: RoutingPart) -> EncodedBatch:
        """States of some documents, for rewriting them; call `verify` before.

        Args:
            rows: [U] int64, documents of this segment, ascending.
            part: this segment's `routing_part`.
        """
        counts = part.chunk_counts[rows]
        index = ragged_range(chunk_offsets(part.chunk_counts)[rows], counts)
        layers = {}
        for i in self.layers:
            keys, values = (t.index_select(0, index) for t in self._content[i])
            layers[i] = LayerStates(keys, values, part.routing_keys[i].index_select(0, index))
        return EncodedBatch(tuple(part.numbers[rows].tolist()), LatentStates(counts, layers))


def _message(path: Path, what: str) -> str:
    bank = path.parent.parent
    return (
        f"Segment '{path.name}' of bank '{bank}' is damaged: {what}. 'msa bank verify {bank}' "
        f"names its documents, 'msa bank repair {bank}' encodes them again from their texts"
    )
