"""One bank over several processes, in two checkouts of this project, in turns in one run.

    python benchmarks/processes.py OTHER [--documents 12000] [--output docs/results]

OTHER is a checkout from before Ray (`git worktree add ../other COMMIT`), whose processes torchrun
starts. A generated world is indexed by one process and by 1 and 2 workers; then questions are
asked, one by one, of the bank in one process and in 1, 2 and 3 shards. The processes of a command
share the cores: each has so many threads. Seconds of encoding are those of the whole command, its
start included; those of a question are what the answer says, the first left out.

Writes processes.json and processes.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring.results import write_results
from measuring.service import COMMAND, world
from scan_versions import HERE, commit, processor, shown_command

MSA = [sys.executable, "-c", COMMAND]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
WORKERS, SHARDS = (0, 1, 2), (0, 1, 2, 3)  # 0: no other process


def main() -> None:
    args = arguments()
    checkouts = {"before": Path(args.other).resolve(), "now": HERE}
    made = world(args.seed, args.documents, args.questions + 1)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "world.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in made.documents), "utf-8")
        encoding = {
            str(workers): {
                name: indexed(checkout, file, Path(place, f"{name}-{workers}"), workers)
                for name, checkout in checkouts.items()
            }
            for workers in WORKERS
        }
        asking = {
            str(shards): {
                name: asked(checkout, Path(place, f"{name}-0"), made.questions, shards)
                for name, checkout in checkouts.items()
            }
            for shards in SHARDS
        }
    results = {
        "command": shown_command(args.other),
        "commits": {name: commit(checkout) for name, checkout in checkouts.items()},
        "machine": processor(),
        "seed": args.seed,
        "documents": args.documents,
        "questions": args.questions,
        "encoding": encoding,
        "asking": asking,
    }
    print(page(results))
    write_results(args.output, "processes", results, page)


def indexed(checkout: Path, file: Path, bank: Path, workers: int) -> float:
    """Seconds of `msa index`."""
    words = ["index", str(file), "--bank", str(bank)]
    began = time.perf_counter()
    run(checkout, words, workers, "--workers")
    return time.perf_counter() - began


def asked(checkout: Path, bank: Path, questions: Sequence[str], shards: int) -> dict[str, float]:
    """Median seconds of a question, and of its routing."""
    words = ["ask", "--bank", str(bank), "--json"]
    lines = run(checkout, words, shards, "--shards", "\n".join(questions)).splitlines()
    found = [json.loads(line)["usage"] for line in lines if line.startswith("{")]
    if len(found) != len(questions):
        sys.exit(f"{checkout}: {len(found)} answers to {len(questions)} questions")
    return {
        part: statistics.median(usage[f"{part}_seconds"] for usage in found[1:])
        for part in ("total", "routing")
    }


def run(checkout: Path, words: list[str], processes: int, option: str, given: str = "") -> str:
    """What a command of a checkout prints, run over so many processes."""
    if checkout == HERE:
        command = [*MSA, *words, "--model", "worlds"]
        command += [option, str(processes)] if processes else []
    else:
        start = [*TORCHRUN, "--nproc-per-node", str(processes)] if processes else []
        command = [*start, *MSA, *words]
    threads = max(1, (os.cpu_count() or 1) // max(1, processes))
    ended = subprocess.run(
        command,
        input=given,
        env={
            **os.environ,
            "PYTHONPATH": str(checkout / "src"),
            "OMP_NUM_THREADS": str(threads),
            "MSA_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        sys.exit(f"{checkout}: {' '.join(words)} failed\n{ended.stderr}")
    return ended.stdout


def page(results: dict[str, Any]) -> str:
    """As Markdown."""
    commits = results["commits"]
    lines = [
        "# One bank over several processes\n",
        f"`{results['command']}`; before (torchrun): {commits['before']}, now (Ray): "
        f"{commits['now']}; {results['machine']}; seed {results['seed']}; the worlds model, "
        f"{results['documents']:,} documents, {results['questions']} questions one by one.\n",
        "Encoding: seconds of `msa index`, its start included.\n",
        "| workers | before | now |",
        "|---|---|---|",
    ]
    for workers, found in results["encoding"].items():
        kind = "no other process" if workers == "0" else workers
        lines.append(f"| {kind} | {found['before']:.1f} | {found['now']:.1f} |")
    lines += [
        "\nAsking: median milliseconds of a question, and of its routing.\n",
        "| shards | before | routing | now | routing |",
        "|---|---|---|---|---|",
    ]
    for shards, found in results["asking"].items():
        kind = "no other process" if shards == "0" else shards
        cells = (1000 * found[n][part] for n in ("before", "now") for part in ("total", "routing"))
        lines.append(f"| {kind} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("other", help="a checkout of another commit")
    parser.add_argument("--documents", type=int, default=12_000)
    parser.add_argument("--questions", type=int, default=30)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", help="folder for processes.json and .md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
