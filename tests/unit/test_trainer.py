"""Steps that go wrong: skipped, counted, and an end to it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import TrainerCallback

from msa import MSAConfig
from msa.errors import TrainingError
from msa.text.prompts import PromptEncoder
from msa.training.config import OptimizerSettings, SampleSettings, Stage, TrainingConfig
from msa.training.config import WorldSettings as World
from msa.training.data import RealWorlds, StepDataset
from msa.training.model import MSAForTraining
from msa.training.run import training_arguments
from msa.training.samples import SampleBuilder
from msa.training.trainer import MAX_SKIPPED_IN_A_ROW, MetricsFile, MSATrainer


class Watch(TrainerCallback):
    """Weights and the optimizer's state after every step."""

    def __init__(self):
        self.weights, self.states = [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
        self.states.append(copied(optimizer.state_dict()))


def copied(value):
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items() if k != "param_groups"}
    if isinstance(value, list):
        return [copied(v) for v in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def same(one, two):
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def nan_loss(out, model):
    return {**out, "loss": out["loss"] * torch.nan}


def nan_gradient(out, model):
    """A finite loss, whose gradient is 0 times infinity."""
    return {**out, "loss": out["loss"] + (model.number_head.bias.sum() * 0).abs().sqrt()}


@pytest.fixture
def run(tiny_tokenizer, tmp_path, monkeypatch):
    """Train some steps of which those named are spoilt; metrics and what was watched."""

    def train(spoilt, how=nan_loss, steps=5, muon=True):
        torch.manual_seed(0)
        stage = Stage(
            name="a",
            steps=steps,
            warmup_steps=0,
            world=World(documents=4, max_document_tokens=120),
            samples=SampleSettings(name=2, read=1),
        )
        optimizer = OptimizerSettings(muon=muon)
        config = TrainingConfig(stages=(stage,), optimizer=optimizer, log_steps=1, save_steps=99)
        model = MSAForTraining(
            MSAConfig(
                vocab_size=len(tiny_tokenizer),
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                chunk_size=8,
                top_k_documents=2,
            )
        )
        original, calls = model.forward, []

        def forward(**inputs):
            calls.append(1)
            out = original(**inputs)
            return how(out, model) if len(calls) in spoilt else out

        monkeypatch.setattr(model, "forward", forward)
        watch = Watch()
        builder = SampleBuilder(PromptEncoder(tiny_tokenizer), 2)
        trainer = MSATrainer(
            stage=stage,
            config=config,
            model=model,
            args=training_arguments(config, stage, tmp_path / "a", model),
            train_dataset=StepDataset(stage, builder, RealWorlds(()), 0),
            data_collator=lambda items: items[0],
            callbacks=[MetricsFile(tmp_path / "metrics.jsonl", stage, None), watch],
        )
        trainer.train()
        return watch

    return train


def rows_in(folder):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.parametrize("muon", [True, False], ids=["muon", "adamw"])
@pytest.mark.parametrize("how", [nan_loss, nan_gradient])
def test_a_step_without_a_finite_loss_or_gradient_changes_nothing(run, tmp_path, how, muon):
    watch = run({3}, how, muon=muon)
    assert same(watch.weights[2], watch.weights[1])
    assert same(watch.states[2], watch.states[1])
    for before, after in ((0, 1), (2, 3), (3, 4)):
        assert not same(watch.weights[before], watch.weights[after])
    rows = rows_in(tmp_path)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 0]
    assert ["loss" in row for row in rows] == [True, True, False, True, True]
    assert all(torch.isfinite(t).all() for t in watch.weights[-1].values())


def test_without_a_spoilt_step_none_is_skipped_and_all_are_logged(run, tmp_path):
    run(set())
    rows = rows_in(tmp_path)
    assert [row["skipped"] for row in rows] == [0] * 5
    for row in rows:
        parts = row["language_model"] + 0.1 * row["routing"] + 0.1 * row["documents"]
        assert row["loss"] == pytest.approx(parts, abs=1e-3)


def test_many_in_a_row_end_the_training_in_one_line(run):
    spoilt = set(range(3, 3 + MAX_SKIPPED_IN_A_ROW))
    with pytest.raises(TrainingError, match=r"'a': loss or gradient was not finite in 5 .* step 7"):
        run(spoilt, steps=9)


def test_as_many_with_a_good_one_between_do_not(run):
    run({2, 3, 4, 5, 7, 8, 9, 10}, steps=10)
