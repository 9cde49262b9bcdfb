"""Routing on CUDA: one pass over the keys in Triton (the rule is Eq. 2 of MSA).

Every program takes a tile of chunks and a tile of routing tokens of one question: matrix product,
maximum over the tokens, maximum over the chunks of each document, one atomic maximum per document
of the tile. Token tiles of all questions visit a tile of keys one after the other, so the keys come
from memory once and then from the cache. What a question must not choose is not even read.

Held besides: [B, N] scores and the offsets of the documents.

Shapes: B batch, T query tokens, N documents, C chunks, G KV heads, D head dim, R rows of token
tiles, K selected documents.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from msa.ops.routing import check_routing, select_documents
from msa.types import Selection

# Tiles: chunks, numbers of a key at a time; tokens at least and at most (tl.dot wants 16).
TILE_CHUNKS = 64
TILE_WIDTH = 64
TILE_TOKENS = (16, 64)


@torch.no_grad()
def route_documents(
    vectors: Tensor,
    routing_mask: Tensor,
    routing_keys: Tensor,
    chunk_counts: Tensor,
    top_k: int,
    document_mask: Tensor | None = None,
    scales: Tensor | None = None,
) -> Selection:
    """Twin of `msa.ops.routing.route_documents`; arguments and returns as there.

    All tensors are on one CUDA device (or on the CPU, under TRITON_INTERPRET=1).
    """
    check_routing(vectors, routing_keys, chunk_counts, top_k, document_mask, scales)
    keys = routing_keys.flatten(1).contiguous()
    ends = chunk_counts.cumsum(0)
    mask = document_mask
    if mask is not None:
        mask = (mask if mask.dim() == 2 else mask[None]).contiguous()
    scores = _document_scores(vectors, routing_mask, keys, ends, mask, scales)
    return select_documents(scores, top_k)


def _document_scores(
    vectors: Tensor,
    routing_mask: Tensor,
    keys: Tensor,
    ends: Tensor,
    mask: Tensor | None,
    scales: Tensor | None,
) -> Tensor:
    """[B, N] float32 document scores; -inf for those that must not be chosen."""
    lowest = int(_ordered(torch.tensor(-torch.inf)))
    ordered = torch.full((len(vectors), len(ends)), lowest, dtype=torch.int32, device=keys.device)
    rows, owner, tile = _token_tiles(vectors, routing_mask)
    if len(owner) and len(keys):
        _kernel[(len(owner) * triton.cdiv(len(keys), TILE_CHUNKS),)](
            rows,
            owner,
            keys,
            keys if scales is None else scales,
            ends,
            keys if mask is None else mask.view(torch.uint8),
            ordered,
            num_tiles=len(owner),
            num_chunks=len(keys),
            num_documents=len(ends),
            mask_stride=0 if mask is None or len(mask) == 1 else len(ends),
            width=keys.shape[1],
            search_steps=len(ends).bit_length(),
            has_mask=mask is not None,
            has_scales=scales is not None,
            tile_tokens=tile,
            tile_chunks=TILE_CHUNKS,
            tile_width=TILE_WIDTH,
            enable_fp_fusion=True,
        )
    return _ordered(ordered).view(torch.float32)


def _ordered(x: Tensor) -> Tensor:
    """Float32 as int32 of the same order, and back (the same operation)."""
    bits = x.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _token_tiles(vectors: Tensor, routing_mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Routing tokens, every question's filled up to whole tiles with its own last token.

    Returns:
        [R, G*D] float32; [tiles] int32, question of each tile; tokens per tile.
    """
    sizes = routing_mask.sum(1).tolist()
    low, high = TILE_TOKENS
    tile = min(max(triton.next_power_of_2(max([1, *sizes])), low), high)
    rows, owner = [vectors[:0, 0]], []
    for row, size in enumerate(sizes):
        tokens = vectors[row][routing_mask[row]]
        rows += [tokens, tokens[-1:].expand(-size % tile, -1)]
        owner += [row] * triton.cdiv(size, tile)
    filled = torch.cat(rows).float().contiguous()
    return filled, torch.tensor(owner, dtype=torch.int32, device=vectors.device), tile


@triton.jit
def _later(document_a, score_a, document_b, score_b):  # type: ignore[no-untyped-def]
    """Running maximum that starts again with every document."""
    return document_b, tl.where(document_a == document_b, tl.maximum(score_a, score_b), score_b)


@triton.jit(  # type: ignore[untyped-decorator,unused-ignore]
    do_not_specialize=["num_tiles", "num_chunks", "num_documents", "mask_stride"]
)
def _kernel(  # type: ignore[no-untyped-def]
    rows,  # [R, width] float32
    owner,  # [R / tile_tokens] int32
    keys,  # [C, width]
    scales,  # [C] float32
    ends,  # [N] int64, one past each document's last chunk
    mask,  # [1 or B, N] uint8
    ordered,  # [B, N] int32, see _ordered
    num_tiles,
    num_chunks,
    num_documents,
    mask_stride,
    width: tl.constexpr,
    search_steps: tl.constexpr,
    has_mask: tl.constexpr,
    has_scales: tl.constexpr,
    tile_tokens: tl.constexpr,
    tile_chunks: tl.constexpr,
    tile_width: tl.constexpr,
):
    # Token tiles vary fastest, so that those of one tile of keys run one after the other.
    token_tile = tl.program_id(0) % num_tiles
    question = tl.load(owner + token_tile).to(tl.int64)
    token = token_tile.to(tl.int64) * tile_tokens + tl.arange(0, tile_tokens)
    place = tl.arange(0, tile_chunks)
    chunk = (tl.program_id(0) // num_tiles).to(tl.int64) * tile_chunks + place
    live = chunk < num_chunks

    # The document of a chunk: the first that ends after it.
    low = tl.zeros((tile_chunks,), tl.int64)
    high = tl.full((tile_chunks,), 0, tl.int64) + num_documents
    for _ in range(search_steps):
        middle = (low + high) // 2
        searching = live & (low < high)
        before = tl.load(ends + middle, mask=searching, other=0) <= chunk
        low = tl.where(searching & before, middle + 1, low)
        high = tl.where(searching & ~before, middle, high)
    document = tl.where(live, low, num_documents)
    if has_mask:
        allowed = tl.load(mask + question * mask_stride + document, mask=live, other=0)
        live = live & (allowed != 0)

    product = tl.zeros((tile_tokens, tile_chunks), tl.float32)
    for start in range(0, width, tile_width):
        number = start + tl.arange(0, tile_width)
        inside = number < width
        query = tl.load(
            rows + token[:, None] * width + number[None, :], mask=inside[None, :], other=0.0
        )
        key = tl.load(
            keys + chunk[None, :] * width + number[:, None],
            mask=inside[:, None] & live[None, :],
            other=0,
        )
        product = tl.dot(query, key.to(tl.float32), product, input_precision="ieee")
    if has_scales:
        product = product * tl.load(scales + chunk, mask=live, other=0.0)[None, :]
    product = tl.where(product == product, product, float("-inf"))  # NaN counts as -inf
    score = tl.where(live, tl.max(product, axis=0), float("-inf"))

    # Chunks of a document stand together: its best up to here, and the last of them writes.
    _, best = tl.associative_scan((document, score), 0, _later)
    following = chunk + 1
    edge = tl.load(ends + document, mask=document < num_documents, other=0)
    last = (edge == following) | (place == tile_chunks - 1) | (following == num_chunks)
    bits = best.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    writes = last & (document < num_documents) & (best > float("-inf"))
    tl.atomic_max(ordered + question * num_documents + document, bits, mask=writes, sem="relaxed")
