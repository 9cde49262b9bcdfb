"""Adapters in training: what they change, what stays frozen, and what becomes of them."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import SMALL
from msa import MSAForCausalLM
from msa.errors import InputError, ModelError
from msa.memory.latent import LatentMemory
from msa.model.adapters import save_adapter
from msa.model.bases import Base
from msa.model.convert import convert_backbone
from msa.text.prompts import PromptTemplate
from msa.training.adapters import (
    adapter_updates,
    add_adapter,
    freeze_below,
    is_router,
    load_adapter,
    merged_state,
    trained_state,
)
from msa.training.config import AdapterSettings
from msa.training.model import MSAForTraining

SETTINGS = AdapterSettings(rank=2, alpha=6)
LINEAR = 7
"""Linear layers of a Llama layer that get an adapter."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    made = convert_backbone(
        LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True)),
        chunk_size=4,
        routing_layers=[0, 2],
        query_reduction="pooled",
    )
    folder = tmp_path_factory.mktemp("start")
    made.save_pretrained(folder)
    return folder


def adapted(folder, dtype=torch.float32, settings=SETTINGS):
    """A model with adapters that change something."""
    model = MSAForTraining.from_pretrained(folder, dtype=dtype)
    add_adapter(model, settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    return model.eval()


def logits_of(model):
    generator = torch.Generator().manual_seed(2)
    documents = torch.randint(1, 64, (4, 11), generator=generator)
    question = torch.randint(1, 64, (1, 6), generator=generator)
    with torch.no_grad():
        states = model.encode_documents(documents, torch.tensor([11, 5, 9, 8]))
        return model(input_ids=question, memory=LatentMemory(states, 2)).logits


def test_merged_weights_compute_what_the_adapted_model_computes(folder):
    model = adapted(folder)
    plain = MSAForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = logits_of(plain)
    merged = {n: t for n, t in merged_state(model).items() if "number_head" not in n}
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    assert torch.allclose(logits_of(plain), logits_of(model), atol=1e-4)
    assert not torch.allclose(logits_of(plain), before, atol=1e-2)


def test_new_adapters_change_nothing(folder):
    model = MSAForTraining.from_pretrained(folder, dtype=torch.float32)
    before = logits_of(model.eval())
    add_adapter(model, SETTINGS)
    assert torch.equal(logits_of(model), before)
    assert not any(isinstance(update, tuple) for update in adapter_updates(model).values())


def test_dropout_leaves_out_part_of_the_adapters_and_not_of_the_base(folder):
    model = adapted(folder, settings=AdapterSettings(rank=2, alpha=6, dropout=0.5))
    plain = adapted(folder)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(model), logits_of(plain))
    model.train()
    torch.manual_seed(3)
    first, second = logits_of(model), logits_of(model)
    assert not torch.allclose(first, second)
    without = MSAForTraining.from_pretrained(folder, dtype=torch.float32)
    add_adapter(without, AdapterSettings(rank=2, alpha=6, dropout=0.5))  # adds nothing yet
    assert torch.equal(logits_of(without.train()), logits_of(without.eval()))


def test_adapters_and_routers_alone_are_trained(folder):
    model = adapted(folder)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(trained_state(model))
    assert all("lora_" in name or ".router_" in name for name in changed)


def test_what_is_trained_has_these_names(folder):
    names = set(trained_state(adapted(folder)))
    lora = {name for name in names if "lora_" in name}
    assert len(lora) == 2 * LINEAR * SMALL["num_hidden_layers"]
    assert "model.layers.1.mlp.up_proj.lora_A.default.weight" in lora
    assert names - lora == {
        f"model.layers.{layer}.self_attn.{name}.weight"
        for layer in (0, 2)
        for name in ("router_q_proj.0", "router_k_proj.0", "router_token_weight")
    }


def test_the_targets_alone_get_an_adapter(folder):
    settings = AdapterSettings(rank=3, alpha=3, targets=("q_proj", "down_proj"))
    lora = {
        n: t for n, t in trained_state(adapted(folder, settings=settings)).items() if "lora" in n
    }
    assert {name.split(".")[4] for name in lora} == {"q_proj", "down_proj"}
    assert all(3 in tensor.shape for tensor in lora.values())


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_layers_below_the_named_one_are_frozen_and_may_be_trained_again(folder, layer):
    model = adapted(folder)
    for index in (layer, 0):
        freeze_below(model, index)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {n for n in trained_state(model) if int(n.split(".")[2]) >= index}


def test_on_a_base_in_bfloat16_adapters_and_routers_are_float32(folder):
    model = adapted(folder, torch.bfloat16)
    trained = trained_state(model)
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    rest = {p.dtype for n, p in model.named_parameters() if n not in trained}
    assert rest == {torch.bfloat16}
    merged = merged_state(model)
    assert merged["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(logits_of(model)).all()


def test_updates_are_those_of_trained_modules_with_their_scale(folder):
    model = adapted(folder)
    model.model.layers[1].mlp.up_proj.lora_B["default"].weight.data.zero_()
    updates = adapter_updates(model, ["model.embed_tokens.weight"])
    assert "model.layers.1.mlp.up_proj" not in updates
    down, up, scale = updates["model.layers.0.mlp.up_proj"]
    assert (tuple(down.shape), tuple(up.shape), scale) == ((2, 32), (48, 2), 3.0)
    assert updates["model.embed_tokens.weight"].shape == (64, 32)
    merged = merged_state(model)["model.layers.0.mlp.up_proj.weight"]
    base = model.model.layers[0].mlp.up_proj.base_layer.weight
    assert torch.allclose(merged, base + scale * up @ down, atol=1e-6)


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    """An adapter folder, and the model that it was made of."""
    model = adapted(folder)
    for name, parameter in model.named_parameters():
        if is_router(name):
            parameter.data.mul_(0.5)
    target = tmp_path_factory.mktemp("adapter")
    base = Base(name="Tiny", file="tiny.gguf", sha256="0" * 64, size=9, hub="a/b@c")
    updates = adapter_updates(model)
    template = PromptTemplate()
    save_adapter(updates, base, target, config=model.config, template=template, dtype=torch.float32)
    return target, model


def test_training_goes_on_from_an_adapter(folder, saved):
    target, model = saved
    again = MSAForTraining.from_pretrained(folder, dtype=torch.float32)
    add_adapter(again, SETTINGS)
    load_adapter(again, target)
    assert torch.allclose(logits_of(again.eval()), logits_of(model), atol=1e-4)
    for name, tensor in trained_state(model).items():
        assert torch.allclose(trained_state(again)[name], tensor, atol=1e-6), name


def test_an_adapter_that_does_not_fit_is_refused_by_name(folder, saved, tmp_path):
    target, _ = saved
    model = MSAForTraining.from_pretrained(folder, dtype=torch.float32)
    add_adapter(model, AdapterSettings(rank=4, alpha=4))
    with pytest.raises(ModelError, match=r"lora_A is \(2, .* this run has \(4, .*rank"):
        load_adapter(model, target)
    bare = MSAForTraining.from_pretrained(folder, dtype=torch.float32)
    add_adapter(bare, AdapterSettings(rank=2, alpha=6, targets=("q_proj",)))
    with pytest.raises(ModelError, match=r"no such weight.*targets"):
        load_adapter(bare, target)
    with pytest.raises(ModelError, match=r"no adapter .*adapter\.safetensors"):
        load_adapter(model, tmp_path)


def test_without_peft_one_line_says_what_to_type(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = MSAForTraining.from_pretrained(folder, dtype=torch.float32)
    with pytest.raises(InputError, match=r"peft is not installed.*pip install") as caught:
        add_adapter(model, SETTINGS)
    assert "\n" not in str(caught.value)
