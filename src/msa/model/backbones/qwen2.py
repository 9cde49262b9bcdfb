"""Qwen2: queries, keys and values have biases; rotated as they are projected."""

from __future__ import annotations

from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
)

from msa.model.backbones import Backbone

BACKBONE = Backbone(
    decoder_layer=Qwen2DecoderLayer,
    norm=Qwen2RMSNorm,
    rotary_embedding=Qwen2RotaryEmbedding,
    rotate=apply_rotary_pos_emb,
)
