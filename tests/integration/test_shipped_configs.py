"""Every file in configs/ trains: some steps on a tiny random backbone, made small by --set."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml

import msa
from conftest import make_tiny_tokenizer
from msa.training.config import load_config
from msa.training.run import train
from training_tools import (
    convert_plain_model,
    rows_of,
    write_plain_model,
    write_question_set,
)

ROOT = Path(__file__).parents[2]
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
TINY = (
    "{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, head_dim: 8, max_position_embeddings: 512, chunk_size: 8, "
    "top_k_documents: 2, routing_layers: [1]}"
)
SMALLER = {
    "worlds": [
        f"model={TINY}",
        "tokenizer={vocab_size: 600, worlds: 5}",
        "real_data={}",
        "compile=false",
        "stages[*].world={documents: 8, max_document_tokens: 60}",
        "stages[*].samples={name: 2, read: 2, hop: 1, answer: 1, copy: 1}",
    ],
    "smollm2-135m": [f"stages[{i}].train_from_layer=2" for i in (1, 5)],
    "qwen3-0.6b": [],
    "qwen3-4b": ["fsdp=false"],
}
QUESTIONS = [
    "stages[*].documents=8",
    "stages[*].max_document_tokens=60",
    "stages[*].route=2",
    "document_batch=3",
]


@pytest.fixture(scope="module", autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for family in ("llama", "qwen3"):
        write_plain_model(folder / f"{family}-plain", make_tiny_tokenizer(), family)
        convert_plain_model(folder / f"{family}-plain", folder / family)
    write_question_set(folder / "persons")
    return folder


def test_every_shipped_config_is_tried():
    assert SMALLER.keys() == CONFIGS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_trains(name, data, tmp_path):
    changes = ["stages[*].steps=2", "threads=1", "log_steps=1", *SMALLER[name]]
    given = load_config(CONFIGS[name])
    if given.start_from:
        family = "qwen3" if name.startswith("qwen3") else "llama"
        changes += [f"start_from={data / family}", f"question_sets=[{data / 'persons'}]"]
        if name.startswith("qwen3"):
            changes += QUESTIONS
        else:
            changes += QUESTIONS[:2]
    told = []
    model = train(CONFIGS[name], tmp_path / "run", changes, progress=lambda *a: told.append(a[:3]))
    stages = [stage.name for stage in given.stages]
    assert told == [(stage, step, 2) for stage in stages for step in (1, 2)]
    rows = rows_of(tmp_path / "run")
    assert all(math.isfinite(row["loss"]) and not row["skipped"] for row in rows)
    assert all(math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in rows)
    assert msa.load(model).model.config.routing_layers
    assert (tmp_path / "run" / "adapter").is_dir() == (given.adapter is not None)


def test_the_config_that_was_changed_is_kept_and_goes_on_by_the_same_command(data, tmp_path):
    changes = ["stages[*].steps=1", "threads=1", *SMALLER["qwen3-0.6b"], *QUESTIONS]
    changes += [f"start_from={data / 'qwen3'}", f"question_sets=[{data / 'persons'}]"]
    for _ in range(2):
        train(CONFIGS["qwen3-0.6b"], tmp_path / "run", changes)
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["start_from"] == str(data / "qwen3")
    assert [stage["documents"] for stage in kept["stages"]] == [8, 8, 8]
    assert kept["bfloat16"] is True
    train(tmp_path / "run" / "config.yaml", tmp_path / "run")  # the same run, by its own file
    with pytest.raises(msa.errors.TrainingError, match="as it was changed by --set"):
        train(CONFIGS["qwen3-0.6b"], tmp_path / "run", [*changes, "seed=1"])


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-4b"])
def test_the_papers_schedule(name):
    """A warm-up for the routers, then the language model; 8k, then 64k tokens of memory."""
    config = load_config(CONFIGS[name])
    tokens = [stage.documents * stage.max_document_tokens for stage in config.stages]
    assert [round(n / 1024) for n in tokens] == [8, 8, 64]
    weights = [(s.losses.language_model, s.losses.routing) for s in config.stages]
    assert weights == [(0.1, 1.0), (1.0, 0.1), (1.0, 0.1)]
    assert [s.learning_rate for s in config.stages] == [1e-4, 6e-6, 6e-6]
    assert config.bfloat16
    assert config.gradient_checkpointing
    assert config.document_batch
    assert config.fsdp == (name == "qwen3-4b")
