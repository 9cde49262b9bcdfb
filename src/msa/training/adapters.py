"""Low-rank adapters on a frozen backbone, by `peft`: what is trained, kept and merged.

LoRA: Hu et al., arXiv 2106.09685. The base stays in its own dtype (bfloat16 halves its memory); the
adapters and the routers are float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from msa.errors import InputError, ModelError
from msa.model.adapters import ADAPTER_FILE, A, B, Update
from msa.training.config import AdapterSettings

ROUTER_PARTS = ("router_q_proj", "router_k_proj", "router_token_weight")


def add_adapter(model: nn.Module, settings: AdapterSettings) -> None:
    """Put adapters into the model, in place; they and the routers alone are trained.

    Args:
        model: an MSA model; its weights are frozen as they are.
        settings: rank, scale and which layers.

    Raises:
        InputError: `peft` is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError(
            "peft is not installed, which adds adapters; pip install 'msa-memory[train]'"
        ) from error
    model.requires_grad_(False)
    inject_adapter_in_model(
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(settings.targets),
        ),
        model,
    )
    for module in model.modules():
        if hasattr(module, "lora_A"):  # autocast brings the matrices to the inputs' dtype
            cast(Any, module).cast_input_dtype_enabled = False
    for name, parameter in model.named_parameters():
        if _is_trained(name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Let training go on from what an adapter folder holds.

    Args:
        model: with adapters in it, on the base of that adapter.
        folder: as `msa.model.adapters.save_adapter` writes it.

    Raises:
        ModelError: it is no adapter folder, or one of another rank or for another model.
    """
    path = Path(folder) / ADAPTER_FILE
    if not path.is_file():
        raise ModelError(
            f"{folder}: no adapter (no {ADAPTER_FILE} in it); give an adapter's folder"
        )
    held = load_file(path)
    places = dict(model.named_parameters())
    modules = dict(model.named_modules())
    for name, tensor in held.items():
        own = name
        for part, inner in ((A, ".lora_A.default.weight"), (B, ".lora_B.default.weight")):
            if name.endswith(part):
                module: Any = modules.get(name.removesuffix(part))
                own = name.removesuffix(part) + inner
                scale = module.scaling["default"] if hasattr(module, "scaling") else 1.0
                tensor = tensor.float() / scale if part == B else tensor
        place = places.get(own)
        if place is None or place.shape != tensor.shape:
            wanted = "no such weight" if place is None else tuple(place.shape)
            raise ModelError(
                f"{path}: {name} is {tuple(tensor.shape)}, this run has {wanted}; give the rank "
                "and targets with which it was trained, and its base as start_from"
            )
        place.copy_(tensor)


def is_router(name: str) -> bool:
    """Whether a parameter belongs to a router."""
    return any(f".{part}." in name for part in ROUTER_PARTS)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Adapters and routers, by name."""
    return trained_part({name: p.detach() for name, p in model.named_parameters()})


def trained_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapters and routers among the weights of a model."""
    return {name: tensor for name, tensor in state.items() if _is_trained(name)}


def _is_trained(name: str) -> bool:
    return "lora_" in name or is_router(name)


def freeze_below(model: nn.Module, layer: int) -> None:
    """Train the adapters and routers from this layer on, and none below."""
    for name, parameter in model.named_parameters():
        if _is_trained(name):
            index = re.search(r"\.layers\.(\d+)\.", name)
            parameter.requires_grad_(index is None or int(index[1]) >= layer)


def adapter_updates(model: nn.Module, own_weights: Sequence[str] = ()) -> dict[str, Update]:
    """What an adapter folder holds: low-rank updates of modules, and whole weights of routers.

    Updates that are zero, as those of layers that were never trained, are left out.

    Args:
        model: with adapters in it.
        own_weights: names of further weights to be kept whole.

    Returns:
        As `msa.model.adapters.save_adapter` takes it.
    """
    updates: dict[str, Update] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            layer: Any = module
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if bool(up.any()):
                updates[name] = (down, up, float(layer.scaling["default"]))
    weights = model.state_dict()
    updates |= {n: weights[n] for n in weights if is_router(n) and "lora_" not in n}
    return updates | {name: weights[name] for name in own_weights}


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the plain model with the adapters added in, under their plain names.

    Sums are made in float32 and kept in the dtype of the base.
    """
    state = dict(model.state_dict())
    merged = {n: t for n, t in state.items() if "lora_" not in n and ".base_layer." not in n}
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        layer: Any = module
        base = layer.base_layer.weight
        delta = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
        weight = base.float() + layer.scaling["default"] * delta
        merged[f"{name}.weight"] = weight.to(base.dtype)
        if layer.base_layer.bias is not None:
            merged[f"{name}.bias"] = layer.base_layer.bias
    return merged
