"""What the training tests share: a tiny question set, a tiny converted model, interrupted runs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from conftest import SMALL
from msa.model.convert import convert_checkpoint
from msa.training.run import train

COLORS = ("red", "blue", "green", "grey", "amber", "white")
PERSONS = 24
SPARE = 6
"""Documents that no question needs."""


def person_text(i: int) -> str:
    color = COLORS[i % len(COLORS)]
    return f"Person {i} has a {color} lamp of {1800 + i}. A friend is person {(i + 1) % PERSONS}."


def write_question_set(folder: Path) -> Path:
    """Questions of one hop and of two about every person, and documents about nobody."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = [
        {"id": f"p{i}", "title": f"Person {i}", "text": person_text(i)} for i in range(PERSONS)
    ]
    documents += [
        {"id": f"s{i}", "title": f"Spare {i}", "text": f"When was the lamp number {i} made?"}
        for i in range(SPARE)
    ]
    questions = []
    for i in range(PERSONS):
        friend = (i + 1) % PERSONS
        made = f"When was the lamp of person {i} made?"
        whose = f"When was the lamp of the friend of person {i} made?"
        questions += [
            {"question": made, "answers": [str(1800 + i)], "gold": [f"p{i}"]},
            {"question": whose, "answers": [str(1800 + friend)], "gold": [f"p{i}", f"p{friend}"]},
        ]
    for name, rows in (("corpus", documents), ("questions.train", questions)):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def write_plain_model(folder: Path, tokenizer, family: str = "llama", **values) -> Path:
    """A random backbone with its tokenizer."""
    torch.manual_seed(0)
    config, model = FAMILIES[family]
    fields = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 2048, **values}
    model(config(**fields)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def convert_plain_model(plain: Path, folder: Path) -> Path:
    """The MSA checkpoint of a plain model, routing in layers 0 and 1 of 3."""
    texts = [person_text(i) for i in range(64)]
    convert_checkpoint(
        plain,
        folder,
        texts=texts,
        questions=[(f"The lamp of person {i}", i) for i in range(64)],
        layers=[0, 1],
        chunk_size=8,
        top_k_documents=2,
    )
    return folder


def write_config(path: Path, config: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def check_same_run(whole: Path, run: Path) -> None:
    """Two runs ended with the same weights, to the last bit, and logged the same losses."""
    expected, got = weights_of(whole), weights_of(run)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    steps = [(row["stage"], row["step"], row["loss"]) for row in rows_of(run)]
    assert steps == [(row["stage"], row["step"], row["loss"]) for row in rows_of(whole)]


class StoppedError(Exception):
    """What the tests stop a run with."""


def train_and_stop_at(config: Path, run: Path, stage: str, step: int) -> None:
    def progress(name, at, steps, metrics):
        if (name, at) == (stage, step):
            raise StoppedError

    with pytest.raises(StoppedError):
        train(config, run, progress=progress)
