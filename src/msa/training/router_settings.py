"""Settings of router pre-training: how pairs are made, what is kept of the model, how to train."""

from __future__ import annotations

from dataclasses import dataclass

from msa.errors import ConfigError

STATE_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """How pairs are made; chances are from 0 to 1, drawn for every passage.

    Attributes:
        sentence: a sentence is asked.
        removed: the sentence asked is taken out of its passage.
        title: the title or heading is asked, and then does not stand in front of the passage.
        question: a question is made from another sentence.
    """

    sentence: float = 1.0
    removed: float = 0.8
    title: float = 0.3
    question: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a chance is out of range; the message names it.
        """
        for name in ("sentence", "removed", "title", "question"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a number from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class StateSettings:
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

    max_document_tokens: int = 512
    batch_tokens: int = 8192
    later_rounds: bool = True
    token_states: bool = False
    dtype: str = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a field is out of range; the message names it.
        """
        for name in ("max_document_tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a whole number from 1")
        if self.dtype not in STATE_DTYPES:
            raise ConfigError(f"dtype={self.dtype!r}: expected one of {', '.join(STATE_DTYPES)}")


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
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

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 20
    epochs: int = 8
    patience: int = 2
    queries: int = 256
    documents: int = 2000
    negatives: int = 4
    temperature: float = 0.0
    together: float = 1.0
    held_out: float = 0.05
    max_held_out: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a field is out of range; the message names it.
        """
        for name in ("epochs", "patience", "queries", "documents", "max_held_out"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a whole number from 1")
        for name in ("learning_rate", "held_out"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(
                    f"{name}={getattr(self, name)}: expected a number between 0 and 1"
                )
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature}: expected 0 or more")
