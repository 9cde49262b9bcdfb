"""The small model that ships with the package, and loading of any checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from msa.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from msa.model.modeling_msa import MSAForCausalLM
    from msa.text.prompts import PromptTemplate

FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "checkpoint"
DEMO = FOLDER / "demo"


class LoadedModel(NamedTuple):
    """A model with what belongs to it.

    Attributes:
        model: in evaluation mode.
        tokenizer: of the same folder.
        template: the text format that the model was trained with.
    """

    model: MSAForCausalLM
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate


def load_default_model(device: str = "cpu") -> LoadedModel:
    """The model that ships inside the package, in float32."""
    return load_model(None, device=device)


def load_model(path: str | Path | None = None, *, device: str = "cpu") -> LoadedModel:
    """Load a checkpoint folder (ours, the released format, or a converted backbone).

    Args:
        path: folder with config.json, weights and tokenizer; None for the default model.
        device: where the model runs. On a CPU weights are brought to float32.

    Raises:
        ModelError: no such folder, no MSA checkpoint in it, missing, damaged or NaN weights.
    """
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from msa.model.modeling_msa import MSAForCausalLM
    from msa.text.prompts import PromptTemplate

    folder = WEIGHTS if path is None else Path(path)
    check_folder(folder)
    progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        dtype = torch.float32 if device == "cpu" else "auto"
        model, report = MSAForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises what its parts raise; one class for callers
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder}: cannot be loaded as an MSA checkpoint ({reason})") from error
    finally:
        if progress:
            logging.enable_progress_bar()
    missing = sorted(set(report["missing_keys"]) - {"temperature", "lm_head.weight"})
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} weights are missing ({missing[0]}, ...); "
            "convert a plain backbone with msa.model.convert first"
        )
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{folder}: weight {name} holds NaN or infinite values; get it anew")
    model.to(device).eval()
    return LoadedModel(model, tokenizer, PromptTemplate.load(folder))


def check_folder(folder: Path) -> None:
    """Refuse, in one line, what is no checkpoint folder.

    Raises:
        ModelError: the folder or its config.json is missing, or it is of another model type.
    """
    if not folder.is_dir():
        raise ModelError(
            f"model {str(folder)!r}: no such folder; give the folder of an MSA checkpoint "
            "(config.json, *.safetensors, tokenizer.json), or leave --model out for the default"
        )
    config = folder / "config.json"
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{config}: cannot be read ({error}); this is no checkpoint") from error
    if kind != "msa":
        raise ModelError(
            f"{folder}: model_type is {kind!r}, expected 'msa'; "
            "convert a plain backbone with msa.model.convert first"
        )
