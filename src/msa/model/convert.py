"""From a plain backbone to an MSA model: the same language model, with routers."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from msa.errors import ConfigError, InputError, ModelError
from msa.inference.options import AskOptions
from msa.model.backbones import backbone_names
from msa.model.calibrate import MIN_TEXTS, CalibrationReport, calibrate_routers
from msa.model.configuration_msa import MSAConfig
from msa.model.export import save_released
from msa.model.marks import Marks, fit_template
from msa.model.modeling_msa import MSAForCausalLM
from msa.model.origin import Origin, base_of
from msa.model.pretrained import is_gguf, read_config, read_model, read_tokenizer
from msa.text.prompts import PromptEncoder, PromptTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_POSITIONS = 1024
"""A question, its template and the text of two documents need about so many."""

MAX_CANDIDATES = 15
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Largest difference of logits at which a converted model still is its backbone."""

FORMATS = ("msa", "released")
# Few rounds, and the routing scores decide what is read: without training the model has not learned
# to name documents.
ASK_OPTIONS = AskOptions(
    max_rounds=2,
    max_documents_per_round=2,
    max_new_tokens=32,
    prior_weight=5.0,
    prior_temperature=0.03,
)
# τ of the routing loss: cosines of whitened vectors are small, 0.3 for a document that fits well.
TEMPERATURE = 0.05
_NOT_CARRIED = (
    *("model_type", "architectures", "transformers_version", "dtype", "torch_dtype"),
    *("quantization_config", "_name_or_path"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
)


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What a conversion gave.

    Attributes:
        backbone: name of the backbone's family.
        parameters: of the result.
        dtype: of its weights.
        calibration: the routing layers and the recall to expect, on pairs of the texts.
        marks: the template's marks, and tokens that were added for it.
        logit_difference: largest between backbone and result without a memory.
    """

    backbone: str
    parameters: int
    dtype: str
    calibration: CalibrationReport
    marks: Marks
    logit_difference: float


def check_backbone(config: Any) -> None:
    """Refuse, by name, a backbone whose attention MSA does not compute.

    Raises:
        ConfigError: an unknown family, sliding windows, quantized weights.
    """
    name = str(config.model_type)
    known = backbone_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, cutoff=0.4)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ConfigError(f"backbone={name!r}: expected one of {known}{hint}")
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"]) - {"full_attention"}
    inactive = not window or window >= int(config.max_position_embeddings)
    if kinds - ({"sliding_attention"} if inactive else set()):
        what = f"sliding_window={window}" if window else f"layers of {sorted(kinds)}"
        raise ConfigError(
            f"{name} with {what}: MSA attends to all local tokens in every layer, so it would "
            "compute something else; give a backbone with full attention"
        )
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = dict(quantized).get("quant_method", "?") if isinstance(quantized, dict) else "?"
        raise ConfigError(
            f"{name} with quantized weights ({method}): give the plain weights, or a GGUF file"
        )


def convert_backbone(backbone: PreTrainedModel, **settings: Any) -> MSAForCausalLM:
    """An MSA model with the backbone's weights and routers that start from its attention.

    Without a memory the result computes what the backbone computes.

    Args:
        backbone: a causal language model whose `model_type` names a file in
            `msa.model.backbones`.
        **settings: MSA's fields of `MSAConfig`: chunk_size, top_k_documents, routing_layers, ...

    Returns:
        The model in the backbone's dtype, on its device. The routers are copies of the layer's
        query and key projections, since those already relate words to words;
        `msa.model.calibrate.calibrate_routers` gives it better ones (ours; the paper does not say
        how they start).

    Raises:
        ModelError: the backbone has weights that this package has no place for.
        ConfigError: it cannot be converted (`check_backbone`), or bad settings.
    """
    check_backbone(backbone.config)
    name = str(backbone.config.model_type)
    fields = {k: v for k, v in backbone.config.to_dict().items() if k not in _NOT_CARRIED}
    heads = int(fields["num_attention_heads"])
    fields["head_dim"] = fields.get("head_dim") or int(fields["hidden_size"]) // heads
    fields["num_key_value_heads"] = fields.get("num_key_value_heads") or heads
    config = MSAConfig(**{**fields, "backbone": name, **settings})
    with torch.device(backbone.device):
        model = MSAForCausalLM(config)
    model.to(backbone.dtype)
    weights = backbone.state_dict()
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    report = model.load_state_dict(weights, strict=False)
    foreign = report.unexpected_keys
    absent = [
        key
        for key in report.missing_keys
        if ".router_" not in key and key not in ("temperature", "lm_head.weight")
    ]
    if foreign or absent:
        raise ModelError(
            f"{name}: weights do not fit; without a place: {foreign[:3]}, missing: {absent[:3]}"
        )
    for index in config.routing_layers or []:
        attention: Any = model.model.layers[index].self_attn
        attention.router_q_proj[0].weight.data.copy_(attention.q_proj.weight.data)
        attention.router_k_proj[0].weight.data.copy_(attention.k_proj.weight.data)
    return model


def convert_checkpoint(
    source: str | Path,
    folder: str | Path,
    *,
    texts: Sequence[str],
    questions: Sequence[tuple[str, int]],
    layers: Sequence[int] | None = None,
    chunk_size: int = 32,
    top_k_documents: int = 16,
    query_reduction: str = "pooled",
    export: str = "msa",
) -> ConversionReport:
    """Make a checkpoint folder of a plain model: whitened routers, tokenizer, template, options.

    Args:
        source: a Hub id, a folder or a GGUF file.
        folder: where the checkpoint goes; not there yet, or empty.
        texts: at least `MIN_TEXTS`; the routers are whitened on them.
        questions: (question, row of the text that answers it), such as a sentence that was taken
            out of it; the layers are chosen by them, and recall is measured with half of them.
        layers: the routing layers; by default those of up to three quarters of the model whose
            scores find most together.
        chunk_size, top_k_documents, query_reduction: as in `MSAConfig`.
        export: "msa", or "released" for the format of the released checkpoint.

    Raises:
        ConfigError: the backbone or a setting cannot be used.
        ModelError: the model or its tokenizer cannot be used or read.
        FetchError: it is not here and cannot be fetched.
        InputError: too few texts, or the folder is not free.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is there already; give a new folder")
    if export not in FORMATS:
        raise ConfigError(f"export={export!r}: expected one of {FORMATS}")
    if len(texts) < MIN_TEXTS:
        raise InputError(
            f"{len(texts)} texts: routers are whitened on at least {MIN_TEXTS}; give more files"
        )
    config = read_config(source)
    check_backbone(config)
    positions = int(config.max_position_embeddings)
    if positions < MIN_POSITIONS:
        raise ConfigError(
            f"{source} has max_position_embeddings={positions}: a question and the documents read "
            f"for it need at least {MIN_POSITIONS}"
        )
    settings: dict[str, Any] = {
        "chunk_size": chunk_size,
        "top_k_documents": top_k_documents,
        "query_reduction": query_reduction,
        "aux_temperature": TEMPERATURE,
    }
    tokenizer = read_tokenizer(source)
    backbone = read_model(source, torch.float32 if is_gguf(source) else "auto")
    template = PromptTemplate() if export == "released" else PromptTemplate.compact()
    marks = fit_template(tokenizer, backbone.get_input_embeddings().weight.detach(), template)
    enlarged = _make_room(backbone, len(tokenizer))
    count = int(backbone.config.num_hidden_layers)
    candidates = None if layers else _candidates(count)
    model = convert_backbone(backbone, routing_layers=list(layers or candidates or []), **settings)
    encoder = PromptEncoder(tokenizer, marks.template)
    difference = logit_difference(backbone, model.eval(), encoder, texts)
    del backbone
    calibration = calibrate_routers(
        model,
        [encoder.document(number, text) for number, text in enumerate(texts, start=1)],
        [encoder.context(question) for question, _ in questions],
        [row for _, row in questions],
        candidates,
    )
    keep_layers(model, calibration.layers)
    _save(model, tokenizer, marks, folder, export)
    if (base := base_of(source)) is not None and export == "msa":
        Origin(base, tuple(enlarged), bool(marks.added)).save(folder)
    return ConversionReport(
        backbone=model.config.backbone,
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        calibration=calibration,
        marks=marks,
        logit_difference=difference,
    )


def keep_layers(model: MSAForCausalLM, layers: Sequence[int]) -> None:
    """Let only these of the routing layers route, in place."""
    for index in set(model.config.routing_layers or []) - set(layers):
        attention: Any = model.model.layers[index].self_attn
        attention.routes = False
        for name in [name for name, _ in attention.named_children() if name.startswith("router_")]:
            delattr(attention, name)
    model.config.routing_layers = sorted(layers)


@torch.no_grad()
def logit_difference(
    backbone: PreTrainedModel, model: MSAForCausalLM, encoder: PromptEncoder, texts: Sequence[str]
) -> float:
    """Largest difference of the logits of backbone and model, without a memory, on a text.

    Raises:
        ModelError: it is more than rounding: the backbone has an attention that MSA does not
            compute.
    """
    ids = torch.tensor([encoder.document(1, max(texts[:MIN_TEXTS], key=len))[:256]])
    ids = ids.to(backbone.device)
    difference = float((backbone(ids).logits.float() - model(ids).logits.float()).abs().max())
    allowed = TOLERANCE.get(model.dtype, 0.0)
    if not difference <= allowed:
        raise ModelError(
            f"{model.config.backbone}: without a memory the logits differ by {difference:.3g}, "
            f"allowed is {allowed:.3g}; this backbone computes attention that MSA does not"
        )
    return difference


def _candidates(count: int) -> list[int]:
    """Layers to choose from: evenly over the lower three quarters, the very first left out."""
    step = max(1, -(-count // MAX_CANDIDATES))
    return list(range(step, 3 * count // 4 + 1, step)) or [count - 1]


def _make_room(backbone: PreTrainedModel, tokens: int) -> list[str]:
    """Rows for tokens that were added to the tokenizer, each the mean of the others.

    Returns:
        Names of the weights that were enlarged.
    """
    before = int(backbone.config.vocab_size)
    if tokens <= before:
        return []
    backbone.resize_token_embeddings(tokens, mean_resizing=False)
    for layer in (backbone.get_input_embeddings(), backbone.get_output_embeddings()):
        layer.weight.data[before:] = layer.weight.data[:before].mean(0)
    tied = bool(backbone.config.tie_word_embeddings)
    return ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]


def _save(
    model: MSAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    marks: Marks,
    folder: Path,
    export: str,
) -> None:
    scratch = folder.absolute().with_name(f".{folder.absolute().name}-partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        if export == "released":
            save_released(model, marks.template, scratch)
        else:
            model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        marks.template.save(scratch)
        ASK_OPTIONS.save(scratch)
        scratch.replace(folder)  # an empty folder gives way
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
