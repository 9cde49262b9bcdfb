"""`msa train` from a YAML file to a model that answers, with a kill in the middle."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from msa import Document, MemoryBank, MemoryEngine, load
from msa.errors import ConfigError, TrainingError
from msa.training.model import MSAForTraining
from msa.training.run import train
from training_tools import (
    StoppedError,
    check_same_run,
    rows_of,
    train_and_stop_at,
    weights_of,
)
from training_tools import write_config as write

CONFIG = {
    "seed": 5,
    "save_steps": 2,
    "log_steps": 1,
    "threads": 1,
    "model": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "chunk_size": 8,
        "top_k_documents": 2,
        "routing_layers": [1],
    },
    "tokenizer": {"vocab_size": 600, "worlds": 5},
    "stages": [
        {
            "name": "routing",
            "steps": 6,
            "warmup_steps": 2,
            "world": {"documents": 8, "breadth": [0.0, 0.2], "max_document_tokens": 60},
            "samples": {"name": 4, "read": 1, "hop": 0, "answer": 0},
            "losses": {"language_model": 0.1, "routing": 1.0, "numbers": 0.5},
        },
        {
            "name": "reading",
            "steps": 6,
            "learning_rate": 0.02,
            "warmup_steps": 0,
            "world": {"documents": 8, "max_digits": 4, "max_document_tokens": 60},
            "samples": {"name": 2, "read": 2, "hop": 1, "answer": 1, "copy": 2},
            "losses": {"documents": 0.0},
        },
    ],
}


def write_config(folder: Path, **changes) -> Path:
    return write(folder / "tiny.yaml", {**CONFIG, **changes})


@pytest.fixture(scope="module", autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run from beginning to end; `told.json` is what its progress function heard."""
    folder = tmp_path_factory.mktemp("whole")
    told = []
    run = folder / "run"
    model = train(write_config(folder), run, progress=lambda *a: told.append([*a[:3], dict(a[3])]))
    assert model == run / "model"
    (run / "told.json").write_text(json.dumps(told))
    return run


def test_a_run_logs_every_step_and_its_parts(whole):
    rows = rows_of(whole)
    assert [(r["stage"], r["step"]) for r in rows] == [
        (stage, step) for stage in ("routing", "reading") for step in range(1, 7)
    ]
    parts = {"language_model", "routing", "recall_at_1"}
    for row in rows:
        assert row.keys() >= parts | {"loss", "learning_rate", "grad_norm"}
        assert ("documents" in row) == ("numbers" in row) == (row["stage"] == "routing")
    told = json.loads((whole / "told.json").read_text())
    assert [t[:3] for t in told] == [[r["stage"], r["step"], 6] for r in rows]
    assert [t[3]["loss"] for t in told] == [r["loss"] for r in rows]


def test_the_logged_loss_is_its_weighted_parts(whole):
    for row in rows_of(whole):
        first = row["stage"] == "routing"
        expected = (0.1 if first else 1.0) * row["language_model"]
        expected += (1.0 if first else 0.1) * row["routing"]
        if first:
            expected += 0.5 * row["numbers"] + 0.1 * row["documents"]
        assert row["loss"] == pytest.approx(expected, abs=1e-3)


def test_the_learning_rate_warms_up_and_falls_in_each_stage(whole):
    rates = [row["learning_rate"] for row in rows_of(whole)]
    assert rates[0] < rates[1] <= 0.01
    assert rates[5] < rates[2]
    assert rates[6] > rates[5]
    assert rates[11] == min(rates[6:])
    assert max(rates[6:]) <= 0.02


def test_nothing_but_the_results_is_left(whole):
    assert {p.name for p in whole.iterdir()} == {
        "config.yaml", "metrics.jsonl", "model", "reading", "routing", "tokenizer", "told.json",
    }  # fmt: skip
    assert [p.name for p in whole.glob("r*/*")] == ["done", "done"]


def test_the_exported_model_answers_from_a_bank(whole, tmp_path):
    loaded = load(whole / "model")
    assert not any("number_head" in name for name in loaded.model.state_dict())
    assert type(loaded.model).__name__ == "MSAForCausalLM"
    documents = [Document(f"d{i}", f"Person {i} lives in town {i}.") for i in range(5)]
    with MemoryBank.create(tmp_path / "bank", loaded) as bank:
        bank.add(documents)
        engine = MemoryEngine(bank)
        answer = engine.ask("Where does person 3 live?", max_new_tokens=5, max_rounds=2)
        assert {c.id for c in answer.citations} <= {d.id for d in documents}
        assert answer.rounds
        assert len(engine.retrieve("Where does person 3 live?", top_k=2)) == 2


def test_a_finished_run_that_is_started_again_trains_nothing(whole):
    before, rows = weights_of(whole), rows_of(whole)
    told = []
    train(whole.parent / "tiny.yaml", whole, progress=lambda *a: told.append(a))
    assert told == []
    assert rows_of(whole) == rows
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(whole).items())


@pytest.mark.parametrize("step", [1, 5], ids=["before any checkpoint", "after a checkpoint"])
@pytest.mark.parametrize("stage", ["routing", "reading"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(whole, tmp_path, stage, step):
    run = tmp_path / "run"
    config = write_config(tmp_path)
    train_and_stop_at(config, run, stage, step)
    checkpoints = [p.name for p in (run / stage).glob("checkpoint-*")]
    assert checkpoints == (["checkpoint-4"] if step == 5 else [])
    train(config, run)
    check_same_run(whole, run)


def test_a_checkpoint_that_was_half_written_is_passed_over(whole, tmp_path):
    """Killed while the checkpoint of step 4 was written: the one of step 2 is gone on from."""
    run = tmp_path / "run"
    config = write_config(tmp_path)
    train_and_stop_at(config, run, "reading", 3)
    half = run / "reading" / "checkpoint-4"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "reading", "st')
    train(config, run)
    check_same_run(whole, run)


def test_a_run_that_was_killed_between_training_and_keeping_a_stage(whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    config = write_config(tmp_path)
    original = MSAForTraining.save_pretrained

    def save(self, folder, *args, **kwargs):
        original(self, folder, *args, **kwargs)
        if Path(folder).name == "done.partial":
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(MSAForTraining, "save_pretrained", save)
        with pytest.raises(StoppedError):
            train(config, run)
    train(config, run)
    check_same_run(whole, run)


def test_a_process_that_is_killed_goes_on_where_it_was(whole, tmp_path):
    """SIGKILL, as the machine would do it, at a step that has a checkpoint behind it."""
    run = tmp_path / "run"
    config = write_config(tmp_path)
    script = (
        "import sys, time\n"
        "from msa.training.run import train\n"
        "def progress(stage, step, steps, metrics):\n"
        "    if (stage, step) == ('reading', 3):\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
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


def test_another_config_is_refused_in_the_folder_of_a_run(whole, tmp_path):
    other = write_config(tmp_path, seed=6)
    with pytest.raises(TrainingError, match=r"run of another config.*choose another") as caught:
        train(other, whole)
    assert str(whole) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert yaml.safe_load((whole / "config.yaml").read_text())["seed"] == 5


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"sedd": 1}, ConfigError, "unknown key 'sedd'"),
        ({"model": {"routing_layers": [9], "num_hidden_layers": 2}}, ConfigError, "routing_layers"),
        ({"start_from": "nowhere"}, TrainingError, r"nowhere holds no tokenizer\.json"),
        ({"real_data": {"texts": ["no.jsonl.gz"]}}, TrainingError, r"no\.jsonl\.gz: cannot be"),
        ({"real_data": {"questions": ["nowhere"]}}, TrainingError, r"nowhere.*cannot be read"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_line(tmp_path, changes, error, said):
    config = write_config(tmp_path, tokenizer={"vocab_size": 300, "worlds": 1}, **changes)
    with pytest.raises(error, match=said) as caught:
        train(config, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_an_output_that_is_a_file_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be made a folder"):
        train(write_config(tmp_path), tmp_path / "file")


def test_the_loss_falls_when_one_step_is_trained_on_over_and_over(tmp_path, monkeypatch):
    from msa.training.data import StepDataset

    original = StepDataset.__getitem__
    monkeypatch.setattr(StepDataset, "__getitem__", lambda self, index: original(self, 0))
    stage = {**CONFIG["stages"][1], "steps": 30, "learning_rate": 0.03, "name": "overfit"}
    stage["losses"] = {"routing": 1.0, "context": 0.5, "documents": 0.5, "numbers": 0.5}
    train(write_config(tmp_path, stages=[stage], save_steps=1000), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    first, last = rows[0], rows[-1]
    for part in ("language_model", "documents", "numbers", "routing"):
        assert last[part] < 0.7 * first[part], part
    assert last["recall_at_1"] > max(first["recall_at_1"], 0.5)


def test_only_pointwise_parts_are_compiled_once_and_weights_keep_their_names(monkeypatch):
    from msa import MSAConfig
    from msa.training.run import compile_layers

    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f) or f)
    model = MSAForTraining(MSAConfig(**CONFIG["model"], vocab_size=64))
    names = set(model.state_dict())
    compile_layers(model)
    compile_layers(model)  # the next stage
    parts = {type(f.__self__).__name__ for f in compiled}
    assert len(compiled) == 6
    assert parts == {"Qwen3MLP", "Qwen3RMSNorm"}
    assert set(model.state_dict()) == names


def test_fine_tuning_begins_with_the_weights_tokenizer_and_template_of_a_checkpoint(
    whole, tmp_path
):
    """On real questions too, and in bfloat16."""
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt") as file:
        for i in range(9):
            file.write(json.dumps({"id": f"d{i}", "text": f"Town {i} has river {i}."}) + "\n")
    with gzip.open(tmp_path / "questions.train.jsonl.gz", "wt") as file:
        for i in range(9):
            row = {"question": f"River of {i}?", "answers": [f"river {i}"], "gold": [f"d{i}"]}
            file.write(json.dumps(row) + "\n")
    stage = {
        "name": "tune",
        "steps": 1,
        "learning_rate": 1e-9,
        "warmup_steps": 0,
        "world": {"documents": 6, "real": 1.0},
        "samples": {"name": 2, "read": 2},
    }
    config = write_config(
        tmp_path,
        start_from=str(whole / "model"),
        model={},
        real_data={"questions": [str(tmp_path)]},
        stages=[stage],
        bfloat16=True,
    )
    train(config, tmp_path / "run")
    before, after = weights_of(whole), weights_of(tmp_path / "run")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    for name in ("tokenizer.json", "prompt_template.json"):
        kept = (tmp_path / "run" / "model" / name).read_text()
        assert json.loads(kept) == json.loads((whole / "model" / name).read_text())
