"""Documents lost, and deleted ones revived, when threads and processes write to one bank at once.

    python benchmarks/lost_documents.py [--trials 100] [--seed 0] [--output docs/results]

Three kinds of trial, each over a new bank:

- delete while compact: threads delete while another compacts;
- six threads add: documents of their own, one bank;
- processes: two processes with two threads each take turns at the bank (one that finds it locked
  tries again); they add, update, delete and compact, and one of them is killed in the middle.

A document is lost when its add or update was acknowledged and the bank does not hold it so; it is
revived when its delete was acknowledged and the bank holds it. What was under way at a kill may
have happened or not. A trial also fails when `verify` finds something. The bar is 0 everywhere.
Writes lost_documents.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from msa import Document, MemoryBank, load
from msa.errors import BankLockedError

WORDS = ("river", "stone", "lamp", "coat", "seven", "garden", "window", "iron", "letter")


@dataclass
class Count:
    """What was found in the trials of one kind."""

    trials: int = 0
    acknowledged: int = 0
    lost: int = 0
    revived: int = 0
    problems: list[str] = field(default_factory=list)


def document(name: str, version: int) -> Document:
    rng = random.Random(f"{name}/{version}")
    return Document(name, " ".join(rng.choices(WORDS, k=8)), metadata={"version": version})


def together(*tasks) -> None:
    """Run functions in threads that start at the same time; raises what one of them raised."""
    start, errors = threading.Barrier(len(tasks)), []

    def run(task) -> None:
        try:
            start.wait()
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def delete_while_compact(path: Path, checkpoint, rng: random.Random) -> tuple[dict, set]:
    with MemoryBank.create(path, checkpoint) as bank:
        names = [f"{i}-{j}" for i in range(4) for j in range(3)]
        for i in range(4):
            bank.add(document(name, 0) for name in names[3 * i : 3 * i + 3])
        gone = rng.sample(names, 4)
        together(bank.compact, *(lambda name=name: bank.delete(name) for name in gone))
    return {name: 0 for name in names if name not in gone}, set()


def six_threads_add(path: Path, checkpoint, rng: random.Random) -> tuple[dict, set]:
    names = {i: [f"{i}-{j}" for j in range(rng.randint(1, 5))] for i in range(6)}
    with MemoryBank.create(path, checkpoint) as bank:
        tasks = [
            lambda some=some: bank.add(document(name, 0) for name in some)
            for some in names.values()
        ]
        together(*tasks)
    return {name: 0 for some in names.values() for name in some}, set()


def writer(path: Path, checkpoint, who: int, seed: int, said) -> None:
    """Change the bank in two threads, again and again; tell what begins and what is done."""
    torch.set_num_threads(1)
    lock = threading.Lock()

    def tell(word: str, thread: int, name: str, version: int | None) -> None:
        with lock:
            said.send_bytes(json.dumps([word, who, thread, name, version]).encode())

    def changes(bank: MemoryBank, thread: int, rng: random.Random) -> None:
        mine = f"{who}-{thread}"
        for _ in range(3):
            name, version = f"{mine}-{rng.randint(0, 3)}", rng.randint(0, 99)
            held = name in bank
            what = rng.choice(["add", "add", "delete", "compact"])
            if what == "compact":
                bank.compact()
            elif what == "delete" and held:
                tell("begin", thread, name, None)
                bank.delete(name)
                tell("done", thread, name, None)
            else:
                tell("begin", thread, name, version)
                bank.add([document(name, version)], on_duplicate="update")
                tell("done", thread, name, version)

    for turn in range(4):
        while True:
            try:
                bank = MemoryBank.open(path, checkpoint)
                break
            except BankLockedError:
                time.sleep(0.005)
        with bank:
            seeds = [random.Random(f"{seed}/{who}/{thread}/{turn}") for thread in range(2)]
            together(*(partial(changes, bank, t, own) for t, own in enumerate(seeds)))


def processes(path: Path, checkpoint, rng: random.Random) -> tuple[dict, set]:
    MemoryBank.create(path, checkpoint).close()
    context = multiprocessing.get_context("fork")  # the model is there already
    started, seed = [], rng.randint(0, 10**9)
    for who in range(2):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=writer, args=(path, checkpoint, who, seed, send))
        process.start()
        send.close()
        started.append((process, receive))
    time.sleep(rng.uniform(0.05, 1.0))
    started[0][0].kill()
    messages = []
    for process, receive in started:
        while True:
            try:
                messages.append(json.loads(receive.recv_bytes()))
            except (EOFError, OSError, ValueError):
                break
        process.join()
    if started[1][0].exitcode:
        raise RuntimeError(f"a writer ended with {started[1][0].exitcode}")
    held, under_way = {}, {}
    for word, who, thread, name, version in messages:
        if word == "begin":
            under_way[who, thread] = name
        else:
            del under_way[who, thread]
            held[name] = version
    return held, set(under_way.values())


KINDS = {
    "delete while compact": delete_while_compact,
    "six threads add": six_threads_add,
    "processes": processes,
}


def judge(path: Path, checkpoint, expected: dict, open_ended: set, count: Count) -> None:
    """Compare a bank with what was acknowledged: name -> version, None when it was deleted."""
    with MemoryBank.open(path, checkpoint) as bank:
        report = bank.verify()
        found = {s.document.id: s.document.metadata["version"] for s in bank.documents()}
    count.trials += 1
    count.acknowledged += len(expected)
    count.problems += [*report.problems, *(f"orphan {name}" for name in report.orphans)]
    for name in (expected.keys() | found.keys()) - open_ended:
        wanted = expected.get(name)
        if wanted is None and name in found:
            count.revived += 1
        elif wanted is not None and found.get(name) != wanted:
            count.lost += 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Documents lost and revived.")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = load("worlds")
    counts = {}
    for kind, trial in KINDS.items():
        count = counts[kind] = Count()
        for number in range(given.trials):
            with tempfile.TemporaryDirectory() as room:
                path, rng = Path(room, "bank"), random.Random(f"{given.seed}/{kind}/{number}")
                expected, open_ended = trial(path, checkpoint, rng)
                judge(path, checkpoint, expected, open_ended, count)
        print(f"{kind}: {count}", flush=True)
    if given.output:
        (given.output / "lost_documents.md").write_text(page(counts, given), encoding="utf-8")
    if any(c.lost or c.revived or c.problems for c in counts.values()):
        raise SystemExit("documents were lost or revived")


def page(counts: dict[str, Count], given: argparse.Namespace) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    rows = [
        f"| {kind} | {c.trials} | {c.acknowledged} | {c.lost} | {c.revived} | {len(c.problems)} |"
        for kind, c in counts.items()
    ]
    return "\n".join(
        [
            "# Documents lost and revived",
            "",
            f"`python benchmarks/lost_documents.py --trials {given.trials} --seed {given.seed}`, "
            f"commit {commit.stdout.strip()}, {platform.machine()}, {platform.system()}.",
            "",
            "| trial | trials | acknowledged | lost | revived | problems that `verify` finds |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
