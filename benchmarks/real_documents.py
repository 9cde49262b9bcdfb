"""Real questions over real documents: what is found, by every layer and by all together.

    python benchmarks/real_documents.py retrieval FOLDER... [--model FOLDER] [--minilm FOLDER]
        [--output docs/results/real_documents.json]

FOLDERs are question sets: corpus.jsonl.gz {id, title, text} and questions.SPLIT.jsonl.gz {id,
question, answers, gold}. The whole corpus of a set is searched. `retrieval --help` lists what it
takes. Answers are the work of `msa eval`.
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

from msa.errors import InputError, MSAError
from msa.evaluation.metrics import all_within, bootstrap, recall_at
from msa.evaluation.provenance import provenance
from msa.evaluation.question_sets import QuestionSet, read_question_set, with_fewer_documents
from msa.evaluation.retrieval import QUESTION_BLOCK, gold_ranks, z_scores
from msa.evaluation.routing import fuse, layer_scores
from msa.evaluation.workbench import Workbench, Workplace, ask_options
from msa.inference.options import AskOptions
from msa.model.checkpoint import Checkpoint
from msa.model.home import home
from msa.model.identity import model_fingerprints
from msa.model.loading import load as load_checkpoint
from msa.ops.routing import QUERY_REDUCTIONS

DEPTHS = (1, 5, 16)
HEAD = """\
# Real questions over real documents

What is found, without reading. What is answered stands in `evaluation.md` of the same folder,
written by `msa eval report`.

*R@k*: every gold document is among the first k of the ranking (two-hop questions have two to four
of them). *share@k*: the share of the gold documents within the first k. In percent.
"""
Scores = np.ndarray


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        retrieval(args)
    except MSAError as error:
        sys.exit(f"error: {error}")


def retrieval(args: argparse.Namespace) -> None:
    """R@1, 5, 16 of every way to rank documents: a table, and a JSON file with its page."""
    checkpoint, about = load(args) if args.model else (None, {})
    pools = checkpoint and checkpoint.model.config.query_reduction == "pooled"
    if not pools and "pooled" in (args.reductions or []):
        raise InputError("--reductions pooled: expected a --model that was made to pool")
    if args.output and Path(args.output).suffix != ".json":
        raise InputError(f"--output {args.output}: expected the name of a .json file")
    results: dict[str, dict] = {}
    about = {"about": provenance(args.seed, **about)}
    for folder in args.sets:
        questions = read(folder, args)
        name = questions.name + (" + title hints" if args.title_hints else "")
        if args.documents:
            questions = with_fewer_documents(questions, args.documents, args.seed)
            name += f", {len(questions.documents):,} documents only"
        ranks: dict[str, list[list[int]]] = {}
        began = time.perf_counter()
        for scores in rankings(questions, checkpoint, args):
            for system, (block, gold) in scores.items():
                ranks.setdefault(system, []).extend(gold_ranks(block, gold))
        row = {
            "split": questions.split,
            "documents": len(questions.documents),
            "questions": len(questions.questions),
            "data": questions.data_hash,
            "seconds": round(time.perf_counter() - began, 1),
            "systems": {s: figures(found, args.seed) | about for s, found in ranks.items()},
        }
        results[name] = row
        show(name, row)
        if args.output:
            keep(Path(args.output), results)


def rankings(
    questions: QuestionSet, checkpoint: Checkpoint | None, args: argparse.Namespace
) -> Iterator[dict[str, tuple[Scores, list[list[int]]]]]:
    """For every block of questions: system -> its scores, and the rows of the gold documents."""
    gold = questions.gold_rows()
    texts = [question.text for question in questions.questions]
    bench = Workbench(checkpoint, questions, workplace(args))
    asked = progress(f"{questions.name}: questions", "")
    for start in range(0, len(texts), QUESTION_BLOCK):
        block = texts[start : start + QUESTION_BLOCK]
        scores = {"BM25": bench.bm25.scores(block)}
        if args.minilm is not None:
            scores["MiniLM"] = bench.minilm.scores(block)
            scores["BM25 + MiniLM"] = z_scores(scores["BM25"]) + z_scores(scores["MiniLM"])
        if checkpoint is not None:
            config = checkpoint.model.config
            for reduction in args.reductions or [config.query_reduction]:
                config.query_reduction = reduction
                name = f"{args.label}, {reduction}" if args.reductions else args.label
                found = layer_scores(checkpoint, bench.states, block)
                scores |= routings(name, found, scores["BM25"], checkpoint.ask_options, args)
                if checkpoint.ask_options.lexical_weight > 0:
                    scores[f"{name}, as asked"] = as_asked(
                        bench, questions, start, checkpoint.ask_options.candidates
                    )
        rows = gold[start : start + QUESTION_BLOCK]
        yield {system: (found, rows) for system, found in scores.items()}
        asked(start + len(block), len(texts))


def routings(
    name: str,
    layers: dict[int, Scores],
    bm25: Scores,
    options: AskOptions,
    args: argparse.Namespace,
) -> dict[str, Scores]:
    """Rankings by single layers, by all of them, and by all of them with the words."""
    weights = args.weights or options.layer_weights or dict.fromkeys(layers, 1 / len(layers))
    fused = fuse(layers, weights)
    found = {f"{name}, layer {layer}": scores for layer, scores in layers.items()}
    found[f"{name}, fused"] = fused
    found[f"{name}, z-scores"] = fuse(layers, normalized=True)
    found[f"{name}, z-scores + BM25"] = z_scores(fused) + z_scores(bm25)
    return found


def as_asked(bench: Workbench, questions: QuestionSet, start: int, depth: int) -> Scores:
    """The ranking that `MemoryEngine.ask` starts from, words and all: minus the rank, [Q, N]."""
    row = {document.id: i for i, document in enumerate(questions.documents)}
    block = questions.questions[start : start + QUESTION_BLOCK]
    scores = np.full((len(block), len(row)), -np.inf)
    for i, outcome in enumerate(bench.system("msa").rank(block, depth)):
        for rank, name in enumerate(outcome.ranked):
            scores[i, row[name]] = -rank
    return scores


def figures(ranks: Sequence[Sequence[int]], seed: int) -> dict[str, object]:
    """Recall at every depth in percent, of questions that have gold documents.

    R: every gold document is within k; share: what share of them; first: the first of them is.
    """
    ranks = [r for r in ranks if r]
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
    kinds = (
        ("R", "share")
        if any(s[f"R@{DEPTHS[-1]}"] != s[f"share@{DEPTHS[-1]}"] for s in row["systems"].values())
        else ("R",)
    )
    heads = [f"{kind}@{k}" for kind in kinds for k in DEPTHS]
    print(f"{'':28}" + "".join(f"{head:>10}" for head in heads))
    for system, found in row["systems"].items():
        print(f"{system:28}" + "".join(f"{found[head]:10.1f}" for head in heads), flush=True)


def load(args: argparse.Namespace) -> tuple[Checkpoint, dict[str, str]]:
    """The checkpoint, and what is to be said about it."""
    checkpoint = load_checkpoint(args.model, dtype=args.dtype)
    config = checkpoint.model.config
    for name, value in ask_options(args.config).items():
        if not hasattr(config, name):
            raise InputError(f"--config {name}: the model's configuration has no such field")
        setattr(config, name, value)
    about = {"model": model_fingerprints(checkpoint.model)[0][:16], "dtype": args.dtype}
    return checkpoint, about | ({"config": args.config} if args.config else {})


def workplace(args: argparse.Namespace) -> Workplace:
    """Where things are kept."""
    return Workplace(
        banks=Path(args.banks or Path(args.cache, "banks")),
        cache=Path(args.cache),
        minilm=Path(args.minilm) if args.minilm else None,
        batch_tokens=args.batch_tokens,
        progress=progress,
    )


def read(folder: str, args: argparse.Namespace) -> QuestionSet:
    """The set, with as many questions as asked for."""
    return read_question_set(
        folder, args.split, count=args.questions, seed=args.seed, title_hints=args.title_hints
    )


def keep(path: Path, results: dict) -> None:
    """Write results as JSON, and the page of all that the file then holds, beside it (.md).

    What it holds of other sets and systems is kept.
    """
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, row in results.items():
        if name in held:
            row = row | {"systems": held[name]["systems"] | row["systems"]}
        held[name] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    path.with_suffix(".md").write_text(page(held), encoding="utf-8")


def page(held: dict) -> str:
    """What the JSON file holds, as Markdown."""
    heads = [f"{kind}@{k}" for kind in ("R", "share") for k in DEPTHS]
    made = [found["about"] for row in held.values() for found in row["systems"].values()]
    lines = [
        HEAD,
        *dict.fromkeys(f"{source(about)}\n" for about in made),
        f"| set | questions | documents | ranked by | {' | '.join(heads)} |",
        "|---" * (len(heads) + 4) + "|",
    ]
    for name, row in held.items():
        where = f"{name} {row['split']} | {row['questions']:,} | {row['documents']:,}"
        for system, found in row["systems"].items():
            cells = " | ".join(f"{found[head]:.1f}" for head in heads)
            lines.append(f"| {where} | {system} | {cells} |")
    return "\n".join([*lines, ""])


def source(about: dict) -> str:
    """Where figures come from, in a line."""
    names = ("commit", "model", "dtype", "machine", "seed")
    told = "; ".join(f"{name}: {about[name]}" for name in names if name in about)
    return f"`{about['command']}` ({told})"


def progress(work: str, unit: str) -> Callable[[int, int], None]:
    """A line on standard error every ten seconds at most."""
    began = last = time.perf_counter()

    def tell(done: int, whole: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last > 10:
            last = now
            speed = f", {done / (now - began):,.1f} {unit}/s" if unit else ""
            print(f"{work} {done:,} of {whole:,}{speed}", file=sys.stderr, flush=True)

    return tell


def weights(text: str) -> dict[int, float]:
    """ "2:1,6:0.5" -> layer -> weight."""
    pairs = [part.split(":") for part in text.split(",") if part]
    return {int(layer): float(weight) for layer, weight in pairs}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("retrieval", help=retrieval.__doc__)
    command.add_argument("sets", nargs="+", metavar="FOLDER", help="question sets")
    command.add_argument("--split", help="by default dev, or else test")
    command.add_argument("--questions", type=int, help="drawn from each set; by default all")
    command.add_argument("--seed", type=int, default=7)
    command.add_argument("--title-hints", action="store_true", help="ask with the rows' title_hint")
    command.add_argument("--model", help="folder of an MSA checkpoint")
    command.add_argument(
        "--config", default="", help='fields of the model to change: query_reduction="max"'
    )
    command.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    command.add_argument(
        "--minilm",
        nargs="?",
        const="",
        help="rank by all-MiniLM-L6-v2 too: its folder, or nothing to have it fetched",
    )
    command.add_argument("--cache", default=str(home() / "evaluation"), help="of embeddings")
    command.add_argument("--banks", help="folder of the banks; by default CACHE/banks")
    command.add_argument("--batch-tokens", type=int, default=4096, help="encoded at once")
    command.add_argument("--threads", type=int, help="by default torch's own choice")
    command.add_argument("--reductions", nargs="+", choices=QUERY_REDUCTIONS, help="compare these")
    command.add_argument(
        "--weights", type=weights, help="of the layers, as 2:1,6:0.5; by default the checkpoint's"
    )
    command.add_argument("--documents", type=int, help="of a smaller corpus, for a quick look")
    command.add_argument("--label", default="MSA", help="of the model, in the table")
    command.add_argument("--output", help="JSON file to add to; a page (.md) is put beside it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
