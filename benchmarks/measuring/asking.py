"""A question's cost against the size of the memory: routing, prefill, decoding, apart.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

import torch

from measuring.report import Report, Row
from measuring.synthetic import DTYPES, SyntheticMemory, shape_of
from measuring.timing import REPEATS, Note, machine, seconds
from msa.model.cache import MSACache

if TYPE_CHECKING:
    from msa.model.modeling_msa import MSAForCausalLM

TOKENS = 32
NEW_TOKENS = 16


@torch.inference_mode()
def ask_once(
    model: MSAForCausalLM, memory: SyntheticMemory, tokens: int, new_tokens: int, seed: int
) -> dict[str, float]:
    """Seconds of one question: `routing`, all layers; `prefill` without it; `decode` per token.

    Args:
        model: in evaluation mode.
        memory: of the model's shape, on its device.
        tokens: T, of the question; all of them route and see the memory.
        new_tokens: decoded one by one, the likeliest.
        seed: of the question's random tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator)
    ids = ids.to(model.device)
    state: dict[str, object] = {}
    cache = MSACache()

    def feed(ids: torch.Tensor) -> None:
        out = model(
            ids,
            memory=memory,
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        state["next"] = out.logits[:, -1:].argmax(-1)

    memory.routing_seconds = 0.0
    prefill = seconds(lambda: feed(ids), model.device)
    routing = memory.routing_seconds

    def decode() -> None:
        for _ in range(new_tokens):
            token = state["next"]
            assert isinstance(token, torch.Tensor)
            feed(token)

    decoding = seconds(decode, model.device)
    return {
        "routing": routing,
        "prefill": prefill - routing,
        "decode": decoding / new_tokens,
    }


def asking(
    model: MSAForCausalLM,
    sizes: Sequence[int],
    *,
    name: str = "default model",
    dtype: str = "float32",
    tokens: int = TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    seed: int = 0,
    note: Note = lambda _: None,
) -> Report:
    """Cost of one question per size of the memory, with a model as it is.

    Args:
        model: in evaluation mode, on the device to be measured.
        sizes: tokens of the memories.
        name: of the model, for people.
        dtype: of the routing keys, a name of `DTYPES`.
        tokens: T, of the question.
        new_tokens: decoded after it.
        repeats: questions per size, after one to warm up; medians are reported.
        seed: of random states and questions.
        note: told what is measured next.

    Raises:
        InputError: a size does not fit into memory.
    """
    shape, device = shape_of(model.config, name), model.device
    report = Report("asking", machine(device))
    report.settings |= {
        "model": name,
        "routing layers": shape.routing_layers,
        "heads": f"{shape.heads} query, {shape.groups} key-value, of {shape.dim}",
        "chunk size": shape.chunk_size,
        "routing keys": dtype,
        "question tokens": tokens,
        "generated tokens": new_tokens,
        "documents selected": shape.top_k,
        "seed": seed,
        "repeats": repeats,
    }
    for size in sizes:
        note(f"{size:,} tokens")
        memory = SyntheticMemory(
            shape,
            model.config.routing_layers,
            size,
            key_dtype=DTYPES[dtype],
            dtype=model.dtype,
            device=device,
            seed=seed,
        )
        times = [ask_once(model, memory, tokens, new_tokens, seed + i) for i in range(repeats + 1)][
            1:
        ]
        part = {key: median(t[key] for t in times) for key in times[0]}
        generation = part["prefill"] + new_tokens * part["decode"]
        row: Row = {
            "tokens": size,
            "chunks": shape.chunks(size),
            "keys_bytes": sum(k.nbytes for k in memory.keys),
            "routing_seconds": part["routing"],
            "prefill_seconds": part["prefill"],
            "decode_seconds_per_token": part["decode"],
            "generation_seconds": generation,
            "question_seconds": part["routing"] + generation,
        }
        report.rows.append(row)
        del memory
    report.fit(None, ("routing_seconds", "generation_seconds", "question_seconds"))
    report.notes.append(
        "Routing: all routing layers, once. Prefill: the question's other work. Generation: "
        f"prefill and {new_tokens} tokens. One round; the memory holds random states, and the "
        "content of what is selected comes from memory, not from disk."
    )
    return report
