"""Trials: how likely a refusal is behind a text, in one forward."""

from __future__ import annotations

import math
from typing import Any

import pytest

from conftest import make_tiny_model, make_tiny_tokenizer
from msa.inference.batch import prompt_batch
from msa.inference.decoding import Decoder
from msa.inference.judging import judge
from msa.text.prompts import PromptEncoder, Reading


@pytest.fixture(scope="module")
def model() -> Any:
    return make_tiny_model(top_k_documents=4)


def test_a_trial_says_what_decoding_would_say_whatever_stands_beside_it(model: Any) -> None:
    encoder = PromptEncoder(make_tiny_tokenizer())
    refusals = [encoder.tokenize("no"), encoder.tokenize("not in this memory"), [7]]
    contexts = []
    for number, text in ((3, "Ada was born in Rome, as was Bob."), (17, "Bob bakes."), (1, "?")):
        context = encoder.context("Who was born?", [Reading(((number, text),))])
        context.extend(encoder.retrieval_end())
        contexts.append(context)
    found = judge(model, contexts, refusals, 0)
    for context, refusal, answered in zip(contexts, refusals, found, strict=True):
        batch = prompt_batch([context], 4, 0, model.device)
        (expected,) = Decoder(model, batch, None, 0).log_probability(refusal)
        assert answered == pytest.approx(1 - math.exp(expected), abs=1e-5)
        assert 0 <= answered <= 1
