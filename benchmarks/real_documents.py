"""Real questions over real documents: what is found, and what is answered.

    python benchmarks/real_documents.py retrieval FOLDER... [--model FOLDER] [--minilm FOLDER]
    python benchmarks/real_documents.py answers FOLDER... --model FOLDER --output RUNS
        [--systems bm25-1 gold msa msa:lexical_weight=0] [--hide-gold]
    python benchmarks/real_documents.py report RUNS [--output docs/results]

FOLDERs are question sets: corpus.jsonl.gz {id, title, text} and questions.SPLIT.jsonl.gz {id,
question, answers, gold}. The whole corpus of a set is searched. `--help` behind a command lists
what it takes. Systems: `bm25-K`, `minilm-K`, `hybrid-K` (the model's reader, handed the K best
documents of a retriever), `gold` (handed the gold documents), `closed` (handed none), each perhaps
with `+memory` behind it (and the compressed memory to attend to); `msa` (a memory bank). Options of
`MemoryEngine.ask` may stand behind `msa`, as in `msa:max_rounds=1,lexical_weight=0`. Ablations by
group: `@documents`, `@interleave`, `@text`, `@layers`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from msa import MemoryBank, MemoryEngine
from msa.errors import InputError, MSAError
from msa.evaluation.metrics import all_within, bootstrap, recall_at
from msa.evaluation.provenance import provenance
from msa.evaluation.question_sets import QuestionSet, read_question_set, with_fewer_documents
from msa.evaluation.reader import TextReader
from msa.evaluation.report import as_json, compared, markdown, read_runs
from msa.evaluation.retrieval import (
    QUESTION_BLOCK,
    BM25Retriever,
    DenseRetriever,
    HybridRetriever,
    Retriever,
    SentenceEncoder,
    gold_ranks,
    z_scores,
)
from msa.evaluation.routing import encode_corpus, fuse, layer_scores
from msa.evaluation.runs import run
from msa.evaluation.systems import (
    GoldSystem,
    MemorySystem,
    ReaderSystem,
    System,
    bank_documents,
)
from msa.inference.options import AskOptions
from msa.memory.latent import LatentMemory
from msa.model.identity import model_fingerprints
from msa.model.loading import load as load_checkpoint
from msa.ops.routing import QUERY_REDUCTIONS

DEPTHS = (1, 5, 16)
SYSTEMS = (
    "bm25-1",
    "bm25-2",
    "bm25-4",
    "minilm-1",
    "minilm-4",
    "msa:lexical_weight=0",
    "msa",
    "gold",
)
ABLATIONS = {
    "@documents": tuple(
        f"msa:max_rounds=1,min_documents_per_round={n},max_documents_per_round={n}"
        for n in (1, 2, 4)
    ),
    "@interleave": ("msa", "msa:max_rounds=1"),
    "@text": ("gold", "gold+memory", "closed+memory", "closed"),
    "@layers": (),  # one per routing layer of the model
}
RETRIEVAL_AUGMENTED = ("bm25-1", "bm25-2", "bm25-4", "minilm-1", "minilm-4")
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
    loaded, about = load(args) if args.model else (None, {})
    pools = loaded and loaded.model.config.query_reduction == "pooled"
    if not pools and "pooled" in (args.reductions or []):
        raise InputError("--reductions pooled: expected a --model that was made to pool")
    encoder = SentenceEncoder(args.minilm) if args.minilm else None
    results: dict[str, object] = {"about": provenance(args.seed, **about)}
    for folder in args.sets:
        questions = read(folder, args)
        name = questions.name + (" + title hints" if args.title_hints else "")
        if args.documents:
            questions = with_fewer_documents(questions, args.documents, args.seed)
            name += f", {len(questions.documents):,} documents only"
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
            for reduction in args.reductions or [loaded.model.config.query_reduction]:
                loaded.model.config.query_reduction = reduction
                name = f"MSA, {reduction}" if args.reductions else "MSA"
                found = layer_scores(*loaded, states, block)
                scores |= routings(name, found, scores["BM25"], args)
        rows = gold[start : start + QUESTION_BLOCK]
        yield {system: (found, rows) for system, found in scores.items()}
        asked(start + len(block), len(texts))


def routings(
    name: str, layers: dict[int, Scores], bm25: Scores, args: argparse.Namespace
) -> dict[str, Scores]:
    """Rankings by single layers, by all of them, and by all of them with the words."""
    options = AskOptions.load(args.model)
    weights = args.weights or options.layer_weights or dict.fromkeys(layers, 1 / len(layers))
    fused = fuse(layers, weights)
    found = {f"{name}, layer {layer}": scores for layer, scores in layers.items()}
    found[f"{name}, fused"] = fused
    found[f"{name}, z-scores"] = fuse(layers, normalized=True)
    found[f"{name}, z-scores + BM25"] = z_scores(fused) + z_scores(bm25)
    lexical = options.lexical_weight if args.lexical_weight is None else args.lexical_weight
    if lexical > 0:
        best = bm25.max(axis=1, keepdims=True).clip(min=1e-9)
        found[f"{name}, words x {lexical:g}"] = fused + lexical * bm25 / best
    return found


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


# Answers


def answers(args: argparse.Namespace) -> None:
    """Ask every system the same questions; a file of JSON lines per set and system, resumable."""
    loaded, about = load(args)
    for folder in args.sets:
        questions = read(folder, args)
        bench = Bench(loaded, questions, args)
        for spec in expanded(args.systems, loaded.model.config.routing_layers):
            parts = [questions.name, questions.split, spec, "hidden" if args.hide_gold else ""]
            name = ".".join("".join(c if c.isalnum() else "-" for c in p) for p in parts if p)
            done = run(
                Path(args.output, f"{name}.jsonl"),
                {
                    **provenance(args.seed, **about),
                    "set": questions.name,
                    "split": questions.split,
                    "data": questions.data_hash,
                    "documents": len(questions.documents),
                    "title_hints": args.title_hints,
                    "system": spec,
                },
                lambda spec=spec, bench=bench: bench.system(spec),
                questions.questions,
                batch_size=args.batch_size,
                hide_gold=args.hide_gold,
                progress=progress(questions.name, spec, "questions"),
            )
            scores = {key: sum(row[key] for row in done.rows) for key in ("em", "f1", "refused")}
            shares = ", ".join(f"{k} {100 * v / len(done.rows):.1f}" for k, v in scores.items())
            print(f"{name}: {len(done.rows)} questions, {shares}", flush=True)


def expanded(systems: Sequence[str], layers: Sequence[int]) -> list[str]:
    """Systems by name, groups of ablations spelt out, none twice."""
    groups = ABLATIONS | {
        "@layers": tuple(f'msa:layer_weights={{"{layer}": 1}},lexical_weight=0' for layer in layers)
    }
    unknown = [s for s in systems if s.startswith("@") and s not in groups]
    if unknown:
        raise InputError(f"no group {unknown[0]!r}; there are: {', '.join(groups)}")
    return list(dict.fromkeys(one for s in systems for one in groups.get(s, (s,))))


class Bench:
    """One set's systems; what they share is made once, and only when it is needed."""

    def __init__(self, loaded, questions: QuestionSet, args: argparse.Namespace) -> None:
        self.loaded, self.set, self.args = loaded, questions, args

    def system(self, spec: str) -> System:
        """The system of that name."""
        name, _, options = spec.partition(":")
        if name == "msa":
            return MemorySystem(self.engine, self.set.documents, ask_options(options))
        name, _, more = name.partition("+")
        kind, _, depth = name.partition("-")
        if not options and more in ("", "memory"):
            reader = self.reader(bool(more))
            if name in ("gold", "closed"):
                return GoldSystem(reader, self.set.documents, None if name == "gold" else 0)
            if kind in ("bm25", "minilm", "hybrid") and depth.isdecimal() and int(depth):
                retriever: Retriever = getattr(self, kind)
                return ReaderSystem(reader, retriever, self.set.documents, int(depth))
        raise InputError(
            f"system {spec!r}: expected bm25-K, minilm-K, hybrid-K, gold or closed, perhaps with "
            "+memory behind it, or msa:OPTION=VALUE,..."
        )

    def reader(self, with_memory: bool = False) -> TextReader:
        """The model's reader; with the whole corpus as its memory if asked for."""
        memory = LatentMemory(self.states, self.top_k) if with_memory else None
        return TextReader(*self.loaded, max_new_tokens=self.args.max_new_tokens, memory=memory)

    @property
    def top_k(self) -> int:
        """Documents that a layer selects."""
        return self.loaded.model.config.top_k_documents

    @cached_property
    def bm25(self) -> Retriever:
        """Over the whole corpus."""
        return BM25Retriever(self.set.documents)

    @cached_property
    def minilm(self) -> Retriever:
        """Over the whole corpus; its embeddings are cached on disk."""
        if not self.args.minilm:
            raise InputError("give --minilm FOLDER, the folder of all-MiniLM-L6-v2")
        encoder = SentenceEncoder(self.args.minilm)
        tell = progress(self.set.name, "MiniLM")
        return DenseRetriever(encoder, self.set.documents, self.args.cache, tell)

    @cached_property
    def hybrid(self) -> Retriever:
        """Z-scores of the two, added."""
        return HybridRetriever([self.bm25, self.minilm])

    @cached_property
    def states(self):
        """Latent states of the whole corpus, in memory."""
        tell = progress(self.set.name, "encoding", "tokens")
        return encode_corpus(
            *self.loaded, self.set.documents, batch_tokens=self.args.batch_tokens, progress=tell
        )

    @cached_property
    def engine(self) -> MemoryEngine:
        """Over a bank of the whole corpus, kept between runs under the hash of data and model."""
        model = model_fingerprints(self.loaded.model)[0][:16]
        folder = Path(self.args.banks, f"{self.set.name}-{self.set.data_hash}-{model}")
        exists = (folder / "bank.json").is_file()
        make = MemoryBank.open if exists else MemoryBank.create
        with make(folder, *self.loaded) as bank:
            if bank.info().num_ids < len(self.set.documents):
                tell = progress(self.set.name, "indexing")
                bank.add(
                    bank_documents(self.set.documents),
                    on_duplicate="skip",
                    progress=lambda state: tell(state.documents, len(self.set.documents)),
                )
        model_, tokenizer, template = self.loaded
        return MemoryEngine(model_, tokenizer, folder, template=template)


def ask_options(text: str) -> dict[str, object]:
    """ "max_rounds=1,lexical_weight=0" -> options of `MemoryEngine.ask`."""
    found = {}
    for part in re.split(r",(?=\w+=)", text) if text else []:
        name, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"option {part!r}: expected NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError as error:
            raise InputError(f"option {part!r}: {value!r} is no JSON value") from error
    return found


def report(args: argparse.Namespace) -> None:
    """Write real_documents.md and .json from a folder of runs."""
    runs = read_runs(args.runs)
    table = markdown(runs, args.seed)
    lines = []
    for one, others, title in (
        ("msa", RETRIEVAL_AUGMENTED, "F1 of `msa` less the best retrieval-augmented reader"),
        ("msa", ["msa:max_rounds=1"], "F1 of `msa` less the same in one round"),
    ):
        found = compared(runs, one, others, "f1", args.seed)
        if found:
            lines += [f"## {title}\n", "| set | against | difference | 95% interval |"]
            lines += ["|---|---|---|---|"]
            lines += [
                f"| {name} | {best} | {100 * by.mean:+.1f} "
                f"| {100 * by.low:+.1f} to {100 * by.high:+.1f} |"
                for name, (best, by) in found.items()
            ]
            lines.append("")
    head = "# Real questions over real documents\n\nWritten by `python benchmarks/real_documents.py"
    text = f"{head} report`.\n\n{table}\n" + "\n".join(lines)
    if args.output:
        Path(args.output).mkdir(parents=True, exist_ok=True)
        Path(args.output, "real_documents.md").write_text(text, encoding="utf-8")
        data = json.dumps(as_json(runs, args.seed), indent=1) + "\n"
        Path(args.output, "real_documents.json").write_text(data, encoding="utf-8")
    print(text)


# What the commands share


def load(args: argparse.Namespace):
    """The checkpoint, and what is to be said about it."""
    loaded = load_checkpoint(args.model, dtype=args.dtype)
    for name, value in ask_options(args.config).items():
        if not hasattr(loaded.model.config, name):
            raise InputError(f"--config {name}: the model's configuration has no such field")
        setattr(loaded.model.config, name, value)
    about = {"model": model_fingerprints(loaded.model)[0][:16], "dtype": args.dtype}
    return loaded, about | ({"config": args.config} if args.config else {})


def read(folder: str, args: argparse.Namespace) -> QuestionSet:
    """The set, with as many questions as asked for."""
    return read_question_set(
        folder, args.split, count=args.questions, seed=args.seed, title_hints=args.title_hints
    )


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
    """ "2:1,6:0.5" -> layer -> weight."""
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
    common.add_argument(
        "--config", default="", help='fields of the model to change: query_reduction="max"'
    )
    common.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    common.add_argument("--minilm", help="folder of all-MiniLM-L6-v2, or of another such model")
    common.add_argument("--cache", default=str(Path.home() / ".cache/msa-memory/evaluation"))
    common.add_argument("--batch-tokens", type=int, default=4096, help="encoded at once")
    common.add_argument("--threads", type=int, help="by default torch's own choice")
    command = commands.add_parser("retrieval", parents=[common], help=retrieval.__doc__)
    command.add_argument("--reductions", nargs="+", choices=QUERY_REDUCTIONS, help="compare these")
    command.add_argument(
        "--weights", type=weights, help="of the layers, as 2:1,6:0.5; by default the checkpoint's"
    )
    command.add_argument("--lexical-weight", type=float, help="by default the checkpoint's")
    command.add_argument("--documents", type=int, help="of a smaller corpus, for a quick look")
    command.add_argument("--output", help="JSON file; results of other sets in it are kept")
    command.set_defaults(run=retrieval)
    command = commands.add_parser("answers", parents=[common], help=answers.__doc__)
    command.add_argument("--systems", nargs="+", default=list(SYSTEMS))
    command.add_argument("--hide-gold", action="store_true", help="ask without the gold documents")
    command.add_argument("--batch-size", type=int, default=16, help="questions asked together")
    command.add_argument("--max-new-tokens", type=int, default=32, help="of a reader's answer")
    command.add_argument("--banks", help="folder of the banks; by default OUTPUT/banks")
    command.add_argument("--output", required=True, help="folder of the runs")
    command.set_defaults(run=answers)
    command = commands.add_parser("report", help=report.__doc__)
    command.add_argument("runs", help="folder of the runs")
    command.add_argument("--output", help="such as docs/results")
    command.add_argument("--seed", type=int, default=7, help="of the bootstrap")
    command.set_defaults(run=report, threads=None)
    args = parser.parse_args()
    if args.run is answers and args.banks is None:
        args.banks = str(Path(args.output, "banks"))
    return args


if __name__ == "__main__":
    main()
