"""`msa bank`: look into a bank and keep it in order."""

from __future__ import annotations

import json as json_module
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from msa.cli import output
from msa.cli.index import open_or_create
from msa.cli.options import (
    DeviceOption,
    JsonOption,
    ModelOption,
    load_model,
    open_bank,
    register,
    stdin_lines,
)
from msa.cli.output import one_line
from msa.errors import InputError
from msa.types import JSON, Document

BankArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of the memory bank.", show_default=False)
]

app = typer.Typer(
    name="bank",
    help="Look into a memory bank, change single documents, keep it in order.",
    epilog="Example: msa bank info bank/",
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def _bank(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def info(
    bank: BankArgument,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what it will take in memory when it is asked.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --plan: where it is asked; cpu, cuda:0, ...",
            show_default="cpu",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="With --plan: RAM to plan for, such as 8GB; what is free if not given.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what a bank holds and how large it is; with --plan what it will take in memory."""
    if plan:
        _print_plan(bank, device or "cpu", None if memory is None else _bytes(memory), json)
        return
    for name, value in (("--device", device), ("--memory", memory)):
        if value is not None:
            raise typer.BadParameter("goes with --plan only", param_hint=name)
    with open_bank(bank) as memory_bank:
        found = memory_bank.info()
    if json:
        output.print_json(found)
        return
    rows = {
        "bank": str(found.path),
        "model": found.model,
        "documents": output.number(found.num_ids),
        "parts": output.number(found.num_documents),
        "tokens": output.number(found.num_tokens),
        "chunks": f"{output.number(found.num_chunks)} of {found.chunk_size} tokens",
        "deleted": f"{output.number(found.num_deleted)} (their space comes back with compact)",
        "segments": f"{output.number(found.num_segments)}, {output.size(found.segment_bytes)}",
        "catalog": output.size(found.catalog_bytes),
        "routing layers": ", ".join(map(str, found.routing_layers)),
        "precision": found.dtype
        if found.content_dtype == found.dtype
        else f"content {found.content_dtype}, the rest {found.dtype}",
        "longest document": f"{output.number(found.max_document_tokens)} tokens",
        "created": found.created,
    }
    _print_table(list(rows.items()))


def _print_table(rows: list[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(Text(name), Text(one_line(value)))
    output.stdout().print(table)


def _print_plan(bank: Path, device: str, memory: int | None, json: bool) -> None:
    with open_bank(bank) as opened:
        from msa.memory.loaded.memory_plan import plan

        made = plan(opened, device, memory=memory)
    if json:
        sums = {"memory_bytes": made.memory_bytes, "device_bytes": made.device_bytes}
        output.print_json({**output.to_json(made), **sums})
        return
    size, on_device = output.size, made.device_available is not None
    where = "pinned RAM" if on_device else "RAM"
    content = f"held in {where}" if made.content == "held" else "mapped from disk"
    keys = f"{size(made.keys_bytes)} on {made.keys_device}, {made.keys_dtype}"
    rows = [
        ("bank", made.bank),
        ("documents", output.number(made.num_documents)),
        ("routing keys", keys),
        ("content", f"{size(made.content_bytes)}, {content}"),
        ("rows", f"{size(made.rows_bytes)} in RAM"),
        ("questions", f"{size(made.question_bytes)} for a batch of them"),
        ("loading", f"{size(made.loading_bytes)} in RAM, for a while"),
        ("RAM", f"{size(made.memory_bytes)} at most; {size(made.memory_available)} are free"),
    ]
    if made.device_available is not None:
        free = size(made.device_available)
        rows.append((made.device, f"{size(made.device_bytes)} at most; {free} are free"))
    rows += [("why" if i == 0 else "", reason) for i, reason in enumerate(made.why)]
    _print_table(rows)


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def _bytes(text: str) -> int:
    """A size such as 8GB, 500 MB or 7.5GiB, in bytes."""
    match = re.fullmatch(r"([0-9.]+)\s*([kmgt]?i?)b?", text.strip().lower())
    value = 0
    if match is not None and match[1].count(".") < 2 and match[1] != ".":
        value = int(float(match[1]) * {**_UNITS, **_BINARY}.get(match[2], 0))
    if value < 1:
        raise typer.BadParameter(f"{text!r} is no size such as 8GB", param_hint="--memory")
    return value


def list_documents(
    bank: BankArgument,
    limit: Annotated[
        int, typer.Option(min=0, metavar="N", help="Documents, at most; 0 for all.")
    ] = 20,
    offset: Annotated[int, typer.Option(min=0, metavar="N", help="Skip so many first.")] = 0,
    json: JsonOption = False,
) -> None:
    """List documents with their numbers and sizes; with --json also texts and metadata."""
    with open_bank(bank) as memory:
        total = len(memory)
        end = total if limit == 0 else min(total, offset + limit)
        shown = 0
        console = output.stdout()
        for start in range(offset, end, 1000):
            for stored in memory.documents(min(1000, end - start), start):
                shown += 1
                if json:
                    output.print_json(stored)
                    continue
                document = stored.document
                title = f"{document.title}: " if document.title else ""
                head = f"[{stored.number}] {one_line(document.id, 40)}"
                console.print(
                    Text(f"{head:<48}", style="bold")
                    + Text(f" {output.plural(stored.num_tokens, 'token'):>12}  ", style="dim")
                    + Text(one_line(title + document.text, 60)),
                    soft_wrap=True,
                )
    if not json:
        output.print_note(f"{output.number(shown)} of {output.plural(total, 'document')}")


def add(
    bank: BankArgument,
    id: Annotated[str, typer.Argument(help="The document's id.")],
    text: Annotated[
        str | None,
        typer.Option(help="Its text; read from stdin if not given.", show_default=False),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Its title.", show_default=False)] = None,
    metadata: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="A JSON object of your own.", show_default=False),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Replace the document if the id is there.")
    ] = False,
    model: ModelOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Store one document; `msa index` stores many."""
    values = _metadata(metadata)
    body = "".join(stdin_lines()) if text is None else text
    if not body.strip():
        raise InputError(f"document {id!r} is empty; give its text with --text or on stdin")
    document = Document(id=id, text=body, title=title, metadata=values)
    with open_or_create(bank, model, device) as memory:
        report = memory.add([document], on_duplicate="update" if update else "error")
        if report.failed:
            raise InputError(f"{report.failed[0][0]}: {report.failed[0][1]}")
        count = memory.info().num_ids
    if json:
        output.print_json(report)
        return
    done = "added" if report.added else "updated" if report.updated else "unchanged"
    output.stdout().print(
        f"{one_line(id)} {done}; the bank holds {output.plural(count, 'document')}", soft_wrap=True
    )


def delete(
    bank: BankArgument,
    ids: Annotated[
        list[str],
        typer.Argument(metavar="IDS...", help="Ids of documents; - reads them from stdin."),
    ],
    json: JsonOption = False,
) -> None:
    """Delete documents; from then on no question finds them.

    All of them or, if one id is unknown, none.
    """
    if ids == ["-"]:
        ids = [line.rstrip("\n") for line in stdin_lines() if line.strip()]
    with open_bank(bank, write=True) as memory:
        count = memory.delete(ids)
        left = memory.info().num_ids
    if json:
        output.print_json({"deleted": count, "documents": left})
        return
    output.stdout().print(
        f"{output.plural(count, 'document')} deleted; the bank holds {output.number(left)}"
    )


def compact(bank: BankArgument, json: JsonOption = False) -> None:
    """Rewrite the bank without the latent states of deleted documents."""
    with open_bank(bank, write=True) as memory, output.progress("Compacting"):
        report = memory.compact()
    if json:
        output.print_json(report)
        return
    output.stdout().print(
        f"{output.size(report.bytes_before)} in {output.plural(report.segments_before, 'segment')}"
        f" became {output.size(report.bytes_after)} in {output.number(report.segments_after)}; "
        f"{output.plural(report.dropped, 'deleted document')} gone for good"
    )


def verify(bank: BankArgument, json: JsonOption = False) -> None:
    """Check every byte of a bank; exits with 1 if something is damaged."""
    with open_bank(bank) as memory, output.progress("Verifying"):
        report = memory.verify()
    if json:
        output.print_json({**output.to_json(report), "ok": report.ok})
    else:
        _print_verified(report)
    if not report.ok:
        raise typer.Exit(1)


def repair(
    bank: BankArgument,
    model: ModelOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Encode the documents of damaged segments again, from the texts that the bank holds."""
    open_bank(bank).close()
    checkpoint = load_model(model, device)
    from msa.memory.bank import MemoryBank

    with (
        MemoryBank.open(bank, checkpoint) as memory,
        output.progress("Repairing"),
    ):
        count = memory.repair()
    if json:
        output.print_json({"repaired": count})
        return
    output.stdout().print(f"{output.plural(count, 'document')} encoded again")


def _print_verified(report: Any) -> None:
    console = output.stdout()
    for problem in report.problems:
        console.print(Text("damaged: ", style="bold red") + Text(one_line(problem)), soft_wrap=True)
    ids = report.damaged_ids
    if ids:
        shown = ", ".join(one_line(i, 40) for i in ids[:10])
        more = f" and {len(ids) - 10} more" if len(ids) > 10 else ""
        console.print(f"these documents: {shown}{more}", soft_wrap=True)
        console.print("msa bank repair encodes them again from their texts")
    console.print(
        f"{output.plural(report.num_documents, 'document')} in "
        f"{output.plural(report.num_segments, 'segment')}, {output.size(report.num_bytes)}: "
        + ("sound" if report.ok else output.plural(len(report.problems), "problem"))
    )


def _metadata(text: str | None) -> dict[str, JSON]:
    if text is None:
        return {}
    try:
        values = json_module.loads(text)
    except RecursionError:
        raise typer.BadParameter("the JSON is nested too deeply", param_hint="--metadata") from None
    except ValueError as error:
        raise typer.BadParameter(f"not valid JSON ({error})", param_hint="--metadata") from None
    if not isinstance(values, dict):
        raise typer.BadParameter("expected a JSON object", param_hint="--metadata")
    return values


register(app, info, "msa bank info bank/ --plan --memory 8GB")
register(app, list_documents, "msa bank list bank/ --limit 50 --offset 100", "list")
register(app, add, 'msa bank add bank/ ada --text "Ada was born in 1815."')
register(app, delete, "msa bank delete bank/ ada notes/old.txt")
register(app, compact, "msa bank compact bank/")
register(app, verify, "msa bank verify bank/ && echo sound")
register(app, repair, "msa bank repair bank/")
