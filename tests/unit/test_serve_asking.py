"""Questions through the service, with a model that answers what the question says."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("pydantic_settings")
pytest.importorskip("prometheus_client")

from msa.errors import EmptyBankError, InputError, ModelError
from msa.serve import asking
from msa.serve.asking import AskService, while_connected
from msa.serve.errors import ServiceError
from msa.serve.fairness import Turns, aside
from msa.serve.keys import ANONYMOUS, Principal
from msa.serve.metrics import Metrics
from msa.serve.settings import ServeSettings
from msa.serve.streams import PING, EventStream, frame
from msa.types import Answer, Event, Usage

ALICE = Principal("alice", frozenset({"read"}), ("*",))
BOB = Principal("bob", frozenset({"read"}), ("*",))


class Request(SimpleNamespace):
    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Engine:
    """Makes requests: the question is a number of tokens, "for ever", or what goes wrong."""

    def __init__(self):
        self.begun = []

    def request(self, question, *, filter=None, stream=False, **changes):
        if question == "wrong":
            raise InputError("this question is wrong")
        self.begun.append(question)
        return Request(question=question, events=self.events(question))

    @staticmethod
    def events(question):
        count = 0
        while question == "for ever" or count < int(question.split()[0]):
            count += 1
            yield Event("token", 1, "x")
        usage = Usage(3, count, 0.0, 0.0)
        yield Event("answer", 1, Answer(question, "x" * count, (), (), usage, "answered"))

    def retrieve(self, queries, top_k, filter):
        return [[f"{query} {i}" for i in range(top_k)] for query in queries]


class Scheduler:
    """One event of every request in a step."""

    def __init__(self, model, max_rows=16):
        self.requests = []

    @property
    def idle(self):
        return not self.requests

    def add(self, request):
        self.requests.append(request)

    def remove(self, request):
        self.requests.remove(request)

    def clear(self):
        self.requests.clear()

    def step(self):
        time.sleep(0.002)
        happened = []
        for request in list(self.requests):
            if request.question == "1 failing step":
                raise RuntimeError("the step failed")
            event = next(request.events)
            if request.question == "2 damaged":
                event = ModelError("not a number")
            happened.append((request, event))
            if isinstance(event, ModelError) or event.kind == "answer":
                self.requests.remove(request)
        return happened


@pytest.fixture(autouse=True)
def _model(monkeypatch):
    monkeypatch.setattr(asking, "Scheduler", Scheduler)


@contextlib.asynccontextmanager
async def running(**given):
    metrics = Metrics()
    service = AskService(ServeSettings.load(**given), metrics, Turns())
    service.metrics = metrics
    service.open(object())
    try:
        yield service, SimpleNamespace(engine=Engine())
    finally:
        await service.close()


def in_service(function, **given):
    async def run():
        async with running(**given) as (service, served):
            return await asyncio.wait_for(function(service, served), 30)

    return asyncio.run(run())


def generated(service):
    return service.metrics.registry.get_sample_value("msa_tokens_total", {"kind": "generated"}) or 0


async def refusal(awaitable):
    with pytest.raises(ServiceError) as refused:
        await awaitable
    return refused.value


def test_events_come_in_order_and_the_place_is_given_back():
    async def run(service, served):
        ask = await service.start(served, "3", principal=ANONYMOUS)
        kinds = [event.kind async for event in ask.events()]
        assert kinds == ["token"] * 3 + ["answer"]
        assert service.admission.inside == 0
        assert generated(service) == 3

    in_service(run)


def test_of_forty_at_once_those_that_find_room_are_answered_and_the_rest_are_told_so():
    async def run(service, served):
        asks = [service.answer(served, "5", principal=ANONYMOUS) for _ in range(40)]
        ended = await asyncio.gather(*asks, return_exceptions=True)
        answers = [one for one in ended if isinstance(one, Answer)]
        refused = [one for one in ended if isinstance(one, ServiceError)]
        assert len(answers) == 12
        assert {answer.text for answer in answers} == {"xxxxx"}
        assert len(refused) == 28
        assert {error.code for error in refused} == {"queue_full"}
        assert {error.status for error in refused} == {429}
        assert service.admission.inside == 0

    in_service(run, max_rows=4, max_waiting=8)


def test_a_question_that_cannot_be_asked_is_refused_before_a_stream_begins():
    async def run(service, served):
        error = await refusal(service.start(served, "wrong", principal=ANONYMOUS))
        assert (error.status, error.message) == (400, "this question is wrong")
        assert service.admission.inside == 0

    in_service(run)


def test_closing_the_events_stops_the_model():
    async def run(service, served):
        ask = await service.start(served, "for ever", principal=ANONYMOUS)
        events = ask.events()
        for _ in range(3):
            await anext(events)
        await events.aclose()
        await service.call(lambda: None)
        await asyncio.sleep(0.02)
        before = generated(service)
        await asyncio.sleep(0.05)
        assert generated(service) == before
        assert service.admission.inside == 0
        assert (await service.answer(served, "1", principal=ANONYMOUS)).text == "x"

    in_service(run)


def test_a_task_that_is_cancelled_stops_the_model():
    async def run(service, served):
        task = asyncio.create_task(service.answer(served, "for ever", principal=ANONYMOUS))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.02)
        before = generated(service)
        assert before > 0
        await asyncio.sleep(0.05)
        assert generated(service) == before

    in_service(run)


def test_one_that_waits_too_long_is_told_so_and_never_runs():
    async def run(service, served):
        first = await service.start(served, "for ever", principal=ANONYMOUS)
        error = await refusal(service.start(served, "1", principal=ANONYMOUS))
        assert (error.status, error.code) == (429, "queue_timeout")
        first.stop()
        await service.answer(served, "2", principal=ANONYMOUS)
        assert served.engine.begun == ["for ever", "2"]

    in_service(run, max_rows=1, queue_seconds=0.1)


def test_a_question_ends_at_its_deadline():
    async def run(service, served):
        error = await refusal(
            service.answer(served, "for ever", principal=ANONYMOUS, deadline_s=0.1)
        )
        assert (error.status, error.code) == (408, "deadline_exceeded")
        error = await refusal(
            service.answer(served, "for ever", principal=ANONYMOUS, deadline_s=99)
        )
        assert (error.status, error.code) == (504, "deadline_exceeded")  # the service's own

    in_service(run, ask_seconds=0.2)


def test_keys_take_turns():
    async def run(service, served):
        blocking = await service.start(served, "for ever", principal=ALICE)
        asks = [
            asyncio.create_task(service.answer(served, f"1 alice {i}", principal=ALICE))
            for i in range(3)
        ]
        await asyncio.sleep(0)
        asks.append(asyncio.create_task(service.answer(served, "1 bob", principal=BOB)))
        await asyncio.sleep(0.02)
        blocking.stop()
        await asyncio.gather(*asks)
        assert served.engine.begun[1:3] == ["1 alice 0", "1 bob"]

    in_service(run, max_rows=1)


def test_a_failure_of_one_question_leaves_the_others_alone():
    async def run(service, served):
        damaged, sound = await asyncio.gather(
            service.answer(served, "2 damaged", principal=ANONYMOUS),
            service.answer(served, "9", principal=ANONYMOUS),
            return_exceptions=True,
        )
        assert damaged.status == 500
        assert "not a number" not in damaged.message
        assert sound.text == "x" * 9

    in_service(run)


def test_a_step_that_fails_ends_those_that_run_and_no_later_one():
    async def run(service, served):
        error = await refusal(service.answer(served, "1 failing step", principal=ANONYMOUS))
        assert error.status == 500
        assert (await service.answer(served, "2", principal=ANONYMOUS)).text == "xx"

    in_service(run)


def test_several_questions_take_one_place_and_keep_their_order():
    async def run(service, served):
        answers = await service.answers(served, ["3", "1", "2"] * 5, principal=ALICE)
        assert [answer.text for answer in answers] == ["xxx", "x", "xx"] * 5
        error = await refusal(service.answers(served, ["3", "wrong"], principal=ALICE))
        assert error.status == 400
        assert service.admission.inside == 0

    in_service(run, max_rows=2, max_waiting=0, max_waiting_per_key=0)


def test_a_search_runs_between_the_steps_of_questions():
    async def run(service, served):
        ask = await service.start(served, "for ever", principal=ANONYMOUS)
        assert await service.search(served, "q", 2, None, ANONYMOUS) == ["q 0", "q 1"]
        ask.stop()
        assert service.admission.inside == 0

    in_service(run)


def test_a_search_of_an_empty_bank_finds_nothing():
    async def run(service, served):
        def retrieve(queries, top_k, filter):
            raise EmptyBankError("/srv/x holds no documents")

        served.engine.retrieve = retrieve
        assert await service.search(served, "q", 2, None, ANONYMOUS) == []

    in_service(run)


def test_stopping_lets_short_questions_end_and_tells_long_ones():
    async def run(service, served):
        short = asyncio.create_task(service.answer(served, "20", principal=ANONYMOUS))
        long = await service.start(served, "for ever", principal=ANONYMOUS)
        draining = asyncio.create_task(service.drain(0.5))
        await asyncio.sleep(0)
        error = await refusal(service.start(served, "1", principal=ANONYMOUS))
        assert (error.status, error.code) == (503, "draining")
        assert (await short).text == "x" * 20
        with pytest.raises(ServiceError) as ended:
            async for _ in long.events():
                pass
        assert ended.value.code == "draining"
        await draining
        assert service.admission.inside == 0

    in_service(run)


def test_a_bank_that_goes_takes_its_questions_along():
    async def run(service, served):
        other = SimpleNamespace(engine=Engine())
        mine = await service.start(served, "for ever", principal=ANONYMOUS)
        kept = await service.start(other, "for ever", principal=ANONYMOUS)
        gone = ServiceError(404, None, "bank_not_found", "gone")
        await service.fail(lambda ask: ask.served is served, gone)
        with pytest.raises(ServiceError, match="gone"):
            async for _ in mine.events():
                pass
        assert (await anext(kept.events())).kind == "token"

    in_service(run)


class Client:
    """A request whose client goes away after a while."""

    def __init__(self, seconds):
        self.seconds = seconds

    async def receive(self):
        await asyncio.sleep(self.seconds)
        return {"type": "http.disconnect"}


def test_a_question_is_given_up_when_its_client_goes():
    async def run(service, served):
        error = await refusal(
            service.answer(served, "for ever", principal=ANONYMOUS, client=Client(0.1))
        )
        assert error.status == 499
        first = await service.start(served, "for ever", principal=ANONYMOUS)
        error = await refusal(
            service.start(served, "1", principal=ANONYMOUS, client=Client(0.05))  # it waits
        )
        assert error.status == 499
        first.stop()
        assert service.admission.inside == 0

    in_service(run, max_rows=1)


def test_what_is_done_before_the_client_goes_is_kept():
    async def run():
        async def work():
            return 7

        return await while_connected(Client(5), work())

    assert asyncio.run(run()) == 7


# ---- streams


async def sent(stream, gone_after=None):
    """What a stream sends to a client that stays, or goes after so many seconds."""
    body = []

    async def receive():
        await asyncio.sleep(60 if gone_after is None else gone_after)
        return {"type": "http.disconnect"}

    async def send(message):
        body.append(message.get("body", b"").decode())

    await stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
    return "".join(body)


async def frames(*items, seconds=0.0):
    for item in items:
        await asyncio.sleep(seconds)
        if isinstance(item, Exception):
            raise item
        yield item


def test_a_stream_shows_signs_of_life_and_ends_with_its_error():
    ended = []
    stream = EventStream(
        frames(frame("a", "token"), ServiceError(503, None, "draining", "over"), seconds=0.05),
        ping_seconds=0.02,
        on_end=lambda: ended.append(True),
    )
    text = asyncio.run(sent(stream))
    assert 'event: token\ndata: "a"\n\n' in text
    assert PING in text
    assert text.endswith('"param":null,"code":"draining"}}\n\n')
    assert ended == [True]


def test_a_stream_ends_when_its_client_goes():
    ended = []
    stream = EventStream(frames("a", seconds=30), on_end=lambda: ended.append(True))
    asyncio.run(asyncio.wait_for(sent(stream, gone_after=0.05), 10))
    assert ended == [True]


def test_what_is_done_aside_leaves_no_thread_behind() -> None:
    worked = []

    def work() -> int:
        worked.append(threading.current_thread())
        return 7

    assert aside(work) == 7
    assert worked[0] is not threading.current_thread()
    assert not worked[0].is_alive()
    with pytest.raises(KeyError, match="gone"):
        aside(lambda: {}["gone"])
