"""`msa bench`: how fast routing, encoding and asking are here, as ratios within one run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from msa.cli import output
from msa.cli.options import DeviceOption, JsonOption, ModelOption, load_model, register
from msa.errors import InputError

if TYPE_CHECKING:
    from msa.benchmarks.report import Report

app = typer.Typer(
    name="bench",
    help="Measure speed on this machine: ratios within one run, and cost against memory size.",
    epilog="Example: msa bench routing --quick",
    rich_markup_mode="rich",
)

SizesOption = Annotated[
    str | None,
    typer.Option(
        "--sizes",
        metavar="LIST",
        help="Tokens of the memories, as 1M,10M.",
        show_default=False,
    ),
]
QuickOption = Annotated[bool, typer.Option("--quick", help="Small sizes, a run of seconds.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, metavar="N", help="Threads of the CPU.", show_default=False),
]
RepeatsOption = Annotated[
    int, typer.Option("--repeats", min=1, metavar="N", help="Runs of each; medians are shown.")
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Of all random numbers.")]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Write JSON, plot and a page (bench.md) into this folder.",
        show_default=False,
    ),
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", metavar="NAME", help="Of the routing keys: bfloat16 or float32.")
]


@app.callback(invoke_without_command=True)
def _bench(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def routing(
    sizes: SizesOption = None,
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="LIST", help="Of the keys: bfloat16, float32 or both."),
    ] = "bfloat16,float32",
    quick: QuickOption = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    repeats: RepeatsOption = 7,
    seed: SeedOption = 0,
    folder: OutputOption = None,
    json: JsonOption = False,
) -> None:
    """Routing in one layer of the 4B configuration.

    Beside it: Eq. 2 written per head with repeated keys, the time to read the keys from memory
    once, and FAISS's flat index over as many vectors.
    """
    tokens = _sizes(sizes, quick, "64k,256k", "1M,2M,5M,10M")
    names = _dtypes(dtype)
    place = _prepare(device, threads)
    from msa.benchmarks.routing import routing as measure

    def run(note: Callable[[str], None]) -> Report:
        return measure(tokens, dtypes=names, device=place, repeats=repeats, seed=seed, note=note)

    _show("Routing", run, folder, json)


def encoding(
    model: ModelOption = None,
    documents: Annotated[
        int, typer.Option(min=1, metavar="N", help="Documents, of random tokens.")
    ] = 400,
    batch_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of a batch, padding included.")
    ] = 16384,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Measure it under torch.compile, too.")
    ] = False,
    quick: QuickOption = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    repeats: RepeatsOption = 5,
    seed: SeedOption = 0,
    folder: OutputOption = None,
    json: JsonOption = False,
) -> None:
    """Encoding beside the plain backbone's forward: same weights, same batches."""
    _prepare(device, threads)
    loaded = load_model(model, device)
    from msa.benchmarks.encoding import encoding as measure

    def run(note: Callable[[str], None]) -> Report:
        return measure(
            loaded.model,
            loaded.tokenizer,
            name=_name(model),
            documents=min(documents, 40) if quick else documents,
            longest=128 if quick else 512,
            batch_tokens=batch_tokens,
            compiled=compiled,
            repeats=min(repeats, 3) if quick else repeats,
            seed=seed,
            note=note,
        )

    _show("Encoding", run, folder, json)


def asking(
    model: ModelOption = None,
    sizes: SizesOption = None,
    dtype: DtypeOption = "float32",
    quick: QuickOption = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    repeats: RepeatsOption = 7,
    seed: SeedOption = 0,
    folder: OutputOption = None,
    json: JsonOption = False,
) -> None:
    """A question's routing, prefill and decoding against the size of the memory.

    Routing should grow as the memory does, generation not at all. The memory is made of random
    states in the model's shapes.
    """
    tokens = _sizes(sizes, quick, "16k,64k", "100k,300k,1M,3M,10M")
    (name,) = _dtypes(dtype, most=1)
    _prepare(device, threads)
    loaded = load_model(model, device)
    from msa.benchmarks.asking import asking as measure

    def run(note: Callable[[str], None]) -> Report:
        return measure(
            loaded.model,
            tokens,
            name=_name(model),
            dtype=name,
            repeats=min(repeats, 3) if quick else repeats,
            seed=seed,
            note=note,
        )

    _show("Asking", run, folder, json)


def scale(
    sizes: SizesOption = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Layers built for prefill and decoding (even; the rest is scaled): 2 on a CPU, "
            "36 on a GPU; 0 for none.",
            show_default=False,
        ),
    ] = None,
    routing_layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Layers whose routing keys are held at once; as many as fit if not given.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = "bfloat16",
    quick: QuickOption = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    repeats: RepeatsOption = 5,
    seed: SeedOption = 0,
    folder: OutputOption = None,
    json: JsonOption = False,
) -> None:
    """The 4B configuration with random states and weights: routing, prefill, decoding, memory.

    36 layers of which 18 route, 8 key-value heads of 128, 32 query heads, chunks of 64 tokens.
    Sizes are 1M and 10M on a CPU, up to 100M on a GPU.
    """
    place = _prepare(device, threads)
    gpu = place != "cpu"
    tokens = _sizes(sizes, quick, "64k,256k", "1M,10M,100M" if gpu else "1M,10M")
    (name,) = _dtypes(dtype, most=1)
    built = layers if layers is not None else 0 if quick else 36 if gpu else 2
    from msa.benchmarks.scale import scale as measure

    def run(note: Callable[[str], None]) -> Report:
        return measure(
            tokens,
            device=place,
            layers=built,
            routing_layers=routing_layers,
            key_dtype=name,
            weight_dtype="bfloat16" if gpu else "float32",
            repeats=min(repeats, 3) if quick else repeats,
            seed=seed,
            note=note,
        )

    _show("The 4B configuration", run, folder, json)


for command, example in (
    (routing, "msa bench routing --sizes 1M,10M --threads 2"),
    (encoding, "msa bench encoding --compile"),
    (asking, "msa bench asking --sizes 1M,10M --output results/"),
    (scale, "msa bench scale --device cuda --sizes 1M,10M,100M"),
):
    register(app, command, example)


def _sizes(given: str | None, quick: bool, small: str, usual: str) -> list[int]:
    from msa.benchmarks.sizes import parse_size

    text = given or (small if quick else usual)
    try:
        return sorted({parse_size(word) for word in text.split(",")})
    except InputError as error:
        raise typer.BadParameter(str(error), param_hint="--sizes") from None


def _dtypes(given: str, most: int = 2) -> list[str]:
    names = list(dict.fromkeys(word.strip() for word in given.split(",")))
    if not set(names) <= {"bfloat16", "float32"} or len(names) > most:
        wanted = "bfloat16 or float32" + (", or both with a comma" if most > 1 else "")
        raise typer.BadParameter(f"{given!r}: expected {wanted}", param_hint="--dtype")
    return names


def _prepare(device: str | None, threads: int | None) -> str:
    """The device's name, after setting the threads.

    Raises:
        InputError: there is no such device.
    """
    with output.progress("Starting"):
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"device {name!r} cannot be used: {reason}") from error
        return name


def _name(model: str | None) -> str:
    return "default model" if model is None else Path(model).name


def _show(
    title: str, run: Callable[[Callable[[str], None]], Report], folder: Path | None, json: bool
) -> None:
    """Measure, write and print."""
    with output.progress(title) as bar:
        report = run(lambda text: bar.set(title, 0.0, text))
    report.command = "msa " + shlex.join(sys.argv[1:])
    written = report.write(folder) if folder else []
    if json:
        output.print_json(report)
        return
    console = output.stdout()
    head, *lines = report.table()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for i, cell in enumerate(head):
        table.add_column(Text(cell), justify="right" if i else "left", no_wrap=True)
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    console.print(table)
    if fits := report.fits():
        console.print(f"Cost ~ tokens^p: {fits}", soft_wrap=True)
    for text in report.notes:
        console.print(text, soft_wrap=True)
    facts = "; ".join(
        f"{k} {v}" for k, v in {**report.settings, **report.machine}.items() if v != ""
    )
    console.print(facts, soft_wrap=True)
    for path in written:
        console.print(f"Written: {path}", soft_wrap=True)
