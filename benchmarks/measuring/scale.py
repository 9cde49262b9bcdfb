"""The 4B configuration without its weights: routing, prefill, decoding, memory by tier.

Shapes are real, states and weights random. What does not fit is measured in part and scaled: layers
of one kind cost the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

import torch

from measuring.asking import ask_once
from measuring.report import Report, Row
from measuring.synthetic import (
    DTYPES,
    SHAPE_4B,
    Shape,
    SyntheticMemory,
    equal_documents,
    layer_index,
    layers_that_fit,
    random_keys,
    random_queries,
    require_memory,
    route,
)
from measuring.timing import REPEATS, Note, Run, bandwidth, machine, seconds, side_by_side
from msa.errors import InputError

if TYPE_CHECKING:
    from msa.model.modeling_msa import MSAForCausalLM

TOKENS = 32
PREFILL_TOKENS = 256
NEW_TOKENS = 8
LOCAL_TOKENS = 4096
"""Of a local context, for the size of its cache."""


def scale(
    sizes: Sequence[int],
    *,
    device: str = "cpu",
    shape: Shape = SHAPE_4B,
    layers: int = 2,
    routing_layers: int | None = None,
    key_dtype: str = "bfloat16",
    weight_dtype: str = "float32",
    tokens: int = TOKENS,
    prefill_tokens: int = PREFILL_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    seed: int = 0,
    note: Note = lambda _: None,
) -> Report:
    """Cost of a question with the 4B configuration, per size of the memory.

    Args:
        sizes: tokens of the memories.
        device: where all of it lies.
        shape: of the configuration.
        layers: built for prefill and decoding, half of them routing; an even number, 0 for none.
        routing_layers: layers whose keys are held at once; as many as fit by default.
        key_dtype, weight_dtype: names of `DTYPES`.
        tokens: T, of the question that routes.
        prefill_tokens: of the local context that is prefilled.
        new_tokens: decoded after it.
        repeats: of each measurement; medians are reported.
        seed: of all random numbers.
        note: told what is measured next.

    Raises:
        InputError: `layers` or `routing_layers` is out of range, or it does not fit into memory.
    """
    place = torch.device(device)
    if layers % 2 or not 0 <= layers <= shape.layers:
        raise InputError(f"layers={layers}: expected an even number from 0 to {shape.layers}")
    wanted = shape.routing_layers if routing_layers is None else routing_layers
    if not 1 <= wanted <= shape.routing_layers:
        raise InputError(
            f"routing layers={wanted}: expected a number from 1 to {shape.routing_layers}"
        )
    report = Report("scale", machine(place))
    report.settings |= {
        "shape": f"{shape.name}: {shape.layers} layers, {shape.routing_layers} route",
        "heads": f"{shape.heads} query, {shape.groups} key-value, of {shape.dim}",
        "chunk size": shape.chunk_size,
        "routing keys": key_dtype,
        "weights": f"random, {weight_dtype}",
        "question tokens": tokens,
        "prefilled tokens": prefill_tokens,
        "documents selected": shape.top_k,
        "seed": seed,
        "repeats": repeats,
    }
    model: Row = {}
    if layers:
        note(f"prefill and decoding, {layers} layers")
        model = model_row(
            shape, layers, DTYPES[weight_dtype], place, prefill_tokens, new_tokens, repeats, seed
        )
    for size in sizes:
        note(f"routing over {size:,} tokens")
        row = routing_row(size, shape, wanted, DTYPES[key_dtype], place, tokens, repeats, seed)
        tiers = tier_row(size, shape, DTYPES[key_dtype], DTYPES[weight_dtype])
        report.rows.append({"tokens": size, **row, **model, **tiers})
    report.fit(None, ("routing_seconds", "read_once_seconds"))
    report.notes.append(
        f"Routing is measured over the keys of `layers held` layers and scaled to "
        f"{shape.routing_layers}; prefill and decoding over `layers built` layers (half of them "
        f"routing, routing itself left out) and scaled to {shape.layers}, embedding and logits "
        f"counted once. The local cache is that of {LOCAL_TOKENS:,} tokens. Bytes by tier follow "
        "from the shapes."
    )
    return report


@torch.inference_mode()
def routing_row(
    size: int,
    shape: Shape,
    wanted: int,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    repeats: int,
    seed: int,
) -> Row:
    """Routing over `wanted` layers' keys, or as many as fit, beside reading them once."""
    key_bytes = shape.key_bytes(size, dtype)
    held = layers_that_fit(key_bytes, wanted, device)
    if not held:
        require_memory(2 * key_bytes, device, f"one layer of {size:,} tokens")
    held = max(1, held)
    chunks = shape.chunks(size)
    keys = [random_keys(chunks, shape, dtype, device, seed)]
    # other layers' keys lie elsewhere in memory; that their values are the same costs nothing
    keys += [keys[0].clone() for _ in range(held - 1)]
    counts = equal_documents(chunks, device)
    layers = [layer_index(layer, counts) for layer in keys]
    queries = random_queries(shape, tokens, device, seed)
    mask = torch.ones(1, tokens, dtype=torch.bool, device=device)

    def ours() -> None:
        for layer in layers:
            route(queries, mask, layer, shape.top_k)

    rate = bandwidth(keys, min(repeats, 3))
    per_layer = side_by_side({"msa": ours}, device, repeats)["msa"] / held
    once = key_bytes / rate
    return {
        "chunks": chunks,
        "layers_held": held,
        "bandwidth_bytes_per_second": rate,
        "read_once_seconds": once * shape.routing_layers,
        "routing_seconds": per_layer * shape.routing_layers,
        "routing_layer_seconds": per_layer,
        "routing_over_read_once_ratio": per_layer / once,
    }


def model_row(
    shape: Shape,
    layers: int,
    dtype: torch.dtype,
    device: torch.device,
    prefill_tokens: int,
    new_tokens: int,
    repeats: int,
    seed: int,
) -> Row:
    """Prefill and decoding with random weights, scaled to all layers; a small memory is attached.

    A layer's cost is what the layers built take together, by their number; the embedding, the final
    norm and the logits of the last token are measured apart.
    """
    model = random_model(shape, layers, dtype, device, seed)
    config = model.config
    memory = SyntheticMemory(
        shape,
        config.routing_layers or [],
        shape.chunk_size * 8 * 64,
        key_dtype=dtype,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    ids = torch.zeros(1, prefill_tokens, dtype=torch.int64, device=device)

    def outside(ids: torch.Tensor) -> Run:
        def run() -> None:
            model.lm_head(model.model.norm(model.model.embed_tokens(ids))[:, -1:])

        return run

    times = [
        ask_once(model, memory, prefill_tokens, new_tokens, seed + i) for i in range(repeats + 1)
    ][1:]
    with torch.inference_mode():
        edges = {n: median(seconds(outside(ids[:, :n]), device) for _ in range(repeats + 1))
                 for n in (1, prefill_tokens)}  # fmt: skip
    scaled = {}
    for name, count in (("prefill", prefill_tokens), ("decode", 1)):
        measured = median(t[name] for t in times)
        layer = max(0.0, measured - edges[count]) / layers
        scaled[name] = (edges[count] + shape.layers * layer, layer)
    return {
        "layers_built": layers,
        "prefill_tokens_per_second": prefill_tokens / scaled["prefill"][0],
        "prefill_layer_seconds": scaled["prefill"][1],
        "decode_tokens_per_second": 1 / scaled["decode"][0],
        "decode_layer_seconds": scaled["decode"][1],
    }


def random_model(
    shape: Shape, layers: int, dtype: torch.dtype, device: torch.device, seed: int
) -> MSAForCausalLM:
    """A model of this shape with small random weights, made in its dtype where it runs.

    Raises:
        InputError: it does not fit into memory.
    """
    from msa.model.modeling_msa import MSAForCausalLM

    config = shape.config(layers)
    parameters = layer_parameters(shape) * layers + shape.vocabulary * shape.hidden
    require_memory(int(parameters * dtype.itemsize), device, f"a model of {layers} layers")
    with torch.device("meta"):
        model = MSAForCausalLM(config)
    model.to(dtype).to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for weights in model.parameters():
            weights.uniform_(-0.02, 0.02, generator=generator)
    # its frequencies are no parameters: they are computed, not drawn
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model.eval()
    return model


def layer_parameters(shape: Shape) -> float:
    """Weights of a layer, on average: half of the layers have a router."""
    heads, groups = shape.heads * shape.dim, shape.groups * shape.dim
    attention = shape.hidden * (2 * heads + 2 * groups)
    router = shape.hidden * (heads + groups) * shape.routing_layers / shape.layers
    return attention + router + 3 * shape.hidden * shape.intermediate


def tier_row(size: int, shape: Shape, key_dtype: torch.dtype, weight_dtype: torch.dtype) -> Row:
    """Bytes by tier: routing keys and weights on the device, content in RAM or on disk."""
    keys = shape.routing_layers * shape.key_bytes(size, key_dtype)
    cache = 2 * shape.layers * LOCAL_TOKENS * shape.groups * shape.dim
    weights = shape.layers * layer_parameters(shape) + shape.vocabulary * shape.hidden
    return {
        "routing_keys_bytes": keys,
        "content_bytes": 2 * keys,
        "weights_bytes": int(weights * weight_dtype.itemsize),
        "local_cache_bytes": cache * weight_dtype.itemsize,
    }
