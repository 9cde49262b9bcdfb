"""Llama: queries and keys are rotated as they are projected."""

from __future__ import annotations

from typing import Any

from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from msa.model.backbones import Backbone


def decoder_layer(config: Any, layer_index: int) -> LlamaDecoderLayer:
    """A Llama layer; `MSAConfig` has no `mlp_bias`, which Llama's own checkpoints leave off."""
    if not hasattr(config, "mlp_bias"):
        config.mlp_bias = False
    return LlamaDecoderLayer(config, layer_index)


BACKBONE = Backbone(
    decoder_layer=decoder_layer,
    norm=LlamaRMSNorm,
    rotary_embedding=LlamaRotaryEmbedding,
    rotate=apply_rotary_pos_emb,
)
