from __future__ import annotations

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conftest import SMALL
from msa import MSAForCausalLM
from msa.errors import ConfigError, ModelError
from msa.memory.latent import LatentMemory
from msa.model.convert import convert_backbone

FAMILIES = pytest.mark.parametrize(
    ("config", "model"),
    [(Qwen3Config, Qwen3ForCausalLM), (LlamaConfig, LlamaForCausalLM)],
    ids=["qwen3", "llama"],
)


def plain(config=Qwen3Config, model=Qwen3ForCausalLM, **values):
    torch.manual_seed(0)
    return model(config(**{**SMALL, **values})).eval()


@FAMILIES
def test_routers_begin_as_copies_of_the_layers_own_projections(config, model):
    backbone = plain(config, model)
    ours = convert_backbone(backbone, routing_layers=[1, 2])
    for index, layer in enumerate(ours.model.layers):
        attention = layer.self_attn
        assert attention.routes == (index in (1, 2))
        if attention.routes:
            source = backbone.model.layers[index].self_attn
            assert torch.equal(attention.router_q_proj[0].weight, source.q_proj.weight)
            assert torch.equal(attention.router_k_proj[0].weight, source.k_proj.weight)
            attention.router_q_proj[0].weight.data.zero_()  # a copy: the source stays
            assert source.q_proj.weight.any()


@pytest.mark.parametrize("tied", [True, False])
@FAMILIES
def test_the_head_is_the_backbones_tied_or_not(config, model, tied):
    backbone = plain(config, model, tie_word_embeddings=tied)
    ours = convert_backbone(backbone)
    assert ours.config.tie_word_embeddings is tied
    assert torch.equal(ours.lm_head.weight, backbone.lm_head.weight)
    shared = ours.lm_head.weight.data_ptr() == ours.model.embed_tokens.weight.data_ptr()
    assert shared is tied


def test_settings_are_taken_and_the_backbones_fields_kept():
    backbone = plain(rope_theta=12345.0, rms_norm_eps=1e-3, max_position_embeddings=99)
    config = convert_backbone(
        backbone, chunk_size=7, top_k_documents=3, routing_layers=[0], routing_score="dot"
    ).config
    assert config.model_type == "msa"
    assert config.backbone == "qwen3"
    assert (config.chunk_size, config.top_k_documents) == (7, 3)
    assert (config.routing_layers, config.routing_score) == ([0], "dot")
    assert config.rope_parameters["rope_theta"] == 12345.0
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-3, 99)


def test_the_dtype_stays_that_of_the_backbone():
    ours = convert_backbone(plain().to(torch.bfloat16))
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}


@FAMILIES
def test_a_converted_model_routes_saves_and_loads(config, model, tmp_path):
    ours = convert_backbone(plain(config, model), chunk_size=4).eval()
    ours.save_pretrained(tmp_path)
    again = MSAForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    documents = torch.randint(0, 64, (3, 9))
    question = torch.randint(0, 64, (1, 5))
    logits = []
    for each in (ours, again):
        with torch.no_grad():
            states = each.encode_documents(documents, torch.tensor([9, 4, 6]))
            out = each(question, memory=LatentMemory(states, 2))
        assert sorted(out.selections) == [1, 2]
        logits.append(out.logits)
    assert torch.equal(*logits)


def test_a_backbone_of_another_family_is_refused_with_the_known_ones():
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ConfigError, match=r"backbone='gpt2': expected one of .*llama.*qwen3"):
        convert_backbone(gpt)


def test_weights_without_a_place_are_refused_by_name():
    backbone = plain()
    backbone.model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"qwen3: weights do not fit; .*layers\.0\.extra"):
        convert_backbone(backbone)


def test_missing_weights_are_refused_by_name():
    backbone = plain()
    del backbone.model.norm
    with pytest.raises(ModelError, match=r"missing: \['model.norm.weight'\]"):
        convert_backbone(backbone)
