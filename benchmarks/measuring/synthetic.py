"""Memories of random states in given shapes: any size in seconds, with no document encoded.

What prefill and decoding cost depends on shapes, not on values. So does routing, nearly, as long
as the values are ordinary: finite, of unit length, no two documents alike (equal scores take a
slower path).

Shapes: B batch, T query tokens, N documents, C chunks, H query heads, G KV heads, D head dim,
K selected documents per row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from measuring.timing import free_bytes, synchronize
from msa.errors import InputError
from msa.memory.search.layer_index import FlatIndex, LayerIndex
from msa.memory.search.layer_keys import LayerKeys
from msa.ops.routing import routing_vectors
from msa.types import Content, Selection

if TYPE_CHECKING:
    from msa.model.configuration_msa import MSAConfig

CHUNKS_PER_DOCUMENT = 8
"""512 tokens with the paper's chunks of 64."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_BLOCK = 1 << 16
_SPARE = 0.9
"""Share of the free memory that a benchmark takes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a configuration on which the cost depends.

    Attributes:
        name: for people.
        layers, routing_layers: how many, the second among the first.
        hidden, intermediate, vocabulary: sizes of the backbone.
        heads, groups, dim: H, G, D.
        chunk_size, top_k: P, k.
    """

    name: str
    layers: int
    routing_layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    groups: int
    dim: int
    chunk_size: int
    top_k: int

    def chunks(self, tokens: int) -> int:
        """C of a memory of so many tokens: whole documents, one at least."""
        documents = max(1, tokens // (self.chunk_size * CHUNKS_PER_DOCUMENT))
        return documents * CHUNKS_PER_DOCUMENT

    def key_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of the routing keys of one layer."""
        return self.chunks(tokens) * self.groups * self.dim * dtype.itemsize

    def config(self, layers: int) -> MSAConfig:
        """A model of this shape with `layers` layers, the upper half routing."""
        from msa.model.configuration_msa import MSAConfig

        return MSAConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=self.dim,
            chunk_size=self.chunk_size,
            top_k_documents=self.top_k,
        )


SHAPE_4B = Shape("4B", 36, 18, 2560, 9728, 151936, 32, 8, 128, 64, 16)
"""The paper's configuration, on Qwen3-4B."""


def shape_of(config: MSAConfig, name: str) -> Shape:
    """The shape of a model's configuration."""
    return Shape(
        name,
        config.num_hidden_layers,
        len(config.routing_layers or []),
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        config.num_attention_heads,
        config.num_key_value_heads or config.num_attention_heads,
        config.head_dim,
        config.chunk_size,
        config.top_k_documents,
    )


def require_memory(needed: int, device: torch.device, what: str) -> None:
    """Refuse what does not fit, before it is made.

    Raises:
        InputError: more is needed than is free; the message gives both and what to change.
    """
    free = free_bytes(device)
    if free is not None and needed > _SPARE * free:
        raise InputError(
            f"{what} takes {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free on {device}. "
            "Give smaller --sizes, or fewer layers"
        )


def layers_that_fit(key_bytes: int, wanted: int, device: torch.device) -> int:
    """How many layers' routing keys fit beside a workspace as large as one layer's; >= 0."""
    free = free_bytes(device)
    if free is None:
        return wanted
    return max(0, min(wanted, int(_SPARE * free / key_bytes) - 1))


def random_keys(
    chunks: int, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int
) -> Tensor:
    """Routing keys [C, G, D] of unit length per head, no two alike.

    Random numbers are made for 65,536 chunks; every further block is the first one with its heads
    and dimensions rotated by other amounts. So a hundred million tokens take seconds.
    """
    groups, dim = shape.groups, shape.dim
    generator = torch.Generator(device).manual_seed(seed)
    first = torch.randn(
        min(chunks, _BLOCK), groups, dim, generator=generator, device=device, dtype=torch.float32
    )
    first = F.normalize(first, dim=-1).to(dtype)
    keys = torch.empty(chunks, groups, dim, dtype=dtype, device=device)
    for block, start in enumerate(range(0, chunks, _BLOCK)):
        part = keys[start : start + _BLOCK]
        turned = torch.roll(first[: len(part)], (block // dim, block % dim), dims=(1, 2))
        part.copy_(turned)
    return keys


def random_queries(shape: Shape, tokens: int, device: torch.device, seed: int) -> Tensor:
    """Routing queries [1, T, H, D] float32, as a router would project them."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(1, tokens, shape.heads, shape.dim, generator=generator, device=device)


def equal_documents(chunks: int, device: torch.device) -> Tensor:
    """Chunk counts [N] int64 of documents of eight chunks each."""
    return torch.full((chunks // CHUNKS_PER_DOCUMENT,), CHUNKS_PER_DOCUMENT, device=device)


def layer_index(keys: Tensor, counts: Tensor) -> LayerIndex:
    """Routing keys of a layer, searched as those of a loaded bank.

    Args:
        keys: [C, G, D] of unit heads.
        counts: [N] int64, chunks of each document.
    """
    return FlatIndex(LayerKeys(keys, counts))


def route(
    routing_queries: Tensor, routing_mask: Tensor, layer: LayerIndex, top_k: int
) -> Selection:
    """Routing of a question as a bank does it: queries [B, T, H, D] to the top-k documents."""
    vectors = routing_vectors(routing_queries, layer.keys.keys.shape[1], "cosine")
    return layer.search(vectors, routing_mask, top_k)


class SyntheticMemory:
    """A `MemoryReader` of random states that keeps the time that routing takes.

    The content of a document is taken from a small table: what is fetched has the true shape, and
    comes from memory, not from disk.

    Attributes:
        routing_seconds: spent in `route` since it was last set to 0.
    """

    def __init__(
        self,
        shape: Shape,
        layers: Sequence[int],
        tokens: int,
        *,
        key_dtype: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        held_layers: int | None = None,
    ) -> None:
        """Make the states.

        Args:
            shape: of keys and content.
            layers: the model's routing layers.
            tokens: that the memory stands for.
            key_dtype, dtype: of routing keys; of content.
            device: where all of it lies.
            seed: of the random states.
            held_layers: make keys for so many layers only, which the others share.

        Raises:
            InputError: it does not fit into memory.
        """
        chunks = shape.chunks(tokens)
        held = len(layers) if held_layers is None else min(held_layers, len(layers))
        require_memory(
            (held + 1) * shape.key_bytes(tokens, key_dtype),
            device,
            f"a memory of {tokens:,} tokens ({held} layers of routing keys)",
        )
        self.tokens = tokens
        self.top_k = shape.top_k
        self.counts = equal_documents(chunks, device)
        self.keys = [random_keys(chunks, shape, key_dtype, device, seed + i) for i in range(held)]
        searches = [layer_index(keys, self.counts) for keys in self.keys]
        self._of_layer = {layer: searches[i % held] for i, layer in enumerate(layers)}
        table = random_keys(min(chunks, 4096), shape, dtype, device, seed + 1000)
        self._table = table
        self._device = device
        self.routing_seconds = 0.0

    def route(self, layer: int, vectors: Tensor, routing_mask: Tensor) -> Selection:
        """Top-k documents of every row by Eq. 2; its time is added to `routing_seconds`."""
        synchronize(self._device)
        start = time.perf_counter()
        selection = self._of_layer[layer].search(vectors, routing_mask, self.top_k)
        synchronize(self._device)
        self.routing_seconds += time.perf_counter() - start
        return selection

    def content(self, layer: int, selection: Selection) -> Content:
        """Eight chunks for every document that was selected."""
        documents = selection.documents
        offsets = torch.arange(CHUNKS_PER_DOCUMENT, device=documents.device)
        rows = documents[:, :, None] * CHUNKS_PER_DOCUMENT + offsets
        states = self._table[rows.flatten(1) % len(self._table)]
        mask = (documents >= 0).repeat_interleave(CHUNKS_PER_DOCUMENT, dim=1)
        return Content(states, states, mask)
