"""Choose how a checkpoint is asked by default, on training questions: writes `ask_options.json`.

    python tools/calibrate_options.py MODEL FOLDER... [--questions 60] [--refusals 40]

FOLDERs are question sets with a train split (`msa.training.question_sets`). Of each, some questions
are drawn; the documents that training questions need are the memory. Chosen are:

- `lexical_weight` and `layer_weights`, for the mean over the sets of recall at 1, 5 and 16;
- `refusal_weights` and `refusal_threshold`: a logistic regression that tells questions whose gold
  documents are there from the same questions when these are taken out, and the threshold at which
  `--wrongly` of the former are refused.

Nothing is chosen on dev or test questions.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from msa import MemoryBank, MemoryEngine, load
from msa.inference.fusion import fuse
from msa.inference.options import (
    BIAS,
    REFUSAL_LOGIT,
    ROUTING_MARGIN,
    ROUTING_SCORE,
    AskOptions,
)
from msa.inference.refusal import refusal_score
from msa.inference.trace import Candidates
from msa.training.question_sets import QuestionSet, TrainingQuestion

DEPTHS = (1, 5, 16)
LEXICAL_WEIGHTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)
LAYER_STEPS = (0.5, 0.75, 1.0, 1.5, 2.0)
FEATURES = (REFUSAL_LOGIT, ROUTING_SCORE, ROUTING_MARGIN)  # known before the answer is written


@dataclass(frozen=True, slots=True)
class Asked:
    """A question's candidates, and the numbers of its gold documents."""

    candidates: Candidates
    gold: frozenset[int]


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    checkpoint = load(args.model)
    options = checkpoint.ask_options.with_changes(refusal_threshold=1.0, refusal_weights=None)
    asked: list[list[Asked]] = []
    present: list[dict[str, float]] = []
    absent: list[dict[str, float]] = []
    for folder in args.folders:
        questions = QuestionSet.load(folder, on_error="skip")
        rng = random.Random(f"{args.seed}/{questions.name}")
        able = [q for q in questions.questions if q.gold and q.answers and not q.unanswerable]
        drawn = rng.sample(able, min(args.questions, len(able)))
        with tempfile.TemporaryDirectory() as place:
            engine = opened(checkpoint, questions, drawn, rng, args.documents, place, options)
            asked.append(routed(engine, drawn))
            some = drawn[: args.refusals]
            present += features(engine, some)
            engine.bank.delete({key for q in some for key in q.gold})
            absent += features(engine, some)
            engine.bank.close()
        print(f"{questions.name}: {len(drawn)} questions", flush=True)
    lexical, layers = ranking(asked)
    weights, threshold = refusals(present, absent, args.wrongly)
    chosen = checkpoint.ask_options.with_changes(
        lexical_weight=lexical,
        layer_weights=layers,
        refusal_weights=weights,
        refusal_threshold=threshold,
    )
    chosen.save(args.output or args.model)
    print(chosen)


def opened(
    checkpoint, questions: QuestionSet, drawn, rng, documents: int, place: str, options: AskOptions
) -> MemoryEngine:
    """An engine over a bank of the drawn questions' documents and others that training needs."""
    wanted = dict.fromkeys(key for q in drawn for key in q.gold)
    others = list(dict.fromkeys(key for q in questions.questions for key in q.gold))
    rng.shuffle(others)
    for key in others:
        if len(wanted) >= documents:
            break
        wanted.setdefault(key)
    bank = MemoryBank.create(Path(place, "bank"), checkpoint)
    bank.add([questions.documents[key] for key in wanted])
    return MemoryEngine(bank, options=options)


def routed(engine: MemoryEngine, drawn: Sequence[TrainingQuestion]) -> list[Asked]:
    """Candidates of round 1, words included."""
    found = engine.candidates([q.question for q in drawn], lexical_weight=1.0)
    numbers = [
        frozenset(engine.bank.get(key).number for key in q.gold)  # type: ignore[union-attr]
        for q in drawn
    ]
    return [Asked(c, gold) for c, gold in zip(found, numbers, strict=True)]


def features(engine: MemoryEngine, drawn: Sequence[TrainingQuestion]) -> list[dict[str, float]]:
    """What speaks for a refusal, of every question."""
    return [dict(a.scores) for a in engine.ask([q.question for q in drawn])]


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
            hits += sum(question.gold <= set(ranked[:k]) for k in DEPTHS if k >= len(question.gold))
            hits += sum(
                len(question.gold & set(ranked[:k])) / k for k in DEPTHS if k < len(question.gold)
            )
        means.append(hits / len(DEPTHS) / len(questions))
    return sum(means) / len(means)


def ranking(asked: Sequence[Sequence[Asked]]) -> tuple[float, dict[int, float]]:
    """Weights of words and layers, one coordinate after the other."""
    indices = sorted(asked[0][0].candidates.layers)
    layers = dict.fromkeys(indices, 1.0 / len(indices))
    lexical = 0.0
    for _ in range(2):
        lexical = max(LEXICAL_WEIGHTS, key=lambda w: quality(asked, w, layers))
        for layer in indices:
            tried = [{**layers, layer: layers[layer] * step} for step in LAYER_STEPS]
            layers = max(tried, key=lambda some: quality(asked, lexical, some))
    for w in LEXICAL_WEIGHTS:
        print(f"lexical_weight {w}: {100 * quality(asked, w, layers):.2f}")
    return lexical, {i: round(w, 4) for i, w in layers.items()}


def refusals(
    present: Sequence[dict[str, float]], absent: Sequence[dict[str, float]], wrongly: float
) -> tuple[dict[str, float], float]:
    """Weights of the features by logistic regression, and the threshold."""
    rows = [*present, *absent]
    x = torch.tensor([[row.get(name, 0.0) for name in FEATURES] for row in rows]).double()
    y = torch.tensor([0.0] * len(present) + [1.0] * len(absent)).double()
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-9)
    design = torch.cat([(x - mean) / scale, torch.ones(len(x), 1).double()], 1)
    beta = torch.zeros(design.shape[1]).double()
    for _ in range(50):  # Newton's method, with a little ridge
        p = (design @ beta).sigmoid()
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + 1e-2 * torch.eye(len(beta))
        beta -= torch.linalg.solve(hessian, design.T @ (p - y) + 1e-2 * beta)
    factors = beta[:-1] / scale
    weights = {name: round(float(w), 5) for name, w in zip(FEATURES, factors, strict=True)}
    weights[BIAS] = round(float(beta[-1] - (factors * mean).sum()), 5)
    scores = sorted((refusal_score(row, weights) for row in present), reverse=True)
    threshold = round(scores[int(wrongly * len(scores))], 4)
    refused = sum(refusal_score(row, weights) > threshold for row in absent)
    kept = sum(refusal_score(row, weights) > threshold for row in present)
    print(
        f"refused {refused} of {len(absent)} without their documents, {kept} of {len(present)} "
        f"with them; weights {weights}, threshold {threshold}"
    )
    return weights, threshold


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a checkpoint or an adapter")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="question sets")
    parser.add_argument("--questions", type=int, default=60, help="of each set")
    parser.add_argument("--refusals", type=int, default=40, help="of these, asked for refusals")
    parser.add_argument("--documents", type=int, default=600, help="of each set, about")
    parser.add_argument("--wrongly", type=float, default=0.04, help="share wrongly refused")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", help="folder to write to; by default that of the model")
    return parser.parse_args()


if __name__ == "__main__":
    main()
