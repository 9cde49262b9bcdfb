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
    project: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]


def get_backbone(name: str) -> Backbone:
    """The backbone of that name.

    Raises:
        ConfigError: there is none; the message names those that exist.
    """
    known = sorted(module.name for module in iter_modules(__path__))
    if name not in known:
        raise ConfigError(f"backbone={name!r}: expected one of {known}")
    backbone: Backbone = import_module(f"{__name__}.{name}").BACKBONE
    return backbone
