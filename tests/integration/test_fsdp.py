"""Training in shards (FSDP2): two processes on CPUs learn what two whole copies learn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import make_tiny_tokenizer
from msa.errors import TrainingError
from msa.training.run import train
from training_tools import (
    convert_plain_model,
    rows_of,
    weights_of,
    write_config,
    write_plain_model,
    write_question_set,
)

# accelerate shards on GPUs only, though gloo can do it: tell it that this is one of its GPU setups.
SCRIPT = """
import sys
from accelerate.state import AcceleratorState, DistributedType, PartialState
original = AcceleratorState.__init__

def init(self, *args, fsdp_plugin=None, **kwargs):
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

AcceleratorState.__init__ = init
from msa.training.run import train
for config, run in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    train(config, run)
    AcceleratorState._reset_state()  # the next run starts as in a new process
"""


def config_of(folder: Path, **changes) -> dict:
    stage = {
        "kind": "questions",
        "steps": 3,
        "learning_rate": 0.0003,  # Adam's first steps follow the sign of the least gradients
        "warmup_steps": 0,
        "documents": 9,
        "route": 2,
        "route_again": 1,
        "read": 2,
        "hop": 1,
    }
    return {
        "seed": 0,  # the processes draw from different sets in steps 1 and 3, from one in step 2
        "start_from": str(folder / "start"),
        "save_steps": 2,
        "log_steps": 1,
        "threads": 1,
        "gradient_checkpointing": True,
        "document_batch": 4,
        "optimizer": {"muon": False},
        "question_sets": [
            str(folder / "persons"),
            {"path": str(folder / "persons"), "routes": False},  # steps of another shape
        ],
        "stages": [
            {**stage, "name": "first", "losses": {"routing": 0.5, "fused": 0.5}},
            {**stage, "name": "second", "steps": 1, "losses": {"documents": 0.0}},
        ],
        **changes,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    plain = folder / "plain"
    write_plain_model(plain, make_tiny_tokenizer(), "qwen3", tie_word_embeddings=True)
    convert_plain_model(plain, folder / "start")
    write_question_set(folder / "persons")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    return folder


def launch(data: Path, configs: dict[Path, dict]) -> None:
    """Train by several configs, one after the other, in two processes; a folder for each run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(data / "script.py")]
    for run, config in configs.items():
        command += [str(write_config(run.with_suffix(".yaml"), config)), str(run)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> dict[str, list[Path]]:
    """Runs of whole copies and of shards, with all weights and with low-rank updates."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {"whole": None, "adapter": {"rank": 2, "alpha": 4}}
    for fsdp in (False, True):
        configs = {
            folder / f"{kind}-{fsdp}": config_of(data, fsdp=fsdp, adapter=adapter)
            for kind, adapter in kinds.items()
        }
        launch(data, configs)
    return {kind: [folder / f"{kind}-{fsdp}" for fsdp in (False, True)] for kind in kinds}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_shards_learn_what_whole_copies_learn(runs, kind):
    one, two = map(rows_of, runs[kind])
    assert [(r["stage"], r["step"]) for r in two] == [("first", i) for i in (1, 2, 3)] + [
        ("second", 1)
    ]
    assert all("routing" in row and "fused" in row for row in two[:3])
    for a, b in zip(one, two, strict=True):
        assert b["routing"] == pytest.approx(a["routing"], abs=1e-3)
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-3)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2)
    expected, found = map(weights_of, runs[kind])
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-3), name
    assert (runs[kind][1] / "adapter").is_dir() == (kind == "adapter")


def test_one_process_is_told_how_to_start_more(data, tmp_path):
    path = write_config(tmp_path / "c.yaml", config_of(data, fsdp=True))
    with pytest.raises(TrainingError, match=r"this is one; start them with 'torchrun") as caught:
        train(path, tmp_path / "run")
    assert "\n" not in str(caught.value)
