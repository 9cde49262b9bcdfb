"""A search with one vector per question and layer, beside reading the keys once and FAISS.

    python benchmarks/routing_pooled.py [--chunks 1000000] [--batches 1 8] [--output docs/results]

Keys are random, of unit heads; questions are random queries, reduced by "pooled". Per dtype and
batch, all measured in turns in one run: the search of a loaded bank, and FAISS's flat inner-product
index over float32 vectors of equal dimension, if it is installed.

Writes routing_pooled.json and routing_pooled.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial

import torch
from torch import Tensor

from measuring.results import write_results
from measuring.routing import flat_index
from measuring.synthetic import (
    DTYPES,
    Shape,
    equal_documents,
    layer_index,
    random_keys,
    random_queries,
)
from measuring.timing import Run, bandwidth, machine, side_by_side
from msa.ops.routing import reduce_queries

CPU = torch.device("cpu")
SHAPE = Shape("pooled", 30, 3, 576, 1536, 49152, heads=9, groups=3, dim=64, chunk_size=32, top_k=16)
TOKENS = 12  # of a question, before they are pooled
COLUMNS = {
    "read_once": "read once",
    "search": "search",
    "faiss": "FAISS",
}


def main() -> None:
    args = arguments()
    results: dict = {
        "command": "python " + " ".join(sys.argv),
        **machine(CPU),
        "chunks": args.chunks,
        "width": SHAPE.groups * SHAPE.dim,
        "top_k": SHAPE.top_k,
        "seed": args.seed,
        "repeats": args.repeats,
        "rows": [],
    }
    with torch.inference_mode():
        for dtype in args.dtypes:
            for row in measure(args, dtype):
                results["rows"].append(row)
                print(json.dumps(row), flush=True)
    write_results(args.output, "routing_pooled", results, page)


def measure(args: argparse.Namespace, dtype: str) -> list[dict]:
    """One row per batch size."""
    keys = random_keys(args.chunks, SHAPE, DTYPES[dtype], CPU, args.seed)
    layer = layer_index(keys, equal_documents(args.chunks, CPU))
    rows = []
    for batch in args.batches:
        vectors, mask = pooled(batch, args.seed)
        runs: dict[str, Run] = {"search": partial(layer.search, vectors, mask, SHAPE.top_k)}
        flat = flat_index(keys, vectors[:, 0], SHAPE.top_k, torch.get_num_threads())
        if flat is not None:
            runs["faiss"] = flat
        rate = bandwidth([keys], args.repeats)
        seconds = {"read_once": keys.nbytes / rate, **side_by_side(runs, CPU, args.repeats)}
        rows.append(
            {
                "dtype": dtype,
                "questions": batch,
                "keys_bytes": keys.nbytes,
                "bandwidth_bytes_per_second": round(rate),
                "seconds": {name: round(value, 5) for name, value in seconds.items()},
                "over_read_once": {
                    name: round(value / seconds["read_once"], 2)
                    for name, value in seconds.items()
                    if name != "read_once"
                },
            }
        )
    return rows


def pooled(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Vectors [B, 1, G*D] and their mask."""
    queries = torch.cat([random_queries(SHAPE, TOKENS, CPU, seed + i) for i in range(batch)])
    every = torch.ones(batch, TOKENS, dtype=torch.bool)
    return reduce_queries(queries, every, SHAPE.groups, "cosine", "pooled")


def page(results: dict) -> str:
    """The results as Markdown."""
    about = (
        f"commit: {results['commit']}; machine: {results['machine']}, {results['threads']} "
        f"threads; torch: {results['torch']}; seed: {results['seed']}"
    )
    lines = [
        "# A search with one vector per question",
        "",
        f"`{results['command']}`",
        "",
        about,
        "",
        f"{results['chunks']:,} random keys of {results['width']} numbers in one layer, "
        f"k = {results['top_k']}. Median milliseconds of a whole batch, all in turns; in brackets "
        "how many times *read once*, the keys' bytes at the bandwidth measured in the same run. "
        "*Search*: as a loaded bank does it. *FAISS*: flat inner product over float32 vectors of "
        "the same dimension.",
        "",
        "| keys | questions | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (2 + len(COLUMNS)) + "|",
    ]
    for row in results["rows"]:
        cells = [row["dtype"], str(row["questions"])]
        for name in COLUMNS:
            seconds, ratio = row["seconds"].get(name), row["over_read_once"].get(name)
            cell = "-" if seconds is None else f"{1e3 * seconds:.1f}"
            cells.append(cell if ratio is None else f"{cell} ({ratio:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="questions at once")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
