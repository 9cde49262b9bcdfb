"""Questions on their way through the model: admission, a queue, one thread, events back."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request as HTTPRequest

from msa.errors import EmptyBankError, MSAError
from msa.inference.interleave import Request
from msa.inference.scheduler import Scheduler
from msa.memory.store.filters import Filter
from msa.serve.banks import ServedBank
from msa.serve.errors import CLIENT_GONE, ServiceError, draining, service_error, unavailable
from msa.serve.fairness import Turns
from msa.serve.keys import Principal
from msa.serve.limits import Admission, Ticket, too_many
from msa.serve.metrics import Metrics
from msa.serve.settings import ServeSettings
from msa.types import Answer, Event, Hit

if TYPE_CHECKING:
    from msa.model.modeling_msa import MSAForCausalLM

Result = TypeVar("Result")
BATCH_ROWS = 4
"""Questions of one request that run at once."""


class Waiting:
    """Something for the model's thread to begin; made and ended on the event loop.

    Args:
        lane: those of one lane are begun in order, lanes take turns.

    Attributes:
        begun: what `begin` gave, or its error.
        cancelled: its caller no longer waits for it.
    """

    def __init__(self, lane: str) -> None:
        self.lane = lane
        self.loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[Any] = self.loop.create_future()
        self.cancelled = False

    def begin(self) -> Any:
        """The work, or its start; on the model's thread."""
        raise NotImplementedError

    def tell(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function on the event loop, from the model's thread."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(function, *args)

    def set_begun(self, result: Any, error: BaseException | None) -> None:
        """Let the one that waits go on; on the event loop."""
        if self.begun.done():
            return
        if error is None:
            self.begun.set_result(result)
        else:
            self.begun.set_exception(error)


class Ask(Waiting):
    """A question that runs. Read its `events`, or `stop` it; see `AskService.start`."""

    def __init__(self, service: AskService, served: ServedBank, lane: str, deadline: float) -> None:
        super().__init__(lane)
        self.served = served
        self.deadline = deadline
        self.arrived = time.monotonic()
        self.late = _too_slow(504)
        self.pieces = 0  # of the answer, so far; the model's thread counts
        self.request: Request | None = None
        self.make: Callable[[], Request] | None = None
        self._service = service
        self._items: asyncio.Queue[Event | ServiceError] = asyncio.Queue()
        self._on_end: list[Callable[[], None]] = []
        self._ended = False

    def begin(self) -> None:
        """Bind the question to the bank's state and let it join those that run."""
        assert self.make is not None
        self.request = self.make()
        self._service.join(self, self.request)

    async def events(self) -> AsyncGenerator[Event]:
        """What happens, as it happens; the last event holds the answer.

        When the iterator is closed, or the task that reads it is cancelled, the model stops.

        Raises:
            ServiceError: the question failed, ran out of time, or the service is stopping.
        """
        try:
            while True:
                item = await self._items.get()
                if isinstance(item, ServiceError):
                    raise item
                yield item
                if item.kind == "answer":
                    return
        finally:
            self.stop()

    def stop(self) -> None:
        """Let the model drop the question; does nothing once it has ended."""
        if not self._ended:
            self._ended = True
            self.cancelled = True
            self._service.drop(self)
            for function in self._on_end:
                function()

    def on_end(self, function: Callable[[], None]) -> None:
        """Call a function when the question has ended, however it does."""
        self._on_end.append(function)

    def push(self, item: Event | ServiceError) -> None:
        """Pass on an event, or an error as the last; on the event loop."""
        if not self._ended:
            self._items.put_nowait(item)


class _Call(Waiting):
    """Work that is done when it is begun."""

    def __init__(self, lane: str, function: Callable[[], Any]) -> None:
        super().__init__(lane)
        self._function = function

    def begin(self) -> Any:
        """Call the function."""
        return self._function()


class AskService:
    """Runs the questions of all banks through one model, in one thread.

    Args:
        settings: limits.
        metrics: where to count.
        turns: told while questions run.
    """

    def __init__(self, settings: ServeSettings, metrics: Metrics, turns: Turns) -> None:
        self._settings = settings
        self._metrics = metrics
        self._turns = turns
        self.admission = Admission(
            settings.max_rows, settings.max_waiting, settings.max_waiting_per_key
        )
        metrics.queue_depth.set_function(lambda: self.admission.inside)
        self._scheduler: Scheduler | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()  # guards the next four
        self._lanes: OrderedDict[str, deque[Waiting]] = OrderedDict()
        self._urgent: deque[Waiting] = deque()
        self._dropped: deque[Ask] = deque()
        self._closing = False
        self._running: dict[Request, Ask] = {}  # of the model's thread
        self._draining = False

    # ---- life

    def open(self, model: MSAForCausalLM) -> None:
        """Start the thread, once the model is there."""
        self._scheduler = Scheduler(model, max_rows=self._settings.max_rows)
        self._thread = threading.Thread(target=self._run, name="msa-model", daemon=True)
        self._thread.start()

    async def drain(self, seconds: float) -> None:
        """Take no more questions; let those that are here end within so many seconds."""
        self._draining = True
        end = time.monotonic() + seconds
        while self.admission.inside and time.monotonic() < end:
            await asyncio.sleep(0.05)
        if self.admission.inside:
            await self.fail(lambda ask: True, draining())

    async def fail(self, which: Callable[[Ask], bool], error: ServiceError) -> None:
        """End questions that run or wait with an error."""

        def fail() -> None:
            with self._changed:
                waiting = [w for lane in self._lanes.values() for w in lane]
            for ask in [*self._running.values(), *waiting]:
                if isinstance(ask, Ask) and which(ask):
                    self._end(ask, error)

        if self._thread is not None:
            await self.call(fail)

    async def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    # ---- for requests

    async def start(
        self,
        served: ServedBank,
        question: str,
        *,
        principal: Principal,
        filter: Filter | None = None,
        changes: Mapping[str, Any] | None = None,
        deadline_s: float | None = None,
        stream: bool = True,
        client: HTTPRequest | None = None,
    ) -> Ask:
        """A question that the model has begun with; the caller must read it or stop it.

        Its place is decided at once, before anything is awaited.

        Args:
            served: the bank.
            question: one.
            principal: who asks; the bank was got with it.
            filter: see `msa.memory.store.filters`.
            changes: fields of `AskOptions`.
            deadline_s: seconds until it is ended; the settings' are the most.
            stream: whether "token" events are wanted.
            client: the request, its body read: if it goes away, the question leaves the queue.

        Raises:
            ServiceError: 429 when too many wait; 503 while stopping; 400 for what cannot be asked.
        """
        ticket = self._admit(principal)
        ask = self._new(
            served, question, filter, changes, principal.name, deadline_s, stream=stream
        )
        ask.on_end(ticket.close)
        await self._begun(ask, client)
        return ask

    async def events(
        self, served: ServedBank, question: str, **options: Any
    ) -> AsyncGenerator[Event]:
        """The events of a question; arguments and errors as of `start`."""
        ask = await self.start(served, question, **options)
        async with contextlib.aclosing(ask.events()) as events:
            async for event in events:
                yield event

    async def answer(
        self,
        served: ServedBank,
        question: str,
        *,
        client: HTTPRequest | None = None,
        **options: Any,
    ) -> Answer:
        """The answer to one question; arguments and errors as of `start`."""
        ask = await self.start(served, question, client=client, stream=False, **options)
        try:
            return await while_connected(client, answer_of(ask))
        finally:
            ask.stop()

    async def answers(
        self,
        served: ServedBank,
        questions: Sequence[str],
        *,
        principal: Principal,
        filter: Filter | None = None,
        changes: Mapping[str, Any] | None = None,
        deadline_s: float | None = None,
        client: HTTPRequest | None = None,
    ) -> list[Answer]:
        """The answers to several questions; one place for all. See `start`."""
        slots = asyncio.Semaphore(BATCH_ROWS)

        async def one(question: str) -> Answer:
            async with slots:
                ask = self._new(
                    served, question, filter, changes, principal.name, deadline_s, stream=False
                )
                await self._begun(ask, None)
                try:
                    return await answer_of(ask)
                finally:
                    ask.stop()

        async def together() -> list[Answer]:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(question)) for question in questions]
            return [task.result() for task in tasks]

        with self._admit(principal):
            try:
                return await while_connected(client, together())
            except ExceptionGroup as errors:
                raise _first(errors) from None

    async def search(
        self,
        served: ServedBank,
        query: str,
        top_k: int,
        filter: Filter | None,
        principal: Principal,
        client: HTTPRequest | None = None,
    ) -> list[Hit]:
        """Documents for a query, best first; errors as of `start`."""
        (found,) = await self.searches(served, [query], top_k, filter, principal, client)
        return found

    async def searches(
        self,
        served: ServedBank,
        queries: Sequence[str],
        top_k: int,
        filter: Filter | None,
        principal: Principal,
        client: HTTPRequest | None = None,
    ) -> list[list[Hit]]:
        """Documents for each of several queries, none of an empty bank; errors as of `start`."""
        with self._admit(principal):
            call = _Call(principal.name, lambda: _retrieved(served, queries, top_k, filter))
            found: list[list[Hit]] = await self._begun(call, client)
            return found

    async def call(self, function: Callable[[], Result]) -> Result:
        """What a function gives that is called between two steps of the model.

        Raises:
            ServiceError: the model's thread has ended; or the function's error, as clients are
                told of it.
        """
        call = _Call("", function)
        with self._changed:
            if self._closing:
                raise draining()
            self._urgent.append(call)
            self._changed.notify_all()
        result: Result = await call.begun
        return result

    # ---- on the event loop

    def _admit(self, principal: Principal) -> Ticket:
        if self._draining:
            raise draining()
        if self._scheduler is None:
            raise unavailable("loading", "The model and the banks are being loaded.")
        try:
            return self.admission.admit(principal)
        except ServiceError as error:
            self._metrics.rejected.labels(error.code).inc()
            raise

    def _new(
        self,
        served: ServedBank,
        question: str,
        filter: Filter | None,
        changes: Mapping[str, Any] | None,
        lane: str,
        deadline_s: float | None,
        *,
        stream: bool,
    ) -> Ask:
        most = self._settings.ask_seconds
        seconds = most if deadline_s is None else min(deadline_s, most)
        ask = Ask(self, served, lane, time.monotonic() + seconds)
        ask.late = _too_slow(504 if seconds == most else 408)
        ask.make = lambda: served.engine.request(
            question, filter=filter, stream=stream, **(changes or {})
        )
        return ask

    async def _begun(self, waiting: Waiting, client: HTTPRequest | None) -> Any:
        """Queue something and wait until the model has begun with it."""
        with self._changed:
            self._lanes.setdefault(waiting.lane, deque()).append(waiting)
            self._changed.notify_all()
        try:
            async with asyncio.timeout(self._settings.queue_seconds):
                return await while_connected(client, _wait(waiting.begun))
        except TimeoutError:
            message = "The question waited too long for the model."
            raise too_many("queue_timeout", message, self._settings.queue_seconds) from None
        finally:
            if not waiting.begun.done() or waiting.begun.cancelled() or waiting.begun.exception():
                waiting.cancelled = True
                if isinstance(waiting, Ask):
                    waiting.stop()

    def drop(self, ask: Ask) -> None:
        """Let the model's thread forget a question."""
        with self._changed:
            self._dropped.append(ask)
            self._changed.notify_all()

    # ---- on the model's thread

    def join(self, ask: Ask, request: Request) -> None:
        """Let a question run."""
        assert self._scheduler is not None
        self._scheduler.add(request)
        self._running[request] = ask

    def _run(self) -> None:
        while self._has_work():
            with self._turns.asking():
                while self._begin() | self._step():
                    pass
        with self._changed:
            left = [*self._urgent, *(w for lane in self._lanes.values() for w in lane)]
        for waiting in left:
            waiting.tell(waiting.set_begun, None, draining())
        for ask in [*self._running.values()]:
            self._end(ask, draining())

    def _has_work(self) -> bool:
        """Waits for work; False when there will be no more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._lanes or self._urgent or self._dropped
            )
            return not self._closing

    def _next(self) -> Waiting | None:
        """What to begin with now: the lanes take turns."""
        with self._changed:
            if self._urgent:
                return self._urgent.popleft()
            if not self._lanes or len(self._running) >= self._settings.max_rows:
                return None
            lane, waiting = self._lanes.popitem(last=False)
            first = waiting.popleft()
            if waiting:
                self._lanes[lane] = waiting
            return first

    def _begin(self) -> bool:
        """Begin with all questions that have room, and one other thing; False if none waits."""
        began = False
        while (waiting := self._next()) is not None:
            began = True
            if waiting.cancelled:
                continue
            try:
                result, error = waiting.begin(), None
            except Exception as failure:
                result, error = None, service_error(failure)
            waiting.tell(waiting.set_begun, result, error)
            if not isinstance(waiting, Ask):
                break
        return began

    def _step(self) -> bool:
        """One step of those that run; False if none does."""
        try:
            self._drop_ended()
            if not self._running or self._closing:
                return False
            assert self._scheduler is not None
            for request, event in self._scheduler.step():
                ask = self._running.get(request)
                if ask is not None:
                    self._deliver(ask, request, event)
        except Exception as failure:  # of the scheduler's own: no request is to blame
            self._restart(service_error(failure))
        return True

    def _deliver(self, ask: Ask, request: Request, event: Event | MSAError) -> None:
        """Hand an event over, and count it."""
        if isinstance(event, MSAError):
            del self._running[request]
            self._metrics.asks_ended.labels("failed").inc()
            ask.tell(ask.push, service_error(event))
            return
        seconds = time.monotonic() - ask.arrived
        if event.kind == "token":
            self._metrics.token(seconds if ask.pieces == 0 else None)
            ask.pieces += 1
        elif event.kind == "answer":
            del self._running[request]
            self._metrics.answered(event.data, ask.pieces, seconds)
        ask.tell(ask.push, event)

    def _drop_ended(self) -> None:
        """Take out what was stopped, or ran out of time."""
        with self._changed:
            dropped, self._dropped = self._dropped, deque()
        for ask in dropped:
            self._end(ask, None)
        now = time.monotonic()
        for ask in [ask for ask in self._running.values() if ask.deadline < now]:
            self._end(ask, ask.late)

    def _end(self, ask: Ask, error: ServiceError | None) -> None:
        if ask.request is not None and self._running.pop(ask.request, None) is not None:
            assert self._scheduler is not None
            self._scheduler.remove(ask.request)
            self._metrics.asks_ended.labels("stopped" if error is None else "failed").inc()
        if error is not None:
            ask.cancelled = True  # it may still wait
            ask.tell(ask.set_begun, None, error)
            ask.tell(ask.push, error)

    def _restart(self, error: ServiceError) -> None:
        """The step itself failed: end all that run, so that others can come."""
        assert self._scheduler is not None
        running, self._running = self._running, {}
        self._metrics.asks_ended.labels("failed").inc(len(running))
        self._scheduler.clear()
        for ask in running.values():
            ask.tell(ask.push, error)


def _retrieved(
    served: ServedBank, queries: Sequence[str], top_k: int, filter: Filter | None
) -> list[list[Hit]]:
    try:
        return served.engine.retrieve(list(queries), top_k, filter)
    except EmptyBankError:
        return [[] for _ in queries]


async def while_connected(client: HTTPRequest | None, work: Coroutine[Any, Any, Result]) -> Result:
    """What a coroutine gives; it is cancelled when the client goes away.

    Args:
        client: its request, of which the body has been read; None watches no client.
        work: to be done.

    Raises:
        ServiceError: 499, the client is gone.
    """
    if client is None:
        return await work
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(client))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ServiceError(CLIENT_GONE, None, "client_gone", "The client went away.")
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(client: HTTPRequest) -> None:
    while (await client.receive())["type"] != "http.disconnect":
        pass


async def _wait(future: asyncio.Future[Result]) -> Result:
    return await future


async def answer_of(ask: Ask) -> Answer:
    """The answer to a question that runs; errors as of `Ask.events`."""
    async for event in ask.events():
        if event.kind == "answer":
            answer: Answer = event.data
            return answer
    raise AssertionError("a question ends with its answer or an error")


def _first(errors: ExceptionGroup[Exception]) -> Exception:
    """The first error in a group of groups."""
    error: Exception = errors
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _too_slow(status: int) -> ServiceError:
    """408 for a client's own deadline, 504 for that of the service; not to be tried again."""
    headers = {"x-should-retry": "false"}
    return ServiceError(
        status, None, "deadline_exceeded", "The question took longer than it may.", headers=headers
    )
