"""`msa model`, `msa convert`, and what the others say when a model must be fetched first."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
from transformers import LlamaForCausalLM

from adapter_tools import make_parts
from msa.cli import main, output
from msa.model import loading


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def shipped(parts, tmp_path, monkeypatch):
    """A package whose default model is an adapter that nothing was fetched for."""
    parts.save(tmp_path / "models" / "smollm2-135m")
    monkeypatch.setattr(loading, "SHIPPED", tmp_path / "models")
    monkeypatch.setenv("MSA_HOME", str(tmp_path / "home"))
    for name in ("MSA_MODEL", "MSA_OFFLINE", "HF_HUB_OFFLINE", "MSA_DTYPE"):
        monkeypatch.setenv(name, "")  # put back afterwards, whatever a command does


@pytest.fixture
def run(capsys):
    def run(*words: object) -> SimpleNamespace:
        with pytest.raises(SystemExit) as stop:
            main.main([str(word) for word in words])
        out, err = capsys.readouterr()
        parsed = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        return SimpleNamespace(code=stop.value.code, out=out, err=err, json=parsed)

    return run


def test_models_are_listed_with_what_they_still_need(run, parts):
    result = run("model", "list")
    assert result.code == 0
    size = output.size(parts.base.size)
    line = f"smollm2-135m (default)  base of {size} to be fetched at the first use"
    assert result.out.strip() == line
    (listed,) = run("model", "list", "--json").json
    assert (listed["name"], listed["ready"], listed["default"]) == ("smollm2-135m", False, True)
    assert listed["base"]["sha256"] == parts.base.sha256


def test_a_model_is_made_ready_from_a_file_and_then_starts_offline(run, parts, tmp_path):
    result = run("model", "get", "--from", parts.base_file)
    assert result.code == 0, result.err
    assert "smollm2-135m is ready" in result.out
    assert "Preparing smollm2-135m, once" in result.err
    assert "ready" in run("model", "list").out
    (tmp_path / "a.txt").write_text("Ada was born in 1815.")
    words = ("--bank", tmp_path / "bank", "--device", "cpu", "--offline")
    assert run("index", tmp_path / "a.txt", *words).code == 0
    found = run("search", "Ada", *words, "--json")
    assert [hit["id"].endswith("a.txt") for hit in found.json] == [True]
    assert json.loads((tmp_path / "bank" / "bank.json").read_text())["model"] == "smollm2-135m"


@pytest.mark.parametrize("words", [("--offline", "model", "get"), ("model", "get", "--offline")])
def test_offline_is_said_in_one_line_with_what_to_type(run, words):
    result = run(*words)
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert "MSA_OFFLINE forbids fetching it; unset it and type 'msa model get'" in result.err


def test_a_model_that_cannot_be_fetched_is_one_line(run):
    result = run("model", "get", "--source", "hub")
    assert result.code == 1
    assert "it is not to be had from hub" in result.err


def test_what_a_model_is_made_of_is_shown(run, parts):
    result = run("model", "info")
    assert result.code == 0
    for part in ("smollm2-135m (default)", "llama", "1, 2", "Tiny", parts.base.sha256[:40]):
        assert part in result.out
    (found,) = run("model", "info", "smollm2-135m", "--json").json
    assert found["config"]["chunk_size"] == 8


def test_the_dtype_is_said_under_debug(run, parts, tmp_path, caplog):
    run("model", "get", "--from", parts.base_file)
    (tmp_path / "a.txt").write_text("Ada was born in 1815.")
    bank = ("--bank", tmp_path / "bank", "--device", "cpu")
    with caplog.at_level("INFO", "msa"):
        run("--debug", "--dtype", "bfloat16", "index", tmp_path / "a.txt", *bank)
    assert "in torch.bfloat16 on cpu" in caplog.text
    assert os.environ["MSA_DTYPE"] == "bfloat16"


# ---- msa convert


@pytest.fixture
def plain(parts, tmp_path):
    """Folder of the plain backbone, and texts about people."""
    model: LlamaForCausalLM = parts.backbone
    model.save_pretrained(tmp_path / "plain")
    parts.tokenizer.save_pretrained(tmp_path / "plain")
    rows = [
        f"Person {i} grew up in the town of Halden near a lake. The red lamp number {i} was made "
        f"by that person in the year {1800 + i}. Nobody has ever seen it shine at night."
        for i in range(80)
    ]
    for name, part in (("a.jsonl", rows[:40]), ("b.jsonl", rows[40:])):
        text = "".join(json.dumps({"id": r[:12], "text": r}) + "\n" for r in part)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_plain_model_becomes_one_that_is_asked_and_the_recall_is_said(run, plain):
    words = ("--texts", plain / "a.jsonl", plain / "b.jsonl", "--chunk-size", "8", "--layers", "1")
    result = run("convert", plain / "plain", plain / "out", *words)
    assert result.code == 0, result.err
    assert "routing in layers 1" in result.out
    assert "to 80 passages" in result.out
    assert "(BM25: " in result.out
    assert "Without a memory its logits differ from the backbone's by" in result.out
    bank = ("--bank", plain / "bank", "--model", plain / "out", "--device", "cpu")
    assert run("index", plain / "a.jsonl", *bank).code == 0


def test_a_conversion_speaks_json(run, plain):
    words = ("--texts", plain / "a.jsonl", "--texts", plain / "b.jsonl", "--json")
    (found,) = run("convert", plain / "plain", plain / "out", *words).json
    assert found["backbone"] == "llama"
    assert 0 <= found["calibration"]["recall_at_16"] <= 1
    assert found["bm25"]["recall_at_16"] > 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--texts", "a.jsonl"), "40 texts: routers are whitened on at least 64"),
        (("--texts", "none.txt"), "none.txt"),
        (("--texts", "a.jsonl", "b.jsonl", "--layers", "one"), "--layers one: expected whole"),
        (("--texts", "a.jsonl", "b.jsonl", "--export", "gguf"), "export='gguf': expected one of"),
    ],
)
def test_what_cannot_be_converted_is_one_line(run, plain, monkeypatch, words, message):
    monkeypatch.chdir(plain)
    result = run("convert", "plain", "out", *words)
    assert result.code == 1
    lines = result.err.splitlines()
    assert lines[-1].startswith("Error: ")
    assert message in result.err
    assert not (plain / "out").exists()
