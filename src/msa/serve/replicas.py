"""Many processes that answer, one that writes: the app as a deployment of Ray Serve.

Every replica runs the app over banks that it opened for reading. It answers what needs the model,
questions and searches, and passes everything else to the writer: an actor that runs the same app
over the same banks, opened for writing. So there is one lock on every bank, one list of jobs and
one truth about documents. What a bank holds for asking lies once in the cluster, in shards that the
replicas and the writer share (`msa.memory.distributed.sharded_bank`).

No answer is older than a write that was acknowledged before its question came, from any client: a
replica asks the writer first how far the banks have come, and begins once it sees that much itself.
Clients need not send anything along.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import os
import re
import signal
import threading
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from msa.errors import ConfigError, MSAError, WorkerError
from msa.memory.distributed import cluster
from msa.serve.app import create_app
from msa.serve.banks import BankState
from msa.serve.errors import (
    CLIENT_GONE,
    ServiceError,
    log_failure,
    service_error,
    unavailable,
)
from msa.serve.gate import SAFE_METHODS, Gate
from msa.serve.keys import Keys
from msa.serve.request_log import REQUEST_ID, log_to_stderr
from msa.serve.service import Service
from msa.serve.settings import ServeSettings

APP_NAME = "msa"
WRITER_NAME = "msa-writer"
REPLICA = "MSA-Replica"
"""Header of every response: the replica that it came through."""
START_SECONDS = 600.0  # to load a model and banks
CATCH_UP_SECONDS = 10.0
WRITER_SECONDS = 10.0  # to say how far the banks have come
WAKE_SECONDS = 5.0
CALLS_AT_ONCE = 1000  # of the writer; streams of jobs' events are calls too
_LOAD_PAUSE = 0.05

_ASKS = re.compile(
    r"/api/banks/[^/]+/(ask|search)|/v1/(chat/completions|responses|vector_stores/[^/]+/search)"
)
_ALIKE = re.compile(r"/|/static/.*|/healthz?|/readyz|/version|/docs(/.*)?|/openapi\.json")
_SCOPE = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
    "client",
    "server",
)


class WriterLink(Protocol):
    """What a replica needs of the writer."""

    async def states(self) -> Mapping[str, BankState]:
        """How far its banks have come, by name; every acknowledged write is in it."""
        ...

    def respond(self, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
        """The messages of its app's response to a request."""
        ...


class Writer:
    """The service that writes; an actor.

    Args:
        build: makes its app, in the process of the actor.
    """

    def __init__(self, build: Callable[[], FastAPI]) -> None:
        self._app = build()
        self._service: Service = self._app.state.service
        self._life: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    async def ready(self) -> None:
        """Come back when the model and the banks are loaded.

        Raises:
            MSAError: they cannot be.
        """
        if self._life is None:  # of an actor that Ray has started again, by the first call
            self._life = asyncio.create_task(self._live())
        await _loaded(self._service, self._life)

    async def _live(self) -> None:
        async with self._app.router.lifespan_context(self._app):
            await self._stopping.wait()

    async def states(self) -> dict[str, BankState]:
        """See `WriterLink.states`."""
        await self.ready()
        return await asyncio.to_thread(
            lambda: {served.name: served.state for served in self._service.registry.all()}
        )

    async def respond(self, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
        """See `WriterLink.respond`. Closing it, or cancelling it, ends the app's work."""
        await self.ready()
        messages: asyncio.Queue[Message] = asyncio.Queue()
        request = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not request:
                await asyncio.Event().wait()  # until the task is cancelled
            return request.pop()

        work = asyncio.create_task(self._app(scope, receive, messages.put))
        try:
            async for message in _until_done(work, messages):
                yield message
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def stop(self) -> None:
        """End what runs, and close the banks; the shards end with them."""
        self._stopping.set()
        if self._life is not None:
            await self._life


class RemoteWriter:
    """The writer as an actor of the cluster; a `WriterLink`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def states(self) -> Mapping[str, BankState]:
        """See `WriterLink.states`.

        Raises:
            ServiceError: 503; the writer is being started again, or does not answer.
        """
        with _writer_errors():
            async with asyncio.timeout(WRITER_SECONDS):
                found: Mapping[str, BankState] = await self._actor.states.remote()
                return found

    async def respond(self, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
        """See `WriterLink.respond`.

        Raises:
            ServiceError: 503; the writer died. What was asked for may have been done.
        """
        answer = self._actor.respond.options(num_returns="streaming").remote(scope, body)
        ended = False
        try:
            with _writer_errors():
                async for message in answer:
                    yield await message
            ended = True
        finally:
            if not ended:
                cluster.connect().cancel(answer)


class Replica:
    """The app of a replica, as a server of ASGI runs it.

    Args:
        app: of a service that only reads.
        writer: who writes.
        name: of the replica.
    """

    def __init__(self, app: FastAPI, writer: WriterLink, name: str) -> None:
        self._app: ASGIApp = app
        self._service: Service = app.state.service
        self._writer = writer
        self._name = name
        self._following = asyncio.Lock()
        self._handed_on = Gate(self._hand_on, self._service.settings, stopping=lambda: False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have it answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, self._once_loaded(send))
            return
        send = self._signed(send)
        path, safe = scope["path"], scope["method"] in SAFE_METHODS
        try:
            if scope["method"] == "POST" and _ASKS.fullmatch(path):
                await self._catch_up()
            elif not (safe and _ALIKE.fullmatch(path)):
                await self._handed_on(scope, receive, send)
                return
        except MSAError as error:
            await service_error(error).response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _catch_up(self) -> None:
        """See every write that has been acknowledged so far.

        Raises:
            ServiceError: 503.
        """
        async with self._following:  # what one learns is never older than what one before learned
            await self._service.follow(await self._writer.states(), CATCH_UP_SECONDS)

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the writer answer."""
        body = await _body(receive)
        sent = False
        try:
            plain = {key: scope[key] for key in _SCOPE if key in scope}
            async with contextlib.aclosing(self._writer.respond(plain, body)) as messages:
                async for message in messages:
                    sent = True
                    await send(message)
        except ServiceError as error:
            if not sent:
                raise
            log_failure(error)  # the server sees a response without its end, and breaks off

    def _once_loaded(self, send: Send) -> Send:
        """Says that the replica has started when it can answer."""

        async def send_when_loaded(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                await _loaded(self._service)
            await send(message)

        return send_when_loaded

    def _signed(self, send: Send) -> Send:
        """Adds the name; Ray Serve itself adds the id of a request, the one that the app reads."""

        async def send_signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                del headers[REQUEST_ID]
                headers[REPLICA] = self._name
            await send(message)

        return send_signed


def serve_replicas(
    settings: ServeSettings, paths: Sequence[Path], on_ready: Callable[[], None]
) -> None:
    """Serve on a cluster until a signal says to stop.

    Args:
        settings: how; `ray` is set.
        paths: files and folders to index into the first bank.
        on_ready: called once requests are answered.

    Raises:
        ConfigError: Ray Serve is not installed, the cluster serves banks already, or the key file
            cannot be used.
        WorkerError: no cluster, or it does not start what it should.
        MSAError: the model or a bank cannot be loaded.
    """
    serve = _ray_serve()
    Keys.load(settings.api_key_file)  # what is wrong with it is said here, not by an actor
    ray = cluster.connect(settings.ray_address)
    settings, paths = _absolute(settings), [path.resolve() for path in paths]
    writer = _start_writer(ray, settings, paths)
    try:
        cluster.gather(writer.ready.remote(), START_SECONDS, "the process that writes")
        _start_replicas(serve, settings)
        stopped = _stop_signal()
        on_ready()
        while not stopped.wait(WAKE_SECONDS):
            writer.ready.remote()  # one that died and was started again loads and resumes its jobs
    finally:
        _stop(ray, serve, settings, writer)


def _stop(ray: Any, serve: Any, settings: ServeSettings, writer: Any) -> None:
    """End the replicas, then the writer with the shards, and leave the cluster."""
    with contextlib.suppress(Exception):  # there may be no replicas yet, or no cluster any more
        serve.delete(APP_NAME)
    with contextlib.suppress(MSAError):
        seconds = 2 * settings.shutdown_seconds + WRITER_SECONDS
        cluster.gather(writer.stop.remote(), seconds, "the process that writes")
    ray.kill(writer)
    if settings.ray_address is None:
        serve.shutdown()
    ray.shutdown()


def _start_writer(ray: Any, settings: ServeSettings, paths: Sequence[Path]) -> Any:
    """The actor that writes; Ray starts it again when it dies, and its jobs go on.

    Raises:
        ConfigError: there is one already.
    """
    actor = ray.remote(Writer).options(
        name=WRITER_NAME,
        namespace=cluster.NAMESPACE,
        num_cpus=0,
        num_gpus=_gpus(settings),
        max_restarts=-1,
        max_concurrency=CALLS_AT_ONCE,
    )
    try:
        return actor.remote(partial(_writer_app, settings, paths))
    except ValueError as error:  # the name is taken
        raise ConfigError(
            "this cluster serves banks already, and one process must write them; stop that "
            f"'msa serve --ray', or use another cluster ({str(error).splitlines()[0]})"
        ) from None


def _start_replicas(serve: Any, settings: ServeSettings) -> None:
    """Returns when all replicas answer.

    Ray Serve waits a minute for its own proxy, which it ends and starts again when it is late. On a
    busy machine that is too short, so who is late is waited for here.

    Raises:
        WorkerError: they do not start.
    """
    from ray.exceptions import RayError

    def build() -> Replica:
        return _replica(settings)

    quiet = {"enable_access_log": False, "log_level": "WARNING"}  # the app writes its own lines
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    door = {"host": settings.host, "port": settings.port}
    deployment = serve.deployment(
        serve.ingress(build)(),
        name="replica",
        num_replicas=settings.replicas,
        # Who must wait, and for how long, is decided by the app.
        max_ongoing_requests=settings.max_rows + settings.max_waiting + CALLS_AT_ONCE,
        graceful_shutdown_timeout_s=settings.shutdown_seconds,
        ray_actor_options={"num_cpus": 0, "num_gpus": _gpus(settings)},
    )
    try:
        with contextlib.suppress(TimeoutError, RayError):
            serve.start(http_options=door, logging_config=quiet)
        serve.start(http_options=door, logging_config=quiet)  # the same one
        with contextlib.suppress(TimeoutError):
            serve.run(deployment.bind(), name=APP_NAME, route_prefix="/", logging_config=quiet)
    except (RuntimeError, TimeoutError, RayError) as error:
        raise WorkerError(f"the replicas do not start: {error}") from error
    if settings.ray_address is None:  # on another's cluster, the door may be elsewhere
        _until_answered(settings)


def _until_answered(settings: ServeSettings) -> None:
    """Wait until a request is answered.

    Raises:
        WorkerError: none is.
    """
    end = time.monotonic() + START_SECONDS
    while True:
        connection = http.client.HTTPConnection(settings.host.strip("[]"), settings.port, timeout=5)
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            contextlib.closing(connection),
        ):
            connection.request("GET", "/healthz")
            if connection.getresponse().status == 200:
                return
        if time.monotonic() > end:
            raise WorkerError(f"Ray Serve does not answer at {settings.host}, port {settings.port}")
        time.sleep(_LOAD_PAUSE)


def _replica(settings: ServeSettings) -> Replica:
    """The app of this process, which is a replica."""
    _prepare_process(settings)
    name = _ray_serve().get_replica_context().replica_id.unique_id
    writer = cluster.connect().get_actor(WRITER_NAME, namespace=cluster.NAMESPACE)
    return Replica(create_app(settings, read_only=True), RemoteWriter(writer), name)


def _writer_app(settings: ServeSettings, paths: Sequence[Path]) -> FastAPI:
    """The app of this process, which is the writer."""
    _prepare_process(settings)
    return create_app(settings, paths=paths)


def _prepare_process(settings: ServeSettings) -> None:
    """Log lines go to a file of Ray's; those with a model on one machine share its cores."""
    import torch

    log_to_stderr()
    beside = cluster.per_node(settings.replicas + 1)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // beside))


def _ray_serve() -> Any:
    try:
        from ray import serve
    except ImportError as error:
        raise ConfigError(
            f"msa serve --ray needs Ray Serve ({str(error).splitlines()[0]}); install it: "
            "pip install 'msa-memory[serve,replicas]'"
        ) from None
    return serve


async def _loaded(service: Service, life: asyncio.Task[None] | None = None) -> None:
    """Wait for a service whose app is starting, or has started.

    Raises:
        Exception: it cannot load, or the task that it lives in has ended with an error.
    """
    while service.state == "loading":
        if life is not None and life.done():
            life.result()
        await asyncio.sleep(_LOAD_PAUSE)
    if service.failure is not None:
        raise service.failure


async def _until_done(
    work: asyncio.Task[None], messages: asyncio.Queue[Message]
) -> AsyncIterator[Message]:
    """What an app sends, as it does.

    Raises:
        Exception: the app's.
    """
    while True:
        get = asyncio.ensure_future(messages.get())
        try:
            await asyncio.wait({work, get}, return_when=asyncio.FIRST_COMPLETED)
            if not get.done():
                break
            yield get.result()
        finally:
            get.cancel()
    while not messages.empty():
        yield messages.get_nowait()
    work.result()


async def _body(receive: Receive) -> bytes:
    """A whole body; the gate has put a limit on it.

    Raises:
        ServiceError: 499; the client went away.
    """
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ServiceError(CLIENT_GONE, None, "client_gone", "The client went away.")
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


@contextlib.contextmanager
def _writer_errors() -> Iterator[None]:
    """Errors of Ray as 503."""
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, TimeoutError):
        message = "The process that writes is not there, or is being started again."
        raise unavailable("writer_away", message) from None


def _absolute(settings: ServeSettings) -> ServeSettings:
    """Settings for processes that run in other folders."""
    changes: dict[str, Any] = {name: path.resolve() for name, path in _paths(settings)}
    changes["banks"] = {name: folder.resolve() for name, folder in settings.banks.items()}
    if settings.model is not None and Path(settings.model).exists():
        changes["model"] = str(Path(settings.model).resolve())
    return settings.model_copy(update=changes)


def _paths(settings: ServeSettings) -> list[tuple[str, Path]]:
    names = ("banks_folder", "state_folder", "api_key_file")
    return [(name, path) for name in names if (path := getattr(settings, name)) is not None]


def _gpus(settings: ServeSettings) -> int:
    return int((settings.device or "").startswith("cuda"))


def _stop_signal() -> threading.Event:
    """Set by the first signal that says to stop."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    return stopped
