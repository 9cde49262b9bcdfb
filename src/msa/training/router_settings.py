"""Settings of router pre-training: how pairs are made, what is kept of the model, how to train."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from msa.training.settings import (
    Count,
    Integer,
    Settings,
    Share,
    Switch,
    Weight,
    Whole,
    settings,
)

Between = Annotated[float, Strict(), Field(gt=0, lt=1)]


@settings
class PairSettings(Settings):
    """How pairs are made; chances are from 0 to 1, drawn for every passage.

    Attributes:
        sentence: a sentence is asked.
        removed: the sentence asked is taken out of its passage.
        title: the title or heading is asked, and then does not stand in front of the passage.
        question: a question is made from another sentence.
    """

    sentence: Share = 1.0
    removed: Share = 0.8
    title: Share = 0.3
    question: Share = 1.0


@settings
class StateSettings(Settings):
    """What is encoded, and how it is kept.

    Attributes:
        max_document_tokens: longer documents are cut (as `msa index` would split them).
        batch_tokens: tokens that are encoded together.
        later_rounds: beside every question of several gold documents, the same question after one
            of them was read, which asks for the others.
        token_states: keep all routing tokens of a query even where their average would do, so that
            the weights of the tokens can be trained.
        dtype: on disk: "float16", "bfloat16" or "float32".
        seed: of the draw of what was read.
    """

    max_document_tokens: Count = 512
    batch_tokens: Count = 8192
    later_rounds: Switch = True
    token_states: Switch = False
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    seed: Integer = 0


@settings
class RouterSettings(Settings):
    """How routers are trained.

    Attributes:
        learning_rate: AdamW's; rises over `warmup_steps`, then falls along a cosine to a tenth.
        weight_decay: AdamW's.
        epochs: at most; `patience` of them without a better recall end the training.
        queries: per step.
        documents: per step, gold ones and hard negatives first, then others of the set.
        negatives: hard negatives of each query.
        temperature: τ of Eq. 5; 0 for the model's `aux_temperature`.
        together: weight of the loss over the mean of the layers' scores; each layer's own loss
            weighs 1 / layers.
        held_out: share of the articles whose questions are kept for measuring recall.
        max_held_out: queries of a set that recall is measured on, at most.
        seed: of the split and of the order.
    """

    learning_rate: Between = 3e-4
    weight_decay: Weight = 0.01
    warmup_steps: Whole = 20
    epochs: Count = 8
    patience: Count = 2
    queries: Count = 256
    documents: Count = 2000
    negatives: Whole = 4
    temperature: Weight = 0.0
    together: Weight = 1.0
    held_out: Between = 0.05
    max_held_out: Count = 500
    seed: Integer = 0
