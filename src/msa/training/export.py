"""What a run leaves: a checkpoint for `msa.load`, and with adapters a folder of what changed."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from msa.inference.options import AskOptions
from msa.model.adapters import save_adapter
from msa.model.bases import Base
from msa.model.origin import ORIGIN_FILE, Origin
from msa.model.pretrained import GGUF_SUFFIX
from msa.text.prompts import PromptTemplate
from msa.training.adapters import adapter_updates, merged_state
from msa.training.config import TrainingConfig
from msa.training.model import MSAForTraining

_log = logging.getLogger(__name__)


def export_model(
    model: MSAForTraining,
    target: Path,
    tokenizer: PreTrainedTokenizerFast,
    template: PromptTemplate,
    start_from: str | None,
) -> None:
    """Write a checkpoint folder, adapters merged into the weights.

    Args:
        model: trained.
        target: the folder.
        tokenizer, template: of the model.
        start_from: checkpoint whose ask options are kept.
    """
    model.export(str(target), merged_state(model))
    tokenizer.save_pretrained(target)
    template.save(target)
    if start_from is not None:
        AskOptions.load(start_from).save(target)


def adapter_origin(config: TrainingConfig) -> Origin | None:
    """The base that an adapter trained by this configuration belongs to.

    None without an adapter, and (with a warning) when the base is not known.

    Raises:
        ConfigError: `adapter.base` or the checkpoint's `base.json` is not valid.
    """
    if config.adapter is None or config.start_from is None:
        return None
    origin = Origin.load(config.start_from)
    given = dict(config.adapter.base)
    if origin is None and not given:
        _log.warning(
            "%s has no %s, so the run will leave no adapter folder, only the merged model; convert "
            "the base with 'msa convert', or describe it under adapter.base",
            config.start_from,
            ORIGIN_FILE,
        )
        return None
    if origin is None:
        return Origin(Base.from_dict(given, Path("adapter.base")))
    values = {**origin.base.to_dict(), **given}
    base = Base.from_dict(values, Path("adapter.base"))
    return Origin(base, origin.own_weights, origin.own_tokenizer)


def export_adapter(
    model: MSAForTraining,
    origin: Origin,
    target: Path,
    tokenizer: PreTrainedTokenizerFast,
    template: PromptTemplate,
    start_from: str | None,
) -> None:
    """Write the adapter folder of a trained model (see `msa.model.adapters`).

    Args:
        model: with low-rank adapters in it.
        origin: its base.
        target: the folder.
        tokenizer, template: of the model; the tokenizer is left out when the base has the same.
        start_from: checkpoint whose ask options are kept.
    """
    in_base = origin.base.file.endswith(GGUF_SUFFIX) and not origin.own_tokenizer
    save_adapter(
        adapter_updates(model, origin.own_weights),
        origin.base,
        target,
        config=model.config,
        template=template,
        tokenizer=None if in_base else tokenizer,
        ask_options=None if start_from is None else AskOptions.load(start_from),
    )
