"""How `msa serve` bears load: each measures a real service in a process of its own.

    python benchmarks/serving.py concurrency [--clients 64] [--output docs/results]
    python benchmarks/serving.py indexing [--job-documents 2000]
    python benchmarks/serving.py kills [--kills 50]
    python benchmarks/serving.py soak [--minutes 30] [--clients 16]
    python benchmarks/serving.py hostile [--requests 2000]
    python benchmarks/serving.py start [--documents 12000]

`concurrency`: questions of many clients at once beside the same ones one after the other, whose
answers have to be equal. `indexing`: questions while an index job runs, and without it. `kills`:
kill -9 while documents are sent; what was acknowledged has to be there. `soak`: clients that ask,
search, add, update and delete; memory has to stay, and no deleted text may come back. `hostile`:
broken requests, path tricks, floods, other tenants' ids, bombs. `start`: until the first answer.

By default the small model over a generated world, so that all of it runs anywhere. --set FOLDER
takes documents of a question set in its place, and its dev questions (`msa eval` describes such
folders). The exit code is 1 if something happened that must not; figures beside a bar are for
people to compare.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from measuring import hostile as attacks
from measuring import serving as loads
from measuring.service import BANK, Service, Workload, real_questions, world
from measuring.serving import Finding
from measuring.serving_page import section, write
from msa.errors import InputError, MSAError
from msa.evaluation.provenance import provenance


def main(words: Sequence[str] | None = None) -> None:
    args = arguments(words)
    try:
        with tempfile.TemporaryDirectory(prefix="msa-serving-") as folder:
            finding: Finding = args.measure(args, Path(folder))
        source = provenance(args.seed, model=args.model)
        if args.json:
            print(json.dumps({**asdict(finding), **source}))
        else:
            print(section(finding, source))
        if args.output is not None:
            note(f"Written: {write(args.output, finding, source)}")
    except MSAError as error:
        sys.exit(f"error: {error}")
    if finding.failures:
        sys.exit(1)


def concurrency(args: argparse.Namespace, folder: Path) -> Finding:
    questions = args.asks or args.clients
    environment = {"MSA_MAX_WAITING": str(args.clients), "MSA_QUEUE_SECONDS": "120"}
    with filled(args, folder, questions, environment) as (service, workload):
        return loads.concurrency(service, workload.questions, args.clients, note)


def indexing(args: argparse.Namespace, folder: Path) -> Finding:
    more = world(args.seed + 1, args.job_documents, 0).documents
    rows = [{**row, "id": f"job-{row['id']}"} for row in more]
    with filled(args, folder, args.asks) as (service, workload):
        return loads.indexing(service, workload.questions, rows, args.clients, note)


def kills(args: argparse.Namespace, folder: Path) -> Finding:
    return loads.kills(empty(args, folder), args.kills, args.seed, note)


def soak(args: argparse.Namespace, folder: Path) -> Finding:
    with filled(args, folder, args.asks) as (service, workload):
        return loads.soak(service, workload, args.clients, args.minutes, args.seed, note)


def hostile(args: argparse.Namespace, folder: Path) -> Finding:
    service = empty(args, folder)
    service.banks = {BANK: folder / "bank", attacks.SECRET_BANK: folder / "secret"}
    service.keys = attacks.KEYS
    service.key = attacks.OWNER
    service.environment = {"MSA_BODY_SECONDS": "3"}
    with service:
        return attacks.hostile(service, args.requests, args.seed, note)


def start(args: argparse.Namespace, folder: Path) -> Finding:
    with filled(args, folder, 1) as (service, workload):
        pass
    return loads.start(service, workload.questions[0], args.repeats, note)


@contextlib.contextmanager
def filled(
    args: argparse.Namespace,
    folder: Path,
    questions: int,
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[Service, Workload]]:
    """A running service with documents in its bank, and questions to ask.

    Args:
        args: of the command line.
        folder: for all files.
        questions: how many.
        environment: settings of the service.
    """
    if args.set is None:
        workload = world(args.seed, args.documents, questions)
    else:
        workload = real_questions(args.set, args.documents, questions, args.seed)
    service = empty(args, folder)
    service.environment = environment or {}
    with service:
        note(f"a bank of {len(workload.documents)} documents")
        job = service.finished(service.index(workload.documents))
        if job["status"] != "done" or job["failed"]:
            raise InputError(f"the bank cannot be filled: {job['message']} {job['failed']}")
        yield service, workload


def empty(args: argparse.Namespace, folder: Path) -> Service:
    """A service, not started, with a bank that is not there yet."""
    return Service(folder, {BANK: folder / "bank"}, args.model)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return int(text)


def minutes(text: str) -> float:
    if not 0 < float(text) < 1e6:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0")
    return float(text)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measures = (concurrency, indexing, kills, soak, hostile, start)
    names = "|".join(measure.__name__ for measure in measures)
    commands = parser.add_subparsers(required=True, metavar=names)
    for measure in measures:
        one = commands.add_parser(measure.__name__)
        one.set_defaults(measure=measure)
        one.add_argument("--model", default="worlds", help="a name, folder or Hub id")
        one.add_argument("--seed", type=int, default=7, help="of all random numbers")
        one.add_argument("--output", type=Path, metavar="DIR", help="write serving.md there")
        one.add_argument("--json", action="store_true", help="print one line of JSON")
        if measure not in (kills, hostile):
            size = 12_000 if measure is start else 1_000
            one.add_argument("--documents", type=positive, default=size, help="in the bank")
            one.add_argument("--set", type=Path, metavar="FOLDER", help="in place of a world")
        if measure in (concurrency, indexing, soak):
            clients = {concurrency: 64, indexing: 1, soak: 16}[measure]
            one.add_argument("--clients", type=positive, default=clients, help="at once")
            asks = None if measure is concurrency else 100
            one.add_argument("--asks", type=positive, default=asks, help="questions to ask")
        if measure is indexing:
            one.add_argument("--job-documents", type=positive, default=2_000, help="to index")
        if measure is kills:
            one.add_argument("--kills", type=positive, default=50, help="of the service")
        if measure is soak:
            one.add_argument("--minutes", type=minutes, default=30.0, help="of it")
        if measure is hostile:
            one.add_argument("--requests", type=positive, default=2_000, help="at least")
        if measure is start:
            one.add_argument("--repeats", type=positive, default=3, help="starts")
    return parser.parse_args(words)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the service is ended, too
    main()
