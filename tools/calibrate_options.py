"""Choose how a checkpoint is asked by default, on training questions: writes `ask_options.json`.

    python tools/calibrate_options.py MODEL FOLDER[:DOCUMENTS]... [--questions 60] [--refusals 40]

FOLDERs are question sets with a train split (`msa.training.question_sets`), best of questions that
the model was not trained on. Of each, some questions are drawn; the memory holds the documents that
they need and others of the set, DOCUMENTS in all. Chosen are:

- `layer_weights`: one over the spread of a layer's scores, so that none is louder than another;
- `lexical_weight`, for the mean over the sets of recall at 1, 5 and 16;
- `judge_weight`, with `--judged` documents, for the share of questions with a right one first; of
  weights that differ by less than half a point, the smallest;
- `evidence_weight`, for the mean F1 over the sets: of weights that differ by less than half a point
  the smallest;
- `refusal_weights` and `refusal_threshold`: a logistic regression that tells questions whose gold
  documents are there from the same questions when these are taken out, and the threshold at which
  `--wrongly` of the former are refused; others are printed with what they refuse;
- `end_bias` and `end_weight`: a logistic regression, over the rounds after the first, that tells
  those in which a gold document that is not read stands first or second among the unread from the
  others, by the model's own log odds of ending and by how far the best unread document leads;
- `max_rounds` and the documents of a round, for the mean F1 over the sets: of ways that differ by
  less than a point, the one that reads less.

With `--keep` the ranking, the way to read and evidence stay as the checkpoint has them, and the
rest is chosen. Nothing is chosen on dev or test questions.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from msa import MemoryBank, MemoryEngine, load
from msa.evaluation.metrics import token_f1
from msa.inference.fusion import fuse, judgment, lead
from msa.inference.options import (
    ANSWER_COVERAGE,
    BIAS,
    COVERAGE,
    REFUSAL_LOGIT,
    AskOptions,
)
from msa.inference.refusal import refusal_score
from msa.inference.trace import Candidates
from msa.model.checkpoint import Checkpoint
from msa.training.question_sets import QuestionSet, TrainingQuestion
from msa.types import Answer

DEPTHS = (1, 5, 16)
LEXICAL_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.2, 1.5, 2.0, 3.0)
EVIDENCE_WEIGHTS = (0.0, 2.0, 4.0, 6.0, 8.0, 10.0)
WRONGLY = (0.05, 0.07, 0.1, 0.15)
JUDGE_WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
# Rounds, and the least and most documents of one: from little to much reading.
READING = ((1, 1, 1), (1, 1, 4), (2, 1, 2), (2, 1, 4), (1, 2, 2), (1, 2, 4), (2, 2, 4))
WORTH_MORE = 1.0  # F1, in percent
# Not the margin between the best documents: in a larger bank than these it is smaller for every
# question.
FEATURES = (REFUSAL_LOGIT, COVERAGE, ANSWER_COVERAGE)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question's candidates, and the numbers of each of its gold documents (more when split)."""

    candidates: Candidates
    gold: Sequence[frozenset[int]]


@dataclass(frozen=True, slots=True)
class Drawn:
    """Questions of a set, and an engine over a bank that holds their documents."""

    engine: MemoryEngine
    questions: Sequence[TrainingQuestion]


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    checkpoint = load(args.model)
    with tempfile.TemporaryDirectory() as place:
        sets = [drawn_set(folder, args, checkpoint, place) for folder in args.folders]
        options = checkpoint.ask_options.with_changes(refusal_threshold=1.0)
        if not args.keep:
            lexical, layers = ranking([routed(one) for one in sets])
            options = options.with_changes(lexical_weight=lexical, layer_weights=layers)
        if args.judged > 1:
            weight = judging(sets, options.with_changes(judged_documents=args.judged))
            options = options.with_changes(
                judged_documents=args.judged if weight else 1, judge_weight=weight
            )
        if not args.keep:
            bias, weight = endings(sets, options.with_changes(max_rounds=3), args.readings)
            options = options.with_changes(end_bias=bias, end_weight=weight)
            rounds, least, most = best_way(sets, options, args.readings)
            options = options.with_changes(
                max_rounds=rounds, min_documents_per_round=least, max_documents_per_round=most
            )
            options = options.with_changes(evidence_weight=evidence(sets, options, args.readings))
        weights, threshold = refusals(sets, options, args.refusals, args.wrongly)
    chosen = options.with_changes(refusal_weights=weights, refusal_threshold=threshold)
    chosen.save(args.output or args.model)
    print(chosen)


def drawn_set(folder: str, args: argparse.Namespace, checkpoint: Checkpoint, place: str) -> Drawn:
    """Questions of a set, and a bank of their documents and others."""
    folder, _, count = folder.partition(":")
    questions = QuestionSet.load(folder, on_error="skip")
    rng = random.Random(f"{args.seed}/{questions.name}")
    able = [q for q in questions.questions if q.gold and q.answers and not q.unanswerable]
    drawn = rng.sample(able, min(args.questions, len(able)))
    wanted = dict.fromkeys(key for q in drawn for key in q.gold)
    others = [key for key in questions.documents if key not in wanted]
    missing = int(count or args.documents) - len(wanted)
    wanted |= dict.fromkeys(rng.sample(others, max(0, min(missing, len(others)))))
    bank = MemoryBank.create(Path(place, str(len(os.listdir(place)))), checkpoint)
    bank.add([questions.documents[key] for key in wanted])
    print(f"{questions.name}: {len(drawn)} questions, {len(bank)} documents", flush=True)
    return Drawn(MemoryEngine(bank), drawn)


def routed(one: Drawn) -> list[Asked]:
    """Candidates of round 1, words included: all documents of each layer."""
    bank = one.engine.bank
    found = one.engine.candidates(
        [q.question for q in one.questions], lexical_weight=1.0, candidates=len(bank)
    )
    parts = bank.parts
    numbers = [[frozenset(p.number for p in parts(key)) for key in q.gold] for q in one.questions]
    return [Asked(c, gold) for c, gold in zip(found, numbers, strict=True)]


def ask(one: Drawn, count: int, options: AskOptions) -> list[Answer]:
    """Answers to the first questions of a set, with other options than the checkpoint's."""
    one.engine.options = options
    return one.engine.ask([q.question for q in one.questions[:count]])


def best_way(sets: Sequence[Drawn], options: AskOptions, count: int) -> tuple[int, int, int]:
    """The way to read with the best mean F1, or one that reads less and is about as good."""
    means = []
    for rounds, least, most in READING:
        changed = options.with_changes(
            max_rounds=rounds, min_documents_per_round=least, max_documents_per_round=most
        )
        mean, shares = mean_f1(sets, changed, count)
        means.append(mean)
        print(
            f"rounds, least and most documents {rounds, least, most}: F1 {mean:.1f} "
            f"({', '.join(f'{share:.0f}' for share in shares)})",
            flush=True,
        )
    return next(w for w, m in zip(READING, means, strict=True) if m > max(means) - WORTH_MORE)


def evidence(sets: Sequence[Drawn], options: AskOptions, count: int) -> float:
    """`evidence_weight`."""
    means = {}
    for weight in EVIDENCE_WEIGHTS:
        changed = options.with_changes(evidence_weight=weight)
        means[weight] = mean_f1(sets, changed, count)[0]
        print(f"evidence_weight {weight}: F1 {means[weight]:.1f}", flush=True)
    return next(w for w, mean in means.items() if mean > max(means.values()) - 0.5)


def mean_f1(
    sets: Sequence[Drawn], options: AskOptions, count: int
) -> tuple[float, Sequence[float]]:
    """Mean over the sets in percent, and that of each."""
    shares = []
    for one in sets:
        pairs = zip(ask(one, count, options), one.questions, strict=False)
        scores = [token_f1(answer.text, list(q.answers)) for answer, q in pairs]
        shares.append(100 * sum(scores) / len(scores))
    return sum(shares) / len(shares), shares


def quality(asked: Sequence[Sequence[Asked]], lexical: float, layers: dict[int, float]) -> float:
    """Mean over the sets of the mean recall at the depths; all gold documents must be within."""
    means = []
    for questions in asked:
        hits = 0.0
        for question in questions:
            c = question.candidates
            words = {n: f.lexical for n, f in c.fused.items() if f.lexical is not None}
            ranked = list(
                fuse(
                    c.layers,
                    temperature=0.1,
                    layer_weights=layers,
                    lexical=words,
                    lexical_weight=lexical,
                )
            )
            for k in DEPTHS:
                within = sum(not numbers.isdisjoint(ranked[:k]) for numbers in question.gold)
                needed = len(question.gold)
                hits += within == needed if k >= needed else within / k
        means.append(hits / len(DEPTHS) / len(questions))
    return sum(means) / len(means)


def ranking(asked: Sequence[Sequence[Asked]]) -> tuple[float, dict[int, float]]:
    """Weights of words and layers."""
    layers = {}
    for layer in sorted(asked[0][0].candidates.layers):
        spreads = [
            torch.tensor([score for _, score in question.candidates.layers[layer]]).std()
            for questions in asked
            for question in questions
        ]
        layers[layer] = 1.0 / float(torch.stack(spreads).mean())
    total = sum(layers.values())
    layers = {layer: round(weight / total, 4) for layer, weight in layers.items()}
    found = {w: quality(asked, w, layers) for w in LEXICAL_WEIGHTS}
    for w, recall in found.items():
        print(f"lexical_weight {w}: {100 * recall:.2f}")
    return max(found, key=lambda w: found[w]), layers


def judging(sets: Sequence[Drawn], options: AskOptions) -> float:
    """The weight with which most questions have a right document first, or a smaller as good."""
    trying = options.with_changes(
        judge_weight=0.0, max_rounds=1, max_new_tokens=1, refusal_threshold=None
    )
    shares = dict.fromkeys(JUDGE_WEIGHTS, 0.0)
    for one in sets:
        parts = one.engine.bank.parts  # type: ignore[union-attr]
        answers = ask(one, len(one.questions), trying)
        for answer, question in zip(answers, one.questions, strict=True):
            gold = {part.number for key in question.gold for part in parts(key)}
            tried = [d for d in answer.rounds[0].ranked if d.judged is not None]
            for weight in JUDGE_WEIGHTS:
                best = max(
                    tried or answer.rounds[0].ranked[:1],
                    key=lambda d: d.score + weight * judgment(d.judged or 0.0),
                )
                shares[weight] += (best.number in gold) / len(one.questions) / len(sets)
    for weight, share in shares.items():
        print(f"judge_weight {weight}: {100 * share:.1f}", flush=True)
    return next(w for w, share in shares.items() if share > max(shares.values()) - 0.005)


def endings(sets: Sequence[Drawn], options: AskOptions, count: int) -> tuple[float, float]:
    """`end_bias` and `end_weight`."""
    features, go_on = [], []
    for one in sets:
        parts = one.engine.bank.parts  # type: ignore[union-attr]
        answers = ask(one, count, options)
        for answer, question in zip(answers, one.questions, strict=False):
            gold = [{part.number for part in parts(key)} for key in question.gold]
            for found in answer.rounds[1:]:
                read = {c.number for c in answer.citations if c.round < found.index}
                unread = [d.number for d in found.ranked if d.number not in read]
                if found.end_log_odds is None or not unread:
                    continue
                ranked = {d.number: d for d in found.ranked}
                features.append([found.end_log_odds, lead(ranked, read)])
                first = set(unread[:2])
                go_on.append(any(some & first for some in gold if not some & read))
    (by_model, by_lead), bias = logistic(features, go_on)
    if by_model >= 0:  # the model tells nothing about it
        return 0.0, 0.0
    bias, weight = round(bias / by_model, 2), round(max(0.0, -by_lead / by_model), 2)
    print(f"end_bias {bias}, end_weight {weight}: {len(go_on)} rounds, {sum(go_on)} to go on from")
    return bias, weight


def logistic(rows: Sequence[Sequence[float]], labels: Sequence[bool]) -> tuple[list[float], float]:
    """Weights of the features, and the bias, by Newton's method with a little ridge."""
    x, y = torch.tensor(rows).double(), torch.tensor(labels).double()
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-9)
    design = torch.cat([(x - mean) / scale, torch.ones(len(x), 1).double()], 1)
    beta = torch.zeros(design.shape[1]).double()
    for _ in range(50):
        p = (design @ beta).sigmoid()
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + 1e-2 * torch.eye(len(beta))
        beta -= torch.linalg.solve(hessian, design.T @ (p - y) + 1e-2 * beta)
    factors = beta[:-1] / scale
    return factors.tolist(), float(beta[-1] - (factors * mean).sum())


def refusals(
    sets: Sequence[Drawn], options: AskOptions, count: int, wrongly: float
) -> tuple[dict[str, float], float]:
    """Weights of the features by logistic regression, and the threshold.

    The gold documents are deleted from the banks on the way.
    """
    answered = [
        (dict(answer.scores), token_f1(answer.text, list(question.answers)) > 0.5)
        for one in sets
        for answer, question in zip(ask(one, count, options), one.questions, strict=False)
    ]
    present = [row for row, _ in answered]
    for one in sets:
        one.engine.bank.delete({key for q in one.questions[:count] for key in q.gold})
    absent = [dict(a.scores) for one in sets for a in ask(one, count, options)]
    rows = [*present, *absent]
    x = [[row.get(name, 0.0) for name in FEATURES] for row in rows]
    factors, bias = logistic(x, [False] * len(present) + [True] * len(absent))
    weights = {name: round(w, 5) for name, w in zip(FEATURES, factors, strict=True)}
    weights[BIAS] = round(bias, 5)
    print(f"refusals: weights {weights}", flush=True)
    scores = sorted((refusal_score(row, weights) for row in present), reverse=True)
    right = [refusal_score(row, weights) for row, is_right in answered if is_right]
    for share in sorted({*WRONGLY, wrongly}):
        threshold = just_above(scores, share)
        refused = sum(refusal_score(row, weights) > threshold for row in absent)
        kept = sum(score > threshold for score in scores)
        lost = sum(score > threshold for score in right)
        print(
            f"threshold {threshold}: refused {refused} of {len(absent)} without their documents, "
            f"{kept} of {len(present)} with them, {lost} of {len(right)} that are answered rightly"
        )
    return weights, just_above(scores, wrongly)


def just_above(scores: Sequence[float], share: float) -> float:
    """The least threshold, of four digits, that so many of the scores, best first, are above."""
    return math.ceil(1e4 * scores[int(share * len(scores))]) / 1e4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a checkpoint or an adapter")
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="question sets; :N for N documents"
    )
    parser.add_argument("--questions", type=int, default=60, help="of each set")
    parser.add_argument("--refusals", type=int, default=40, help="of these, asked for refusals")
    parser.add_argument("--readings", type=int, default=40, help="of these, asked in every way")
    parser.add_argument("--documents", type=int, default=600, help="of each set, about")
    parser.add_argument("--keep", action="store_true", help="the ranking and the way to read")
    parser.add_argument("--judged", type=int, default=3, help="documents tried; 1 tries none")
    parser.add_argument("--wrongly", type=float, default=0.05, help="share wrongly refused")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", help="folder to write to; by default that of the model")
    return parser.parse_args()


if __name__ == "__main__":
    main()
