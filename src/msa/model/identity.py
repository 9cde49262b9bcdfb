"""Which checkpoint a model is: its name, and hashes of its weights.

Hashing gigabytes takes seconds, so the hashes of a checkpoint that was loaded from files are kept
below `msa.model.home` and hold as long as those files and the model are what they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from msa.model.home import home

if TYPE_CHECKING:
    from msa.model.modeling_msa import MSAForCausalLM

# What decides the latent states of given weights, besides the fields that a bank names.
_CONFIG_FIELDS = (
    "attention_bias",
    "backbone",
    "head_dim",
    "hidden_act",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
)
_LAYER = re.compile(r"\.layers\.(\d+)\.")
SAMPLED = 512
"""Values of each weight that are looked at to see whether a model has changed."""


class Fingerprints(NamedTuple):
    """SHA-256 in hexadecimal of a model's weights.

    Attributes:
        weights: all but the routers'.
        router: the routers'.
        states: those that the content of a bank depends on: the embedding and the layers up to
            the last routing layer, without the routers. Training that leaves these as they are
            leaves every bank as it is.
    """

    weights: str
    router: str
    states: str


@dataclass(frozen=True, slots=True)
class _State:
    """What is looked at to see whether a model has changed.

    Attributes:
        sample: digest of names, shapes, settings and a sample of the values.
        sums: of all bits of each weight; a value that changes changes its sum.
    """

    sample: str
    sums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a model was loaded from.

    Attributes:
        name: what it was loaded by.
        files: digest of the paths, sizes and times of its files.
        state: its state right after loading.
    """

    name: str
    files: str
    state: _State


_origins: WeakKeyDictionary[Any, _Origin] = WeakKeyDictionary()
_hashes: WeakKeyDictionary[Any, tuple[_State, Fingerprints]] = WeakKeyDictionary()


def set_origin(model: MSAForCausalLM, name: str, files: Sequence[Path]) -> None:
    """Note what a model was just loaded from; its files must not have changed since."""
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        place = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ino}\n"
        digest.update(place.encode(errors="surrogateescape"))
    _origins[model] = _Origin(name, digest.hexdigest(), _state_of(model))


def checkpoint_name(model: MSAForCausalLM) -> str:
    """What a model was loaded by (a name, Hub id or folder), to tell people."""
    origin = _origins.get(model)
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    return origin.name if origin is not None else str(name)


def model_fingerprints(model: MSAForCausalLM) -> Fingerprints:
    """Hashes of the weights, of the router, and of what the states of documents depend on.

    Over names, shapes and values rounded to bfloat16, so that a checkpoint has one fingerprint
    whether it is loaded in float32 or in bfloat16. Kept per model until a weight changes: all
    weights are summed up each time, at the speed of memory, since torch does not count what is
    written through `.data`.
    """
    state = _state_of(model)
    known = _hashes.get(model)
    if known is not None and known[0] == state:
        return known[1]
    origin = _origins.get(model)
    loaded = origin is not None and origin.state == state
    path = home() / "fingerprints" / f"{origin.files}.json" if origin and loaded else None
    hashes = _read(path, state.sample) or _computed(model)
    _hashes[model] = (state, hashes)
    if path is not None:
        _keep(path, state.sample, hashes)
    return hashes


def _computed(model: MSAForCausalLM) -> Fingerprints:
    parameters = sorted(model.named_parameters())
    settings = _settings(model)
    others = [(name, weight) for name, weight in parameters if "router" not in name]
    encoding = [(name, weight) for name, weight in others if _encodes(name, model)]
    weights, states = (
        hashlib.sha256((_hash_tensors(part) + settings).encode()).hexdigest()
        for part in (others, encoding)
    )
    router = _hash_tensors((name, weight) for name, weight in parameters if "router" in name)
    return Fingerprints(weights, router, states)


def _encodes(name: str, model: MSAForCausalLM) -> bool:
    """Whether the states of documents depend on a weight."""
    layer = _LAYER.search(name)
    if layer is None:
        return "embed_tokens" in name
    return int(layer[1]) <= max(model.config.routing_layers or (-1,))


def _settings(model: MSAForCausalLM) -> str:
    settings = {name: getattr(model.config, name, None) for name in _CONFIG_FIELDS}
    return json.dumps(settings, sort_keys=True, default=str)


def _hash_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)};".encode())
        rounded = tensor.detach().to(torch.bfloat16).cpu().contiguous().reshape(-1)
        digest.update(rounded.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _state_of(model: MSAForCausalLM) -> _State:
    parameters = sorted(model.named_parameters())
    digest = hashlib.sha256(_settings(model).encode())
    samples, sums = [], []
    for name, parameter in parameters:
        digest.update(f"{name} {tuple(parameter.shape)};".encode())
        flat = parameter.detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // SAMPLED)].to(torch.bfloat16))
        sums.append(_bit_sum(flat))
    if samples:
        digest.update(torch.cat(samples).cpu().view(torch.uint8).numpy().data)
    return _State(digest.hexdigest(), tuple(torch.stack(sums).tolist()) if sums else ())


def _bit_sum(flat: torch.Tensor) -> torch.Tensor:
    """Sum of the words of a weight [N], modulo 2**64: a scalar int64 on its device."""
    if flat.storage_offset() * flat.itemsize % 8:
        flat = flat.clone()
    whole = flat.numel() * flat.itemsize // 8 * 8 // flat.itemsize
    words, rest = flat[:whole].view(torch.int64), flat[whole:].view(torch.uint8)
    return words.sum() + rest.sum(dtype=torch.int64)


def _read(path: Path | None, sample: str) -> Fingerprints | None:
    if path is None:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = Fingerprints(*(str(values[name]) for name in Fingerprints._fields))
        return found if values["sample"] == sample else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not kept yet, or damaged: it is computed again


def _keep(path: Path, sample: str, hashes: Fingerprints) -> None:
    """Write the hashes for the next start, which computes them again if that is not possible."""
    text = json.dumps({"sample": sample, **hashes._asdict()}) + "\n"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
