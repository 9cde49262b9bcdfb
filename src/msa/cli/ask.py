"""`msa ask` and `msa search`: questions to a bank."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from msa.cli import output
from msa.cli.options import (
    BankOption,
    DeviceOption,
    FilterOption,
    JsonOption,
    ModelOption,
    RayOption,
    ShardsOption,
    SlackOption,
    metadata_filter,
    open_engine,
    stdin_lines,
)
from msa.cli.output import one_line
from msa.errors import MSAError, WorkerError

if TYPE_CHECKING:
    from rich.console import Console

    from msa.inference.engine import MemoryEngine
    from msa.types import Answer, Citation, Event, Round

SNIPPET = 90
TRACE_SHOWN = 8


def ask(
    bank: BankOption,
    question: Annotated[
        str | None,
        typer.Argument(help="The question; without it, one per line is read from stdin."),
    ] = None,
    model: ModelOption = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Show what every layer routed to in every round.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Show every step at once: routing, reading, answer.")
    ] = False,
    max_rounds: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Rounds of reading, at most.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens of the answer, at most.")
    ] = None,
    prior_weight: Annotated[
        float | None,
        typer.Option(min=0, metavar="X", help="Weight of routing scores in what is read."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, metavar="X", help="Sample; 0 takes the likeliest token.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Make sampling repeatable.")
    ] = None,
    filter: FilterOption = None,
    slack: SlackOption = None,
    shards: ShardsOption = None,
    ray: RayOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Ask a question and get the answer with the documents that were read for it.

    With --json, an object per question (with --stream, one per event). Without a question, lines
    of stdin are questions; on a terminal, this is a conversation that ends with Ctrl-D.
    """
    given = {
        "max_rounds": max_rounds,
        "max_new_tokens": max_new_tokens,
        "prior_weight": prior_weight,
        "temperature": temperature,
        "seed": seed,
        "filter": metadata_filter(filter),
    }
    options = {name: value for name, value in given.items() if value is not None}
    if question is not None and not question.strip():
        raise typer.BadParameter("the question is empty", param_hint="QUESTION")
    failed = 0
    with open_engine(bank, model, device, slack, shards, ray) as engine:
        if question is not None:
            _ask_one(engine, question, options, trace=trace, stream=stream, json=json)
            return
        for line in _questions():
            try:
                _ask_one(engine, line, options, trace=trace, stream=stream, json=json)
            except WorkerError:  # no question can be answered any more
                raise
            except MSAError as error:  # the next question may be a better one
                output.print_error(str(error))
                failed += 1
    if failed:
        raise typer.Exit(1)


def search(
    query: Annotated[str, typer.Argument(help="What to look for, in words.")],
    bank: BankOption,
    top_k: Annotated[
        int, typer.Option("--top-k", "-k", min=1, metavar="N", help="Documents, at most.")
    ] = 10,
    model: ModelOption = None,
    filter: FilterOption = None,
    slack: SlackOption = None,
    shards: ShardsOption = None,
    ray: RayOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """List the documents that the model routes a query to, best first."""
    if not query.strip():
        raise typer.BadParameter("the query is empty", param_hint="QUERY")
    wanted = metadata_filter(filter)
    with open_engine(bank, model, device, slack, shards, ray) as engine:
        hits = engine.retrieve(query, top_k=top_k, filter=wanted)
    if json:
        for hit in hits:
            output.print_json(hit)
        return
    console = output.stdout()
    for rank, hit in enumerate(hits, 1):
        title = f"  {one_line(hit.title, 60)}" if hit.title else ""
        head = Text(f"{rank:>3}. ") + Text(one_line(hit.id, 60), style="bold") + Text(title)
        console.print(head + Text(f"  {hit.score:.3f}", style="dim"), soft_wrap=True)
        console.print(Text("     " + one_line(hit.text, SNIPPET)), soft_wrap=True)


def _questions() -> Iterator[str]:
    """Lines of stdin that are not blank; with a prompt in a terminal."""
    lines = stdin_lines()
    while True:
        if sys.stdin.isatty():
            output.stderr().print("? ", end="", style="bold")
        line = next(lines, None)
        if line is None:
            return
        if line.strip():
            yield line.strip()


def _ask_one(
    engine: MemoryEngine,
    question: str,
    options: dict[str, Any],
    *,
    trace: bool,
    stream: bool,
    json: bool,
) -> None:
    if not stream:
        with output.progress("Asking"):
            answer = engine.ask(question, **options)
        if json:
            output.print_json(answer)
        else:
            print_answer(output.stdout(), answer, trace=trace)
        return
    printer = StreamPrinter(output.stdout(), trace=trace)
    for event in engine.ask(question, stream=True, **options):
        if json:
            output.print_json(event)
        else:
            printer.show(event)


def print_answer(console: Console, answer: Answer, *, trace: bool) -> None:
    """The answer, what was read for it, and what it cost."""
    console.print(Text(printable(answer.text) or "(no answer)", style="bold"), soft_wrap=True)
    for turn in answer.rounds:
        if trace:
            print_routing(console, turn)
        for citation in turn.read:
            print_reading(console, citation)
    print_cost(console, answer)


def print_cost(console: Console, answer: Answer) -> None:
    """One line: rounds, tokens, time, and why it stopped if not by itself."""
    usage = answer.usage
    silent = answer.stopped in ("answered", "not_found")  # the text says the latter
    why = "" if silent else f", stopped by {answer.stopped}"
    console.print(
        f"  {output.plural(len(answer.rounds), 'round')}, {output.number(usage.prompt_tokens)} + "
        f"{output.plural(usage.generated_tokens, 'token')}, {usage.total_seconds:.2f} s{why}",
        style="dim",
    )


def print_reading(console: Console, citation: Citation) -> None:
    """One document that was read."""
    label = Text(f"  round {citation.round} read  ", style="green")
    name = Text(f"[{citation.number}] {one_line(citation.id, 40)}", style="bold")
    rest = max(20, console.width - len(label) - len(name) - 3)
    console.print(label + name + Text("  " + one_line(citation.text, rest)), soft_wrap=True)


def print_routing(
    console: Console, turn: Round, shown: int = TRACE_SHOWN, marked: Collection[str] = ()
) -> None:
    """Per routing layer its best documents with their scores; a star before the ids `marked`."""
    read = {citation.number for citation in turn.read}
    for layer, documents in sorted(turn.routed.items()):
        label = Text(f"  round {turn.index} layer {layer} routed  ", style="cyan")
        entries = []
        for document in documents[:shown]:
            star = "*" if document.id in marked else ""
            name = f"[{document.number}] {star}{one_line(document.id, 24)} {document.score:.2f}"
            entries.append(Text(name, style="bold green" if document.number in read else ""))
        if len(documents) > shown:
            entries.append(Text(f"and {len(documents) - shown} more", style="dim"))
        _print_below(console, label, entries or [Text("nothing")])


def _print_below(console: Console, label: Text, entries: Sequence[Text]) -> None:
    """A label and a list after it, wrapped below itself; no entry is broken."""
    line, indent = label.copy(), len(label)
    for i, entry in enumerate(entries):
        piece = entry + Text("," if i < len(entries) - 1 else "")
        if len(line) > indent and len(line) + 1 + len(piece) > console.width:
            console.print(line, soft_wrap=True)
            line = Text(" " * indent)
        line += (Text(" ") if len(line) > indent else Text("")) + piece
    console.print(line, soft_wrap=True)


class StreamPrinter:
    """Prints the events of one question as they come."""

    def __init__(self, console: Console, *, trace: bool) -> None:
        self._console = console
        self._trace = trace
        self._writing = False

    def show(self, event: Event) -> None:
        """Print one event."""
        if event.kind == "routing" and self._trace:
            print_routing(self._console, event.data)
        elif event.kind == "reading":
            print_reading(self._console, event.data)
        elif event.kind == "token":
            self._writing = True
            piece = printable(event.data)
            self._console.print(Text(piece, style="bold"), end="", soft_wrap=True)
            self._console.file.flush()
        elif event.kind == "answer":
            self._console.print("" if self._writing else "(no answer)")
            print_cost(self._console, event.data)


def printable(text: str) -> str:
    """Text without control characters, which could write anywhere on a terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")
