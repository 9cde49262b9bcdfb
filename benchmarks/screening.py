"""Searching a bank's routing keys: a copy in int8 first, or all of them in float32 or bfloat16.

    python benchmarks/screening.py BANK [--questions 6] [--repeats 3] [--output docs/results]

BANK is one of benchmarks/scaling.py, whose questions are asked once, so that every search is one of
a real question; then all searches are made again by each of the three, in turns. Checks that they
select the same. Writes screening.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from msa import MemoryBank, MemoryEngine
from msa.memory.loaded import memory_plan
from msa.memory.search.layer_index import LayerIndex
from msa.model.loading import load
from msa.ops.kernels.screening import Screen
from msa.types import Selection
from quality import about
from scaling import questions_of

READ = 60  # routing tokens from which on a text was read before


def main() -> None:
    args = arguments()
    loaded = load("worlds")
    with MemoryBank.open(Path(args.bank, "bank"), loaded, read_only=True) as bank:
        searches = searches_of(bank, loaded, args)
        tokens = bank.info().num_tokens
    kinds: dict[int, dict[str, LayerIndex]] = {}
    for layer in {search[0].layer: search[0] for search in searches}.values():
        screen = Screen.followed(None, layer.keys, layer.counts)
        assert screen is not None, "too few keys for a copy, or torch has no int8 product here"
        plain = replace(layer, screen=None)
        kinds[layer.layer] = {
            "int8 first": replace(layer, screen=screen),
            "float32": replace(plain, keys=layer.keys.float()),
            "bfloat16": plain,
        }
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.repeats):
        for layer, vectors, mask, top_k in searches:
            question = "after reading" if int(mask.sum()) > READ else "question"
            found: dict[str, Selection] = {}
            for name, keys in kinds[layer.layer].items():
                start = time.perf_counter()
                found[name] = keys.search(vectors, mask, top_k)
                seconds.setdefault((question, name), []).append(time.perf_counter() - start)
            wanted = found["float32"]
            assert all(torch.equal(s.documents, wanted.documents) for s in found.values())
            assert all(torch.equal(s.scores, wanted.scores) for s in found.values())
    chunks = len(searches[0][0].keys)
    results = {"about": about(args), "tokens": tokens, "chunks": chunks, "routes": {}}
    for route in ("question", "after reading"):
        lengths = [
            int(m.sum())
            for _, _, m, _ in searches
            if (int(m.sum()) > READ) == (route != "question")
        ]
        medians = {n: statistics.median(s) for (r, n), s in seconds.items() if r == route}
        results["routes"][route] = {
            "searches": len(lengths),
            "routing_tokens": statistics.median(lengths),
            "seconds": {name: round(value, 4) for name, value in medians.items()},
            "ratios": {n: round(v / medians["int8 first"], 2) for n, v in medians.items()},
        }
    print(json.dumps(results, indent=2))
    if args.output:
        Path(args.output, "screening.json").write_text(json.dumps(results, indent=2) + "\n")


def searches_of(bank: MemoryBank, loaded, args: argparse.Namespace) -> list[tuple]:
    """What layers are asked while questions are answered: keys as stored, vectors, mask, k."""
    made: list[tuple] = []
    search = LayerIndex.search

    def watched(self, vectors, mask, top_k, document_mask=None):
        made.append((self, vectors, mask, top_k))
        return search(self, vectors, mask, top_k, document_mask)

    _, one, two = questions_of(args)
    plan = memory_plan.plan(bank, dtype=bank.manifest.torch_dtype, content_dtype=loaded.model.dtype)
    engine = MemoryEngine(bank, plan=plan)
    LayerIndex.search = watched
    try:
        for question in one[: args.questions // 2] + two[: args.questions // 2]:
            engine.ask(question.text)
    finally:
        LayerIndex.search = search
    return made


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bank", help="folder of benchmarks/scaling.py")
    parser.add_argument("--questions", type=int, default=6, help="half of them two-hop")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--breadth", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", default=None)
    args = parser.parse_args()
    args.options = "{}"
    return args


if __name__ == "__main__":
    main()
