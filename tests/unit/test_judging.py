"""Trials: how likely a question is after a text, in one forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import make_tiny_model
from msa.inference.judging import MAX_TEXT_TOKENS, judge, make_trials
from msa.text.prompts import PromptEncoder


@pytest.fixture(scope="module")
def model() -> Any:
    return make_tiny_model(top_k_documents=4)


def test_a_trial_says_what_one_forward_would_say_whatever_stands_beside_it(
    model: Any, encoder: PromptEncoder
) -> None:
    tried = [
        *make_trials(encoder, "Who was born?", ["Ada was born in Rome, as was Bob.", "?", ""], 512),
        *make_trials(encoder, "What does Bob, who is no baker, bake?", ["Bob bakes."], 512),
    ]
    for trial, found in zip(tried, judge(model, tried, 0), strict=True):
        ids = torch.tensor([trial.input_ids])
        with torch.no_grad():
            by_token = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        logs = by_token.gather(-1, ids[0, 1:, None])[-trial.question_length :, 0]
        assert found == pytest.approx(float(logs.mean().exp()), abs=1e-5)
        assert 0 <= found <= 1


def test_long_texts_are_cut_and_a_question_without_room_is_not_tried(
    encoder: PromptEncoder,
) -> None:
    question = "Who?"
    (whole,) = make_trials(encoder, question, ["word " * 5000], 100_000)
    (short,) = make_trials(encoder, question, ["word " * 5000], 64)
    after = len(encoder.plain("\nQuestion: ")) + len(encoder.plain(question))
    assert (len(whole), len(short)) == (MAX_TEXT_TOKENS + after, 64)
    assert make_trials(encoder, question, ["word"], after) == []
    assert make_trials(encoder, "", ["word"], 64) == []
