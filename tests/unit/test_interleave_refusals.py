"""What is refused of scripted answers, and what is told of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from conftest import make_tiny_model
from msa.inference.evidence import UNKNOWN_SHARE
from msa.text.prompts import PromptEncoder
from scripted_asking import (
    END,
    LEAD_IN,
    READ,
    STOP,
    TEXTS,
    FakeSnapshot,
    read,
    run,
)

REFUSAL = "not in this memory"


@pytest.fixture
def model() -> Any:
    return make_tiny_model(top_k_documents=8)


@pytest.mark.parametrize(
    ("answer", "share", "refused"),
    [
        ("Rome", 0.1, True),
        ("Ada", 0.7, False),  # it stands in both sentences: the better one counts
        ("Paris", UNKNOWN_SHARE, False),  # it stands nowhere, and nothing can be told
    ],
)
def test_how_much_of_the_question_stands_beside_the_answer_counts(
    model: Any,
    encoder: PromptEncoder,
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    share: float,
    refused: bool,
) -> None:
    asked: list[Sequence[str]] = []
    shares = [0.6, 0.7, 0.1]
    monkeypatch.setattr(FakeSnapshot, "coverage", lambda _, q, some: asked.append(some) or shares)
    texts = {**TEXTS, 3: "Ada bakes. Ada was born in Rome."}
    script({"Q?": [f"[3]{READ}", END, f" {answer}{STOP}"]})
    weights = {"answer_coverage": -10.0, "bias": 4.0}
    options = {"refusal_threshold": 0.9, "refusal_weights": weights}
    (found,), _ = run(model, encoder, ["Q?"], texts=texts, **options)
    (given,) = asked  # all that was read, then sentence by sentence
    assert [text.strip() for text in given] == [texts[3], "Ada bakes.", "Ada was born in Rome."]
    assert (found.stopped == "not_found") is refused
    assert found.scores["coverage"] == 0.6
    assert found.scores["answer_coverage"] == share


def test_what_a_question_asks_for_and_nobody_wrote_speaks_for_a_refusal(
    model: Any, encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []
    covered: list[float | None] = [0.25, None]

    def coverage(_: Any, question: str, texts: Sequence[str]) -> list[float] | None:
        asked.append((question, list(texts)))
        share = covered[len(asked) - 1]
        return None if share is None else [share] * len(texts)

    monkeypatch.setattr(FakeSnapshot, "coverage", coverage)
    options = {"max_rounds": 1, "max_new_tokens": 2, "refusal_threshold": 0.5}
    weights = {"coverage": -10.0, "bias": 4.0}
    for expected, refused in ((0.25, True), (UNKNOWN_SHARE, False)):
        (answer,), _ = run(model, encoder, ["Q?"], refusal_weights=weights, **options)
        assert answer.scores["coverage"] == expected
        assert (answer.stopped == "not_found") is refused
    question, texts = asked[1]
    assert question == "Q?"
    assert texts[0] == "\n".join(p for c in answer.citations for p in (c.title or "", c.text))
    run(model, encoder, ["Q?"], max_rounds=1, max_new_tokens=2)
    assert len(asked) == 2  # only where a threshold asks for it


@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal_that_the_model_writes_cites_nothing(
    model: Any, encoder: PromptEncoder, script: Any, stream: bool
) -> None:
    script({"Q?": [f"[3]{READ}", END, f" {REFUSAL}{STOP}"]})
    (answer,), events = run(model, encoder, ["Q?"], stream=stream)
    assert (answer.text, answer.citations, answer.stopped) == (REFUSAL, (), "not_found")
    assert read(answer) == [[3], []]  # the trace still says what was read
    assert "".join(e.data for e in events if e.kind == "token") == REFUSAL * stream
    assert set(answer.scores) == {"routing_score", "routing_margin", "answer_log_probability"}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("refusal", [REFUSAL, REFUSAL.capitalize(), REFUSAL.upper()])
def test_where_the_threshold_is_for_an_answer_the_model_does_not_refuse_by_itself(
    model: Any, encoder: PromptEncoder, script: Any, stream: bool, refusal: str, monkeypatch: Any
) -> None:
    script({"Q?": [f"[3]{READ}", END, f" {refusal}{STOP}"]})
    # the script does not know of the question how likely the refusal is
    monkeypatch.setattr("msa.inference.interleave.LIKELY_REFUSAL", -math.inf)
    options = {"refusal_threshold": 1.0, "max_new_tokens": 6, "stream": stream}
    (answer,), events = run(model, encoder, ["Q?"], **options)
    assert answer.stopped in ("answered", "max_tokens")
    assert len(answer.citations) == 1
    assert not answer.text.lower().startswith("not")
    assert "".join(e.data for e in events if e.kind == "token") == answer.text * stream


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("weights", "threshold", "written"),
    [
        (None, 0.0, False),
        # written in full only where the score needs it
        ({"bias": 3.0, "answer_coverage": -4.0}, 0.5, True),
        ({"bias": 5.0, "answer_log_probability": -1e4}, 0.5, False),
        ({"bias": 5.0, "answer_coverage": -4.0}, 0.5, False),
    ],
)
def test_an_answer_is_refused_when_its_score_is_above_the_threshold(
    model: Any,
    encoder: PromptEncoder,
    script: Any,
    stream: bool,
    weights: Any,
    threshold: float,
    written: bool,
) -> None:
    script({"Q?": [f"[3]{READ}", END, f" Rome{STOP}"]})
    options = {"stream": stream, "refusal_weights": weights}
    (answer,), events = run(model, encoder, ["Q?"], refusal_threshold=threshold, **options)
    assert (answer.text, answer.citations, answer.stopped) == (REFUSAL, (), "not_found")
    assert "".join(e.data for e in events if e.kind == "token") == REFUSAL * stream
    assert answer.scores["refusal"] > threshold
    assert ("answer_log_probability" in answer.scores) is written
    (answer,), events = run(model, encoder, ["Q?"], refusal_threshold=1.0, **options)
    assert (answer.text, answer.stopped) == ("Rome", "answered")
    assert len(answer.citations) == 1
    assert "".join(e.data for e in events if e.kind == "token") == "Rome" * stream
    assert set(answer.scores) == {
        "refusal", "refusal_logit", "routing_score", "routing_margin", "coverage",
        "answer_log_probability", "answer_coverage",
    }  # fmt: skip


@pytest.mark.parametrize("forced", [True, False])
def test_the_probability_of_the_refusal_is_that_of_all_its_tokens(
    model: Any, encoder: PromptEncoder, script: Any, forced: bool
) -> None:
    calls = script({"Q?": [f"[3]{READ}", END]})
    (answer,), _ = run(
        model, encoder, ["Q?"], refusal_threshold=1.0, force_answer_prefix=forced, max_new_tokens=2
    )
    ids = calls[-1][0]
    tokens = encoder.answer(REFUSAL)[len(encoder.tokenize(LEAD_IN)) * forced :]
    batch = torch.tensor([ids + tokens])
    context = encoder.context("Q?", [])
    positions = [i + 8 * (i >= context.prefix_length) for i in range(batch.shape[1])]
    text = encoder.tokenizer.decode(ids)
    routes = torch.zeros_like(batch, dtype=torch.bool)
    question = text.index("related to the question\n") + len("related to the question")
    routes[0, context.prefix_length : len(encoder.tokenize(text[:question]))] = True
    start, stop = text.index("[3]. "), text.index(READ, text.index("[3]. "))
    routes[0, len(encoder.tokenize(text[:start])) : len(encoder.tokenize(text[:stop]))] = True
    sees = torch.arange(batch.shape[1])[None] >= context.prefix_length
    snapshot = FakeSnapshot(model, encoder, TEXTS, top_k=len(TEXTS))
    with torch.no_grad():
        logits = model(
            batch, position_ids=torch.tensor([positions]), memory=snapshot.reader,
            routing_mask=routes, memory_mask=sees,
        ).logits[0, len(ids) - 1 : -1]  # fmt: skip
    expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum()
    p = answer.scores["refusal"]
    assert math.log(max(p, 1e-12)) == pytest.approx(max(float(expected), math.log(1e-12)), abs=1e-2)


def test_rows_that_are_refused_leave_the_others_their_answers(
    encoder: PromptEncoder, script: Any
) -> None:
    model = make_tiny_model(top_k_documents=8, query_reduction="pooled")
    plans = {"Q?": [f"[3]{READ}", END, f" Rome{STOP}"], "R?": [f"[5]{READ}", END, f" 406{STOP}"]}
    script(plans)
    options = {"refusal_threshold": 0.5, "refusal_weights": {"routing_score": 1e4, "bias": 0.0}}
    alone = {q: run(model, encoder, [q], **{**options, "refusal_threshold": 1.0}) for q in plans}
    scores = {q: answers[0].scores["routing_score"] for q, (answers, _) in alone.items()}
    between = sum(scores.values()) / 2
    options["refusal_weights"]["bias"] = -1e4 * between
    answers, _ = run(model, encoder, list(plans), **options)
    for answer, right in zip(answers, ("Rome", "406"), strict=True):
        refused = scores[answer.question] > between
        assert answer.text == (REFUSAL if refused else right)
    assert sorted(a.stopped for a in answers) == ["answered", "not_found"]
