"""One loader for everything: a name, a Hub id or a folder gives a `Checkpoint`."""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msa.errors import ConfigError, FetchError, ModelError
from msa.inference.options import AskOptions
from msa.model.adapters import (
    CONFIG_FILE,
    MADE_ANEW,
    adapter_base,
    is_adapter,
    merged_folder,
    merged_path,
)
from msa.model.bases import Base, Progress
from msa.model.checkpoint import Checkpoint
from msa.model.home import offline
from msa.model.identity import set_origin
from msa.model.modeling_msa import MSAForCausalLM
from msa.model.precision import cpu_dtype, named_dtype
from msa.model.pretrained import hub_options, is_hub_id, without_bars
from msa.text.prompts import PromptTemplate

SHIPPED = Path(__file__).parents[1] / "models"
"""Folder of the models that ship with the package, each in a folder of its name."""

PREFERRED = ("smollm2-135m", "worlds")
"""The default model is the first of these that ships, unless $MSA_MODEL names another."""

_log = logging.getLogger(__name__)


def load(
    name_or_path: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Load a model with its tokenizer, text format and options.

    Args:
        name_or_path: a registered name (`shipped_names`), the folder of a checkpoint (of this
            package, of the released format, or an adapter), or a Hub id, "OWNER/NAME" or
            "OWNER/NAME@REVISION". None for the default model (`default_name`).
        device: where the model runs.
        dtype: what it runs in. By default $MSA_DTYPE, else on a CPU what is faster there, measured
            once (models of less than 100 MB: float32); elsewhere what the checkpoint is stored in.
        progress: told what is fetched or prepared at the first use; by default it is written to
            stderr.

    Raises:
        ModelError: there is no such model, or its files are missing, damaged or not finite.
        FetchError: it must be fetched first, and cannot be.
        ConfigError: its configuration or `dtype` is not valid.

    Example:
        >>> from msa import load
        >>> load("worlds").model.config.routing_layers
        [3, 4, 5]
    """
    name = default_name() if name_or_path is None else str(name_or_path)
    dtype = dtype or os.environ.get("MSA_DTYPE") or None
    wanted = None if dtype is None else named_dtype(dtype)
    folder = ready_folder(name, progress=progress or _Stderr())
    kind = torch.device(device).type
    if wanted is None and kind == "cpu":
        wanted = cpu_dtype(sum(path.stat().st_size for path in _weight_files(folder)))
    model, tokenizer = _read(folder, wanted)
    model.to(torch.device(device)).eval()
    set_origin(model, name, [folder / CONFIG_FILE, *_weight_files(folder)])
    _log.info("model %s (%s) in %s on %s", name, folder, model.dtype, device)
    return Checkpoint(model, tokenizer, PromptTemplate.load(folder), AskOptions.load(folder), name)


def ready_folder(
    name: str, *, progress: Progress, source: str | None = None, given: Path | None = None
) -> Path:
    """Folder of a whole checkpoint, with all that it needs fetched and prepared.

    Args:
        name: a registered name, a Hub id or a folder.
        progress, source, given: as in `msa.model.bases.fetch_base`.

    Raises:
        ModelError, FetchError, ConfigError: as `load` does.
    """
    folder = checkpoint_folder(name)
    if not is_adapter(folder):
        return folder
    return merged_folder(folder, _file_name(name), progress=progress, source=source, given=given)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model without loading it.

    Attributes:
        name: what `load` knows it by.
        default: it is the model that is used when none is named.
        folder: of the checkpoint or adapter.
        base: the weights that an adapter needs; None for a whole checkpoint.
        ready: nothing has to be fetched or prepared any more.
        weights: folder of the weights that are loaded, when it is ready.
        config: contents of its `config.json`.
    """

    name: str
    default: bool
    folder: Path
    base: Base | None
    ready: bool
    weights: Path | None
    config: dict[str, Any]


def model_info(name: str) -> ModelInfo:
    """What is known of a model; nothing is loaded, and only a Hub id is fetched.

    Raises:
        ModelError, FetchError, ConfigError: as `load` does.
    """
    folder = checkpoint_folder(name)
    base, weights = None, folder
    if is_adapter(folder):
        base, weights = adapter_base(folder), merged_path(folder, _file_name(name))
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    config.pop("base", None)
    ready = (weights / CONFIG_FILE).is_file()
    default = name == default_name()
    return ModelInfo(name, default, folder, base, ready, weights if ready else None, config)


def shipped_names() -> list[str]:
    """Names of the models that ship with the package."""
    found = SHIPPED.iterdir() if SHIPPED.is_dir() else []
    return sorted(path.name for path in found if (path / CONFIG_FILE).is_file())


def loadable_name(model: str) -> str | None:
    """What to give `load` for the model that a bank says made it; None if it is not to be had.

    Args:
        model: `Manifest.model`: a name, a Hub id or a folder.
    """
    if Path(model).parts[-2:] == ("default_model", "checkpoint"):  # where the first default lay
        return "worlds"
    there = model in shipped_names() or (Path(model) / CONFIG_FILE).is_file() or is_hub_id(model)
    return model if there else None


def default_name() -> str:
    """What is loaded when no model is named: $MSA_MODEL, else the first of `PREFERRED` there is.

    Raises:
        ModelError: the package ships without its models.
    """
    if given := os.environ.get("MSA_MODEL"):
        return given
    shipped = shipped_names()
    for name in PREFERRED:
        if name in shipped:
            return name
    raise ModelError(f"{SHIPPED}: holds no model; install the package again, or name a model")


def checkpoint_folder(name: str) -> Path:
    """Folder of a registered name, of a Hub id (fetched if it is not here), or the folder itself.

    Raises:
        ModelError: there is no such model, or it is none of MSA's.
        FetchError: a Hub id that is not here and cannot be fetched.
    """
    if name in shipped_names():
        return SHIPPED / name
    folder = Path(name)
    if not folder.exists() and is_hub_id(name):
        folder = _from_hub(name)
    check_folder(folder)
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, options = hub_options(name)
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(repository, allow_patterns=patterns, **options))
    except Exception as error:  # httpx, requests and huggingface_hub raise classes of their own
        if variable := offline():
            raise FetchError(
                f"model {name!r}: no such folder; as a Hub id it is not here yet, and {variable} "
                "forbids fetching it; unset it, or give a folder"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise FetchError(
            f"model {name!r}: no such folder, and it cannot be had from the Hub ({reason})"
        ) from error


def check_folder(folder: Path) -> None:
    """Refuse, in one line, what is no checkpoint folder.

    Raises:
        ModelError: the folder or its config.json is missing, or it is of another model type.
    """
    if not folder.is_dir():
        names = [*shipped_names(), *PREFERRED]
        near = difflib.get_close_matches(str(folder), names, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ModelError(
            f"model {str(folder)!r}: no such name or folder; {hint}Give one of "
            f"{', '.join(shipped_names())}, a Hub id, or the folder of an MSA checkpoint "
            "(config.json, *.safetensors, tokenizer.json)"
        )
    config = folder / CONFIG_FILE
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{config}: cannot be read ({error}); this is no checkpoint") from error
    if kind != "msa":
        raise ModelError(
            f"{folder}: model_type is {kind!r}, expected 'msa'; "
            f"make it one first: msa convert {folder} OUT --texts FILE"
        )


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _file_name(name: str) -> str:
    """A name that can stand in a path."""
    return "".join(c if c.isalnum() or c in "-." else "-" for c in Path(name).name) or "model"


def _read(folder: Path, dtype: torch.dtype | None) -> tuple[MSAForCausalLM, Any]:
    """Model and tokenizer of a checkpoint folder; the dtype is the stored one by default."""
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    said = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what is missing is said below
    try:
        with without_bars():
            model, report = MSAForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", output_loading_info=True, local_files_only=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except ConfigError:
        raise
    except Exception as error:  # transformers raises what its parts raise; one class for callers
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder}: cannot be loaded as an MSA checkpoint ({reason})") from error
    finally:
        transformers_logging.set_verbosity(said)
    missing = sorted(set(report["missing_keys"]) - MADE_ANEW)
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} weights are missing ({missing[0]}, ...); get it again, or "
            "make one of a plain backbone: msa convert"
        )
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{folder}: weight {name} holds NaN or infinite values; get it again")
    return model, tokenizer


class _Stderr:
    """Progress on stderr: a line for each thing that is done, with its share on a terminal."""

    def __init__(self) -> None:
        self._said = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if total and sys.stderr.isatty():
            end = "\n" if done >= total else ""
            print(f"\r{what} {100 * done / total:.0f}%", end=end, file=sys.stderr, flush=True)
        elif what != self._said:
            print(what, file=sys.stderr)
        self._said = what
