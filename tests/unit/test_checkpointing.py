"""Activations that are computed again: the same gradients, and less to be held."""

from __future__ import annotations

import gc
import random
import weakref
from itertools import accumulate

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import SMALL
from msa.errors import ConfigError
from msa.model import modeling_msa
from msa.model.convert import convert_backbone
from msa.model.modeling_msa import Step
from msa.synthetic_worlds import generate_world
from msa.text.prompts import PromptEncoder
from msa.training import model as training_model
from msa.training.adapters import add_adapter
from msa.training.config import AdapterSettings, LossSettings, SampleSettings, WorldSettings
from msa.training.model import MSAForTraining
from msa.training.samples import SampleBuilder

TOP_K = 2
LOSSES = LossSettings(routing=0.3, documents=0.2, numbers=0.5, fused=0.4, last_token=0.6)


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": len(tiny_tokenizer)}))
    made = convert_backbone(
        plain,
        chunk_size=8,
        top_k_documents=TOP_K,
        routing_layers=[0, 2],
        query_reduction="pooled",
    )
    folder = tmp_path_factory.mktemp("start")
    made.save_pretrained(folder)
    return folder


def model_of(folder, adapter=False, losses=LOSSES):
    model = MSAForTraining.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.number_head.weight)
    if adapter:
        add_adapter(model, AdapterSettings(rank=2, alpha=4))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    model.loss_settings = losses
    return model.train()


def step_of(tokenizer, documents=9):
    """Documents and questions of every kind, some of them for routing alone."""
    samples = SampleSettings(name=3, read=1, hop=2, answer=1, copy=1)
    builder = SampleBuilder(PromptEncoder(tokenizer), TOP_K)
    world = WorldSettings(documents=documents, max_document_tokens=60)
    step = builder.step(generate_world(2, documents), random.Random(0), world, samples, LOSSES)
    routing = [group for group in step["groups"] if group["positives"].any()]
    step["groups"].append({**routing[0], "route_only": torch.tensor([True])})
    return step


@pytest.fixture(scope="module")
def step(tiny_tokenizer):
    return step_of(tiny_tokenizer)


def gradients_of(model, step):
    model.zero_grad()
    loss = model(**step)["loss"]
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


WAYS = {
    "layers": (True, 0),
    "documents": (False, 2),
    "layers and documents": (True, 2),
    "one document at a time": (False, 1),
}


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_without_it(folder, step, way, adapter):
    layers, batch = WAYS[way]
    model = model_of(folder, adapter)
    loss, expected = gradients_of(model, step)
    routers = [name for name in expected if ".router_" in name]
    assert len(routers) == 6
    assert all(expected[name].any() for name in routers)
    assert ("model.embed_tokens.weight" in expected) != adapter
    model.checkpoint_activations(layers)
    model.document_batch = batch
    again, found = gradients_of(model, step)
    assert torch.allclose(again, loss, atol=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert torch.allclose(found[name], gradient, atol=1e-6 * scale, rtol=0), name


def is_on(model):
    """Whether all layers are computed again; transformers' property has changed its name."""
    (on,) = {layer.gradient_checkpointing for layer in model.model.layers}
    return on


def test_it_can_be_turned_off_again(folder, step):
    model = model_of(folder)
    model.checkpoint_activations()
    assert is_on(model)
    model.checkpoint_activations(False)
    assert not is_on(model)


def enabled(model, options=None):
    """By transformers' own method, whose name has changed."""
    name = "activation_checkpointing_enable"
    getattr(model, name, model.gradient_checkpointing_enable)(options)


def test_the_reentrant_kind_is_refused_since_routers_would_get_no_gradients(folder):
    model = model_of(folder)
    with pytest.raises(ConfigError, match="use_reentrant=True: routers would get no") as caught:
        enabled(model, {"use_reentrant": True})
    assert "\n" not in str(caught.value)
    assert not is_on(model)


@pytest.mark.parametrize("options", [None, {}, {"preserve_rng_state": False}])
def test_by_transformers_method_it_is_the_same(folder, step, options):
    model = model_of(folder)
    _, expected = gradients_of(model, step)
    enabled(model, options)
    _, found = gradients_of(model, step)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[n], g, atol=1e-6) for n, g in expected.items())


def peak_bytes(model, step):
    """Peak of what a step allocates, forwards and backwards, and has not freed yet."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        model(**step)["loss"].backward()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(size for _, size in changes))


@pytest.mark.parametrize("layers", [False, True], ids=["documents", "layers and documents"])
def test_memory_hardly_grows_with_the_number_of_documents(folder, tiny_tokenizer, layers):
    few, many = step_of(tiny_tokenizer, 8), step_of(tiny_tokenizer, 48)
    many["groups"] = few["groups"] = []  # the documents alone
    model = model_of(folder, losses=LossSettings(documents=0.0, numbers=1.0))
    plain = peak_bytes(model, many) - peak_bytes(model, few)
    model.checkpoint_activations(layers)
    model.document_batch = 4
    assert peak_bytes(model, many) - peak_bytes(model, few) < 0.1 * plain


@pytest.mark.parametrize("asks", [True, False], ids=["with a right document", "without"])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_a_step_outlives_it(folder, step, way, asks, monkeypatch):
    """What is computed again must not be kept where its own graph keeps it: that is never freed."""
    made = []

    class Watched(Step):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(weakref.ref(self))

    for module in (modeling_msa, training_model):
        monkeypatch.setattr(module, "Step", Watched)
    groups = step["groups"]
    if not asks:
        groups = [{**g, "positives": torch.zeros_like(g["positives"])} for g in groups]
    model = model_of(folder)
    layers, model.document_batch = WAYS[way]
    model.checkpoint_activations(layers)
    for _ in range(2):
        model(**{**step, "groups": groups})["loss"].backward()
    gc.collect()
    assert len(made) > 2
    assert not any(reference() for reference in made)
