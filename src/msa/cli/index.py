"""`msa index`: files and folders into a bank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from msa.cli import output
from msa.cli.options import (
    BankOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    RayOption,
    load_model,
    open_bank,
)
from msa.errors import BankMismatchError, BankNotFoundError, ConfigError
from msa.text.loaders import (
    FieldNames,
    LoadedDocument,
    LoadFailure,
    load_documents,
    total_bytes,
)

if TYPE_CHECKING:
    from msa.evaluation.agreement import Agreement
    from msa.memory.bank import MemoryBank
    from msa.memory.distributed.encoding_pool import EncodingPool
    from msa.memory.store.reports import AddProgress, AddReport
    from msa.types import Document

SHOWN_REASONS = 20
FLOATS = ("float32", "bfloat16", "float16")
PRECISIONS = (*FLOATS, "int8", "fp8", "int4")


@dataclass(frozen=True, slots=True)
class _Work:
    """What the command line says of an `add`."""

    bank: Path
    model: str | None
    device: str | None
    on_duplicate: Any
    batch_tokens: int
    precision: str | None
    workers: int | None
    ray: str | None


class Intake:
    """Documents on their way into a bank, and everything that fell by the wayside.

    Attributes:
        failed, ignored: what gave no document, and why.
        bar: shows the bytes read, from when it is set.
    """

    def __init__(self, paths: Sequence[Path], fields: FieldNames) -> None:
        self.total_bytes = total_bytes(paths)
        self.failed: list[LoadFailure] = []
        self.ignored: list[LoadFailure] = []
        self.bar: output.ProgressBar | None = None
        self._unseen_bytes = 0
        self._loaded = load_documents(paths, fields=fields, on_bytes=self._read)
        self._waiting: list[LoadedDocument] = []

    def has_documents(self) -> bool:
        """True if there is at least one; reads no further than that one."""
        if not self._waiting:
            self._waiting = [loaded for loaded in [next(self._usable(), None)] if loaded]
        return bool(self._waiting)

    def documents(self) -> Iterator[Document]:
        """The documents, read as they are asked for."""
        waiting, self._waiting = self._waiting, []
        for loaded in chain(waiting, self._usable()):
            yield loaded.document

    def _usable(self) -> Iterator[LoadedDocument]:
        for loaded in self._loaded:
            if isinstance(loaded, LoadedDocument):
                yield loaded
            else:
                (self.ignored if loaded.ignored else self.failed).append(loaded)

    def _read(self, num_bytes: int) -> None:
        self._unseen_bytes += num_bytes
        if self.bar is not None:
            self.bar.advance(self._unseen_bytes)
            self._unseen_bytes = 0


def index(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATHS...", help="Files and folders; folders are read whole."),
    ],
    bank: BankOption,
    model: ModelOption = None,
    update: Annotated[
        bool,
        typer.Option(
            "--update/--skip",
            help="For a known id with another text: store the new one, or keep the old (failed).",
        ),
    ] = True,
    id_field: Annotated[
        str, typer.Option(metavar="NAME", help="JSONL field or table column of the id.")
    ] = "id",
    text_field: Annotated[
        str, typer.Option(metavar="NAME", help="JSONL field or table column of the text.")
    ] = "text",
    title_field: Annotated[
        str, typer.Option(metavar="NAME", help="JSONL field or table column of the title.")
    ] = "title",
    batch_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens that are encoded together.")
    ] = 16384,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of a new bank: float32, bfloat16 or float16; or int8, fp8 or int4 for the "
            "content (routing keys in bfloat16). What it changes is measured. [default: the "
            "model's]",
            show_default=False,
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if anything at all failed.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Encode in so many processes (extra 'distributed')."),
    ] = None,
    ray: RayOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Read files and folders into a memory bank, which is made if it is not there.

    Reads txt, md, jsonl, csv and tsv (also .gz), and pdf, html and docx with the extra
    "documents". Long texts are split into linked parts. Run it again after files have changed:
    unchanged documents cost nothing, changed ones are encoded anew. Exits with 1 if no document
    could be stored.

    With --workers, or --ray and a cluster, windows of documents are encoded by several processes;
    the bank must lie where all of them see it.
    """
    intake = Intake(paths, FieldNames(id=id_field, text=text_field, title=title_field))
    work = _Work(
        bank, model, device, "update" if update else "skip", batch_tokens, precision, workers, ray
    )
    report = _add(intake, work)
    agreement = _agreement(work) if precision and report and report.added else None
    if json:
        measured = {} if agreement is None else {"agreement": asdict(agreement)}
        output.print_json({**_as_json(bank, intake, report), **measured})
    else:
        _print_report(bank, intake, report)
        if agreement is not None:
            output.stdout().print(
                f"Precision {agreement.precision}: {100 * agreement.selected:.2f}% of the "
                "documents that the model's own precision selects are selected "
                f"({output.plural(agreement.questions, 'question')} to "
                f"{output.plural(agreement.documents, 'document')} of the bank)",
                soft_wrap=True,
            )
    if report is None or not report.added + report.updated + report.unchanged:
        raise typer.Exit(1)
    if strict and (report.failed or intake.failed):
        raise typer.Exit(1)


def open_or_create(
    path: Path, model: str | None, device: str | None, precision: str | None = None
) -> MemoryBank:
    """A bank to write to; made, in this precision, if the folder is not there or empty."""
    if precision is not None and precision not in PRECISIONS:
        raise ConfigError(f"--precision {precision}: expected one of {', '.join(PRECISIONS)}")
    try:
        # what is wrong with it is said before a model is loaded
        with open_bank(path) as found:
            made = found.manifest
        exists = True
        if precision not in (None, made.content_dtype):
            raise BankMismatchError(
                f"Bank '{path}' was made with precision {made.content_dtype}, not {precision}. "
                "Leave --precision out, or index into a new folder"
            )
    except BankNotFoundError:
        exists = False
    checkpoint = load_model(model, device)
    from msa.memory.bank import MemoryBank

    if exists:
        return MemoryBank.open(path, checkpoint)
    import torch

    packed = None if precision in FLOATS else precision
    dtype = "bfloat16" if packed else precision
    return MemoryBank.create(
        path,
        checkpoint,
        dtype=None if dtype is None else getattr(torch, dtype),
        content_dtype=packed,
    )


def _agreement(work: _Work) -> Agreement:
    """What the bank's precision changes, measured on a sample of it."""
    from msa.evaluation.agreement import selection_agreement

    checkpoint = load_model(work.model, work.device)
    from msa.memory.bank import MemoryBank

    with MemoryBank.open(work.bank, checkpoint, read_only=True) as memory:
        return selection_agreement(memory)


def _add(intake: Intake, work: _Work) -> AddReport | None:
    """Store the documents; None if there are none.

    What is stored when the user interrupts stays.
    """
    if not intake.has_documents():
        return None
    with (
        open_or_create(work.bank, work.model, work.device, work.precision) as memory,
        _encoding_pool(memory, work) as pool,
        _progress(intake) as show,
    ):
        try:
            return memory.add(
                intake.documents(),
                on_duplicate=work.on_duplicate,
                batch_tokens=work.batch_tokens,
                progress=show,
                pool=pool,
            )
        except KeyboardInterrupt:
            raise output.Interrupted(
                f"Interrupted. The bank holds {output.plural(memory.info().num_ids, 'document')}; "
                "run the same command again to go on."
            ) from None


def _encoding_pool(
    bank: MemoryBank, work: _Work
) -> contextlib.AbstractContextManager[EncodingPool | None]:
    """Workers, if there are to be any."""
    if work.workers is None and work.ray is None:
        return contextlib.nullcontext()
    from msa.memory.distributed.encoding_pool import EncodingPool

    return EncodingPool(bank, work.workers or 1, address=work.ray)


@contextlib.contextmanager
def _progress(intake: Intake) -> Iterator[Callable[[AddProgress], None]]:
    with output.progress("Indexing", intake.total_bytes) as bar:
        intake.bar = bar

        def show(progress: AddProgress) -> None:
            speed = progress.tokens / max(progress.seconds, 1e-9)
            bar.advance(
                note=f"{output.plural(progress.documents, 'document')}, "
                f"{output.number(speed)} tokens/s"
            )

        yield show


def _failures(intake: Intake, report: AddReport | None) -> list[tuple[str, str]]:
    """(source, reason) of everything that failed, in files first, then in the bank."""
    found = [(failure.source, failure.reason) for failure in intake.failed]
    return found + list(report.failed if report else ())


def _as_json(bank: Path, intake: Intake, report: AddReport | None) -> dict[str, Any]:
    failed = _failures(intake, report)
    return {
        "bank": bank,
        "added": report.added if report else 0,
        "unchanged": report.unchanged if report else 0,
        "updated": report.updated if report else 0,
        "failed": len(failed),
        "ignored": len(intake.ignored),
        "parts": report.parts if report else 0,
        "tokens": report.tokens if report else 0,
        "seconds": report.seconds if report else 0.0,
        "failures": [{"source": source, "reason": reason} for source, reason in failed],
        "ignored_files": [{"source": f.source, "reason": f.reason} for f in intake.ignored],
    }


def _print_report(bank: Path, intake: Intake, report: AddReport | None) -> None:
    console = output.stdout()
    failed = _failures(intake, report)
    counts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    counts.add_column()
    counts.add_column(justify="right")
    for name, count in (
        ("added", report.added if report else 0),
        ("unchanged", report.unchanged if report else 0),
        ("updated", report.updated if report else 0),
        ("failed", len(failed)),
        ("ignored", len(intake.ignored)),
    ):
        counts.add_row(name, output.number(count))
    console.print(counts)
    for title, reasons in (
        ("Failed", failed),
        ("Ignored", [(f.source, f.reason) for f in intake.ignored]),
    ):
        if reasons:
            console.print(f"\n{title}:", style="bold")
        for source, reason in reasons[:SHOWN_REASONS]:
            console.print(f"  {output.one_line(source)}: {output.one_line(reason)}", soft_wrap=True)
        if len(reasons) > SHOWN_REASONS:
            rest = output.number(len(reasons) - SHOWN_REASONS)
            console.print(f"  and {rest} more; --json lists them all")
    if report is None:
        output.print_error(f"no document found; {bank} was not touched")
    elif report.tokens:
        speed = output.number(report.tokens / max(report.seconds, 1e-9))
        console.print(
            f"\n{output.plural(report.tokens, 'token')} encoded in {report.seconds:.1f} s "
            f"({speed} tokens/s) into {bank}",
            soft_wrap=True,
        )
