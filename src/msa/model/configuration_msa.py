"""Configuration of an MSA model: the backbone's fields and, flat beside them, what MSA adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Qwen3Config

from msa.errors import ConfigError
from msa.ops.routing import QUERY_REDUCTIONS

ROUTING_SCORES = ("cosine", "dot")


class MSAConfig(Qwen3Config):
    """Fields of the backbone (those of `Qwen3Config`, the common decoder-only set) plus MSA's.

    Attributes:
        backbone: name of a file in `msa.model.backbones`.
        chunk_size: tokens per chunk, P (paper: 64).
        top_k_documents: documents that each routing layer selects, k (paper: 16). The question's
            positions start k after the prefix, whatever was found (paper 3.2.2). Not named top_k,
            which transformers takes for a setting of sampling.
        routing_layers: indices of the routing layers; None for the upper half (paper).
        routing_score: "cosine" (the paper, Eq. 2) or "dot" (scaled dot product; what the released
            inference code computes for every `aux_loss_method` but "INFONCE").
        query_reduction: how the tokens of a question come together before the scan of the memory:
            "max" (Eq. 2; all released checkpoints), "mean", "last" or "pooled"; see
            `msa.ops.routing.reduce_queries`.
        aux_temperature: τ of the routing loss (Eq. 5).
    """

    model_type = "msa"

    backbone: str = "qwen3"
    chunk_size: int = 64
    top_k_documents: int = 16
    routing_layers: list[int] | None = None
    routing_score: str = "cosine"
    query_reduction: str = "max"
    aux_temperature: float = 0.1
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the routing layers and check what MSA adds.

        Raises:
            ConfigError: a field is out of range; the message names it.
        """
        super().__post_init__(**kwargs)
        layers = self.num_hidden_layers
        if self.routing_layers is None:
            self.routing_layers = list(range(layers // 2, layers))
        self.routing_layers = sorted(int(i) for i in self.routing_layers)
        if any(i < 0 or i >= layers for i in self.routing_layers):
            raise ConfigError(
                f"routing_layers={self.routing_layers}: expected indices from 0 to {layers - 1}"
            )
        if len(set(self.routing_layers)) != len(self.routing_layers):
            raise ConfigError(f"routing_layers={self.routing_layers}: an index is given twice")
        if self.chunk_size < 1 or self.top_k_documents < 1:
            raise ConfigError(
                f"chunk_size={self.chunk_size}, top_k_documents={self.top_k_documents}: "
                "expected whole numbers from 1"
            )
        if self.routing_score not in ROUTING_SCORES:
            raise ConfigError(
                f"routing_score={self.routing_score!r}: expected one of {ROUTING_SCORES}"
            )
        if self.query_reduction not in QUERY_REDUCTIONS:
            raise ConfigError(
                f"query_reduction={self.query_reduction!r}: expected one of {QUERY_REDUCTIONS}"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from a dictionary, ours or the released `config.json` (nested `msa_config`)."""
        if "msa_config" in config_dict:
            config_dict = from_released(config_dict)
        return super().from_dict(config_dict, **kwargs)


def from_released(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten the released checkpoint's `config.json`.

    `router_layer_idx` is a string ("18,19,20" or "all"); `sliding_window` is a bool there;
    `aux_loss_method` decides the score that its inference computes (cosine for exactly "INFONCE").

    Raises:
        ConfigError: `msa_config` is no object, or asks for a reduction that Eq. 2 does not have.
    """
    flat = dict(config)
    nested = flat.pop("msa_config")
    if not isinstance(nested, Mapping):
        raise ConfigError(f"msa_config is {type(nested).__name__}: expected an object")
    wanted = {
        "head_reduce_method": "mean",
        "chunk_reduce_method": "max",
        "decouple_pooling_mode": "mean",
        "decouple_router": True,
    }
    for name, value in wanted.items():
        if nested.get(name, value) != value:
            raise ConfigError(
                f"msa_config.{name}={nested[name]!r}: this package computes Eq. 2 with {value!r}"
            )
    reduction = nested.get("query_reduce_method", "max")
    if reduction not in ("max", "mean", "last"):
        raise ConfigError(
            f"msa_config.query_reduce_method={reduction!r}: expected 'max', 'mean' or 'last'"
        )
    flat["query_reduction"] = reduction
    layers = str(nested.get("router_layer_idx", "all"))
    count = int(flat["num_hidden_layers"])
    flat["routing_layers"] = (
        list(range(count)) if layers == "all" else [int(i) for i in layers.split(",")]
    )
    flat["chunk_size"] = int(nested["pooling_kernel_size"])
    flat["top_k_documents"] = int(nested.get("top_k_docs", 16))
    flat["routing_score"] = "cosine" if nested.get("aux_loss_method") == "INFONCE" else "dot"
    flat["aux_temperature"] = float(nested.get("infonce_loss_temp", 0.1))
    flat["backbone"] = "qwen3"
    if isinstance(flat.get("sliding_window"), bool):
        flat["sliding_window"] = None
    return flat
