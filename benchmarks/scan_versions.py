"""The scan of one layer's routing keys in two checkouts of this project, in turns in one run.

    python benchmarks/scan_versions.py OTHER [--tokens 1000000 10000000] [--output docs/results]

OTHER is a checkout of another commit (`git worktree add ../other COMMIT`). Keys are random, of unit
heads, in the paper's shape (8 heads of 128, chunks of 64); a question has 32 tokens. Measured are
the maximum over the tokens (Eq. 2) in both checkouts, and a pooled query in this one. Every turn is
a process of its own; the medians of the turns are compared.

Writes scan_versions.json and scan_versions.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
KINDS = {"before": "max", "now": "max", "pooled": "pooled"}
REPEATS = 5


def main() -> None:
    args = arguments()
    if args.child:
        print(json.dumps(seconds(args.child, args.tokens[0], args.dtype, args.seed)))
        return
    rows = [row for dtype in args.dtypes for row in compared(args, dtype)]
    report = {"command": shown_command(args.other), "seed": args.seed, "rows": rows}
    report |= {"before": commit(Path(args.other)), "now": commit(HERE), "machine": processor()}
    print(page(report))
    if args.output:
        folder = Path(args.output)
        Path(folder, "scan_versions.json").write_text(json.dumps(report, indent=2) + "\n")
        Path(folder, "scan_versions.md").write_text(page(report))


def compared(args: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    """A row for every size: median seconds of each kind, and how they compare."""
    rows = []
    for tokens in args.tokens:
        taken: dict[str, list[float]] = {name: [] for name in KINDS}
        for _ in range(args.turns):
            for name, kind in KINDS.items():
                checkout = Path(args.other) if name == "before" else HERE
                taken[name].append(child(checkout, kind, tokens, dtype, args.seed))
        medians = {name: statistics.median(found) for name, found in taken.items()}
        rows.append({"tokens": tokens, "dtype": dtype, **medians})
    return rows


def child(checkout: Path, kind: str, tokens: int, dtype: str, seed: int) -> float:
    """Seconds of one process that uses the package of a checkout."""
    paths = f"{checkout / 'src'}{os.pathsep}{checkout / 'benchmarks'}"
    command = [sys.executable, __file__, "--child", kind, "--tokens", str(tokens)]
    command += ["--dtype", dtype, "--seed", str(seed), str(checkout)]
    run = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        sys.exit(f"{checkout}: its scan failed\n{run.stderr}")
    return float(json.loads(run.stdout))


def seconds(kind: str, tokens: int, dtype: str, seed: int) -> float:
    """Median seconds of a scan by the package that Python finds."""
    import torch

    try:
        from measuring import synthetic
    except ImportError:  # checkouts in which the benchmarks were part of the package
        from msa.benchmarks import synthetic  # type: ignore[import-not-found, no-redef]
    shape, device = synthetic.SHAPE_4B, torch.device("cpu")
    chunks = shape.chunks(tokens)
    keys = synthetic.random_keys(chunks, shape, synthetic.DTYPES[dtype], device, seed)
    make = getattr(synthetic, "layer_index", None) or synthetic.layer_keys
    layer = make(keys, synthetic.equal_documents(chunks, device))
    queries = synthetic.random_queries(shape, 32, device, seed)
    mask = torch.ones(1, 32, dtype=torch.bool)
    with torch.inference_mode():
        if kind == "pooled":
            from msa.ops.routing import reduce_queries

            pooled, one = reduce_queries(queries, mask, shape.groups, "cosine", "pooled")
            return median(lambda: layer.search(pooled, one, shape.top_k))
        return median(lambda: synthetic.route(queries, mask, layer, shape.top_k))


def median(run: Callable[[], object]) -> float:
    """Median of some runs, the first left out."""
    taken = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def page(report: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        "# The scan of routing keys, before and now\n",
        f"`{report['command']}`; before: {report['before']}, now: {report['now']}; "
        f"{report['machine']}; seed {report['seed']}. Milliseconds of a layer and a question.\n",
        "| tokens | keys | before, Eq. 2 | now, Eq. 2 | speed | now, pooled | speed |",
        "|---" * 7 + "|",
    ]
    for row in report["rows"]:
        before, now, pooled = (1000 * row[name] for name in KINDS)
        lines.append(
            f"| {row['tokens']:,} | {row['dtype']} | {before:.1f} | {now:.1f} "
            f"| {before / now:.2f}x | {pooled:.2f} | {before / pooled:.1f}x |"
        )
    return "\n".join(lines) + "\n"


def shown_command(other: str) -> str:
    """The command, with the name of the other checkout only."""
    words = [Path(other).name if word == other else word for word in sys.argv[1:]]
    return " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *words])


def commit(checkout: Path) -> str:
    """Short hash of what is checked out."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def processor() -> str:
    """The machine, in words."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {os.cpu_count()} cores"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("other", help="a checkout of another commit")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="folder for the page")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
