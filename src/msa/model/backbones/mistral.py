"""Mistral without a sliding window: queries and keys are rotated as they are projected."""

from __future__ import annotations

from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralRMSNorm,
    MistralRotaryEmbedding,
    apply_rotary_pos_emb,
)

from msa.model.backbones import Backbone

BACKBONE = Backbone(
    decoder_layer=MistralDecoderLayer,
    norm=MistralRMSNorm,
    rotary_embedding=MistralRotaryEmbedding,
    rotate=apply_rotary_pos_emb,
)
