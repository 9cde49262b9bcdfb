"""`msa index`: files and folders into a bank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from os.path import exists
from pathlib import Path, PurePosixPath
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
    common_root,
    load_documents,
    path_below,
    total_bytes,
)

if TYPE_CHECKING:
    from msa.evaluation.agreement import Agreement
    from msa.memory.bank import MemoryBank
    from msa.memory.distributed.encoding_pool import EncodingPool
    from msa.memory.store.origins import Origin, Origins
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
    prune: bool


class Intake:
    """Documents on their way into a bank, and everything that fell by the wayside.

    Args:
        paths: files and folders.
        fields: see `load_documents`.
        root: the folder that ids start at.
        old: the origins of a bank that has documents of earlier versions, None for any other.

    Attributes:
        root: of `--root`.
        failed, ignored: what gave no document, and why.
        notes: (source, what was guessed to read it).
        gone: documents of the bank that these files gave once and give no more.
        pruned: whether those were deleted.
        bar: shows the bytes read, from when it is set.
    """

    def __init__(
        self, paths: Sequence[Path], fields: FieldNames, root: Path, old: Origins | None = None
    ) -> None:
        self.total_bytes = total_bytes(paths)
        self.root = root
        self.failed: list[LoadFailure] = []
        self.ignored: list[LoadFailure] = []
        self.notes: list[tuple[str, str]] = []
        self.gone: list[Origin] = []
        self.pruned = False
        self.bar: output.ProgressBar | None = None
        self._paths = paths
        self._old = old
        self._unseen_bytes = 0
        self._loaded = load_documents(
            paths,
            root=root,
            fields=fields,
            on_bytes=self._read,
            held_as=None if old is None else self._held_as,
        )
        self._waiting: list[LoadedDocument] = []
        self._ids: set[str] = set()
        self._files: set[str] = set()
        self._unrecorded: dict[Origin, bytes] = {}  # and their content
        self._old_files: set[tuple[str, str]] = set()  # origin, and the name in ids of its lines

    def has_documents(self) -> bool:
        """True if there is at least one; reads no further than that one."""
        if not self._waiting:
            self._waiting = [loaded for loaded in [next(self._usable(), None)] if loaded]
        return bool(self._waiting)

    def documents(self) -> Iterator[Document]:
        """The documents, read as they are asked for."""
        from msa.memory.ingest.pipeline import content_hash
        from msa.memory.store.origins import Origin

        waiting, self._waiting = self._waiting, []
        for loaded in chain(waiting, self._usable()):
            document = loaded.document
            self._ids.add(document.id)
            self._files.add(loaded.origin)
            self._unrecorded[Origin(document.id, loaded.origin)] = content_hash(document)
            yield document

    def record(self, origins: Origins) -> None:
        """Let the bank know where the documents came from that were read so far."""
        found, self._unrecorded = self._unrecorded, {}
        origins.record(found)

    def find_gone(self, origins: Origins) -> None:
        """See what the bank has of these files that they did not give, now that all are read.

        What could not be read gives no document, and none of its documents is gone.
        """
        for pair in self._old_files:
            origins.adopt_records(*pair)
        failed = {failure.origin for failure in self.failed if failure.origin is not None}
        if any(not name.strip("./") for name in failed):
            return  # a folder with all of them could not be read
        below = [origins.below(path_below(self.root, p)) for p in self._paths if exists(p)]
        self.gone = [
            origin
            for origin in dict.fromkeys(chain(*below))
            if origin.document not in self._ids
            and failed.isdisjoint([origin.path, *map(str, PurePosixPath(origin.path).parents)])
        ]

    def why_gone(self, origin: Origin) -> str:
        """What has become of a document, in a few words."""
        if origin.path in self._files:
            return f"not in {origin.path} any more"
        return f"{origin.path} is not there any more"

    def _held_as(self, path: str, old_id: str, document: Document | None) -> bool:
        """See `msa.text.loaders.HeldAs`."""
        from msa.memory.ingest.pipeline import content_hash

        assert self._old is not None
        if document is None:
            return self._old.held_as(path, old_id, None)
        self._old_files.add((path, old_id.rpartition(":")[0]))
        return self._old.held_as(path, old_id, content_hash(document))

    def _usable(self) -> Iterator[LoadedDocument]:
        for loaded in self._loaded:
            if isinstance(loaded, LoadedDocument):
                if loaded.note is not None:
                    self.notes.append((loaded.source, loaded.note))
                yield loaded
            else:
                (self.ignored if loaded.ignored else self.failed).append(loaded)

    def _read(self, num_bytes: int) -> None:
        self._unseen_bytes += num_bytes
        if self.bar is not None:
            self.bar.advance(self._unseen_bytes)
            self._unseen_bytes = 0


@contextlib.contextmanager
def _intake(
    paths: Sequence[Path], fields: FieldNames, bank: Path, root: Path | None
) -> Iterator[Intake]:
    """The documents of some files, by the root that the bank remembers or that is given."""
    try:
        opened = open_bank(bank)
    except BankNotFoundError:
        yield Intake(paths, fields, root or common_root(paths))
        return
    with opened:
        origins = opened.catalog.origins
        known = origins.root()
        if root is None and known is not None and not Path(known).is_dir():
            output.print_note(
                f"Ids in this bank are paths below {known}, which is not there (any more). If its "
                "files are elsewhere now, say so once: --root DIR"
            )
        start = root or (common_root(paths) if known is None else Path(known))
        yield Intake(paths, fields, start, origins if origins.has_old() else None)


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
    prune: Annotated[
        bool,
        typer.Option(
            "--prune", help="Delete what these files and folders gave once and give no more."
        ),
    ] = False,
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="Folder at which ids of files start; the bank remembers it. [default: what it "
            "remembers, or the folder that holds PATHS]",
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
    unchanged documents cost nothing, changed ones are encoded again, and those that are gone are
    named, or deleted with --prune. A file is the same document however its path is typed. Exits
    with 1 if no document could be stored.

    With --workers, or --ray and a cluster, windows of documents are encoded by several processes;
    the bank must lie where all of them see it.
    """
    fields = FieldNames(id=id_field, text=text_field, title=title_field)
    on_duplicate = "update" if update else "skip"
    work = _Work(bank, model, device, on_duplicate, batch_tokens, precision, workers, ray, prune)
    with _intake(paths, fields, bank, root) as intake:
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
    stored = report is not None and report.added + report.updated + report.unchanged
    if not stored and not intake.pruned:
        raise typer.Exit(1)
    if strict and _failures(intake, report):
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
        _find_gone_only(intake, work)
        return None
    with (
        open_or_create(work.bank, work.model, work.device, work.precision) as memory,
        _encoding_pool(memory, work) as pool,
    ):
        origins = memory.catalog.origins
        if origins.root() != str(intake.root.resolve()):
            origins.remember_root(str(intake.root.resolve()))
        try:
            with _progress(intake, origins) as show:
                report = memory.add(
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
        intake.record(origins)
        _prune(intake, memory, work)
        return report


def _find_gone_only(intake: Intake, work: _Work) -> None:
    """The files gave nothing: see what a bank that is there has of them."""
    try:
        opened = open_bank(work.bank, write=work.prune)
    except BankNotFoundError:
        return
    with opened:
        _prune(intake, opened, work)


def _prune(intake: Intake, memory: MemoryBank, work: _Work) -> None:
    """Find what is gone, and delete it if that was asked for."""
    intake.find_gone(memory.catalog.origins)
    if work.prune and intake.gone:
        memory.delete(origin.document for origin in intake.gone)
        intake.pruned = True


def _encoding_pool(
    bank: MemoryBank, work: _Work
) -> contextlib.AbstractContextManager[EncodingPool | None]:
    """Workers, if there are to be any."""
    if work.workers is None and work.ray is None:
        return contextlib.nullcontext()
    from msa.memory.distributed.encoding_pool import EncodingPool

    return EncodingPool(bank, work.workers or 1, address=work.ray)


@contextlib.contextmanager
def _progress(intake: Intake, origins: Origins) -> Iterator[Callable[[AddProgress], None]]:
    with output.progress("Indexing", intake.total_bytes) as bar:
        intake.bar = bar

        def show(progress: AddProgress) -> None:
            intake.record(origins)
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
        "gone": len(intake.gone),
        "pruned": len(intake.gone) if intake.pruned else 0,
        "parts": report.parts if report else 0,
        "tokens": report.tokens if report else 0,
        "seconds": report.seconds if report else 0.0,
        "failures": [{"source": source, "reason": reason} for source, reason in failed],
        "ignored_files": [{"source": f.source, "reason": f.reason} for f in intake.ignored],
        "gone_documents": [{"id": o.document, "reason": intake.why_gone(o)} for o in intake.gone],
        "notes": [{"source": source, "note": note} for source, note in intake.notes],
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
        ("pruned" if intake.pruned else "gone", len(intake.gone)),
    ):
        counts.add_row(name, output.number(count))
    console.print(counts)
    for title, reasons in (
        ("Failed", failed),
        ("Ignored", [(f.source, f.reason) for f in intake.ignored]),
        ("Notes", intake.notes),
        ("Gone", [(origin.document, intake.why_gone(origin)) for origin in intake.gone]),
    ):
        if reasons:
            console.print(f"\n{title}:", style="bold")
        for source, reason in reasons[:SHOWN_REASONS]:
            console.print(f"  {output.one_line(source)}: {output.one_line(reason)}", soft_wrap=True)
        if len(reasons) > SHOWN_REASONS:
            rest = output.number(len(reasons) - SHOWN_REASONS)
            console.print(f"  and {rest} more; --json lists them all")
    if intake.gone and not intake.pruned:
        console.print("\nThe bank holds what is gone until you add --prune", soft_wrap=True)
    if report is None and not intake.pruned:
        output.print_error(f"no document found; {bank} was not touched")
    elif report is None:
        return
    elif report.tokens:
        speed = output.number(report.tokens / max(report.seconds, 1e-9))
        console.print(
            f"\n{output.plural(report.tokens, 'token')} encoded in {report.seconds:.1f} s "
            f"({speed} tokens/s) into {bank}",
            soft_wrap=True,
        )
