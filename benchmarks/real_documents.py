"""Real questions over real documents: what is found, and what is answered.

    python benchmarks/real_documents.py retrieval FOLDER... [--model FOLDER] [--minilm FOLDER]

FOLDERs are question sets: corpus.jsonl.gz {id, title, text} and questions.SPLIT.jsonl.gz {id,
question, answers, gold}. The whole corpus of a set is searched. `--help` behind a command lists
what it takes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from msa.default_model import load_model
from msa.errors import MSAError
from msa.evaluation.metrics import all_within, bootstrap, recall_at
from msa.evaluation.provenance import provenance
from msa.evaluation.question_sets import QuestionSet, read_question_set
from msa.evaluation.retrieval import (
    QUESTION_BLOCK,
    BM25Retriever,
    DenseRetriever,
    SentenceEncoder,
    gold_ranks,
    z_scores,
)
from msa.evaluation.routing import encode_corpus, fuse, layer_scores
from msa.memory.manifest import model_fingerprints

DEPTHS = (1, 5, 16)
Scores = np.ndarray


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        args.run(args)
    except MSAError as error:
        sys.exit(f"error: {error}")


# Retrieval


def retrieval(args: argparse.Namespace) -> None:
    """R@1, 5, 16 of every way to rank documents, a table and a JSON file."""
    loaded, about = None, {}
    if args.model:
        loaded = load_model(args.model)
        loaded.model.to(getattr(torch, args.dtype))
        about = {"model": model_fingerprints(loaded.model)[0][:16], "dtype": args.dtype}
    encoder = SentenceEncoder(args.minilm) if args.minilm else None
    results: dict[str, object] = {"about": provenance(args.seed, **about)}
    for folder in args.sets:
        questions = read_question_set(
            folder, args.split, count=args.questions, seed=args.seed, title_hints=args.title_hints
        )
        name = questions.name + (" + title hints" if args.title_hints else "")
        ranks: dict[str, list[list[int]]] = {}
        began = time.perf_counter()
        for scores in rankings(questions, loaded, encoder, args):
            for system, (block, gold) in scores.items():
                ranks.setdefault(system, []).extend(gold_ranks(block, gold))
        row = {
            "split": questions.split,
            "documents": len(questions.documents),
            "questions": len(questions.questions),
            "data": questions.data_hash,
            "seconds": round(time.perf_counter() - began, 1),
            "systems": {system: figures(found, args.seed) for system, found in ranks.items()},
        }
        results[name] = row
        show(name, row)
        if args.output:
            merge_json(Path(args.output), results)


def rankings(
    questions: QuestionSet, loaded, encoder: SentenceEncoder | None, args: argparse.Namespace
) -> Iterator[dict[str, tuple[Scores, list[list[int]]]]]:
    """For every block of questions: system -> its scores, and the rows of the gold documents."""
    documents, gold = questions.documents, questions.gold_rows()
    texts = [question.text for question in questions.questions]
    bm25 = BM25Retriever(documents)
    dense = None
    if encoder is not None:
        dense = DenseRetriever(encoder, documents, args.cache, progress(questions.name, "MiniLM"))
    states = None
    if loaded is not None:
        states = encode_corpus(
            *loaded,
            documents,
            batch_tokens=args.batch_tokens,
            progress=progress(questions.name, "encoding", "tokens"),
        )
    asked = progress(questions.name, "questions")
    for start in range(0, len(texts), QUESTION_BLOCK):
        block = texts[start : start + QUESTION_BLOCK]
        scores = {"BM25": bm25.scores(block)}
        if dense is not None:
            scores["MiniLM"] = dense.scores(block)
            scores["BM25 + MiniLM"] = z_scores(scores["BM25"]) + z_scores(scores["MiniLM"])
        if states is not None:
            layers = layer_scores(*loaded, states, block)
            scores |= {f"layer {layer}": found for layer, found in layers.items()}
            scores["MSA, sum"] = fuse(layers, args.weights)
            scores["MSA, sum of z-scores"] = fuse(layers, args.weights, normalized=True)
            scores["MSA + BM25"] = z_scores(scores["MSA, sum"]) + z_scores(scores["BM25"])
        rows = gold[start : start + QUESTION_BLOCK]
        yield {system: (found, rows) for system, found in scores.items()}
        asked(start + len(block), len(texts))


def figures(ranks: Sequence[Sequence[int]], seed: int) -> dict[str, object]:
    """Recall at every depth in percent: every gold document within k, and the share within k."""
    found: dict[str, object] = {}
    for k in DEPTHS:
        interval = bootstrap([all_within(r, k) for r in ranks], seed=seed)
        found[f"R@{k}"] = round(100 * interval.mean, 2)
        found[f"R@{k} interval"] = [round(100 * interval.low, 2), round(100 * interval.high, 2)]
        found[f"share@{k}"] = round(100 * sum(recall_at(r, k) for r in ranks) / len(ranks), 2)
        found[f"first@{k}"] = round(100 * sum(r[0] < k for r in ranks) / len(ranks), 2)
    return found


def show(name: str, row: dict) -> None:
    """A table on standard output."""
    print(
        f"\n{name} {row['split']}: {row['documents']:,} documents, {row['questions']:,} questions, "
        f"{row['seconds']:.0f} s"
    )
    kinds = ("R", "share") if any(
        s[f"R@{DEPTHS[-1]}"] != s[f"share@{DEPTHS[-1]}"] for s in row["systems"].values()
    ) else ("R",)
    heads = [f"{kind}@{k}" for kind in kinds for k in DEPTHS]
    print(f"{'':24}" + "".join(f"{head:>10}" for head in heads))
    for system, found in row["systems"].items():
        print(f"{system:24}" + "".join(f"{found[head]:10.1f}" for head in heads), flush=True)


# What the commands share


def merge_json(path: Path, results: dict) -> None:
    """Write results, keeping what the file holds of other sets and systems."""
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, row in results.items():
        if name in held and name != "about":
            row = row | {"systems": held[name]["systems"] | row["systems"]}
        held[name] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def progress(name: str, what: str, unit: str = "") -> Callable[[int, int], None]:
    """A line on standard error every ten seconds at most."""
    began = last = time.perf_counter()

    def tell(done: int, whole: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last > 10:
            last = now
            speed = f", {done / (now - began):,.0f} {unit}/s" if unit else ""
            print(f"{name}: {what} {done:,} of {whole:,}{speed}", file=sys.stderr, flush=True)

    return tell


def weights(text: str) -> dict[int, float]:
    """"2:1,6:0.5" -> layer -> weight."""
    pairs = [part.split(":") for part in text.split(",") if part]
    return {int(layer): float(weight) for layer, weight in pairs}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("sets", nargs="+", metavar="FOLDER", help="question sets")
    common.add_argument("--split", help="by default dev, or else test")
    common.add_argument("--questions", type=int, help="drawn from each set; by default all")
    common.add_argument("--seed", type=int, default=7)
    common.add_argument("--title-hints", action="store_true", help="ask with the rows' title_hint")
    common.add_argument("--model", help="folder of an MSA checkpoint")
    common.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    common.add_argument("--minilm", help="folder of all-MiniLM-L6-v2, or of another such model")
    common.add_argument("--cache", default=str(Path.home() / ".cache/msa-memory/evaluation"))
    common.add_argument("--batch-tokens", type=int, default=4096, help="of documents encoded at once")
    common.add_argument("--threads", type=int, help="by default torch's own choice")
    command = commands.add_parser("retrieval", parents=[common], help=retrieval.__doc__)
    command.add_argument("--weights", type=weights, help="of the layers in the sums: 2:1,6:0.5")
    command.add_argument("--output", help="JSON file; results of other sets in it are kept")
    command.set_defaults(run=retrieval)
    return parser.parse_args()


if __name__ == "__main__":
    main()
