"""From a plain backbone to an MSA model that can be trained further."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from msa.errors import ModelError
from msa.model.backbones import get_backbone
from msa.model.configuration_msa import MSAConfig
from msa.model.modeling_msa import MSAForCausalLM


def convert_backbone(backbone: PreTrainedModel, **settings: Any) -> MSAForCausalLM:
    """An MSA model with the backbone's weights and routers that start from its attention.

    Without a memory the result computes what the backbone computes.

    Args:
        backbone: a causal language model whose `model_type` names a file in
            `msa.model.backbones` (Qwen3, Llama).
        **settings: MSA's fields of `MSAConfig`: chunk_size, top_k_documents, routing_layers, ...

    Returns:
        The model in the backbone's dtype, on its device. The routers are copies of the layer's
        query and key projections, since those already relate words to words; Eq. 5 does the rest
        (ours; the paper does not say how they start).

    Raises:
        ModelError: the backbone has weights that this package has no place for.
        ConfigError: no such backbone, or bad settings.
    """
    name = str(backbone.config.model_type)
    get_backbone(name)
    fields = {k: v for k, v in backbone.config.to_dict().items() if k not in _NOT_CARRIED}
    config = MSAConfig(**{**fields, "backbone": name, **settings})
    with torch.device(backbone.device):
        model = MSAForCausalLM(config)
    model.to(backbone.dtype)
    weights = backbone.state_dict()
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    report = model.load_state_dict(weights, strict=False)
    foreign = report.unexpected_keys
    absent = [
        key
        for key in report.missing_keys
        if ".router_" not in key and key not in ("temperature", "lm_head.weight")
    ]
    if foreign or absent:
        raise ModelError(
            f"{name}: weights do not fit; without a place: {foreign[:3]}, missing: {absent[:3]}"
        )
    for index in config.routing_layers or []:
        attention: Any = model.model.layers[index].self_attn
        attention.router_q_proj[0].weight.data.copy_(attention.q_proj.weight.data)
        attention.router_k_proj[0].weight.data.copy_(attention.k_proj.weight.data)
    return model


_NOT_CARRIED = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype")
