"""Routers alone: as a stage of a run that can go on, and on the texts of a bank."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import make_tiny_model
from msa import Document, MemoryBank, load
from msa.errors import ConfigError, InputError
from msa.inference.options import AskOptions
from msa.model.checkpoint import Checkpoint
from msa.text.prompts import PromptTemplate
from msa.training import router_stage
from msa.training.config import load_config
from msa.training.router_settings import RouterSettings
from msa.training.router_stage import train_on_bank
from msa.training.run import train

pytest.importorskip("bm25s")
SHORT = {"epochs": 1, "queries": 16, "documents": 32, "held_out": 0.3, "negatives": 2}


def documents(count: int) -> list[Document]:
    words = ["timber", "harbor", "fortress", "railway", "school", "market", "river", "bridge"]
    texts = (
        f"The {words[i % 8]} of town {i} was built in {1700 + i} by many men. Nobody knows who "
        f"paid for the {words[(i + 3) % 8]} of town {i} at that time. It stands to this day."
        for i in range(count)
    )
    return [Document(f"d{i}", text, f"Town {i}") for i, text in enumerate(texts)]


@pytest.fixture
def checkpoint(tiny_tokenizer) -> Checkpoint:
    model = make_tiny_model(query_reduction="pooled", routing_layers=[0, 1], num_hidden_layers=2)
    options = AskOptions(max_rounds=2)
    return Checkpoint(model, tiny_tokenizer, PromptTemplate(), options, "tiny")


@pytest.fixture
def filled(tmp_path, checkpoint):
    with MemoryBank.create(tmp_path / "bank", checkpoint) as bank:
        bank.add(documents(70))
        yield bank


def save(checkpoint: Checkpoint, folder) -> None:
    checkpoint.model.save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)
    checkpoint.template.save(folder)


def test_routers_are_learned_from_the_texts_of_a_bank(tmp_path, checkpoint, filled):
    before = {k: v.clone() for k, v in checkpoint.model.state_dict().items()}
    report = train_on_bank(checkpoint, filled, tmp_path / "new", settings=RouterSettings(**SHORT))
    assert report.train_queries > 70  # sentences, titles and questions
    made = load(tmp_path / "new", dtype="float32")
    changed = {k for k, v in made.model.state_dict().items() if not torch.equal(v, before[k])}
    assert all("router_" in name for name in changed)
    assert bool(changed) == (report.best_epoch > 0)
    assert made.ask_options.max_rounds == 2
    assert not (tmp_path / "new" / "states").exists()
    with pytest.raises(InputError, match="holds a model already"):
        train_on_bank(checkpoint, filled, tmp_path / "new")


def test_a_bank_of_few_documents_is_refused(tmp_path, checkpoint, bank):
    with pytest.raises(InputError, match="holds 0 documents; routers learn from at least 64"):
        train_on_bank(checkpoint, bank, tmp_path / "new")


def test_a_part_of_a_bank_is_drawn_by_the_seed(filled, monkeypatch):
    monkeypatch.setattr(router_stage, "PAGE", 8)
    some = [d.id for d in router_stage._sample(filled, 20, 1)]
    assert len(set(some)) == 20
    assert some == [d.id for d in router_stage._sample(filled, 20, 1)]
    assert some != [d.id for d in router_stage._sample(filled, 20, 2)]
    assert [d.id for d in router_stage._sample(filled, 99, 1)] == [f"d{i}" for i in range(70)]


def test_a_stage_of_routers_runs_and_is_not_run_again(tmp_path, checkpoint, monkeypatch):
    save(checkpoint, tmp_path / "start")
    texts = tmp_path / "texts.jsonl"
    rows = [{"id": d.id, "title": d.title, "text": d.text} for d in documents(40)]
    texts.write_text("\n".join(map(json.dumps, [*rows, {"id": "empty"}])), encoding="utf-8")
    stage = {"kind": "routers", "name": "routers", "texts": [str(texts)], "training": SHORT}
    config = {"start_from": str(tmp_path / "start"), "stages": [stage]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    said = []
    folder = train(tmp_path / "c.yaml", tmp_path / "run", progress=lambda *v: said.append(v))
    assert ("routers: epoch", 1, 1, {}) in said
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["stage"] == "routers"
    assert set(row["after"]["all"]) == {"1", "5", "16"}
    assert "texts.jsonl:41" in row["texts_left_out"][0]
    done = load_file(tmp_path / "run" / "routers" / "done" / "model.safetensors")
    made = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.router_k_proj.0.weight"
    assert torch.equal(done[name], made[name])
    monkeypatch.setattr(
        "msa.training.run._Run._train_routers", None
    )  # would fail if it were called
    again = load_file(train(tmp_path / "c.yaml", tmp_path / "run") / "model.safetensors")
    assert torch.equal(again[name], made[name])


def write_stage(tmp_path, **values):
    stage = {"kind": "routers", "name": "r", "texts": ["a.jsonl"], **values}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"start_from": "x", "stages": [stage]}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"texts": []}, "stage 'r' trains routers on nothing"),
        ({"passages": 0}, "passages: expected 1 or more, got 0"),
        ({"training": {"epochs": 0}}, r"training\.epochs: expected 1 or more, got 0"),
        ({"states": {"dtype": "int8"}}, r"states\.dtype: expected .*, got 'int8'"),
        ({"pairs": {"removed": 3.0}}, r"pairs\.removed: expected 1.0 or less, got 3.0"),
        ({"training": {"epoch": 1}}, "unknown key 'epoch'"),
        ({"kind": "router"}, r"kind: expected one of .*, got 'router'"),
    ],
)
def test_a_stage_that_cannot_be_run_is_said_in_one_line(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write_stage(tmp_path, **values))


def test_the_command_hands_on_what_it_is_given(tmp_path, monkeypatch, capsys):
    from msa.cli import train as command

    report = SimpleNamespace(
        before={"all": {1: 0.1, 16: 0.5}},
        after={"all": {1: 0.2, 16: 0.75}},
        held_out_queries=9,
        skipped_losses=0,
        best_epoch=2,
    )
    given = {}

    def run(checkpoint, bank, folder, **options):
        given.update(options, folder=folder, bank=bank)
        options["progress"]("epoch", 1, 2)
        return report

    monkeypatch.setattr(router_stage, "train_on_bank", run)
    monkeypatch.setattr(command, "open_bank", lambda path: f"bank {path}")
    monkeypatch.setattr(command, "load_model", lambda *_: None)
    command.train(routers_only=True, bank=tmp_path / "notes", passages=7, seed=3)
    printed = capsys.readouterr().out
    assert given["folder"] == tmp_path / "notes-model"
    assert (given["passages"], given["settings"].seed) == (7, 3)
    assert "10.0% and 50.0% before, 20.0% and 75.0% after" in printed
    assert f"--model {tmp_path / 'notes-model'}" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give a CONFIG.yaml, or --routers-only"),
        ({"routers_only": True}, "needs the bank"),
        ({"config": "c.yaml"}, "name the folder of the run"),
        ({"routers_only": True, "changes": ["seed=3"]}, "changes a CONFIG.yaml"),
    ],
)
def test_the_command_says_what_is_missing(options, message):
    import typer

    from msa.cli.train import train as command

    with pytest.raises(typer.BadParameter, match=message):
        command(**options)
