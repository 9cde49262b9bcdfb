"""One bank that grows from 16K to 100M tokens, asked the same questions at every size.

    python benchmarks/scaling.py BANK [--sizes 16K 128K 1M 10M 100M] [--texts FILE...]
        [--scans full 1 0.8] [--set FOLDER] [--output docs/results]

The bank begins with a generated world of held-out names, about which the questions are; real text
(FILEs, whatever `msa index` reads) and generated documents in turns are added behind it. With
`--set` all of it is real: the bank begins with the gold documents of questions drawn from a
question set, behind which the rest of its corpus and then the FILEs are added. Kept in the folder
BANK: run the command again to go on where it was stopped, also in the middle of a size. Writes
scaling.json (scaling_SET.json); each size is asked in a process of its own, whose peak memory is
noted. `reading_keys_seconds` is what it takes to read all routing keys from memory once: what no
full scan can beat.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from measuring.timing import bandwidth
from msa import Document, MemoryBank, MemoryEngine
from msa.evaluation.metrics import mean, recall
from msa.evaluation.question_answering import score, world_questions
from msa.evaluation.question_sets import Question, read_question_set
from msa.memory.search.clustered_index import PruningSettings
from msa.memory.store.reports import BankInfo
from msa.model.loading import load as load_checkpoint
from msa.synthetic_worlds import iter_world_documents
from msa.text.loaders import LoadFailure, load_documents
from quality import about

WORLD_DOCUMENTS = 200  # about 16K tokens
BLOCK = 2000  # documents added between looks at the size, at most
TOKENS = 150  # of a document, roughly
LARGER_THAN_CACHES = 1 << 28  # bytes
UNITS = {"K": 10**3, "M": 10**6}


def main() -> None:
    args = arguments()
    if args.ask:
        print(json.dumps(ask(args)))
        return
    loaded = load(args)
    state = Path(args.bank, "scaling_state.json")  # beside the bank, so that it outlives a stop
    folder = Path(args.bank, "bank")
    rows = json.loads(state.read_text())["rows"] if state.is_file() else {}
    folder.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        state.write_text(json.dumps({"rows": rows}))
        if args.output:
            asked = {name: row for name, row in rows.items() if row["asked"]}
            text = json.dumps({"about": about(args), **asked}, indent=2) + "\n"
            name = f"scaling_{Path(args.set).name}.json" if args.set else "scaling.json"
            Path(args.output, name).write_text(text, encoding="utf-8")

    for name in args.sizes:
        row = rows.setdefault(
            name, {"failed": 0, "tokens_added": 0, "seconds_to_add_them": 0.0, "asked": []}
        )
        exists = (folder / "bank.json").is_file()
        with MemoryBank.open(folder, *loaded) if exists else create(folder, loaded) as bank:
            if bank.info().num_tokens > 1.1 * size_of(name):  # it has grown beyond this size
                continue
            whole = grow(bank, args, size_of(name), row, save)
        for scan in args.scans:
            if scan not in [found["scan"] for found in row["asked"]]:
                row["asked"].append({"scan": scan, **asked_elsewhere(args, scan)})
                save()
        print(name, json.dumps(row, indent=1), flush=True)
        if not whole:
            print(f"the texts end at {row['tokens']:,} tokens; name more with --texts")
            break


def grow(bank: MemoryBank, args: argparse.Namespace, size: int, row: dict, save) -> bool:
    """Add documents up to so many tokens, and note it after every block; False if they end."""
    stream = islice(documents(args), bank.info().num_ids, None)
    while True:
        info = bank.info()
        row |= {
            "documents": info.num_ids,
            "documents_and_parts": info.num_documents,
            "tokens": info.num_tokens,
            "bytes_on_disk": info.segment_bytes + info.catalog_bytes,
        }
        missing = size - info.num_tokens
        if missing <= 0:
            return True
        mean_tokens = max(TOKENS, info.num_tokens // max(1, info.num_ids))
        started = time.perf_counter()
        block = list(islice(stream, min(BLOCK, max(1, missing // (2 * mean_tokens)))))
        if not block:
            return False
        report = bank.add(block, on_duplicate="skip")
        row["failed"] += len(report.failed)
        row["tokens_added"] += report.tokens
        row["seconds_to_add_them"] += round(time.perf_counter() - started, 1)
        row["peak_memory_of_building"] = max(row.get("peak_memory_of_building", 0), peak_memory())
        save()


def create(folder: Path, loaded) -> MemoryBank:
    """In bfloat16, which halves the disk."""
    return MemoryBank.create(folder, *loaded, dtype=torch.bfloat16)


def size_of(text: str) -> int:
    """Tokens: a number, perhaps with K or M behind it."""
    unit = UNITS.get(text[-1].upper(), 1)
    return int(float(text.rstrip("kKmM")) * unit)


def documents(args: argparse.Namespace) -> Iterator[Document]:
    """What is asked about, then the rest in an order that is always the same."""
    world, _ = questions_of(args)
    yield from world
    if args.set:
        yield from real_texts(args.texts)
        return
    titles = {d.title for d in world if d.title}
    real = real_texts(args.texts)
    made = (
        Document(id=f"made-{i}", text=d.text, title=d.title)
        for i, d in enumerate(
            iter_world_documents(
                args.seed + 1, 10_000_000, breadth=args.breadth, split="test", avoid=titles
            )
        )
    )
    for number, document in enumerate(made):
        yield document
        if number % 4 == 0:  # real texts are several times longer
            yield from islice(real, 1)


def real_texts(files: list[str]) -> Iterator[Document]:
    """Documents of the files, under ids that no other file has."""
    for file in files:
        for item in load_documents([Path(file)]):
            if isinstance(item, LoadFailure):
                print(f"left out: {item}", file=sys.stderr)
                continue
            found = item.document
            yield Document(id=f"{Path(file).stem}/{found.id}", text=found.text, title=found.title)


def questions_of(
    args: argparse.Namespace,
) -> tuple[list[Document], dict[str, list[Question]]]:
    """The documents that the bank begins with, and the questions by kind."""
    if not args.set:
        documents, one, two = world_questions(
            args.seed, WORLD_DOCUMENTS, args.questions // 2, breadth=args.breadth
        )
        return documents, {"one_hop": one, "two_hop": two}
    drawn = read_question_set(args.set, count=args.questions, seed=args.seed)
    gold = {i for question in drawn.questions for i in question.gold}
    first = sorted(drawn.documents, key=lambda d: d.id not in gold)  # the rest keeps its order
    return first, {"questions": list(drawn.questions)}


def asked_elsewhere(args: argparse.Namespace, scan: str) -> dict[str, object]:
    """Ask in a new process, so that its memory is its own."""
    command = [sys.executable, __file__, args.bank, "--ask", "--questions", str(args.questions)]
    command += ["--seed", str(args.seed), "--breadth", str(args.breadth), "--scans", scan]
    command += ["--model", args.model] if args.model else []
    command += ["--set", args.set] if args.set else []
    command += ["--dtype", args.dtype]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, object] = json.loads(out.stdout.splitlines()[-1])
    return found


def ask(args: argparse.Namespace) -> dict[str, object]:
    """Every question by itself, as users come; times are per question."""
    loaded = load(args)
    (scan,) = args.scans
    _, kinds = questions_of(args)
    start = time.perf_counter()
    bank = MemoryBank.open(Path(args.bank, "bank"), loaded, read_only=True)
    pruning = None if scan == "full" else PruningSettings(slack=float(scan))
    engine = MemoryEngine(bank, pruning=pruning)
    found: dict[str, object] = {"seconds_to_load": round(time.perf_counter() - start, 2)}
    with engine:
        engine.ask(next(iter(kinds.values()))[0].text)  # the first touches what is mapped
        usages, per_round = [], []
        for name, questions in kinds.items():
            answers = [engine.ask(q.text) for q in questions]
            usages += [a.usage for a in answers]
            per_round += [a.usage.routing_seconds / len(a.rounds) for a in answers]
            figures = score(questions, answers).as_dict()
            figures.pop("seconds_per_question")
            hits = [[h.id for h in engine.retrieve(q.text, top_k=16)] for q in questions]
            figures["recall_at_16"] = mean(
                [recall(h, q.gold[:1]) for h, q in zip(hits, questions, strict=True)]
            )
            figures["recall_at_16_of_all"] = mean(
                [float(recall(h, q.gold) == 1) for h, q in zip(hits, questions, strict=True)]
            )
            found[name] = {k: round(v, 4) for k, v in figures.items()}
            rounds = mean([len(a.rounds) for a in answers])
            found[name]["rounds"] = round(rounds, 2)
        found["reading_keys_seconds"] = round(reading_keys(engine.bank.info(), loaded.model), 6)
    found["routing_seconds"] = spread([u.routing_seconds for u in usages])
    found["routing_seconds_per_round"] = spread(per_round)
    found["total_seconds"] = spread([u.total_seconds for u in usages])
    found["peak_memory_of_asking"] = peak_memory()
    return found


def load(args: argparse.Namespace):
    """The checkpoint, in the dtype asked for."""
    loaded = load_checkpoint(args.model)
    loaded.model.to(getattr(torch, args.dtype))
    return loaded


def reading_keys(info: BankInfo, model) -> float:
    """Seconds to read the routing keys of all layers from memory once, in the bank's dtype."""
    config = model.config
    width = config.num_key_value_heads * config.head_dim * getattr(torch, info.dtype).itemsize
    size = info.num_chunks * width * len(info.routing_layers)
    return size / bandwidth([torch.ones(max(size, LARGER_THAN_CACHES) // 4)])


def spread(values: list[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    cuts = statistics.quantiles(values, n=20)
    return {"p50": round(statistics.median(values), 4), "p95": round(cuts[-1], 4)}


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage says is inherited from the process that started this one
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bank", help="folder for the bank and for what was measured so far")
    parser.add_argument("--sizes", nargs="+", default=["16K", "128K", "1M", "10M", "100M"])
    parser.add_argument("--texts", nargs="*", default=[])
    parser.add_argument("--set", help="folder of a question set: all of the bank is real text")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--questions", type=int, default=200, help="of a world, half are two-hop")
    parser.add_argument("--breadth", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--model", default=None)
    parser.add_argument("--output", default=None)
    parser.add_argument(
        "--scans",
        nargs="+",
        default=["full"],
        help="how routing keys are searched: full, or pruned with this slack; asked one by one",
    )
    parser.add_argument("--ask", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.options = "{}"
    return args


if __name__ == "__main__":
    main()
