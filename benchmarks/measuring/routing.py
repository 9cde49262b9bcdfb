"""Routing (Eq. 2) beside a per-head formulation, the memory's bandwidth, and a flat vector index.

Shapes: B batch, T query tokens, N documents, C chunks, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from measuring.report import Report, Row
from measuring.synthetic import (
    DTYPES,
    SHAPE_4B,
    Shape,
    equal_documents,
    layer_index,
    random_keys,
    random_queries,
    require_memory,
    route,
)
from measuring.timing import (
    REPEATS,
    Note,
    Run,
    bandwidth,
    extra_bytes,
    machine,
    side_by_side,
)
from msa.memory.search.layer_index import LayerIndex
from msa.ops.routing import select_documents
from msa.types import Selection

TOKENS = 32
"""Of a question."""

COLD_BYTES = 256_000_000
"""Keys are read from as many layers in turn as make this much, so that no cache holds them."""

PER_HEAD_CHUNKS = 20_000
FAISS_NOTE = "FAISS is not installed, so its rows are left out; pip install 'msa-memory[bench]'"


def per_head_route(
    routing_queries: Tensor,
    routing_mask: Tensor,
    routing_keys: Tensor,
    chunk_counts: Tensor,
    top_k: int,
) -> Selection:
    """Eq. 2 as it is written down: keys repeated for every query head, a cosine per head.

    What we compare ourselves with; it builds [C, H, D] and [B, H, T, C].

    Args:
        routing_queries: [B, T, H, D].
        routing_mask: [B, T] bool, True for tokens that route.
        routing_keys: [C, G, D] of unit length per head; its dtype is the one computed in.
        chunk_counts: [N] int64.
        top_k: k >= 1.

    Returns:
        Selection, as `msa.ops.routing.select_documents`.

    Source: MSA 3.2.1, Eq. 2, in the order of the released code; written for this comparison.
    """
    heads, groups = routing_queries.shape[2], routing_keys.shape[1]
    keys = routing_keys.repeat_interleave(heads // groups, dim=1)  # [C, H, D]
    queries = F.normalize(routing_queries, dim=-1).to(keys.dtype).transpose(1, 2)  # [B, H, T, D]
    cosines = queries @ keys.permute(1, 2, 0)  # [B, H, T, C]
    scores = cosines.mean(dim=1).masked_fill(~routing_mask[:, :, None], -torch.inf).amax(dim=1)
    documents = torch.repeat_interleave(chunk_counts).expand_as(scores)
    empty = scores.new_full((len(scores), len(chunk_counts)), -torch.inf)
    best = empty.scatter_reduce(1, documents, scores, reduce="amax")
    return select_documents(best.float(), top_k)


def flat_index(routing_keys: Tensor, vectors: Tensor, top_k: int, threads: int) -> Run | None:
    """A search of FAISS's flat inner-product index for vectors [T, G*D]; None without FAISS.

    One vector of G * D float32 numbers per chunk: what a vector store of the same size would hold.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its wrapper, about the interpreter
            import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(vectors.shape[-1])
    index.add(routing_keys.flatten(1).float().cpu().numpy())
    return partial(index.search, vectors.float().cpu().numpy(), top_k)


def routing(
    sizes: Sequence[int],
    *,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    device: str = "cpu",
    shape: Shape = SHAPE_4B,
    tokens: int = TOKENS,
    repeats: int = REPEATS,
    seed: int = 0,
    note: Note = lambda _: None,
) -> Report:
    """Cost of routing one question in one layer, per size and dtype of the keys.

    Args:
        sizes: tokens of the memories.
        dtypes: of the routing keys, names of `DTYPES`.
        device: where the keys lie.
        shape: of the configuration.
        tokens: T, of the question.
        repeats: runs of each function, in turns; medians are reported.
        seed: of the random states.
        note: told what is measured next.

    Raises:
        InputError: a size does not fit into memory.
    """
    place = torch.device(device)
    report = Report("routing", machine(place))
    report.settings |= {
        "shape": shape.name,
        "heads": f"{shape.heads} query, {shape.groups} key-value, of {shape.dim}",
        "chunk size": shape.chunk_size,
        "question tokens": tokens,
        "documents selected": shape.top_k,
        "seed": seed,
        "repeats": repeats,
    }
    for dtype in dtypes:
        for size in sizes:
            note(f"{size:,} tokens, {dtype}")
            row = _measure(size, DTYPES[dtype], place, shape, tokens, repeats, seed)
            report.rows.append({"tokens": size, "dtype": dtype, **row})
    report.fit("dtype", ("msa_seconds", "read_once_seconds", "faiss_seconds"))
    if any("faiss_seconds" not in row for row in report.rows):
        report.notes.append(FAISS_NOTE)
    report.notes.append(
        "Per layer. `MSA`: as a loaded bank searches, in float32 on a CPU. `read once`: the keys' "
        "bytes at the bandwidth measured in the same run. `product`: the matrix product of Eq. 2 "
        "alone, in float32 on a CPU. `per head`: keys "
        f"repeated for every query head, [H, T, C] built; up to {PER_HEAD_CHUNKS:,} chunks. "
        "FAISS: flat inner product over float32 vectors, one per chunk, on the CPU; once with a "
        "vector per token of the question, once with a single vector."
    )
    return report


def _measure(
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    shape: Shape,
    tokens: int,
    repeats: int,
    seed: int,
) -> Row:
    """One column of the table."""
    chunks, key_bytes = shape.chunks(size), shape.key_bytes(size, dtype)
    layers = max(1, -(-COLD_BYTES // key_bytes)) if chunks > 256 else 1
    index_bytes = chunks * shape.groups * shape.dim * 4
    needed = layers * key_bytes + 3 * index_bytes
    require_memory(needed, device, f"{size:,} tokens in one layer")
    keys = [random_keys(chunks, shape, dtype, device, seed)]
    keys += [keys[0].clone() for _ in range(layers - 1)]
    counts = equal_documents(chunks, device)
    queries = random_queries(shape, tokens, device, seed)
    mask = torch.ones(1, tokens, dtype=torch.bool, device=device)
    turns: Any = cycle(keys)

    def per_head() -> Selection:
        return per_head_route(queries, mask, next(turns), counts, shape.top_k)

    def search(layers: Sequence[LayerIndex]) -> Run:
        turns = cycle(layers)
        return lambda: route(queries, mask, next(turns), shape.top_k)

    runs: dict[str, Run] = {"msa": search([layer_index(layer, counts) for layer in keys])}
    if chunks <= PER_HEAD_CHUNKS:
        runs["per_head"] = per_head
    vectors = queries[0, :, :: shape.heads // shape.groups].flatten(1)
    for name, some in (("faiss", vectors), ("faiss_one_vector", vectors[:1])):
        if flat := flat_index(keys[0], some, shape.top_k, torch.get_num_threads()):
            runs[name] = flat
    runs["product"] = _product(keys[0], vectors)
    with torch.inference_mode():
        rate = bandwidth(keys, repeats)
        times = side_by_side(runs, device, repeats)
        extra: dict[str, int | None] = {
            name: extra_bytes(runs[name], device) for name in ("msa", "per_head") if name in runs
        }
    return _row(chunks, key_bytes, rate, times, extra)


def _product(routing_keys: Tensor, vectors: Tensor) -> Run:
    """The matrix product of Eq. 2 alone: what routing cannot beat where arithmetic is the limit.

    In float32 on a CPU, with keys that are in float32 already; in the keys' dtype on a GPU.
    """
    keys = routing_keys.flatten(1)
    keys = keys if keys.is_cuda else keys.float()
    columns = vectors.to(keys.dtype).T.contiguous()
    out = keys.new_empty(len(keys), columns.shape[1])
    return partial(torch.matmul, keys, columns, out=out)


def _row(
    chunks: int,
    key_bytes: int,
    rate: float,
    times: dict[str, float],
    extra: dict[str, int | None],
) -> Row:
    """Seconds, bytes and what follows from them."""
    once = key_bytes / rate
    row: Row = {"chunks": chunks, "keys_bytes": key_bytes, "bandwidth_bytes_per_second": rate}
    row |= {"read_once_seconds": once} | {f"{name}_seconds": t for name, t in times.items()}
    row["msa_over_read_once_ratio"] = times["msa"] / once
    row["msa_over_product_ratio"] = times["msa"] / times["product"]
    for name in ("per_head", "faiss", "faiss_one_vector"):
        if name in times:
            row[f"{name}_over_msa_ratio"] = times[name] / times["msa"]
    row |= {f"{name}_extra_bytes": value for name, value in extra.items()}
    mine, theirs = extra.get("msa"), extra.get("per_head")
    if mine and theirs:
        row["per_head_over_msa_extra_bytes_ratio"] = theirs / mine
    return row
