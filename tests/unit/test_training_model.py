from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional as F

from msa import MSAConfig
from msa.memory.latent import LatentMemory
from msa.synthetic_worlds import generate_world
from msa.text.prompts import PromptEncoder
from msa.training.config import LossSettings, SampleSettings, WorldSettings
from msa.training.losses import routing_loss
from msa.training.model import MSAForTraining
from msa.training.samples import IGNORED, SampleBuilder

TOP_K = 2
SETTINGS = LossSettings(
    language_model=0.7, routing=0.3, context=0.4, documents=0.2, numbers=0.5, last_token=0.6
)


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    torch.manual_seed(0)
    made = MSAForTraining(
        MSAConfig(
            vocab_size=len(tiny_tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            chunk_size=8,
            top_k_documents=TOP_K,
            routing_layers=[1, 2],
            initializer_range=0.2,
        )
    ).eval()
    made.loss_settings = SETTINGS
    return made


def step_of(tokenizer, **counts):
    samples = SampleSettings(**{"name": 0, "read": 0, "hop": 0, "answer": 0, **counts})
    builder = SampleBuilder(PromptEncoder(tokenizer), TOP_K)
    world = WorldSettings(documents=8, max_document_tokens=120)
    return builder.step(generate_world(2, 8), random.Random(0), world, samples, SETTINGS)


@pytest.fixture(scope="module")
def step(tiny_tokenizer):
    return step_of(tiny_tokenizer, name=3, read=2, hop=1, answer=1, copy=2)


def test_the_loss_is_that_of_inference_row_by_row(model, step):
    """Every row alone, without padding, through the forward pass that answers questions."""
    with torch.no_grad():
        states = model.encode_documents(step["documents"], step["lengths"])
        total = weight = 0.0
        aux, last = [], []
        for group in step["groups"]:
            for row in range(len(group["labels"])):
                length = int((group["labels"][row] != IGNORED).nonzero().max()) + 1
                cut = {n: t[row : row + 1, :length] for n, t in group.items() if n != "positives"}
                memory = LatentMemory(states, TOP_K)
                logits = model(
                    input_ids=cut["input_ids"],
                    position_ids=cut["position_ids"],
                    memory=memory if cut["routing_mask"].any() else None,
                    routing_mask=cut["routing_mask"],
                    memory_mask=cut["memory_mask"],
                ).logits
                losses = F.cross_entropy(
                    logits[0, :-1], cut["labels"][0, 1:], reduction="none", ignore_index=IGNORED
                )
                total += float((losses * cut["weights"][0, 1:]).sum())
                weight += float(cut["weights"][0, 1:].sum())
                right, read = group["positives"][row : row + 1], group["read"][row : row + 1]
                if not right.any():
                    continue
                aux += [
                    routing_loss(s, right, model.temperature, read) for s in memory.scores.values()
                ]
                if read.any():
                    one = torch.zeros_like(cut["routing_mask"])
                    one[0, cut["routing_mask"][0].nonzero().max()] = True
                    memory = LatentMemory(states, TOP_K)
                    model(
                        input_ids=cut["input_ids"],
                        position_ids=cut["position_ids"],
                        memory=_RoutesElsewhere(memory, one, LatentMemory(states, TOP_K)),
                        routing_mask=cut["routing_mask"],
                        memory_mask=cut["memory_mask"],
                    )
                    last += [
                        routing_loss(s, right, model.temperature, read)
                        for s in memory.scores.values()
                    ]
        out = model(**step)
    parts = out["parts"]
    assert parts["language_model"].item() == pytest.approx(total / weight, rel=1e-4)
    assert parts["routing"].item() == pytest.approx(torch.stack(aux).mean().item(), rel=1e-4)
    assert last
    assert parts["last_token"].item() == pytest.approx(torch.stack(last).mean().item(), rel=1e-4)
    weighted = 0.7 * parts["language_model"] + 0.3 * parts["routing"] + 0.6 * parts["last_token"]
    weighted = weighted + 0.2 * parts["documents"] + 0.5 * parts["numbers"]
    assert out["loss"].item() == pytest.approx(weighted.item(), rel=1e-5)


class _RoutesElsewhere:
    """Notes the scores that other tokens would give, and selects by all."""

    def __init__(self, noted, mask, memory):
        self.noted, self.mask, self.memory = noted, mask, memory

    def route(self, layer, vectors, routing_mask):
        self.noted.route(layer, vectors, self.mask)
        return self.memory.route(layer, vectors, routing_mask)

    def content(self, layer, selection):
        return self.memory.content(layer, selection)


def test_the_documents_loss_is_that_of_the_plain_model_without_padding(model, step):
    total = count = 0.0
    with torch.no_grad():
        for ids, length in zip(step["documents"], step["lengths"].tolist(), strict=True):
            alone = ids[None, :length]
            total += float(model(input_ids=alone, labels=alone).loss) * (length - 1)
            count += length - 1
        parts = model(**step)["parts"]
    assert parts["documents"].item() == pytest.approx(total / count, rel=1e-4)


def test_every_part_reaches_the_documents_and_all_weights_are_taught(model, step):
    model.zero_grad()
    model(**step)["loss"].backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_the_number_head_learns_each_documents_own_number(model, step):
    """Numbers of other documents are no answer: shuffling them changes the loss."""
    with torch.no_grad():
        right = model(**step)["parts"]["numbers"]
        wrong = model(**{**step, "digits": step["digits"].roll(1, 0)})["parts"]["numbers"]
    assert right != wrong


@pytest.mark.parametrize("documents", [0.0, 0.2])
def test_a_step_without_questions_can_still_be_taken(model, tiny_tokenizer, documents):
    step = step_of(tiny_tokenizer)
    assert step["groups"] == []
    model.loss_settings = LossSettings(documents=documents)
    try:
        model.zero_grad()
        out = model(**step)
        out["loss"].backward()
    finally:
        model.loss_settings = SETTINGS
    assert torch.isfinite(out["loss"])
    assert (out["loss"].item() > 0) == (documents > 0)


def test_steps_that_only_copy_route_nothing(model, tiny_tokenizer):
    parts = model(**step_of(tiny_tokenizer, copy=3))["parts"]
    assert "routing" not in parts
    assert parts["language_model"] > 0
