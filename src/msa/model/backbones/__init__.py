"""Backbones: how MSA uses a decoder-only model of transformers.

A backbone is a record of that model's own classes and one function. To add one, write a file here
that defines `BACKBONE`, and name it in `MSAConfig.backbone`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import Tensor, nn

from msa.errors import ConfigError


def project(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, H, D], keys and values [B, T, G, D] of hidden states [B, T, E], projected.

    What most families do; those that normalize queries and keys bring their own.
    """
    heads = (*hidden.shape[:-1], -1, attention.head_dim)
    queries = attention.q_proj(hidden).view(heads)
    return queries, attention.k_proj(hidden).view(heads), attention.v_proj(hidden).view(heads)


@dataclass(frozen=True, slots=True)
class Backbone:
    """What MSA needs of a decoder-only model.

    Attributes:
        decoder_layer: class of a layer, built as (config, layer index). It must have
            `input_layernorm` and `self_attn`, and pass its keyword arguments on to `self_attn`.
        norm: class of the final norm, built as (hidden size, eps=...).
        rotary_embedding: class of the rotary embedding, built as (config).
        rotate: (queries, keys, cos, sin, unsqueeze_dim) -> rotated queries and keys.
        project: (attention module, hidden [B, T, E]) -> queries [B, T, H, D], keys and values
            [B, T, G, D], before rotation.
    """

    decoder_layer: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    rotary_embedding: Callable[..., nn.Module]
    rotate: Callable[..., tuple[Tensor, Tensor]]
    project: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]] = project


def backbone_names() -> list[str]:
    """Names of the backbones there are, which are `model_type`s of transformers."""
    return sorted(module.name for module in iter_modules(__path__))


def get_backbone(name: str) -> Backbone:
    """The backbone of that name.

    Raises:
        ConfigError: there is none; the message names those that exist.
    """
    if name not in backbone_names():
        raise ConfigError(f"backbone={name!r}: expected one of {backbone_names()}")
    backbone: Backbone = import_module(f"{__name__}.{name}").BACKBONE
    return backbone
