"""The score of a refusal, and how an answer that is refused comes out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa.inference.options import (
    ANSWER_COVERAGE,
    ANSWER_LOG_PROBABILITY,
    FEATURES,
    REFUSAL_LOGIT,
)
from msa.inference.refusal import (
    is_refusal,
    logit,
    refusal_range,
    refusal_score,
    routing_features,
)
from msa.text.prompts import PromptTemplate


@settings(deadline=None)
@given(st.floats(1e-9, 1 - 1e-9))
def test_without_weights_the_score_is_the_models_probability_of_the_refusal(p: float) -> None:
    features = {REFUSAL_LOGIT: logit(math.log(p)), "routing_score": 0.7}
    assert refusal_score(features, None) == pytest.approx(p, rel=1e-6, abs=1e-9)


def test_probabilities_of_0_and_1_have_finite_logits() -> None:
    assert -30 < logit(-math.inf) < logit(-5.0) < logit(0.0) < 30


def test_the_score_is_a_logistic_function_of_the_weighted_features() -> None:
    features = dict(zip(FEATURES, (2.0, 0.5, 0.25, -1.0, 0.6, 0.3), strict=True))
    weights = {"bias": 1.0, "refusal_logit": 0.5, "answer_log_probability": -2.0}
    assert refusal_score(features, weights) == pytest.approx(1 / (1 + math.exp(-4.0)))
    assert refusal_score({}, weights) == pytest.approx(1 / (1 + math.exp(-1.0)))
    assert refusal_score(features, {"bias": 1e9}) == 1.0
    assert refusal_score(features, {"bias": -1e9}) == pytest.approx(0.0)


def test_without_weights_of_the_answer_the_score_is_known_before_it() -> None:
    for weights in (None, {REFUSAL_LOGIT: 1.0, ANSWER_COVERAGE: 0.0}):
        score = refusal_score({REFUSAL_LOGIT: 0.5}, weights)
        assert refusal_range({REFUSAL_LOGIT: 0.5}, weights) == (score, score)


@settings(deadline=None)
@given(st.floats(-10, 10), st.floats(-3, 3), st.floats(-3, 3), st.floats(0, 1), st.floats(-20, 0))
def test_no_answer_takes_the_score_out_of_its_range(
    known: float, near: float, likely: float, covered: float, log_probability: float
) -> None:
    weights = {REFUSAL_LOGIT: 1.0, ANSWER_COVERAGE: near, ANSWER_LOG_PROBABILITY: likely}
    least, most = refusal_range({REFUSAL_LOGIT: known}, weights)
    answer = {ANSWER_COVERAGE: covered, ANSWER_LOG_PROBABILITY: log_probability}
    score = refusal_score({REFUSAL_LOGIT: known, **answer}, weights)
    assert least - 1e-9 <= score <= most + 1e-9


def test_features_of_a_ranking() -> None:
    assert routing_features([0.75, 0.5, 0.1]) == {"routing_score": 0.75, "routing_margin": 0.25}
    assert routing_features([0.75]) == {"routing_score": 0.75, "routing_margin": 0.0}
    assert routing_features([]) == {}


@pytest.mark.parametrize("text", ["not in this memory", " Not in this\nmemory. "])
def test_a_refusal_is_known_by_its_words(text: str) -> None:
    assert is_refusal(text, PromptTemplate())
    assert not is_refusal(text, PromptTemplate(refusal=""))
    assert not is_refusal(text + " of mine", PromptTemplate())
    assert not is_refusal("", PromptTemplate())
