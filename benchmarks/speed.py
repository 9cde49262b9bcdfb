"""Speed on this machine: ratios within one run, and cost against the size of the memory.

    python benchmarks/speed.py routing [--sizes 1M,10M] [--threads 2] [--output docs/results]
    python benchmarks/speed.py encoding [--compile]
    python benchmarks/speed.py asking [--model MODEL]
    python benchmarks/speed.py scale [--device cuda] [--sizes 1M,10M,100M]

`routing`: one layer of the 4B configuration, beside Eq. 2 written per head with repeated keys, the
time to read the keys once, and FAISS's flat index over as many vectors. `encoding`: beside the
plain backbone's forward with the same weights and batches. `asking`: a question's routing, prefill
and decoding against the size of the memory (random states in the model's shapes). `scale`: the 4B
configuration with random states and weights: routing, prefill, decoding, memory.

With --output writes bench_KIND.json, a plot and the page bench.md into a folder.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from measuring.report import Report, section
from measuring.sizes import parse_size
from msa.errors import InputError, MSAError
from msa.model.checkpoint import Checkpoint
from msa.model.loading import load


def main(words: Sequence[str] | None = None) -> None:
    args = arguments(words)
    try:
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(args.device)
        if args.threads:
            torch.set_num_threads(args.threads)
        report: Report = args.measure(args)
        report.command = "python benchmarks/speed.py " + shlex.join(words or sys.argv[1:])
        written = report.write(args.output) if args.output else []
    except MSAError as error:
        sys.exit(f"error: {error}")
    if args.json:
        print(json.dumps(asdict(report)))
        return
    print(section(report, has_plot=False))
    for path in written:
        print(f"Written: {path}")


def routing(args: argparse.Namespace) -> Report:
    from measuring.routing import routing as measure

    sizes = tokens(args, "64k,256k", "1M,2M,5M,10M")
    common = {"repeats": args.repeats or 7, "seed": args.seed, "note": note}
    return measure(sizes, dtypes=args.dtypes, device=args.device, **common)


def encoding(args: argparse.Namespace) -> Report:
    from measuring.encoding import encoding as measure

    checkpoint = loaded(args)
    return measure(
        checkpoint.model,
        checkpoint.tokenizer,
        name=checkpoint.name,
        documents=min(args.documents, 40) if args.quick else args.documents,
        longest=128 if args.quick else 512,
        batch_tokens=args.batch_tokens,
        compiled=args.compile,
        repeats=repeats(args),
        seed=args.seed,
        note=note,
    )


def asking(args: argparse.Namespace) -> Report:
    from measuring.asking import asking as measure

    sizes = tokens(args, "16k,64k", "100k,300k,1M,3M,10M")
    checkpoint = loaded(args)
    common = {"repeats": repeats(args), "seed": args.seed, "note": note}
    return measure(checkpoint.model, sizes, name=checkpoint.name, dtype=args.dtype, **common)


def scale(args: argparse.Namespace) -> Report:
    from measuring.scale import scale as measure

    gpu = torch.device(args.device).type != "cpu"
    built = 0 if args.quick else 36 if gpu else 2
    return measure(
        tokens(args, "64k,256k", "1M,10M,100M" if gpu else "1M,10M"),
        device=args.device,
        layers=built if args.layers is None else args.layers,
        routing_layers=args.routing_layers,
        key_dtype=args.dtype,
        weight_dtype="bfloat16" if gpu else "float32",
        repeats=repeats(args),
        seed=args.seed,
        note=note,
    )


def loaded(args: argparse.Namespace) -> Checkpoint:
    """The model to measure: the one given, or the default one."""
    return load(args.model, device=args.device)


def check_device(name: str) -> None:
    """Refuse a device that is not there, in one line."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used: {reason}") from error


def tokens(args: argparse.Namespace, quick: str, usual: str) -> list[int]:
    """The sizes of the memories, in order."""
    text = args.sizes or (quick if args.quick else usual)
    return sorted({parse_size(word) for word in text.split(",")})


def repeats(args: argparse.Namespace) -> int:
    """How often each is measured: 5 times, or 3 if it must be quick."""
    wanted = args.repeats or 5
    return min(wanted, 3) if args.quick else wanted


def note(text: str) -> None:
    print(text, file=sys.stderr)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return int(text)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="routing|encoding|asking|scale")
    both = ["bfloat16", "float32"]
    for measure in (routing, encoding, asking, scale):
        one = commands.add_parser(measure.__name__)
        one.set_defaults(measure=measure)
        one.add_argument("--quick", action="store_true", help="small sizes, a run of seconds")
        one.add_argument("--device", help="a GPU where there is one, if not given")
        one.add_argument("--threads", type=positive, help="of the CPU")
        one.add_argument("--repeats", type=positive, help="of each; medians are shown")
        one.add_argument("--seed", type=int, default=0, help="of all random numbers")
        one.add_argument("--output", type=Path, metavar="DIR", help="write JSON, plot and page")
        one.add_argument("--json", action="store_true", help="print one line of JSON")
        if measure is not encoding:
            one.add_argument("--sizes", metavar="LIST", help="tokens of the memories, as 1M,10M")
        if measure in (encoding, asking):
            one.add_argument("--model", help="a name, folder or Hub id")
        if measure is routing:
            one.add_argument("--dtypes", nargs="+", choices=both, default=both, help="of the keys")
        if measure is asking:
            one.add_argument("--dtype", choices=both, default="float32", help="of the keys")
        if measure is scale:
            one.add_argument("--dtype", choices=both, default="bfloat16", help="of the keys")
            one.add_argument("--layers", type=int, help="built for prefill and decoding (even)")
            one.add_argument("--routing-layers", type=positive, help="whose keys are held at once")
        if measure is encoding:
            one.add_argument("--documents", type=positive, default=400, help="of random tokens")
            one.add_argument("--batch-tokens", type=positive, default=16384, help="with padding")
            one.add_argument("--compile", action="store_true", help="under torch.compile, too")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
