"""How much of a memory a pruned scan reads, what it misses, and the time it takes.

    python benchmarks/pruning.py [--sizes 1M 10M 100M] [--cache FILE] [--output docs/results]

A generated world of about a million tokens is encoded by the model, and its questions are asked:
routing keys and routing vectors are the model's own. Larger memories are grown from these keys: to
each copy of a key is added the difference of two keys of its block, times the root of a half. So
the copies are spread as the keys of a block are. How true that is, is measured too: a tenth of the
world is grown to its whole size and compared with it (`grown_from_a_tenth`).

Writes pruning.json and pruning.md.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from measuring.results import write_results
from measuring.sizes import parse_size
from measuring.timing import machine
from msa.memory.search.clustered_index import (
    BlockScan,
    ClusteredIndex,
    PruningSettings,
    cluster_order,
)
from msa.memory.search.layer_keys import LayerKeys
from msa.ops.kernels import route_documents
from msa.ops.routing import TopDocuments
from msa.types import Selection

KINDS = ("question, one hop", "question, two hops", "question and text read")
TOP_K = 16


def main() -> None:
    args = arguments()
    base = cached(args.cache, lambda: encode(args))
    keys, counts = base[f"keys.{args.layer}"], base["counts"]
    per_chunk = int(base["tokens"]) / len(keys)
    vectors = base[f"vectors.{args.layer}"].split(base["lengths"].tolist())
    ids = drawn(base["kind"], args.questions)
    about = {
        "command": "python " + " ".join(sys.argv),
        **machine(torch.device("cpu")),
        "seed": args.seed,
        "layer": args.layer,
        "world_tokens": int(base["tokens"]),
        "tokens_per_chunk": round(per_chunk, 2),
        "block_size": args.block_size,
        "top_k": TOP_K,
    }
    results: dict[str, object] = {"about": about, "sizes": []}
    questions = [(int(base["kind"][i]), vectors[i]) for i in ids]
    if args.check:
        results["grown_from_a_tenth"] = check(args, keys, counts, questions)
        write_results(args.output, "pruning", results, page)
    for tokens in args.sizes:
        grown = grow(keys, counts, round(tokens / per_chunk), args.seed)
        row = {"tokens": tokens, **measure(args, *grown, questions)}
        results["sizes"].append(row)
        write_results(args.output, "pruning", results, page)


def measure(args: argparse.Namespace, keys: Tensor, counts: Tensor, questions: list) -> dict:
    """Figures of one memory: recall and share read over all questions, times over some."""
    began, cpu = time.perf_counter(), time.process_time()
    pruned = ClusteredIndex.build(
        LayerKeys(keys, counts), PruningSettings(block_size=args.block_size)
    )
    row: dict = {
        "chunks": len(keys),
        "documents": len(counts),
        "blocks": len(pruned.blocks.ends),
        "build_seconds": round(time.perf_counter() - began, 1),
        "build_cpu_seconds": round(time.process_time() - cpu, 1),
        "extra_bytes_per_chunk": round(pruned.blocks.num_bytes / len(keys), 1),
        "kinds": {},
    }
    show({k: v for k, v in row.items() if k != "kinds"})
    if args.ask:
        input("Enter to begin with the times: ")
    for kind, name in enumerate(KINDS):
        some = [v for k, v in questions if k == kind]
        row["kinds"][name] = {"tokens_routing": round(mean(len(v) for v in some), 1)}
        if args.timed:
            row["kinds"][name] |= timed(args, pruned, keys, counts, some[: args.timed])
            show({name: row["kinds"][name]})
    for kind, name in enumerate(KINDS):
        if not args.only_times:
            some = [v for k, v in questions if k == kind]
            row["kinds"][name] |= recalls(args, pruned, some)
            show({name: row["kinds"][name]})
    return row


def timed(
    args: argparse.Namespace, pruned: ClusteredIndex, keys: Tensor, counts: Tensor, some: list
) -> dict:
    """Median milliseconds of one question in one layer, wall and processor, taken by turns."""
    runs: dict[str, Callable] = {"full": lambda v, m: route_documents(v, m, keys, counts, TOP_K)}
    for slack in args.slacks:
        runs[f"slack {slack}"] = partial(pruned.with_slack(slack).search, top_k=TOP_K)
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for v in some:
        every = torch.ones(1, len(v), dtype=torch.bool)
        found: dict[str, Selection] = {}
        for name, run in runs.items():
            began, used = time.perf_counter(), time.process_time()
            found[name] = run(v[None], every)
            wall[name].append(1e3 * (time.perf_counter() - began))
            cpu[name].append(1e3 * (time.process_time() - used))
        for name in {"slack 1.0"} & set(found):
            torch.testing.assert_close(found[name].scores, found["full"].scores, atol=1e-5, rtol=0)
    return {
        "timed_questions": len(some),
        "ms": {name: round(median(values), 2) for name, values in wall.items()},
        "cpu_ms": {name: round(median(values), 2) for name, values in cpu.items()},
    }


def recalls(args: argparse.Namespace, pruned: ClusteredIndex, some: list) -> dict:
    """Recall of the exact selection, and share of the keys read; per slack.

    The exact selection is that of slack 1, which is the full scan's (`timed` compares them).
    """
    hits: dict[float, list[int]] = {slack: [] for slack in args.slacks}
    read: dict[float, list[int]] = {slack: [] for slack in args.slacks}
    for v in some:
        exact, all_read = scanned(pruned, v, 1.0)
        for slack in args.slacks:
            found, rows_read = (exact, all_read) if slack == 1.0 else scanned(pruned, v, slack)
            hits[slack].append(int(torch.isin(exact, found).sum()))
            read[slack].append(rows_read)
    chunks = len(pruned.blocks.keys)
    return {
        "questions": len(some),
        "recall": {s: round(mean(hits[s]) / TOP_K, 5) for s in args.slacks},
        "questions_with_a_miss": {s: sum(h < TOP_K for h in hits[s]) for s in args.slacks},
        "read": {s: round(mean(read[s]) / chunks, 5) for s in args.slacks},
    }


def scanned(pruned: ClusteredIndex, vectors: Tensor, slack: float) -> tuple[Tensor, int]:
    """Documents that are found, and how many keys are read for it."""
    best = TopDocuments(1, TOP_K, pruned.blocks.num_documents)
    scan = BlockScan(pruned.blocks, vectors, best)
    scan.run(slack)
    return best.selection(vectors.device).documents[0], scan.rows_read


def check(args: argparse.Namespace, keys: Tensor, counts: Tensor, questions: list) -> dict:
    """The world itself beside a tenth of it, grown to its size, for questions about that tenth."""
    part = len(counts) // 10
    end = int(counts[:part].sum())
    about = []
    for kind, v in questions:
        every = torch.ones(1, len(v), dtype=torch.bool)
        best = route_documents(v[None], every, keys, counts, 1)
        if int(best.documents) < part:
            about.append((kind, v))
    rows = {}
    grown = grow(keys[:end], counts[:part], len(keys), args.seed)
    for name, memory in {"world": (keys, counts), "grown": grown}.items():
        settings = PruningSettings(block_size=args.block_size)
        pruned = ClusteredIndex.build(LayerKeys(*memory), settings)
        rows[name] = {
            KINDS[kind]: recalls(args, pruned, [v for k, v in about if k == kind])
            for kind in sorted({k for k, _ in about})
        }
    show(rows)
    return rows


def grow(keys: Tensor, counts: Tensor, chunks: int, seed: int) -> tuple[Tensor, Tensor]:
    """Whole documents, copied with noise of the spread of a block, up to about `chunks`."""
    if chunks <= 1.05 * len(keys):
        return keys, counts
    generator = torch.Generator().manual_seed(seed)
    flat = keys.flatten(1)
    order, sizes = cluster_order(flat, 32, seed)
    block = torch.empty(len(keys), dtype=torch.int64)
    block[order] = torch.repeat_interleave(sizes)
    starts = (sizes.cumsum(0) - sizes)[block]
    sizes = sizes[block]
    copies = round(chunks / len(keys))
    result = torch.empty(copies * len(keys), *keys.shape[1:])
    result[: len(keys)] = keys
    for copy in range(1, copies):
        one, two = (
            flat[order[starts + (torch.rand(len(keys), generator=generator) * sizes).long()]]
            for _ in range(2)
        )
        moved = (flat + 0.5**0.5 * (one - two)).view(keys.shape)
        result[copy * len(keys) : (copy + 1) * len(keys)] = F.normalize(moved, dim=-1)
    return result, counts.repeat(copies)


def drawn(kinds: Tensor, count: int) -> list[int]:
    """The first `count` questions of every kind."""
    return [i for k in range(len(KINDS)) for i in (kinds == k).nonzero()[:count, 0].tolist()]


def cached(path: str | None, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    if path and Path(path).is_file():
        return load_file(path)
    tensors = make()
    if path:
        save_file(tensors, path)
    return tensors


def encode(args: argparse.Namespace) -> dict[str, Tensor]:
    """Routing keys of a world, and routing vectors of its questions asked of that world."""
    from msa.memory.ingest.encoder import DocumentEncoder
    from msa.memory.latent import LatentMemory
    from msa.model.loading import load
    from msa.synthetic_worlds import generate_world
    from msa.text.prompts import Reading
    from msa.types import Document, LatentStates, LayerStates

    class Recorder(LatentMemory):
        def route(self, layer, some, mask):
            vectors[layer].append(some[mask])
            return super().route(layer, some, mask)

    world = generate_world(args.seed, args.documents, breadth=args.breadth, split="test")
    loaded = load(args.model)
    model, tokenizer, template = loaded.model, loaded.tokenizer, loaded.template
    encoder = DocumentEncoder(model, tokenizer, template)
    texts = [Document(d.key, d.text, title=d.title) for d in world.documents]
    tokens = [(n, encoder.tokens(n, d)) for n, d in enumerate(texts, start=1)]
    layers = model.config.routing_layers
    parts: dict[int, tuple[int, dict[int, list[Tensor]]]] = {}
    for start in range(0, len(tokens), 1024):
        for batch in encoder.encode_tokens(tokens[start : start + 1024]):
            sizes = batch.states.chunk_counts.tolist()
            split = {
                i: [
                    t.split(sizes)
                    for t in (states.pooled_keys, states.pooled_values, states.routing_keys)
                ]
                for i, states in batch.states.layers.items()
            }
            for row, number in enumerate(batch.numbers):
                states = {i: [t[row].clone() for t in ts] for i, ts in split.items()}
                parts[number] = (sizes[row], states)
        print(f"encoded {min(start + 1024, len(tokens))} documents", file=sys.stderr, flush=True)
    ordered = [parts[number] for number in sorted(parts)]
    counts = torch.tensor([count for count, _ in ordered])
    joined = {
        i: LayerStates(*(torch.cat([states[i][j] for _, states in ordered]) for j in range(3)))
        for i in layers
    }
    vectors: dict[int, list[Tensor]] = {i: [] for i in layers}
    memory = Recorder(
        LatentStates(counts, joined), model.config.top_k_documents, model.config.routing_score
    )
    rng = random.Random(args.seed)
    numbers = {d.key: n for n, d in enumerate(world.documents, start=1)}
    contexts = []
    for hops in (1, 2):
        some = [q for q in world.questions if q.hops == hops]
        for question in rng.sample(some, min(300, len(some))):
            contexts.append((hops - 1, encoder.prompts.context(question.question)))
            if hops == 2:
                number = numbers[question.gold[0]]
                reading = Reading(((number, texts[number - 1].content),))
                contexts.append((2, encoder.prompts.context(question.question, [reading])))
    for _, context in contexts:
        with torch.no_grad():
            model(
                torch.tensor([context.input_ids]),
                memory=memory,
                routing_mask=torch.tensor([context.routes]),
                memory_mask=torch.tensor([context.sees_memory]),
                position_ids=torch.tensor([context.positions(model.config.top_k_documents)]),
            )
    tensors = {f"keys.{i}": joined[i].routing_keys for i in layers}
    tensors |= {f"vectors.{i}": torch.cat(vectors[i]) for i in layers}
    return tensors | {
        "counts": counts,
        "tokens": torch.tensor(sum(len(ids) for _, ids in tokens)),
        "lengths": torch.tensor([len(v) for v in vectors[layers[0]]]),
        "kind": torch.tensor([kind for kind, _ in contexts]),
    }


def page(results: dict) -> str:
    """The figures in Markdown."""
    about = results["about"]
    lines = [
        "# A pruned scan",
        "",
        f"`{about['command']}`",
        "",
        f"commit: {about['commit']}; machine: {about['machine']}, {about['threads']} threads; "
        f"torch: {about['torch']}; seed: {about['seed']}",
        "",
        f"Routing layer {about['layer']} of the default model, one question at a time, "
        f"k = {about['top_k']}, blocks of {about['block_size']} chunks on the mean. Up to "
        f"{about['world_tokens']:,} tokens the keys are those of a generated world; larger "
        "memories are grown from them (see the script). *Read*: share of the keys that was scored; "
        "*recall*: share of the documents of a full scan that was found; *ms*: median wall time "
        "(of the processor in brackets).",
        "",
        "| tokens | routes | tokens routing | slack | read | recall | questions | ms | full scan, "
        "ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["sizes"]:
        for name, kind in row["kinds"].items():
            if "recall" not in kind:
                continue
            for slack, recall in kind["recall"].items():
                ms = [
                    f"{kind['ms'][run]:,.1f} ({kind['cpu_ms'][run]:,.1f})" if "ms" in kind else "-"
                    for run in (f"slack {slack}", "full")
                ]
                lines.append(
                    f"| {row['tokens']:,} | {name} | {kind['tokens_routing']:.0f} | {slack} | "
                    f"{100 * kind['read'][slack]:.2f}% | {100 * recall:.2f}% | "
                    f"{kind['questions']} | {ms[0]} | {ms[1]} |"
                )
    lines += ["", "| tokens | chunks | blocks | seconds to build (processor) | bytes per chunk |"]
    lines += ["|---|---|---|---|---|"]
    lines += [
        f"| {row['tokens']:,} | {row['chunks']:,} | {row['blocks']:,} | {row['build_seconds']} "
        f"({row['build_cpu_seconds']}) | {row['extra_bytes_per_chunk']} |"
        for row in results["sizes"]
    ]
    if "grown_from_a_tenth" in results:
        lines += [
            "",
            "A tenth of the world grown to its size, beside the world itself, for questions about "
            "that tenth:",
            "",
            "| keys | routes | questions | slack | read | recall |",
            "|---|---|---|---|---|---|",
        ]
        for keys, kinds in results["grown_from_a_tenth"].items():
            for name, kind in kinds.items():
                lines += [
                    f"| {keys} | {name} | {kind['questions']} | {slack} | "
                    f"{100 * kind['read'][slack]:.2f}% | {100 * recall:.2f}% |"
                    for slack, recall in kind["recall"].items()
                ]
    return "\n".join(lines) + "\n"


def show(row: object) -> None:
    print(json.dumps(row), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=parse_size, nargs="*", default=[10**6, 10**7, 10**8])
    parser.add_argument("--slacks", type=float, nargs="*", default=[1.0, 0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--block-size", type=int, default=PruningSettings().block_size)
    parser.add_argument("--questions", type=int, default=100, help="of each kind, for recall")
    parser.add_argument("--timed", type=int, default=9, help="questions of each kind, for times")
    parser.add_argument("--only-times", action="store_true", help="no recall")
    parser.add_argument("--check", action="store_true", help="measure how true growing is")
    parser.add_argument("--model", default=None, help="folder; the default model if none")
    parser.add_argument("--layer", type=int, default=4, help="routing layer")
    parser.add_argument("--documents", type=int, default=14000, help="of the world")
    parser.add_argument("--breadth", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--ask", action="store_true", help="wait for Enter before timing")
    parser.add_argument("--cache", default=None, help="file for what was encoded")
    parser.add_argument("--output", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
