"""What a loader gives: a model together with what belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from msa.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from msa.inference.options import AskOptions
    from msa.model.modeling_msa import MSAForCausalLM
    from msa.text.prompts import PromptTemplate


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model with what belongs to it; `msa.load` gives one.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: the model's.
        template: the text format that the model was trained with.
        ask_options: how questions are asked unless a call says otherwise.
        name: what it was loaded by: a registered name, a Hub id or a folder.
    """

    model: MSAForCausalLM
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    ask_options: AskOptions
    name: str


def parts_of(
    model: MSAForCausalLM | Checkpoint | None,
    tokenizer: PreTrainedTokenizerBase | None,
    template: PromptTemplate | None,
) -> tuple[MSAForCausalLM | None, PreTrainedTokenizerBase | None, PromptTemplate | None]:
    """Model, tokenizer and template, of a checkpoint or one by one.

    Raises:
        InputError: a model without its tokenizer, or the reverse.
    """
    if isinstance(model, Checkpoint):
        return model.model, tokenizer or model.tokenizer, template or model.template
    if (model is None) != (tokenizer is None):
        raise InputError(
            "a model and its tokenizer are needed (or a Checkpoint), or neither; one was given"
        )
    return model, tokenizer, template
