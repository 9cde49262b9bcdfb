"""A real `msa serve`: its process, requests to it, and what it says of itself."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

from msa.errors import InputError, MSAError

T = TypeVar("T")
BANK = "notes"
START_SECONDS = 300.0
JOB_SECONDS = 3600.0
COMMAND = "import sys; from msa.cli.main import main; main(sys.argv[1:])"
FINISHED = ("done", "failed", "cancelled")


class ServiceDiedError(MSAError):
    """The service ended by itself, or does not answer."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A response.

    Attributes:
        status: of HTTP.
        headers: lower-case name -> value.
        body: all of it.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Asked:
    """What came of a question that was asked as a stream.

    Attributes:
        question: as asked.
        status: of HTTP.
        first_seconds: until the first event.
        seconds: until the end.
        answer: see `msa.types.Answer`; None if there is none.
        text: all that came.
    """

    question: str
    status: int
    first_seconds: float
    seconds: float
    answer: dict[str, Any] | None
    text: str

    @property
    def essence(self) -> Any:
        """What has to be the same whenever this is asked: the answer without times and scores."""
        if self.answer is None:
            return None
        usage = self.answer["usage"]
        cited = [(c["id"], c["text"]) for c in self.answer["citations"]]
        counts = usage["prompt_tokens"], usage["generated_tokens"]
        return self.answer["text"], self.answer["stopped"], cited, counts


@dataclass(frozen=True, slots=True)
class Workload:
    """Documents, as lines of JSONL hold them, and questions about them."""

    documents: Sequence[dict[str, Any]]
    questions: Sequence[str]


def world(seed: int, documents: int, questions: int) -> Workload:
    """A generated world, and questions of one and two hops about it in random order.

    Raises:
        InputError: the world has fewer questions.
    """
    import random

    from msa.synthetic_worlds import generate_world

    made = generate_world(seed, documents, breadth=0.15, split="test")
    asked = [q.question for q in made.questions]
    if len(asked) < questions:
        raise InputError(
            f"a world of {documents} documents has {len(asked)} questions, not {questions}; "
            "give more --documents"
        )
    rows = [{"id": d.key, "title": d.title, "text": d.text} for d in made.documents]
    return Workload(rows, random.Random(seed).sample(asked, questions))


def real_questions(folder: Path, documents: int, questions: int, seed: int) -> Workload:
    """Dev questions of a set, the passages that they need, and others of it.

    Raises:
        InputError: the folder is no question set, or has fewer questions.
    """
    from msa.evaluation.question_sets import read_question_set, with_fewer_documents

    drawn = read_question_set(folder, count=questions, seed=seed)
    if len(drawn.questions) < questions:
        raise InputError(f"{folder} holds {len(drawn.questions)} questions, not {questions}")
    kept = with_fewer_documents(drawn, documents, seed).documents
    rows = [{"id": d.id, "title": d.title or "", "text": d.text} for d in kept]
    return Workload(rows, [q.text for q in drawn.questions])


@dataclass
class Service:
    """`msa serve` in a process of its own; a context that starts and ends it.

    Args:
        folder: for its log, keys and whatever else; banks of `banks` that are not there are made.
        banks: name -> folder.
        model: as `msa serve --model`.
        keys: key -> name, scopes and banks, as in a key file; without any nobody needs one.
        environment: settings as environment variables.

    Attributes:
        port: where it listens.
        key: sent with each request that names no other.
        started, listened: when the process was started, and listened; by `time.perf_counter`.
    """

    folder: Path
    banks: Mapping[str, Path]
    model: str
    keys: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    key: str | None = None
    started: float = 0.0
    listened: float = 0.0
    _process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        try:
            self.until_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """What it has written to stderr, in all its lives."""
        path = self.folder / "service.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start the process; returns when it listens."""
        options = [w for name, path in self.banks.items() for w in ("--bank", f"{name}={path}")]
        options += ["--port", "0", "--model", self.model]
        if self.keys:
            file = self.folder / "keys"
            lines = [f"{hashlib.sha256(k.encode()).hexdigest()} {w}" for k, w in self.keys.items()]
            file.write_text("\n".join(lines))
            options += ["--api-key-file", str(file)]
        before = len(self.log)
        self.started = time.perf_counter()
        with (self.folder / "service.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, "serve", *options],
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
            )
        found = self._wait(lambda: re.search(r"127\.0\.0\.1:(\d+)", self.log[before:]))
        assert found is not None  # _wait gives what is true
        self.port = int(found[1])
        self.listened = time.perf_counter()

    def until_ready(self) -> None:
        """Wait until model and banks are loaded."""
        self._wait(lambda: self.request("GET", "/readyz").status == 200)

    def _wait(self, found: Callable[[], T]) -> T:
        deadline = time.monotonic() + START_SECONDS
        while not (result := found()):
            self.check_alive()
            if time.monotonic() > deadline:
                raise ServiceDiedError(f"not ready after {START_SECONDS:.0f} s: {self.log[-500:]}")
            time.sleep(0.05)
        return result

    def check_alive(self) -> None:
        """Raises:
        ServiceDiedError: the process has ended.
        """
        if self._process is None or self._process.poll() is not None:
            raise ServiceDiedError(f"the service has ended: {self.log[-500:]}")

    def kill(self) -> None:
        """End the process as if the power failed."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """Ask the process to end, and wait for it."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()

    def rss(self) -> int | None:
        """Bytes of memory that the process holds; None where it cannot be asked (not on Linux)."""
        assert self._process is not None
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self._process.pid}/status").read_text()
            found = re.search(r"VmRSS:\s+(\d+) kB", status)
            return int(found[1]) * 1024 if found else None
        return None

    def failures(self) -> list[str]:
        """Lines of the log that tell of a fault of the service."""
        lines = self.log.splitlines()
        return [line for line in lines if "Traceback" in line or '"level": "error"' in line]

    # ---- requests

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        kind: str = "application/json",
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float = 300.0,
    ) -> Reply:
        """Send a request on a connection of its own; a body that is no bytes is sent as JSON.

        Raises:
            OSError: no connection.
            http.client.HTTPException: no response of HTTP.
        """
        with self.connection(seconds) as connection:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, self._headers(kind, key, data, headers))
            response = connection.getresponse()
            got = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, got, response.read())

    @contextlib.contextmanager
    def connection(self, seconds: float = 300.0) -> Iterator[http.client.HTTPConnection]:
        """A connection, closed in the end."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            yield connection
        finally:
            connection.close()

    def _headers(
        self,
        kind: str,
        key: str | None,
        data: bytes | None,
        more: Mapping[str, str] | None,
    ) -> dict[str, str]:
        headers = {} if data is None else {"Content-Type": kind}
        if (key or self.key) is not None:
            headers["Authorization"] = f"Bearer {key or self.key}"
        return {**headers, **(more or {})}

    def ask(self, question: str, bank: str = BANK, **given: Any) -> Asked:
        """Ask, and read the stream to its end.

        Raises:
            OSError: no connection, or it broke.
        """
        data = json.dumps({"question": question, "stream": True, **given}).encode()
        started = time.perf_counter()
        first, lines = None, []
        with self.connection() as connection:
            headers = self._headers("application/json", None, data, None)
            connection.request("POST", f"/api/banks/{bank}/ask", data, headers)
            response = connection.getresponse()
            for line in response:
                if first is None and line.startswith(b"event:"):
                    first = time.perf_counter()
                lines.append(line.decode())
        ended = time.perf_counter()
        text = "".join(lines)
        return Asked(
            question,
            response.status,
            (first or ended) - started,
            ended - started,
            _answer_of(text),
            text,
        )

    def put(self, name: str, text: str, bank: str = BANK, **given: Any) -> Reply:
        """Store a document."""
        path = f"/api/banks/{bank}/documents/{quote(name, safe='')}"
        return self.request("PUT", path, {"text": text, **given})

    def index(self, documents: Sequence[Mapping[str, Any]], bank: str = BANK) -> str:
        """Begin to index documents; the job's id.

        Raises:
            ServiceDiedError: it was refused.
        """
        lines = "".join(json.dumps(row) + "\n" for row in documents).encode()
        path = f"/api/banks/{bank}/documents:batch"
        reply = self.request("POST", path, lines, kind="application/jsonl")
        if reply.status != 202:
            raise ServiceDiedError(f"{reply.status} for {path}: {reply.body[:300]!r}")
        return str(reply.json["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        """How a job stands.

        Raises:
            ServiceDiedError: there is none.
        """
        reply = self.request("GET", f"/api/jobs/{job_id}")
        if reply.status != 200:
            raise ServiceDiedError(f"{reply.status} for job {job_id}: {reply.body[:300]!r}")
        return dict(reply.json)

    def finished(self, job_id: str) -> dict[str, Any]:
        """A job when it has ended.

        Raises:
            ServiceDiedError: it does not end.
        """
        deadline = time.monotonic() + JOB_SECONDS
        while (job := self.job(job_id))["status"] not in FINISHED:
            if time.monotonic() > deadline:
                raise ServiceDiedError(f"job {job_id} does not end: {job}")
            time.sleep(0.05)
        return job

    def rows(self, bank: str = BANK) -> list[dict[str, Any]]:
        """Every document and part of the bank, from its list."""
        rows: list[dict[str, Any]] = []
        after: int | None = 0
        while after is not None:
            path = f"/api/banks/{bank}/documents?limit=100&after={after}"
            page = self.request("GET", path).json
            rows += page["data"]
            after = page["next"]
        return rows


def _answer_of(text: str) -> dict[str, Any] | None:
    """The data of the event `answer` of a stream."""
    for frame in text.replace("\r\n", "\n").split("\n\n"):
        lines = frame.split("\n")
        if "event: answer" in lines:
            data = [line.removeprefix("data:").strip() for line in lines if line[:5] == "data:"]
            return dict(json.loads("\n".join(data)))
    return None
