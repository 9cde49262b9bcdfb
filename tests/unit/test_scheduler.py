"""Questions that come and go while others are asked: every answer is the one it gets alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_interleave import TEXTS, FakeSnapshot

from conftest import make_tiny_model, make_tiny_tokenizer
from msa.errors import LexicalIndexError, ModelError, MSAError
from msa.inference.interleave import AskFormat, Request
from msa.inference.options import AskOptions
from msa.inference.scheduler import Scheduler
from msa.text.prompts import PromptEncoder
from msa.types import Answer

OTHER_TEXTS = {
    8: "Nothing of the kind.",
    90: "Bob paints the Tiber, at night.",
    3: "Another three.",
}
QUESTIONS = ["Where?", "Who lies on the Tiber, and since when exactly?", "Q?", "Why " * 30, "?"]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_tiny_model(top_k_documents=4)


@pytest.fixture(scope="module")
def form(model: Any) -> AskFormat:
    return AskFormat(model, PromptEncoder(make_tiny_tokenizer()))


@pytest.fixture(scope="module")
def requests(model: Any, form: AskFormat) -> list[Request]:
    snapshots = [FakeSnapshot(model, form.encoder, texts, 5) for texts in (TEXTS, OTHER_TEXTS)]
    all_options = [
        AskOptions(max_rounds=2, max_documents_per_round=2, max_new_tokens=7),
        AskOptions(max_rounds=1, max_new_tokens=20, force_answer_prefix=False, prior_weight=2.0),
        AskOptions(max_rounds=3, max_new_tokens=4, temperature=2.0, top_p=0.9, seed=5),
        AskOptions(max_rounds=1, max_new_tokens=9, refusal_threshold=0.5, allow_unread=True),
        AskOptions(max_rounds=2, max_new_tokens=9, refusal_threshold=0.0),
        AskOptions(max_rounds=2, max_new_tokens=5, judged_documents=3, prior_weight=3.0),
    ]
    return [
        Request(question, snapshot, options, form, stream)
        for question in QUESTIONS
        for snapshot in snapshots
        for options in all_options
        for stream in (False, True)
    ]


def again(request: Request) -> Request:
    return Request(
        request.question, request.snapshot, request.options, request.format, request.stream
    )


def alone(model: Any, request: Request) -> tuple[Answer, str]:
    """The answer, and the pieces of its stream."""
    scheduler = Scheduler(model)
    scheduler.add(request)
    events = [event for _, event in _all(scheduler)]
    pieces = "".join(event.data for event in events if event.kind == "token")
    return events[-1].data, pieces


def _all(scheduler: Scheduler) -> Iterator[tuple[Request, Any]]:
    while not scheduler.idle:
        yield from scheduler.step()


def facts(answer: Answer) -> tuple[Any, ...]:
    """What does not depend on the clock."""
    read = [[c.number for c in turn.read] for turn in answer.rounds]
    usage = answer.usage.prompt_tokens, answer.usage.generated_tokens
    return answer.question, answer.text, answer.stopped, read, usage


@pytest.mark.parametrize("seed", range(3))
def test_answers_do_not_depend_on_who_else_asks(
    model: Any, requests: list[Request], seed: int
) -> None:
    rng = random.Random(seed)
    some = rng.sample(requests, 30)
    scheduler = Scheduler(model, max_rows=rng.choice([3, 8, 50]), prefill_tokens=1500)
    waiting, answers, pieces = list(some), {}, dict.fromkeys(some, "")
    while waiting or not scheduler.idle:
        for _ in range(min(len(waiting), rng.choice([0, 0, 1, 4]))):
            scheduler.add(waiting.pop())
        for request, event in scheduler.step():
            assert request not in answers  # its answer is the last of it
            if event.kind == "token":
                pieces[request] += event.data
            elif event.kind == "answer":
                answers[request] = event.data
    assert len(scheduler) == 0
    for request in some:
        answer, streamed = alone(model, again(request))
        assert facts(answers[request]) == facts(answer)
        assert pieces[request] == streamed == (answer.text if request.stream else "")


def test_a_long_question_is_begun_while_short_ones_keep_coming(
    model: Any, requests: list[Request]
) -> None:
    """The shortest prompts go first; that must not keep a long one out for ever."""
    short = next(request for request in requests if request.question == "?")
    long = next(request for request in requests if len(request.question) > 100)
    scheduler = Scheduler(model, max_rows=50, prefill_tokens=1)  # one prompt a step
    scheduler.add(long)
    asked = 0
    routed = False
    while not routed and asked < 100:
        scheduler.add(again(short))
        asked += 1
        routed = any(request is long for request, _ in scheduler.step())
    assert 1 < asked < 10


def test_a_question_that_is_removed_is_asked_no_more_and_the_others_go_on(
    model: Any, requests: list[Request]
) -> None:
    for steps in range(12):
        some = [again(request) for request in requests[:60:9]]
        scheduler = Scheduler(model, max_rows=4)
        for request in some:
            scheduler.add(request)
        ended = []
        for _ in range(steps):
            ended += [r for r, event in scheduler.step() if event.kind == "answer"]
        gone = some[steps % len(some)]
        scheduler.remove(gone)
        scheduler.remove(gone)  # nothing more happens
        for request, event in _all(scheduler):
            assert request is not gone
            ended += [request] if event.kind == "answer" else []
        assert {id(r) for r in ended} | {id(gone)} == {id(r) for r in some}
    scheduler.add(again(gone))
    scheduler.add(again(gone))
    scheduler.step()
    assert len(scheduler.clear()) == 2
    assert scheduler.idle


@pytest.mark.parametrize("method", ["lexical", "ids", "texts"])
def test_a_memory_that_fails_ends_its_own_questions_only(
    model: Any, form: AskFormat, method: str
) -> None:
    def fails(*_: Any) -> Any:
        raise LexicalIndexError("the disk is gone")

    options = AskOptions(max_rounds=1, max_new_tokens=3)
    words = AskOptions(max_rounds=1, max_new_tokens=3, lexical_weight=1.0)
    sound, broken = (FakeSnapshot(model, form.encoder, TEXTS, 5) for _ in range(2))
    setattr(broken, method, fails)
    scheduler = Scheduler(model)
    asked = [
        Request("Where?", broken, words if method == "lexical" else options, form),
        Request("Where?", sound, options, form),
        Request("Who paints?", broken, words if method == "lexical" else options, form),
    ]
    for request in asked:
        scheduler.add(request)
    last = dict(_all(scheduler))
    assert isinstance(last[asked[0]], LexicalIndexError)
    assert isinstance(last[asked[2]], MSAError)
    assert facts(last[asked[1]].data) == facts(alone(model, again(asked[1]))[0])


def test_a_model_that_computes_nonsense_is_the_end_of_all(form: AskFormat) -> None:
    damaged = make_tiny_model(top_k_documents=4)
    snapshot = FakeSnapshot(damaged, form.encoder, TEXTS, 5)
    with torch.no_grad():
        damaged.lm_head.weight.fill_(float("nan"))
    scheduler = Scheduler(damaged)
    scheduler.add(Request("Where?", snapshot, AskOptions(), AskFormat(damaged, form.encoder)))
    with pytest.raises(ModelError, match="NaN"):
        scheduler.step()
