"""Adapters: what they hold, how they are merged, and that it happens once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import msa
from adapter_tools import UPDATED, make_parts
from msa.errors import ConfigError, FetchError, ModelError
from msa.model import adapters
from msa.model.adapters import is_adapter, merged_path
from msa.model.bases import fetch_base
from msa.text.prompts import PromptTemplate


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MSA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(parts, tmp_path):
    return parts.save(tmp_path / "adapter")


@pytest.fixture
def fetched(parts, home):
    return fetch_base(parts.base, given=parts.base_file, progress=lambda *_: None)


def test_a_loaded_adapter_is_its_base_plus_the_scaled_products_and_the_routers(
    folder, fetched, parts
):
    loaded = msa.load(folder)
    plain, merged = parts.backbone.state_dict(), loaded.model.state_dict()
    for name, tensor in merged.items():
        module = name.removesuffix(".weight")
        if module in UPDATED:
            down, up, scale = parts.state[module]
            wanted = plain[name] + scale * (up.half().float() @ down.half().float())
            assert torch.allclose(tensor, wanted, atol=1e-5)
            assert not torch.allclose(tensor, plain[name], atol=1e-2)
        elif ".router_" in name:
            assert torch.equal(tensor, parts.state[name].half().float())
        elif name in plain:
            assert torch.equal(tensor, plain[name])
    assert loaded.ask_options.max_rounds == 2
    assert loaded.template == PromptTemplate()
    assert loaded.model.config.routing_layers == [1, 2]


def test_the_merged_model_is_made_once_and_needs_no_base_afterwards(folder, fetched, monkeypatch):
    first = msa.load(folder)
    fetched.unlink()
    monkeypatch.setattr(adapters, "merge", lambda *_: pytest.fail("merged twice"))
    again = msa.load(folder)
    pairs = zip(first.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_changed_adapter_is_merged_anew_and_a_changed_card_is_not(folder, home):
    before = merged_path(folder, "x")
    (folder / "README.md").write_text("# A card\n")
    assert merged_path(folder, "x") == before
    (folder / "ask_options.json").write_text("{}")
    assert merged_path(folder, "x") != before


def test_it_takes_half_precision_and_no_more_than_what_changed(folder, parts):
    values = sum(
        v.numel() if isinstance(v, torch.Tensor) else v[0].numel() + v[1].numel()
        for v in parts.state.values()
    )
    size = (folder / adapters.ADAPTER_FILE).stat().st_size
    assert 2 * values < size < 2 * values + 4096
    assert is_adapter(folder)


def test_a_missing_base_offline_is_one_line_that_says_what_to_type(folder, home):
    with pytest.raises(FetchError, match=r"Tiny .* MSA_OFFLINE forbids .* 'msa model get") as error:
        msa.load(folder)
    assert "\n" not in str(error.value)


def test_a_base_that_was_damaged_since_is_removed_and_said(folder, fetched):
    with fetched.open("r+b") as file:
        file.seek(2000)
        file.write(b"damaged")
    with pytest.raises(FetchError, match="was damaged and is removed; type 'msa model get'"):
        msa.load(folder)
    assert not fetched.exists()


def test_a_damaged_adapter_is_said_and_leaves_nothing(folder, fetched, home):
    path = folder / adapters.ADAPTER_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"adapter\.safetensors: is damaged"):
        msa.load(folder)
    assert not list((home / "models").iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.9.self_attn.q_proj.weight": torch.zeros(1)}, "the model wants None"),
        ({"model.norm.weight": torch.zeros(3)}, r"model\.norm\.weight is \(3,\)"),
        ({UPDATED[0]: (torch.zeros(2, 3), torch.zeros(4, 2), 1.0)}, "up_proj.* the model wants"),
        ({UPDATED[0]: (torch.zeros(2, 32), torch.zeros(48, 3), 1.0)}, "up_proj.* the model wants"),
        ({"model.norm.weight": torch.full((32,), 1e6)}, "not finite in torch.float16"),
        ({"model.layers.1.self_attn.router_k_proj.0.weight": None}, "router weights are missing"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_saved(parts, tmp_path, change, message):
    wrong = {name: value for name, value in {**parts.state, **change}.items() if value is not None}
    with pytest.raises(ModelError, match=message):
        replace(parts, state=wrong).save(tmp_path / "a")


def test_a_base_that_lacks_a_weight_is_refused(folder, parts):
    model = parts.model
    weights = {k: v for k, v in model.state_dict().items() if k != "model.norm.weight"}
    adapter = adapters.load_file(folder / adapters.ADAPTER_FILE)
    with pytest.raises(ModelError, match=r"its base lacks model\.norm\.weight"):
        adapters.merge(weights, adapter, model.config, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": None}, r"\['sha256'\]"),
        ({"colour": "red"}, r"\['colour'\]"),
        ({"size": "big"}, r"\['size'\]"),
        ({"file": "../x.gguf"}, "expected a plain file name"),
    ],
)
def test_a_base_is_named_in_full_or_refused(folder, home, change, message):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["base"] = {k: v for k, v in {**values["base"], **change}.items() if v is not None}
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        msa.load(folder)


def test_an_adapter_on_safetensors_needs_a_tokenizer(parts, tmp_path):
    with pytest.raises(ModelError, match=r"base\.safetensors has no tokenizer"):
        replace(parts, tokenizer=None).save(tmp_path / "a")


def test_a_bank_made_in_one_dtype_opens_in_the_other(folder, fetched, tmp_path):
    exact, short = msa.load(folder, dtype="float32"), msa.load(folder, dtype=torch.bfloat16)
    assert {short.model.dtype, exact.model.dtype} == {torch.bfloat16, torch.float32}
    with msa.MemoryBank.create(tmp_path / "bank", short) as bank:
        bank.add([msa.Document("a", "Ada was born in 1815.")])
    with msa.MemoryBank.open(tmp_path / "bank", exact) as bank:
        bank.add([msa.Document("b", "Bob was born in 1915.")])
        assert len(bank) == 2


def test_what_a_killed_process_has_left_is_removed(folder, fetched, home):
    target = merged_path(folder, "adapter")
    left = target.with_name(f".{target.name}-abc")
    left.mkdir(parents=True)
    msa.load(folder)
    assert [p.name for p in target.parent.iterdir()] == [target.name]
