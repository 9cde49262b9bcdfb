"""Index real text as a user would, and measure: tokens/s, bytes per million tokens, seconds.

    python benchmarks/real_input.py FILE... [--questions FILE] [--output docs/results]

FILEs are what `msa index` takes. Every file gets a bank of its own. Writes real_input.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from measuring.results import write_results
from msa import MemoryBank, MemoryEngine
from msa.model.loading import load
from msa.text.loaders import LoadFailure, load_documents
from quality import about


def main() -> None:
    args = arguments()
    loaded = load(args.model)
    results: dict[str, object] = {"about": about(args)}
    for path in args.files:
        results[Path(path).parent.name + "/" + Path(path).name] = measure(loaded, Path(path), args)
        print(json.dumps(results, indent=1), flush=True)
        write_results(args.output, "real_input", results)


def measure(loaded, path: Path, args: argparse.Namespace) -> dict[str, object]:
    failures = []

    def documents():
        for item in load_documents([path]):
            if isinstance(item, LoadFailure):
                failures.append(item)
            else:
                yield item.document

    with tempfile.TemporaryDirectory() as folder:
        bank = MemoryBank.create(Path(folder, "bank"), loaded)
        report = bank.add(documents(), on_duplicate="skip")
        info = bank.info()
        start = time.perf_counter()
        with MemoryEngine(bank) as engine:
            opened = time.perf_counter() - start
            questions = draw(path, bank, args)
            asking = [engine.ask(q).usage for q in questions]
            start = time.perf_counter()
            for question in questions:
                engine.retrieve(question)
            searching = (time.perf_counter() - start) / len(questions)
        bank.close()
    return {
        "documents": info.num_ids,
        "documents_and_parts": info.num_documents,
        "failed": len(report.failed) + len(failures),
        "tokens": report.tokens,
        "encoded_tokens_per_second": round(report.tokens / report.seconds),
        "bytes_per_million_tokens": {
            "segments": round(info.segment_bytes / report.tokens * 1e6),
            "catalog": round(info.catalog_bytes / report.tokens * 1e6),
        },
        "seconds_to_load_for_asking": round(opened, 3),
        "questions": len(questions),
        "seconds_per_question_median": round(
            statistics.median([u.total_seconds for u in asking]), 4
        ),
        "of_which_routing_median": round(statistics.median([u.routing_seconds for u in asking]), 4),
        "seconds_per_search_mean": round(searching, 4),
    }


def draw(path: Path, bank: MemoryBank, args: argparse.Namespace) -> list[str]:
    """Questions of the set beside the file; or, where there are none, first sentences."""
    rng = random.Random(args.seed)
    files = sorted(path.parent.glob("questions.dev.jsonl.gz"))
    if files:
        with gzip.open(files[0], "rt", encoding="utf-8") as file:
            pool = [json.loads(line)["question"] for line in file]
    else:
        texts = [d.document.text for d in bank.documents(limit=500)]
        pool = ["What is said about this: " + text.split(". ")[0][:120] for text in texts]
    return rng.sample(pool, min(args.questions, len(pool)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--model", default=None)
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", default=None)
    args = parser.parse_args()
    args.breadth = args.options = None
    return args


if __name__ == "__main__":
    main()
