"""Our checkpoints in the format of the released one, which the authors' code reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msa.errors import ConfigError
from msa.model.configuration_msa import MSAConfig
from msa.text.prompts import PromptTemplate

if TYPE_CHECKING:
    from msa.model.modeling_msa import MSAForCausalLM

_OURS = (
    *("backbone", "chunk_size", "top_k_documents", "routing_layers", "routing_score"),
    *("query_reduction", "aux_temperature", "layer_types", "rope_parameters", "dtype"),
)


def to_released(config: MSAConfig) -> dict[str, Any]:
    """What the released checkpoint's `config.json` says of such a model.

    The inverse of `msa.model.configuration_msa.from_released`.

    Raises:
        ConfigError: the released code has no such backbone or reduction.
    """
    if config.backbone != "qwen3":
        raise ConfigError(
            f"backbone={config.backbone!r}: the released format has 'qwen3' only; export as 'msa'"
        )
    if config.query_reduction == "pooled":
        raise ConfigError(
            "query_reduction='pooled': the released format has 'max', 'mean' and 'last'; convert "
            "with one of them, or export as 'msa'"
        )
    values = {k: v for k, v in config.to_dict().items() if k not in _OURS}
    rope = dict(config.rope_parameters)
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    values |= {"sliding_window": False, "use_sliding_window": False}
    values["torch_dtype"] = str(config.dtype or "float32").removeprefix("torch.")
    layers = config.routing_layers or []
    values["msa_config"] = {
        "aux_loss": False,
        "aux_loss_method": "INFONCE" if config.routing_score == "cosine" else "INFONCE_DECOUPLE",
        "chunk_reduce_method": "max",
        "decouple_pooling_mode": "mean",
        "decouple_router": True,
        "head_reduce_method": "mean",
        "infonce_loss_temp": config.aux_temperature,
        "pooling_kernel_size": config.chunk_size,
        "query_reduce_method": config.query_reduction,
        "rewrite_position": True,
        "router_layer_idx": ",".join(map(str, layers)),
        "top_k_docs": config.top_k_documents,
    }
    return values


def save_released(model: MSAForCausalLM, template: PromptTemplate, folder: Path) -> None:
    """Write configuration and weights in the released format; the weights' names are the same.

    Raises:
        ConfigError: the released code cannot run such a model, or has another text format.
    """
    config = to_released(model.config)
    if template != PromptTemplate():
        raise ConfigError(
            "the tokenizer lacks marks of the released text format, which the released code does "
            "not let one choose; export as 'msa'"
        )
    model.save_pretrained(folder)
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
