"""Llama: queries and keys are rotated as they are projected."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from msa.model.backbones import Backbone


def project(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, H, D], keys and values [B, T, G, D] of hidden states [B, T, E]."""
    heads = (*hidden.shape[:-1], -1, attention.head_dim)
    queries = attention.q_proj(hidden).view(heads)
    return queries, attention.k_proj(hidden).view(heads), attention.v_proj(hidden).view(heads)


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
    project=project,
)
