"""Qwen3: queries and keys are normalized per head before rotation."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from msa.model.backbones import Backbone


def project(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, H, D], keys and values [B, T, G, D] of hidden states [B, T, E]."""
    heads = (*hidden.shape[:-1], -1, attention.head_dim)
    queries = attention.q_norm(attention.q_proj(hidden).view(heads))
    keys = attention.k_norm(attention.k_proj(hidden).view(heads))
    return queries, keys, attention.v_proj(hidden).view(heads)


BACKBONE = Backbone(
    decoder_layer=Qwen3DecoderLayer,
    norm=Qwen3RMSNorm,
    rotary_embedding=Qwen3RotaryEmbedding,
    rotate=apply_rotary_pos_emb,
    project=project,
)
