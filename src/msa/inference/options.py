"""How questions are asked: one frozen object, checked when it is made; needs no torch."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from msa.errors import ConfigError

LEAST_TEMPERATURE = 0.001
"""Above 0; scores that are divided by less overflow."""
ASK_OPTIONS_FILE = "ask_options.json"
_COUNTS = (
    "max_rounds",
    "max_documents_per_round",
    "min_documents_per_round",
    "max_new_tokens",
    "candidates",
    "judged_documents",
    "answer_beginnings",
    "batch_size",
)
# Features of the refusal's score (msa.inference.refusal):
# log(p / (1 - p)) of the whole refusal in place of an answer, by the model
REFUSAL_LOGIT = "refusal_logit"
# best fused score of the first round, and how far the second is below it
ROUTING_SCORE = "routing_score"
ROUTING_MARGIN = "routing_margin"
# mean over the answer's tokens of the logarithm of their probability
ANSWER_LOG_PROBABILITY = "answer_log_probability"
# share of the question's words, rare ones counting more, that stand in what was read
COVERAGE = "coverage"
# the same share, of the sentences in which the answer stands, with their titles; of the best one
ANSWER_COVERAGE = "answer_coverage"
FEATURES = (
    REFUSAL_LOGIT,
    ROUTING_SCORE,
    ROUTING_MARGIN,
    ANSWER_LOG_PROBABILITY,
    COVERAGE,
    ANSWER_COVERAGE,
)
# Known only once the answer is written; and what they can be.
OF_THE_ANSWER = {ANSWER_LOG_PROBABILITY: (-math.inf, 0.0), ANSWER_COVERAGE: (0.0, 1.0)}
BIAS = "bias"


_FROM_ZERO = (
    "prior_weight",
    "lexical_weight",
    "end_weight",
    "evidence_weight",
    "judge_margin",
    "judge_weight",
    "temperature",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AskOptions:
    """Settings of `MemoryEngine.ask`. A checkpoint's own defaults lie in `ask_options.json`.

    Attributes:
        max_rounds: rounds in which the model may read; after them it must answer.
        max_documents_per_round: documents that the model may name in one round.
        min_documents_per_round: documents that it must name in a round in which it reads, if so
            many are there to be named.
        max_new_tokens: tokens of the answer, at most.
        candidates: documents that a routing layer lists for the fused ranking (`fusion.fuse`); the
            model attends to its own `top_k_documents` only. Below that number, that number.
        layer_weights: routing layer -> factor of its scores in the fused ranking, 0 for layers that
            are not named; None weighs all equally.
        lexical_weight: factor in the fused ranking of how well a document's words fit
            (`MemoryBank.lexical_ranking`); 0 leaves words alone.
        prior_weight: how much the fused ranking weighs in on which of the routed documents is
            named (an extension; 0 is the paper: the model alone decides). 1 treats the ranking as
            a prior that the model has not seen.
        prior_temperature: tau of the softmax over the fused scores.
        end_bias, end_weight: from the second round on, `end_bias` minus `end_weight` times how far
            the best unread document leads (`fusion.lead`) is added to the log odds of ending the
            retrieval (an extension; 0 and 0 are the paper: the model alone decides).
        judged_documents: documents from the top of the first round's fused ranking that the model
            tries, each by itself, where several stand close together: how likely the question is
            after the text joins the fused score. 1 tries none. Each costs a prefill of its text.
        judge_margin: how far below the best fused score a document is still tried.
        judge_weight: factor of the logarithm of that probability in the fused score.
        evidence_weight: while an answer is written with a `temperature` of 0, and with
            `force_answer_prefix`: factor of how much less of the question the sentence holds that
            a token leads into than the best sentence of the same text (`Evidence.behind`), taken
            off the token's logit (an extension; 0 is the paper). Needs a bank with a word index.
        answer_beginnings: with a `temperature` of 0, and with `force_answer_prefix`: first tokens
            of the answer, the likeliest ones, each of which is written on from; given is the answer
            with the greatest probability as a whole, evidence included (an extension; 1 is the
            paper). Those close to the best are (`decoding.CLOSE_BEGINNING`), so many at most; an
            answer with more than one is streamed in one piece.
        temperature: 0 writes the likeliest token; from 0.001 on samples.
        top_p: sample from the smallest set of tokens with this much probability.
        seed: makes sampling repeatable, every question with a generator of its own; None takes
            that generator's seed from torch's global one.
        force_answer_prefix: give the template's answer lead-in to the model instead of letting it
            write it: the same tokens for a trained model, fewer steps, and no way round it.
        refusal_threshold: refuse to answer when the refusal's score (`refusal.refusal_score`) is
            above it; None neither refuses nor computes the score, 1 computes it and never refuses.
            What the model refuses by itself stays refused.
        refusal_weights: weights of the score's features (`FEATURES`) and "bias"; None
            takes the probability that the model gives to the refusal.
        allow_unread: let the model answer without having read a document.
        batch_size: questions that are run through the model together.
    """

    max_rounds: int = 4
    max_documents_per_round: int = 4
    min_documents_per_round: int = 1
    max_new_tokens: int = 64
    candidates: int = 64
    layer_weights: Mapping[int, float] | None = None
    lexical_weight: float = 0.0
    prior_weight: float = 0.0
    prior_temperature: float = 0.1
    end_bias: float = 0.0
    end_weight: float = 0.0
    judged_documents: int = 1
    judge_margin: float = 0.1
    judge_weight: float = 0.15
    evidence_weight: float = 0.0
    answer_beginnings: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    force_answer_prefix: bool = True
    refusal_threshold: float | None = None
    refusal_weights: Mapping[str, float] | None = None
    allow_unread: bool = False
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise ConfigError(f"{name} is {value!r}; give a whole number of at least 1.")
            object.__setattr__(self, name, operator.index(value))  # NumPy's as Python's
        if self.min_documents_per_round > self.max_documents_per_round:
            raise ConfigError(
                f"min_documents_per_round is {self.min_documents_per_round}; give a number of at "
                f"most max_documents_per_round, which is {self.max_documents_per_round}."
            )
        object.__setattr__(self, "layer_weights", _layer_weights(self.layer_weights))
        threshold = self.refusal_threshold
        if threshold is not None and (not _is_finite(threshold) or not 0 <= threshold <= 1):
            raise ConfigError(
                f"refusal_threshold is {threshold!r}; give a number from 0 to 1, or None."
            )
        _check_refusal_weights(self.refusal_weights)
        if not _is_finite(self.end_bias):
            raise ConfigError(f"end_bias is {self.end_bias!r}; give a number.")
        for name in _FROM_ZERO:
            value = getattr(self, name)
            if not _is_finite(value) or value < 0:
                raise ConfigError(f"{name} is {value!r}; give a number of at least 0.")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ConfigError(
                f"temperature is {self.temperature!r}; give 0, or at least {LEAST_TEMPERATURE}."
            )
        if not _is_finite(self.prior_temperature) or self.prior_temperature <= 0:
            raise ConfigError(
                f"prior_temperature is {self.prior_temperature!r}; give a number above 0."
            )
        if not _is_finite(self.top_p) or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p!r}; give a number above 0, at most 1.")
        if self.seed is not None and (not _is_int(self.seed) or not 0 <= self.seed < 2**63):
            raise ConfigError(f"seed is {self.seed!r}; give a whole number of at least 0, or None.")
        if self.seed is not None:
            object.__setattr__(self, "seed", operator.index(self.seed))
        for name in ("force_answer_prefix", "allow_unread"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give true or false.")

    def with_changes(self, **changes: Any) -> AskOptions:
        """These options with some of them changed.

        Raises:
            ConfigError: a value or a name is not valid.
        """
        known = [f.name for f in fields(self)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise ConfigError(f"Unknown option {unknown[0]!r}; there are: {', '.join(known)}.")
        return replace(self, **changes) if changes else self

    def save(self, folder: str | Path) -> None:
        """Write the options beside a checkpoint; those that were there stay if that fails."""
        text = json.dumps(asdict(self), indent=2)
        temporary = Path(folder, ASK_OPTIONS_FILE + ".tmp")
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(Path(folder, ASK_OPTIONS_FILE))
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | Path) -> AskOptions:
        """Read the options beside a checkpoint; the defaults if there are none.

        Raises:
            ConfigError: the file is no JSON object, or holds other names or values.
        """
        path = Path(folder, ASK_OPTIONS_FILE)
        if not path.is_file():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON ({error}).") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a JSON object of ask options.")
        try:
            return cls().with_changes(**values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def _layer_weights(weights: object) -> dict[int, float] | None:
    """Weights by layer; JSON writes layers as strings.

    Raises:
        ConfigError: a layer is no whole number, or no weight is above 0.
    """
    if weights is None:
        return None
    wrong = (
        f"layer_weights is {weights!r}; give layers with numbers of at least 0, such as {{2: 1}}."
    )
    if not isinstance(weights, Mapping):
        raise ConfigError(wrong)
    found: dict[int, float] = {}
    for layer, weight in weights.items():
        if not _is_finite(weight) or weight < 0:
            raise ConfigError(wrong)
        if not _is_int(layer) and not (isinstance(layer, str) and layer.isdecimal()):
            raise ConfigError(wrong)
        found[int(layer)] = float(weight)
    if not any(found.values()):
        raise ConfigError(wrong)
    return found


def _check_refusal_weights(weights: object) -> None:
    """Refuse weights of features that there are not."""
    names = (*FEATURES, BIAS)
    if weights is None:
        return
    if not isinstance(weights, Mapping) or not all(_is_finite(w) for w in weights.values()):
        raise ConfigError(
            f"refusal_weights is {weights!r}; give numbers by name ({', '.join(names)}), or None."
        )
    unknown = sorted(set(map(str, weights)) - set(names))
    if unknown:
        raise ConfigError(
            f"refusal_weights has {unknown[0]!r}; give some of {', '.join(names)}, or None."
        )


def _is_int(value: object) -> bool:
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)  # type: ignore[arg-type]
