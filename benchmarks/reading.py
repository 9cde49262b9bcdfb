"""How well a model reads what it is given: questions beside their gold documents, nothing to find.

    python benchmarks/reading.py ADAPTER... --sets FOLDER... [--questions 400] [--seed 5]

ADAPTER is what `msa.load` takes: a name, a run's `adapter/` or a checkpoint. Of every set so many
training questions are drawn whose gold documents have less than 4,000 characters together. Each is
put as in a last round, without a memory; the answer's tokens are given one by one.
*loss* is the mean over these tokens, *exact* the share of questions of which every token is the
likeliest one: what greedy decoding would have to write. Hold the questions out of training.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import torch
from torch import nn

import msa
from msa.model.modeling_msa import MSAForCausalLM, Step
from msa.text.prompts import PromptEncoder, Reading
from msa.training.question_sets import QuestionSet
from msa.training.samples import IGNORED, Sample, by_length, collate

MOST_CHARACTERS = 4_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="ADAPTER")
    parser.add_argument("--sets", nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    sets = [QuestionSet.load(folder, on_error="skip") for folder in args.sets]
    for name in args.models:
        checkpoint = msa.load(name)
        prompts = PromptEncoder(checkpoint.tokenizer, checkpoint.template)
        for questions in sets:
            samples = last_rounds(questions, prompts, args.questions, args.seed)
            loss, exact = read(checkpoint.model, samples)
            print(f"{name}: {questions.name}, {len(samples)}: loss {loss:.3f}, exact {exact:.1f}%")


def last_rounds(
    questions: QuestionSet, prompts: PromptEncoder, count: int, seed: int
) -> list[Sample]:
    """Questions behind which their gold documents were read, and the answer."""
    rng = random.Random(seed)
    documents = questions.documents
    able = [
        q
        for q in questions.questions
        if q.answers
        and q.gold
        and sum(len(documents[key].content) for key in q.gold) < MOST_CHARACTERS
    ]
    samples = []
    for question in rng.sample(able, min(count, len(able))):
        numbers = rng.sample(range(10, 9_000), len(question.gold))
        texts = [documents[key].content for key in question.gold]
        read = Reading(tuple(zip(numbers, texts, strict=True)))
        context = prompts.context(question.question, [read])
        length = len(context.input_ids)
        sample = Sample(context, [IGNORED] * length, [0.0] * length, [])
        sample.write(prompts.retrieval_end(), 0.0)
        sample.write_answer(prompts, question.question, question.answers[0])
        sample.context.sees_memory = [False] * len(sample.labels)
        sample.context.routes = [False] * len(sample.labels)
        samples.append(sample)
    return samples


@torch.inference_mode()
def read(model: MSAForCausalLM, samples: Sequence[Sample]) -> tuple[float, float]:
    """Mean loss of the answers' tokens, and the percentage of answers that are exact."""
    total = tokens = exact = 0.0
    for part in by_length(samples):
        group = collate(part, 1, model.config.top_k_documents)
        step = Step(
            memory=None, routing_mask=group["routing_mask"], memory_mask=group["memory_mask"]
        )
        embedded = model.model.embed_tokens(group["input_ids"])
        hidden = model.model(embedded, group["position_ids"], step)[:, :-1]
        targets, counts = group["labels"][:, 1:], group["weights"][:, 1:] > 0
        logits = model.lm_head(hidden[counts]).float()
        total += nn.functional.cross_entropy(logits, targets[counts], reduction="sum").item()
        tokens += counts.sum().item()
        right = torch.ones_like(counts)
        right[counts] = logits.argmax(-1) == targets[counts]
        exact += right.all(dim=1).sum().item()
    return total / tokens, 100 * exact / len(samples)


if __name__ == "__main__":
    main()
