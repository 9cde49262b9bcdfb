"""What a converted checkpoint says of its base, so that adapters trained on it fit."""

from __future__ import annotations

import json

import pytest
import torch

import msa
from conftest import make_tiny_tokenizer
from msa.errors import ConfigError
from msa.model import origin as module
from msa.model.adapters import save_adapter
from msa.model.bases import Base
from msa.model.home import sha256_of
from msa.model.loading import ready_folder
from msa.model.origin import Origin, base_of
from training_tools import convert_plain_model, write_plain_model

BASE = Base(name="Tiny", file="tiny.gguf", sha256="0" * 64, size=9, hub="a/b@c")


def test_what_is_saved_is_loaded(tmp_path):
    for origin in (Origin(BASE), Origin(BASE, ("model.embed_tokens.weight",), True)):
        origin.save(tmp_path)
        assert Origin.load(tmp_path) == origin


def test_without_a_file_nothing_is_known(tmp_path):
    assert Origin.load(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read.*base"),
        ('{"base": 1}', "cannot be read"),
        ('{"base": {"name": "x"}}', "base has missing"),
    ],
)
def test_a_damaged_file_is_one_clear_line(tmp_path, text, said):
    (tmp_path / "base.json").write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        Origin.load(tmp_path)
    assert str(tmp_path / "base.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_base_is_the_file_that_was_read(tmp_path):
    folder = tmp_path / "My-Model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "Small.Q4_1.gguf").write_bytes(b"GGUF")
    found = base_of(folder)
    assert (found.name, found.file, found.size) == ("My-Model", "model.safetensors", 7)
    assert found.sha256 == sha256_of(folder / "model.safetensors")
    assert base_of(tmp_path / "Small.Q4_1.gguf").name == "Small.Q4_1"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert base_of(folder) is None  # more files than one
    assert base_of("nobody/nothing") is None


def test_a_hub_base_is_named_with_the_commit_that_was_read(tmp_path, monkeypatch):
    path = tmp_path / "snapshots" / "abc123" / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    monkeypatch.setattr(module, "try_to_load_from_cache", lambda *_, **__: str(path))
    found = base_of("owner/name@main")
    assert (found.name, found.hub) == ("owner/name", "owner/name@abc123")


def test_a_conversion_says_which_base_it_took(tmp_path, tiny_tokenizer):
    plain = write_plain_model(tmp_path / "plain", tiny_tokenizer)
    found = Origin.load(convert_plain_model(plain, tmp_path / "msa"))
    assert found.base.sha256 == sha256_of(plain / "model.safetensors")
    assert (found.own_weights, found.own_tokenizer) == ((), False)


def test_an_adapter_of_a_model_with_added_tokens_holds_their_embeddings(tmp_path, monkeypatch):
    monkeypatch.setenv("MSA_HOME", str(tmp_path / "home"))
    plain = write_plain_model(tmp_path / "plain", make_tiny_tokenizer(["<|im_start|>"]))
    folder = convert_plain_model(plain, tmp_path / "msa")
    origin, start = Origin.load(folder), msa.load(folder, dtype="float32")
    assert origin.own_weights == ("model.embed_tokens.weight", "lm_head.weight")
    assert origin.own_tokenizer
    assert "base" not in json.loads((folder / "config.json").read_text())
    weights = start.model.state_dict()
    kept = [n for n in weights if ".router_" in n or n in origin.own_weights]
    adapter = save_adapter(
        {name: weights[name] for name in kept},
        origin.base,
        tmp_path / "adapter",
        config=start.model.config,
        template=start.template,
        tokenizer=start.tokenizer,
        merged_dtype=torch.float32,
    )
    ready_folder(str(adapter), progress=lambda *_: None, given=plain)
    loaded = msa.load(adapter, dtype="float32")
    assert len(loaded.tokenizer) == len(start.tokenizer)
    ids = torch.arange(len(start.tokenizer) - 12, len(start.tokenizer))[None]
    with torch.no_grad():
        one, two = loaded.model(ids).logits, start.model(ids).logits
    assert torch.allclose(one, two, atol=2e-2)
