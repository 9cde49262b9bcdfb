"""Adapters: a model as what training changed of a base, in megabytes instead of hundreds of them.

A folder with `config.json` (an `MSAConfig` and, under "base", the weights it belongs to),
`adapter.safetensors`, `prompt_template.json`, `ask_options.json` and, unless the base's will do, a
tokenizer. `adapter.safetensors` holds low-rank updates as `MODULE.lora_A` [r, in] and
`MODULE.lora_B` [out, r], the scale folded into B, and whole tensors (routers) under their names.

Loading merges once, W + B A in float32, and keeps the result as an ordinary checkpoint folder below
`msa.model.home`, so that later starts read no base and no adapter.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from msa.errors import FetchError, ModelError
from msa.model.bases import Base, Progress, fetch_base
from msa.model.configuration_msa import MSAConfig
from msa.model.home import exclusive, home, made_whole, sha256_of
from msa.model.modeling_msa import MSAForCausalLM
from msa.model.pretrained import GGUF_SUFFIX, read_tokenizer, read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from msa.inference.options import AskOptions
    from msa.text.prompts import PromptTemplate

ADAPTER_FILE = "adapter.safetensors"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
A, B = ".lora_A", ".lora_B"
MADE_ANEW = {"temperature", "lm_head.weight"}
"""Weights that a checkpoint may lack: the configuration gives them."""

Update = Tensor | tuple[Tensor, Tensor, float]


def is_adapter(folder: Path) -> bool:
    """True for the folder of an adapter."""
    return (folder / ADAPTER_FILE).is_file()


def save_adapter(
    state: Mapping[str, Update],
    base: Base,
    folder: str | Path,
    *,
    config: MSAConfig,
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ask_options: AskOptions | None = None,
    dtype: torch.dtype = torch.float16,
    merged_dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write an adapter folder.

    Args:
        state: module or weight name of `MSAForCausalLM` -> what training changed: for a module
            ("model.layers.3.self_attn.q_proj") the low-rank update (A [r, in], B [out, r], scale),
            which adds scale * B A to its weight; for a weight
            ("model.layers.2.self_attn.router_q_proj.0.weight") the whole tensor. All routers must
            be among them.
        base: the weights that the rest comes from.
        folder: made if it is not there; a file of the same name in it is replaced.
        config: of the merged model.
        template: text format.
        tokenizer: None when that of the base will do.
        ask_options: how questions are asked by default.
        dtype: of what is stored: float16 (the more exact) or bfloat16 (the wider).
        merged_dtype: of the merged weights.

    Returns:
        The folder.

    Raises:
        ModelError: a name or shape does not fit, a router is missing, a value is not finite, or
            there is no tokenizer.
    """
    folder = Path(folder)
    if tokenizer is None and not base.file.endswith(GGUF_SUFFIX):
        raise ModelError(f"{base.file} has no tokenizer in it; give save_adapter the tokenizer")
    tensors: dict[str, Tensor] = {}
    for name, update in state.items():
        if isinstance(update, Tensor):
            tensors[name] = update.detach().to("cpu", dtype).contiguous()
            continue
        down, up, scale = update
        tensors[name + A] = down.detach().to("cpu", dtype).contiguous()
        tensors[name + B] = (up.detach().cpu().float() * scale).to(dtype).contiguous()
    check_adapter(tensors, config, folder)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{name}: not finite in {dtype}; store the adapter in bfloat16, or look for NaN"
            )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    values = config.to_diff_dict()
    values |= {"dtype": str(merged_dtype).removeprefix("torch."), "base": base.to_dict()}
    _write_json(folder / CONFIG_FILE, values)
    template.save(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if ask_options is not None:
        ask_options.save(folder)
    return folder


def check_adapter(tensors: Mapping[str, Tensor], config: MSAConfig, where: Path) -> None:
    """Refuse tensors that a model of this configuration has no place for.

    Raises:
        ModelError: names or shapes that do not fit, or routers that are missing.
    """
    shapes = expected_shapes(config)
    left = {name for name in shapes if ".router_" in name}
    for name, tensor in tensors.items():
        module = name.removesuffix(A).removesuffix(B)
        if module == name:
            wanted, found = shapes.get(name), tuple(tensor.shape)
            left.discard(name)
        else:
            down, up = tensors.get(module + A), tensors.get(module + B)
            wanted = shapes.get(module + ".weight")
            rank_fits = down is not None and up is not None and down.shape[0] == up.shape[1]
            found = (up.shape[0], down.shape[1]) if rank_fits else ()  # type: ignore[union-attr]
        if wanted is None or tuple(wanted) != found:
            raise ModelError(
                f"{where}: {name} is {found or tuple(tensor.shape)}, the model wants {wanted}; "
                "this adapter was made for another configuration"
            )
    if left:
        raise ModelError(f"{where}: router weights are missing ({sorted(left)[0]}, ...)")


def expected_shapes(config: MSAConfig) -> dict[str, torch.Size]:
    """Shape of every weight of a model of this configuration; nothing is allocated."""
    with torch.device("meta"):
        model = MSAForCausalLM(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def merge(
    base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], config: MSAConfig, where: Path
) -> dict[str, Tensor]:
    """The weights of the merged model, in float32.

    Args:
        base: weights of the plain backbone, by their names there.
        adapter: contents of `adapter.safetensors`.
        config: of the merged model.
        where: the adapter, for messages.

    Raises:
        ModelError: base, adapter and configuration do not fit.
    """
    check_adapter(adapter, config, where)
    shapes = expected_shapes(config)
    merged = {name: base[name].float() for name in shapes if name in base}
    for name, tensor in adapter.items():
        if name.endswith(A):
            continue
        if not name.endswith(B):
            merged[name] = tensor.float()
            continue
        module = name.removesuffix(B)
        weight = merged.get(module + ".weight")
        if weight is not None and weight.shape == shapes[module + ".weight"]:
            update = tensor.float() @ adapter[module + A].float()
            merged[module + ".weight"] = weight + update
    merged.setdefault("temperature", torch.tensor(float(config.aux_temperature)))
    if config.tie_word_embeddings:
        merged.pop("lm_head.weight", None)
    needed = set(shapes) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    wrong = sorted(needed - set(merged))
    wrong += sorted(n for n, tensor in merged.items() if tensor.shape != shapes[n])
    if wrong:
        raise ModelError(
            f"{where}: its base lacks {wrong[0]}, or has it in another shape; fetch the base again"
        )
    for name, tensor in merged.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{where}: weight {name} holds NaN or infinite values; get it again")
    return merged


def adapter_base(folder: Path) -> Base:
    """The base that an adapter names.

    Raises:
        ModelError: its `config.json` cannot be read, or names none.
        ConfigError: it names one wrongly.
    """
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["base"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: names no base ({error!r}); this adapter is damaged") from error
    if not isinstance(values, Mapping):
        raise ModelError(f"{path}: base is {type(values).__name__}, expected an object")
    return Base.from_dict(values, path)


def merged_path(folder: Path, name: str) -> Path:
    """Where the merged checkpoint of an adapter lies; its name tells its base and its content."""
    base = adapter_base(folder)
    digest = hashlib.sha256(base.sha256.encode())
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.suffix != ".md"):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return home() / "models" / f"{name}-{digest.hexdigest()[:16]}"


def merged_folder(
    folder: Path,
    name: str,
    *,
    progress: Progress,
    source: str | None = None,
    given: Path | None = None,
) -> Path:
    """A checkpoint folder with the adapter merged into its base; made at the first call.

    Args:
        folder: of the adapter.
        name: for the merged folder's own name.
        progress, source, given: as in `msa.model.bases.fetch_base`.

    Raises:
        FetchError: the base cannot be fetched, or the merged weights cannot be kept.
        ModelError: adapter or base is damaged.
    """
    target = merged_path(folder, name)
    if (target / CONFIG_FILE).is_file():
        return target
    base = adapter_base(folder)
    path = fetch_base(base, progress=progress, source=source, given=given)
    waiting = f"Waiting for another process that prepares {name}"
    with exclusive(target.name, lambda: progress(waiting, 0, 0)):
        if (target / CONFIG_FILE).is_file():
            return target
        progress(f"Preparing {name}, once", 0, 0)
        if sha256_of(path) != base.sha256:
            shutil.rmtree(path.parent, ignore_errors=True)
            raise FetchError(f"{path}: was damaged and is removed; type 'msa model get' again")
        with made_whole(target) as scratch:
            _write_merged(folder, path, scratch)
    return target


def _write_merged(folder: Path, base_path: Path, scratch: Path) -> None:
    values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    del values["base"]
    config: MSAConfig = MSAConfig.from_dict(values)
    try:
        adapter = load_file(folder / ADAPTER_FILE)
    except SafetensorError as error:
        raise ModelError(f"{folder / ADAPTER_FILE}: is damaged ({error}); get it again") from error
    merged = merge(read_weights(base_path), adapter, config, folder)
    dtype = getattr(torch, str(values.get("dtype", "bfloat16")))
    try:
        save_file(
            {name: tensor.to(dtype).contiguous() for name, tensor in merged.items()},
            scratch / WEIGHTS_FILE,
            metadata={"format": "pt"},
        )
    except SafetensorError as error:  # its I/O errors are no OSError
        raise FetchError(
            f"{home()}: cannot be written ({error}); free space there, or name another folder: "
            "MSA_HOME=FOLDER"
        ) from error
    for source in folder.iterdir():
        if source.is_file() and source.name not in (ADAPTER_FILE, CONFIG_FILE):
            shutil.copyfile(source, scratch / source.name)
    if not (folder / "tokenizer.json").is_file():
        read_tokenizer(base_path).save_pretrained(scratch)
    _write_json(scratch / CONFIG_FILE, values)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
