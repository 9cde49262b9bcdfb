"""How well a model routes, names and answers in generated worlds that it has never seen.

    python benchmarks/quality.py [--model FOLDER] [--output docs/results]

Writes quality.json with the commit, the machine and the seed. Real documents: real_documents.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from measuring.results import write_results
from msa import MemoryBank, MemoryEngine
from msa.evaluation.metrics import mean, recall
from msa.evaluation.question_answering import ask_all, world_questions
from msa.model.loading import load
from msa.types import Document


def main() -> None:
    args = arguments()
    loaded = load(args.model)
    results: dict[str, object] = {"about": about(args)}
    options = json.loads(args.options)
    for size in args.sizes:
        documents, one, two = world_questions(
            args.seed + size, size, args.questions, breadth=args.breadth
        )
        sets = {"one_hop": one, "two_hop": two}
        results[f"world_{size}"] = run(loaded, documents, sets, options)
        show(f"world_{size}", results[f"world_{size}"])
        write_results(args.output, "quality", results)


def run(loaded, documents: list[Document], sets: dict[str, list], options: dict) -> dict:
    row: dict[str, object] = {"documents": len(documents)}
    with tempfile.TemporaryDirectory() as folder:
        bank = MemoryBank.create(Path(folder, "bank"), loaded)
        started = time.perf_counter()
        report = bank.add(documents)
        row["tokens"] = report.tokens
        row["encoded_tokens_per_second"] = round(report.tokens / (time.perf_counter() - started))
        row["failed"] = len(report.failed)
        with MemoryEngine(bank, **options) as engine:
            for name, questions in sets.items():
                figures, answers = ask_all(engine, questions)
                hits = engine.retrieve([q.text for q in questions], top_k=16)
                row[name] = {
                    **{k: round(v, 4) for k, v in figures.as_dict().items()},
                    "retrieve_recall_at_16": round(
                        mean(
                            [
                                recall([h.id for h in found], q.gold)
                                for found, q in zip(hits, questions, strict=True)
                            ]
                        ),
                        4,
                    ),
                }
                for question, answer in list(zip(questions, answers, strict=True))[:4]:
                    print("  ", question.text, "|", answer.text, "|", question.answers[0])
        bank.close()
    return row


def about(args: argparse.Namespace) -> dict[str, object]:
    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], capture_output=True, text=True, check=False
        ).stdout.strip()

    return {
        "command": "python " + " ".join(sys.argv),
        "commit": git("rev-parse", "--short", "HEAD")
        + ("+" if git("status", "-s", "-uno") else ""),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, CPU",
        "torch": torch.__version__,
        "seed": args.seed,
        "breadth": args.breadth,
        "options": args.options,
    }


def show(name: str, row: object) -> None:
    print(name, json.dumps(row, indent=1), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="folder; the default model if none")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1000, 10000])
    parser.add_argument("--questions", type=int, default=200, help="questions of each kind")
    parser.add_argument("--breadth", type=float, default=1.0)
    parser.add_argument("--options", default="{}", help="JSON of AskOptions")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
