"""`msa train` with adapters: stages on question sets, from a converted model to a shipped one."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import msa
from conftest import make_tiny_tokenizer
from msa import MSAForCausalLM
from msa.errors import ConfigError
from msa.inference.options import AskOptions
from msa.model.home import sha256_of
from msa.model.loading import ready_folder
from msa.training.run import train
from training_tools import (
    check_same_run,
    convert_plain_model,
    rows_of,
    train_and_stop_at,
    weights_of,
    write_config,
    write_plain_model,
    write_question_set,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """`plain/`, a backbone; `start/`, converted; `persons/`, a question set."""
    folder = tmp_path_factory.mktemp("data")
    write_plain_model(folder / "plain", make_tiny_tokenizer())
    convert_plain_model(folder / "plain", folder / "start")
    write_question_set(folder / "persons")
    return folder


def config_of(start: Path, **changes) -> dict:
    stage = {
        "kind": "questions",
        "steps": 3,
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "documents": 8,
        "route": 0,
    }
    finding = {"name": "finding", "route": 3, "route_again": 2}
    reading = {"name": "reading", "train_from_layer": 2, "read": 2, "hop": 1, "refuse": 1}
    losses = [
        {"language_model": 0.0, "routing": 0.5, "fused": 1.0, "documents": 0.0},
        {"language_model": 1.0, "routing": 0.0, "documents": 0.0},
    ]
    return {
        "seed": 4,
        "start_from": str(start / "start"),
        "save_steps": 2,
        "log_steps": 1,
        "threads": 1,
        "adapter": {"rank": 2, "alpha": 4, "base": {"name": "Tiny", "license": "apache-2.0"}},
        "optimizer": {"weight_decay": 0.0},
        "question_sets": [str(start / "persons")],
        "stages": [
            {**stage, **finding, "losses": losses[0]},
            {**stage, **reading, "losses": losses[1]},
        ],
        **changes,
    }


@pytest.fixture(scope="module")
def whole(start) -> Path:
    """A run from beginning to end."""
    config = write_config(start / "tiny.yaml", config_of(start))
    assert train(config, start / "run") == start / "run" / "model"
    return start / "run"


def trained_in(run: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(run / stage / "done" / "model.safetensors")


def test_every_stage_trains_its_layers_and_leaves_the_base_as_it_was(whole, start):
    finding, reading = trained_in(whole, "finding"), trained_in(whole, "reading")
    assert finding.keys() == reading.keys()
    assert all("lora_" in name or ".router_" in name for name in finding)
    changed = {n for n in reading if not torch.equal(finding[n], reading[n])}
    assert {int(name.split(".")[2]) for name in changed} == {2}
    below = [n for n in finding if "lora_B" in n and int(n.split(".")[2]) < 1]
    assert all(finding[name].any() for name in below)
    before = load_file(start / "start" / "model.safetensors")
    after = weights_of(whole)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(before[name], after[name])
    name = "model.layers.2.mlp.up_proj.weight"
    assert not torch.equal(before[name], after[name])


def test_a_stage_may_leave_a_mean_of_its_weights_before_and_after(whole, start):
    finding, reading = config_of(start)["stages"]
    stages = [finding, {**reading, "keep_start": 0.25}]
    config = write_config(start / "kept.yaml", config_of(start, stages=stages))
    train(config, start / "kept")
    before, after = trained_in(whole, "finding"), trained_in(whole, "reading")
    mixed = trained_in(start / "kept", "reading")
    assert mixed.keys() == after.keys()
    for name, tensor in mixed.items():
        assert torch.allclose(tensor, 0.25 * before[name] + 0.75 * after[name], atol=1e-6)


def test_every_step_is_logged_with_its_parts(whole):
    rows = rows_of(whole)
    assert [(r["stage"], r["step"]) for r in rows] == [
        (stage, step) for stage in ("finding", "reading") for step in (1, 2, 3)
    ]
    for row in rows[:3]:
        assert row["loss"] == pytest.approx(0.5 * row["routing"] + row["fused"], abs=1e-3)
        assert {"recall_at_1", "fused_recall_at_1"} <= row.keys()
    for row in rows[3:]:
        assert row["loss"] == pytest.approx(row["language_model"], abs=1e-3)


def test_the_merged_model_loads_with_the_options_of_its_start(whole, start):
    loaded = msa.load(whole / "model", dtype="float32")
    assert loaded.ask_options == AskOptions.load(start / "start")
    assert loaded.model.config.routing_layers == [0, 1]
    assert not (whole / "model" / "base.json").exists()  # it is no base any more
    expected = weights_of(whole)
    for name, tensor in loaded.model.state_dict().items():
        if name in expected:
            assert torch.equal(tensor, expected[name])


@pytest.fixture
def prepared(whole, start, tmp_path, monkeypatch) -> Path:
    """The adapter folder, its base given."""
    monkeypatch.setenv("MSA_HOME", str(tmp_path / "home"))
    base = start / "plain" / "model.safetensors"
    ready_folder(str(whole / "adapter"), progress=lambda *_: None, given=base)
    return whole / "adapter"


def test_the_adapter_folder_is_the_merged_model(prepared, whole):
    loaded, merged = msa.load(prepared, dtype="float32"), msa.load(whole / "model", dtype="float32")
    assert loaded.ask_options == merged.ask_options
    assert loaded.template == merged.template
    expected = merged.model.state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    for name, tensor in loaded.model.state_dict().items():  # it is kept in bfloat16
        assert torch.allclose(tensor, expected[name], rtol=2**-7, atol=1e-4), name
    ids = torch.randint(5, 60, (1, 12))
    with torch.no_grad():
        one, two = loaded.model(ids).logits, merged.model(ids).logits
    assert torch.allclose(one, two, atol=0.05 * float(two.abs().max()))


def test_the_adapter_names_its_base_and_holds_what_was_trained(whole, start):
    adapter = load_file(whole / "adapter" / "adapter.safetensors")
    values = json.loads((whole / "adapter" / "config.json").read_text())
    plain = start / "plain" / "model.safetensors"
    assert values["base"]["name"] == "Tiny"
    assert values["base"]["sha256"] == sha256_of(plain)
    assert values["base"]["size"] == plain.stat().st_size
    assert {n.rpartition(".")[2] for n in adapter if "router" not in n} == {"lora_A", "lora_B"}
    assert sum("router" in name for name in adapter) == 6


def test_the_adapter_can_be_shipped(whole, start, tmp_path, monkeypatch):
    monkeypatch.setenv("MSA_HOME", str(tmp_path / "home"))
    spec = importlib.util.spec_from_file_location("ship_model", ROOT / "tools" / "ship_model.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, "SHIPPED", tmp_path / "models")
    adapter, base = whole / "adapter", start / "plain"
    given = ["ship_model.py", str(adapter), "tiny", "--base", str(base)]
    monkeypatch.setattr(sys, "argv", given)
    tool.main()
    shipped = tmp_path / "models" / "tiny"
    assert {p.name for p in shipped.iterdir()} == {p.name for p in adapter.iterdir()}
    assert msa.load(shipped).model.config.routing_layers == [0, 1]


@pytest.mark.parametrize(("stage", "step"), [("finding", 3), ("reading", 1), ("reading", 3)])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(whole, start, tmp_path, stage, step):
    run, config = tmp_path / "run", start / "tiny.yaml"
    train_and_stop_at(config, run, stage, step)
    kept = [path.name for path in (run / stage).glob("checkpoint-*")]
    assert kept == (["checkpoint-2"] if step == 3 else [])
    for checkpoint in kept:  # what is trained and nothing else
        saved = load_file(run / stage / checkpoint / "model.safetensors")
        assert saved.keys() == trained_in(whole, "finding").keys()
    train(config, run)
    check_same_run(whole, run)
    one, two = (load_file(r / "adapter" / "adapter.safetensors") for r in (whole, run))
    assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())


def test_a_process_that_is_killed_goes_on_where_it_was(whole, start, tmp_path):
    run, config = tmp_path / "run", start / "tiny.yaml"
    script = (
        "import sys, time\n"
        "from msa.training.run import train\n"
        "def progress(stage, step, steps, metrics):\n"
        "    if (stage, step) == ('reading', 3):\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(600)\n"
        "train(sys.argv[1], sys.argv[2], progress=progress)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(config), str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        while "ready" not in process.stdout.readline():
            assert process.poll() is None, "the run ended before it was killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert (run / "reading" / "checkpoint-2").is_dir()
    train(config, run)
    check_same_run(whole, run)


def test_on_a_base_in_bfloat16_what_is_trained_stays_float32(start, tmp_path):
    config = config_of(start, bfloat16=True)
    train(write_config(tmp_path / "tiny.yaml", config), tmp_path / "run")
    kept = trained_in(tmp_path / "run", "reading")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    weights = weights_of(tmp_path / "run")
    assert weights["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert MSAForCausalLM.from_pretrained(tmp_path / "run" / "model").dtype == torch.bfloat16


def test_without_a_known_base_the_run_says_that_no_adapter_is_left(start, tmp_path, caplog):
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    for path in (start / "start").iterdir():
        if path.name != "base.json":
            (nameless / path.name).write_bytes(path.read_bytes())
    config = config_of(start, start_from=str(nameless), adapter={"rank": 2})
    config["stages"] = [{**config["stages"][0], "steps": 1}]
    with caplog.at_level(logging.WARNING):
        train(write_config(tmp_path / "tiny.yaml", config), tmp_path / "run")
    assert "has no base.json, so the run will leave no adapter folder" in caplog.text
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_wrongly_described_base_is_refused_before_anything_is_trained(start, tmp_path):
    config = config_of(start, adapter={"base": {"colour": "red"}})
    with pytest.raises(ConfigError, match=r"adapter\.base: base has .*'colour'"):
        train(write_config(tmp_path / "tiny.yaml", config), tmp_path / "run")
    assert not (tmp_path / "run" / "finding").exists()
