"""How a service bears load: many questions at once, index jobs, kills, hours of use, its start."""

from __future__ import annotations

import itertools
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from statistics import mean
from typing import Any

from measuring.service import BANK, Asked, Reply, Service, Workload
from measuring.timing import Note

UNREACHABLE = (OSError, HTTPException)
WARM_UP = 2
LEAST_ACTIONS = 15  # of a client in use, however slow the machine
_SECRET = re.compile(r"Zq[0-9a-f]{10}")


@dataclass(slots=True)
class Finding:
    """The outcome of one load.

    Attributes:
        kind: of the load.
        settings: what was asked for.
        figures: (what, value, bar or "").
        failures: what must not happen and did; empty where all is well.
        notes: how to read it.
    """

    kind: str
    settings: dict[str, str | int | float] = field(default_factory=dict)
    figures: list[tuple[str, str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, value: str | int | float, bar: str = "") -> None:
        """Add a figure."""
        shown = f"{value:,.2f}" if isinstance(value, float) else value
        self.figures.append((what, f"{shown:,}" if isinstance(shown, int) else shown, bar))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of all does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


# ---- questions at once


def concurrency(service: Service, questions: Sequence[str], clients: int, note: Note) -> Finding:
    """Questions of many clients at once, beside the same ones one after the other.

    Args:
        service: with a bank that answers them.
        questions: each is asked once in either way.
        clients: that ask at once; everyone takes the next question when it has its answer.
        note: told what is measured next.
    """
    found = Finding("concurrency", {"questions": len(questions), "clients": clients})
    for question in questions[:WARM_UP]:
        service.ask(question)
    note(f"{len(questions)} questions one after the other")
    alone, alone_seconds = _timed(lambda: [service.ask(q) for q in questions])
    note(f"{len(questions)} questions of {clients} clients")
    with ThreadPoolExecutor(clients) as pool:
        together, seconds = _timed(lambda: list(pool.map(service.ask, questions)))
    for one, other in zip(alone, together, strict=True):
        if one.answer is None or other.answer is None:
            lost = one if one.answer is None else other
            found.failures.append(f"no answer: {lost.status} {lost.text[:200]}")
        elif one.essence != other.essence:
            found.failures.append(
                f"another answer to {one.question!r}: {one.essence} alone, {other.essence} together"
            )
    found.add("questions a second, one at a time", len(questions) / alone_seconds)
    found.add(f"questions a second, {clients} clients", len(questions) / seconds)
    found.add("ratio", alone_seconds / seconds, ">= 2.5")
    _add_waits(found, "one at a time", alone)
    _add_waits(found, f"{clients} clients", together)
    first = [asked.first_seconds for asked in together]
    ratio = percentile(first, 0.95) / percentile(first, 0.5)
    found.add("first event, p95 / p50", ratio, "<= 2")
    found.add("answers lost or different", len(found.failures), "0")
    return found


def _add_waits(found: Finding, how: str, asked: Sequence[Asked]) -> None:
    for what, values in (
        ("first event", [a.first_seconds for a in asked]),
        ("answer", [a.seconds for a in asked]),
    ):
        both = f"{percentile(values, 0.5):.3f} / {percentile(values, 0.95):.3f}"
        found.add(f"{what}, s, {how}, p50 / p95", both)


def _timed(call: Callable[[], list[Asked]]) -> tuple[list[Asked], float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


# ---- an index job beside questions


def indexing(
    service: Service,
    questions: Sequence[str],
    documents: Sequence[dict[str, Any]],
    clients: int,
    note: Note,
) -> Finding:
    """Questions while an index job runs, beside the same ones without it.

    Args:
        service: with a bank that answers them.
        questions: asked in rounds for as long as the job runs.
        documents: of the job; their ids are not in the bank.
        clients: that ask at once.
        note: told what is measured next.
    """
    found = Finding("indexing", {"documents": len(documents), "clients": clients})
    for question in questions[:WARM_UP]:
        service.ask(question)
    note(f"{len(questions)} questions without a job")
    with ThreadPoolExecutor(clients) as pool:
        without = list(pool.map(service.ask, questions))
    note(f"an index job of {len(documents)} documents, and questions")
    started = time.perf_counter()
    job_id = service.index(documents)
    ended = threading.Event()
    with ThreadPoolExecutor(clients) as pool:
        asking = [
            pool.submit(_ask_until, service, questions[i % len(questions) :], ended)
            for i in range(clients)
        ]
        try:
            job = service.finished(job_id)
        finally:
            ended.set()
        seconds = time.perf_counter() - started
        beside = [asked for future in asking for asked in future.result()]
    lost = [a for a in [*without, *beside] if a.answer is None]
    found.failures += [f"no answer: {a.status} {a.text[:200]}" for a in lost]
    if job["status"] != "done" or job["added"] != len(documents):
        found.failures.append(f"the job has not stored all: {_short(job)}")
    ratio = percentile([a.seconds for a in beside], 0.95) / percentile(
        [a.seconds for a in without], 0.95
    )
    _add_waits(found, f"without a job ({len(without)})", without)
    _add_waits(found, f"with one ({len(beside)})", beside)
    found.add("answer, p95 with / without", ratio, "<= 2")
    found.add("seconds of the job", seconds)
    found.add("documents stored", int(job["added"]), f"{len(documents):,}")
    found.add("questions lost", len(lost), "0")
    return found


def _ask_until(service: Service, questions: Sequence[str], ended: threading.Event) -> list[Asked]:
    """Ask in rounds; each question once at least if the job is that quick."""
    asked: list[Asked] = []
    while not ended.is_set() or not asked:
        asked.append(service.ask(questions[len(asked) % len(questions)]))
    return asked


def _short(job: dict[str, Any]) -> dict[str, Any]:
    return {k: job[k] for k in ("status", "added", "total", "message", "failed")}


# ---- its start


def start(service: Service, question: str, repeats: int, note: Note) -> Finding:
    """From the start of the process to its first answer, over a bank that is there.

    Args:
        service: one that does not run.
        question: asked as soon as it is ready.
        repeats: starts.
        note: told what is measured next.
    """
    found = Finding("start", {"repeats": repeats})
    times: dict[str, list[float]] = {"listening": [], "ready": [], "answered": []}
    passages = 0
    for i in range(repeats):
        note(f"start {i + 1} of {repeats}")
        with service:  # entered when it is ready
            times["ready"].append(time.perf_counter() - service.started)
            asked = service.ask(question)
            times["answered"].append(time.perf_counter() - service.started)
            times["listening"].append(service.listened - service.started)
            if asked.answer is None:
                found.failures.append(f"no answer: {asked.status} {asked.text[:200]}")
            info = service.request("GET", f"/api/banks/{BANK}").json["info"]
            passages = int(info["num_documents"])
    found.settings["passages"] = passages
    for what, values in times.items():
        bar = "<= 15" if what == "answered" else ""
        found.add(f"seconds until {what}, the slowest of {repeats}", max(values), bar)
    found.notes.append("The bank's files may lie in the system's cache.")
    return found


# ---- kills


@dataclass(slots=True)
class _Acknowledged:
    """What the service has said it keeps.

    Attributes:
        texts: id of a document -> text.
        jobs: that were accepted.
        refused: answers that are neither yes nor "not now".
    """

    texts: dict[str, str] = field(default_factory=dict)
    jobs: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def kills(service: Service, count: int, seed: int, note: Note) -> Finding:
    """End the service by kill -9 while documents are sent to it, again and again.

    Three clients send without a pause: single documents, jobs of several as JSONL, and uploads of
    files. After a random time the process is killed and started again. In the end all that was
    acknowledged has to be there, and nothing twice.

    Args:
        service: one that does not run, with an empty bank.
        count: kills.
        seed: of when.
        note: told of every kill.
    """
    found = Finding("kills", {"kills": count})
    rng = random.Random(seed)
    kept = _Acknowledged()
    for number in range(count):
        with service:
            senders = [
                threading.Thread(target=send, args=(service, f"{number}", kept))
                for send in (_send_documents, _send_jobs, _send_files)
            ]
            for sender in senders:
                sender.start()
            time.sleep(rng.uniform(0.05, 1.5))
            service.kill()
            for sender in senders:
                sender.join()
        note(f"kill {number + 1} of {count}: {len(kept.texts)} documents acknowledged")
    with service:
        jobs = [service.finished(job_id) for job_id in kept.jobs]
        verified = _maintained(service, "verify")
        rows = service.rows()
    texts = {row["id"]: row["snippet"] for row in rows}
    missing = sorted(set(kept.texts) - set(texts))
    wrong = [i for i, text in kept.texts.items() if i in texts and texts[i] != text]
    unfinished = [_short(job) for job in jobs if job["status"] != "done" or job["failed"]]
    found.failures += kept.refused
    found.failures += [f"acknowledged, and not there: {i}" for i in missing]
    found.failures += [f"not as it was acknowledged: {i}: {texts[i]!r}" for i in wrong]
    found.failures += [f"twice: {i}" for i, n in Counter(r["id"] for r in rows).items() if n > 1]
    found.failures += [f"a job that is not done: {job}" for job in unfinished]
    if verified["status"] != "done" or not _sound(verified["result"]):
        found.failures.append(f"the bank is damaged: {verified['result']}")
    found.failures += [f"in the log: {line}" for line in service.failures()]
    found.add("documents acknowledged", len(kept.texts))
    found.add("jobs accepted", len(kept.jobs))
    found.add("acknowledged and missing", len(missing), "0")
    found.add("stored twice", len(rows) - len(texts), "0")
    found.add("jobs not done in the end", len(unfinished), "0")
    return found


def _sound(result: dict[str, Any] | None) -> bool:
    return result is not None and not result["problems"]


def _maintained(service: Service, what: str) -> dict[str, Any]:
    reply = service.request("POST", f"/api/banks/{BANK}:{what}")
    return service.finished(reply.json["id"])


def _send(send: Callable[[int], Reply]) -> Iterator[tuple[int, Reply]]:
    """Send one request after the other until the service is gone."""
    number = 0
    while True:
        try:
            yield number, send(number)
        except (*UNREACHABLE, ValueError):
            return
        number += 1


def _text(name: str) -> str:
    return f"Record {name} was written in {1700 + sum(name.encode()) % 300}."


def _send_documents(service: Service, round_: str, kept: _Acknowledged) -> None:
    def put(number: int) -> Reply:
        name = f"put-{round_}-{number}"
        return service.put(name, _text(name))

    for number, reply in _send(put):
        name = f"put-{round_}-{number}"
        if reply.status == 201:
            kept.texts[name] = _text(name)
        elif reply.status == 429:
            time.sleep(0.2)
        else:
            kept.refused.append(f"PUT {name}: {reply.status} {reply.body[:200]!r}")


def _send_jobs(service: Service, round_: str, kept: _Acknowledged) -> None:
    import json

    def names(number: int) -> list[str]:
        return [f"line-{round_}-{number}-{i}" for i in range(8)]

    def post(number: int) -> Reply:
        lines = [json.dumps({"id": name, "text": _text(name)}) for name in names(number)]
        path = f"/api/banks/{BANK}/documents:batch"
        return service.request("POST", path, "\n".join(lines).encode(), kind="application/jsonl")

    for number, reply in _send(post):
        _keep_job(reply, names(number), kept)


def _send_files(service: Service, round_: str, kept: _Acknowledged) -> None:
    def names(number: int) -> list[str]:
        return [f"file-{round_}-{number}-{i}.txt" for i in range(4)]

    def post(number: int) -> Reply:
        kind, body = multipart([(name, _text(name).encode()) for name in names(number)])
        return service.request("POST", f"/api/banks/{BANK}/jobs", body, kind=kind)

    for number, reply in _send(post):
        _keep_job(reply, names(number), kept)


def _keep_job(reply: Reply, names: Sequence[str], kept: _Acknowledged) -> None:
    if reply.status == 202:
        kept.jobs.append(reply.json["id"])
        kept.texts |= {name: _text(name) for name in names}
    elif reply.status == 429:
        time.sleep(0.2)
    else:
        kept.refused.append(f"a job: {reply.status} {reply.body[:200]!r}")


def multipart(
    files: Sequence[tuple[str, bytes]], name: str = "files", **fields: str
) -> tuple[str, bytes]:
    """Content-Type and body of a form: fields, then files that are all called `name`."""
    edge, what = "msa-benchmark-7d1f", "Content-Disposition: form-data; name"
    parts = [f'{what}="{key}"\r\n\r\n{value}'.encode() for key, value in fields.items()]
    kind = "Content-Type: application/octet-stream"
    parts += [
        f'{what}="{name}"; filename="{file}"\r\n{kind}\r\n\r\n'.encode() + data
        for file, data in files
    ]
    body = b"".join(b"--%s\r\n%s\r\n" % (edge.encode(), part) for part in parts)
    return f"multipart/form-data; boundary={edge}", body + f"--{edge}--\r\n".encode()


# ---- hours of use


@dataclass(slots=True)
class _Soak:
    """What all clients of a soak share.

    Attributes:
        dead: words of texts that are deleted -> when that was acknowledged.
        counts: of requests, by what they did.
        failures: what must not happen.
    """

    service: Service
    workload: Workload
    ends: float
    dead: dict[str, float] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def soak(
    service: Service, workload: Workload, clients: int, minutes: float, seed: int, note: Note
) -> Finding:
    """Clients that ask, add, update, delete and search without a pause, and how memory grows.

    Every text that is added holds a word of its own. Once its deletion is acknowledged, nothing
    that is asked from then on may show the word.

    Args:
        service: with the documents of the workload in its bank.
        workload: its questions are asked, beside questions about what was added.
        clients: each with 20 documents that come and go.
        minutes: of it, of which the first fifth is to warm up.
        seed: of what the clients do.
        note: told of the memory.
    """
    found = Finding("soak", {"clients": clients, "minutes": minutes})
    began = time.monotonic()
    shared = _Soak(service, workload, began + 60 * minutes)
    memory: list[tuple[float, int]] = []
    with ThreadPoolExecutor(clients) as pool:
        using = [pool.submit(_use, shared, i, random.Random(f"{seed}-{i}")) for i in range(clients)]
        _watch(shared, using, memory, note)
        for future in using:
            future.result()
    growth = _growth(memory, began + 60 * minutes / 5, shared.ends)
    found.failures += shared.failures
    found.failures += [f"in the log: {line}" for line in service.failures()]
    for what, count in sorted(shared.counts.items()):
        found.add(what, count)
    found.add("errors and texts that came back", len(found.failures), "0")
    if growth is not None:
        first, second = growth
        found.add("MB of memory, mean of the first half", first / 1e6)
        found.add("MB of memory, mean of the second half", second / 1e6)
        found.add("growth, %", 100 * (second / first - 1), "<= 5")
    return found


def _watch(
    shared: _Soak, using: Sequence[Future[None]], memory: list[tuple[float, int]], note: Note
) -> None:
    """Write down the memory every second, and compact the bank every minute."""
    compacted = told = time.monotonic()
    while not all(future.done() for future in using):
        now = time.monotonic()
        if (held := shared.service.rss()) is not None:
            memory.append((now, held))
        if now - compacted > 60:
            _maintained(shared.service, "compact")
            shared.counts["compacted"] += 1
            compacted = now
        if memory and now - told > 60:
            note(f"{sum(shared.counts.values()):,} requests, {memory[-1][1] / 1e6:,.0f} MB")
            told = now
        time.sleep(min(1.0, max(0.05, (shared.ends - now) / 20)))


def _growth(
    memory: Sequence[tuple[float, int]], warm: float, ends: float
) -> tuple[float, float] | None:
    """Mean memory of the two halves of the time after warming up; None if there is none of one.

    It goes up and down by a third, with how many questions run together and with a bank that is
    loaded again. Memory at rest tells less: it is what the allocator happened to keep.
    """
    middle = (warm + ends) / 2
    first = [held for when, held in memory if warm <= when < middle]
    second = [held for when, held in memory if middle <= when < ends]
    return (mean(first), mean(second)) if first and second else None


def _use(shared: _Soak, client: int, rng: random.Random) -> None:
    """One client's loop."""
    words: dict[str, str] = {}  # id -> the word that tells its text
    gone: list[str] = []  # words that are deleted
    for count in itertools.count():
        if time.monotonic() >= shared.ends and count >= LEAST_ACTIONS:
            break
        action = rng.choices(
            (_ask, _search, _store, _delete), weights=(50, 15, 25, 10 if words else 0)
        )[0]
        try:
            action(shared, client, rng, words, gone)
        except UNREACHABLE as error:
            shared.failures.append(f"{action.__name__}: {type(error).__name__}: {error}")
            shared.service.check_alive()
        del gone[:-20]


def _ask(
    shared: _Soak, client: int, rng: random.Random, words: dict[str, str], gone: list[str]
) -> None:
    began = time.monotonic()
    question = _question(shared, rng, words, gone)
    if rng.random() < 0.5:
        asked = shared.service.ask(question)
        _check(shared, "asked as a stream", began, asked.status, asked.text)
        if asked.status == 200 and asked.answer is None:
            shared.failures.append(f"a stream without an answer: {asked.text[-300:]}")
    else:
        reply = shared.service.request("POST", f"/api/banks/{BANK}/ask", {"question": question})
        _check(shared, "asked", began, reply.status, reply.body.decode())


def _search(
    shared: _Soak, client: int, rng: random.Random, words: dict[str, str], gone: list[str]
) -> None:
    began = time.monotonic()
    body = {"query": _question(shared, rng, words, gone), "top_k": 10}
    reply = shared.service.request("POST", f"/api/banks/{BANK}/search", body)
    _check(shared, "searched", began, reply.status, reply.body.decode())


def _question(shared: _Soak, rng: random.Random, words: dict[str, str], gone: list[str]) -> str:
    """About the world, or what this client has added or deleted; the word itself stays out."""
    asked = [*words.values(), *gone]
    if asked and rng.random() < 0.4:
        return f"When was {rng.choice(asked)[2:]} born?"
    return rng.choice(shared.workload.questions)


def _store(
    shared: _Soak, client: int, rng: random.Random, words: dict[str, str], gone: list[str]
) -> None:
    name, word = f"soak-{client}-{rng.randrange(20)}", f"Zq{rng.getrandbits(40):010x}"
    before = words.get(name)
    reply = shared.service.put(name, f"{word} was born in {rng.randrange(1800, 2000)}.")
    _check(shared, "updated" if before else "added", 0.0, reply.status, "", (200, 201))
    if reply.status in (200, 201):
        words[name] = word
        if before is not None:
            gone.append(before)
            shared.dead[before] = time.monotonic()


def _delete(
    shared: _Soak, client: int, rng: random.Random, words: dict[str, str], gone: list[str]
) -> None:
    name = rng.choice(sorted(words))
    reply = shared.service.request("DELETE", f"/api/banks/{BANK}/documents/{name}")
    _check(shared, "deleted", 0.0, reply.status, "")
    if reply.status == 200:
        gone.append(words.pop(name))
        shared.dead[gone[-1]] = time.monotonic()


def _check(
    shared: _Soak,
    what: str,
    began: float,
    status: int,
    text: str,
    expected: Sequence[int] = (200,),
) -> None:
    """Count a request, and look for words that were deleted before it began."""
    if status == 429:
        shared.counts["refused with 429"] += 1
        time.sleep(0.1)
        return
    shared.counts[what] += 1
    if status not in expected:
        shared.failures.append(f"{what}: {status} {text[:300]}")
    for word in set(_SECRET.findall(text)):
        shared.counts["texts of clients shown"] += 1
        if shared.dead.get(word, began) < began:
            shared.failures.append(f"{what}: shows {word}, which was deleted before")
