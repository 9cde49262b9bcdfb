"""`msa demo`: what a memory does, on documents that the model has never seen."""

from __future__ import annotations

import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from msa.cli import output
from msa.cli.options import DeviceOption, JsonOption, ModelOption, load_model
from msa.cli.output import one_line
from msa.demo.material import Material, Step, load_material
from msa.errors import InputError, MSAError
from msa.inference.spans import sentence_around
from msa.types import Answer, Citation, Document, RankedDocument, Round

if TYPE_CHECKING:
    from msa.memory.bank import MemoryBank
    from msa.memory.store.reports import AddProgress, AddReport
    from msa.model.checkpoint import Checkpoint

SMALL = "worlds"
"""The small model, and the folder of the documents that it was made for."""

INDENT = 11
SHOWN = 3
"""Documents of a round that are named."""

CHANGES = {
    "add": ("Add a document", "+", "green"),
    "update": ("Change it", "~", "yellow"),
    "delete": ("Delete it", "-", "red"),
}


def demo(
    model: ModelOption = None,
    worlds: Annotated[
        bool,
        typer.Option("--worlds", help="The small model on generated documents; fetches nothing."),
    ] = False,
    questions: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Ask only the first N questions."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Exit with 1 if an answer, a citation or a refusal is not as expected."
        ),
    ] = False,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Build a memory, ask it questions and watch it read; add, update and delete a document.

    The documents and questions ship with the package: passages of Wikipedia, and questions of one
    hop, of two, and without an answer. The model was not trained on them. The memory lies in a
    temporary folder and is gone afterwards. With --json, an object per question.
    """
    if model is None and not worlds:
        worlds = _only_the_small_model(json)
    material = load_material(SMALL if worlds else "real")
    checkpoint = load_model(model or (SMALL if worlds else None), device)
    show = _Show(output.stdout(), checkpoint, json=json)
    with tempfile.TemporaryDirectory(prefix="msa-demo-") as folder:
        run_demo(Path(folder, "bank"), checkpoint, material, show, questions, worlds=worlds)
    show.end(picked=not worlds)
    if check and show.differences:
        raise MSAError(
            f"{len(show.differences)} of {output.plural(show.asked, 'question')} not as expected: "
            + "; ".join(show.differences)
        )


def _only_the_small_model(json: bool) -> bool:
    """True, with a line that says so, if no model for real text is the default one."""
    from msa.model.loading import default_name

    if default_name() != SMALL:
        return False
    if not json:
        output.print_note(
            f"The default model here is the small one ({SMALL}), which reads no real text: these "
            "are its generated worlds. Another model: msa demo --model MODEL"
        )
    return True


def run_demo(
    path: Path,
    checkpoint: Checkpoint,
    material: Material,
    show: _Show,
    limit: int | None = None,
    *,
    worlds: bool = False,
) -> None:
    """Index the documents, then ask and change.

    Args:
        path: where the bank is made.
        checkpoint: the model.
        material: documents and steps.
        show: is told what happens.
        limit: questions before the first change, at most.
        worlds: the documents are generated.

    Raises:
        InputError: a document cannot be stored.
        MSAError: a deleted document was still found.
    """
    from msa.inference.engine import MemoryEngine
    from msa.memory.bank import MemoryBank

    asked = [step for step in material.steps if step.kind == "ask"][:limit]
    with MemoryBank.create(path, checkpoint) as bank:
        report = _index(bank, material.documents)
        show.bank(checkpoint, report, bank.info().segment_bytes, worlds=worlds)
        engine = MemoryEngine(bank)
        for step in [*asked, *(step for step in material.steps if step.kind != "ask")]:
            show.section(step)
            if step.kind != "ask":
                show.change(step, *_change(bank, step))
            with output.progress("Asking"):
                answer = engine.ask(step.question)
            _check_gone(step, answer, bank)
            show.answer(step, answer)


def _index(bank: MemoryBank, documents: tuple[Document, ...]) -> AddReport:
    with output.progress("Reading the documents", len(documents)) as bar:

        def progress(done: AddProgress) -> None:
            speed = output.number(done.tokens / max(done.seconds, 1e-9))
            note = f"{output.plural(done.documents, 'document')}, {speed} tokens/s"
            bar.set("Reading the documents", done.documents, note)

        # small commits: the bar moves, and they cost little
        report = bank.add(documents, commit_tokens=4096, progress=progress)
    if report.failed:
        raise InputError(f"demo document {report.failed[0][0]}: {report.failed[0][1]}")
    return report


def _change(bank: MemoryBank, step: Step) -> tuple[str, float]:
    """Change the memory before a question; what was the text before, and the seconds it took."""
    start, before = time.perf_counter(), ""
    if step.document is not None:
        if step.kind == "update":
            before = bank.get(step.document.id).document.text
            bank.update(step.document)
        else:
            bank.add([step.document])
    elif step.deleted is not None:
        bank.delete(step.deleted)
    return before, time.perf_counter() - start


def _check_gone(step: Step, answer: Answer, bank: MemoryBank) -> None:
    if step.deleted is None:
        return
    routed = {d.id for turn in answer.rounds for layer in turn.routed.values() for d in layer}
    if step.deleted in routed or step.deleted in bank:
        raise MSAError(f"the deleted document {step.deleted} was still found; a fault of ours")


@dataclass(frozen=True, slots=True)
class Evidence:
    """Where an answer stands in a text that was read.

    Attributes:
        citation: the document.
        sentence: of its text, on one line.
        start, end: of the answer in the sentence; equal when it does not stand there.
    """

    citation: Citation
    sentence: str
    start: int
    end: int


def find_evidence(answer: Answer) -> Evidence | None:
    """The sentence that an answer was taken from; None if no cited text holds the answer.

    A citation's own span comes first; without one, the answer is looked for in the texts, the last
    one read first.
    """
    for citation in reversed(answer.citations):
        if citation.span:
            return _sentence(citation, *citation.span)
    wanted = answer.text.strip().rstrip(".").lower()
    for citation in reversed(answer.citations):
        start = citation.text.lower().find(wanted) if wanted else -1
        if start >= 0:
            return _sentence(citation, start, start + len(wanted))
    return None


def _sentence(citation: Citation, start: int, end: int) -> Evidence:
    text = citation.text
    first, last = sentence_around(text, start, end)
    left = one_line("x" + text[first:start] + "x")[1:-1]  # spaces at the cuts are kept
    middle = one_line(text[start:end])
    right = one_line("x" + text[end:last] + "x")[1:-1]
    return Evidence(citation, left + middle + right, len(left), len(left) + len(middle))


class _Show:
    """Prints what happens, for people or as JSON, and keeps count.

    Attributes:
        asked: questions.
        differences: what is not as expected, a line each.
    """

    def __init__(self, console: Console, checkpoint: Checkpoint, *, json: bool) -> None:
        self._console = console
        self._template = checkpoint.template
        self._words = checkpoint.ask_options.lexical_weight > 0
        self._json = json
        self._section = ""
        self._seconds = 0.0
        self._started = time.perf_counter()
        self._unicode = console.encoding.lower().startswith("utf")
        self.asked = 0
        self.differences: list[str] = []

    def bank(self, checkpoint: Checkpoint, report: AddReport, size: int, *, worlds: bool) -> None:
        """What the memory holds, and how fast it was read."""
        if self._json:
            figures = {"documents": report.added, "tokens": report.tokens, "bytes": size}
            output.print_json(
                {"step": "index", "model": checkpoint.name, **figures, "seconds": report.seconds}
            )
            return
        self._rule("Memory Sparse Attention", style="bold")
        what = "document" if worlds else "passage"
        of = "of invented worlds" if worlds else "of Wikipedia"
        speed = output.number(report.tokens / max(report.seconds, 1e-9))
        self._console.print(
            f"{output.plural(report.added, what)} {of} that the model has never seen: "
            f"{output.plural(report.tokens, 'token')} read in {report.seconds:.1f} s "
            f"({speed} tokens/s), kept as latent states ({output.size(size)} on disk). Every "
            "question finds its documents there by meaning"
            + (" and by words." if self._words else "."),
        )

    def section(self, step: Step) -> None:
        """A heading, where a new kind of question begins."""
        if step.kind != "ask":
            name = {"add": "Add a document", "update": "Change it", "delete": "Delete it"}[
                step.kind
            ]
        elif step.refused:
            name = "No answer: the memory does not hold one"
        elif len(step.cited) > 1:
            name = "Two hops: what the first document says leads to the second"
        else:
            name = "One hop: one document says it"
        if name != self._section and not self._json:
            self._console.print()
            self._rule(name)
        self._section = name

    def change(self, step: Step, before: str, seconds: float) -> None:
        """What was added, changed or deleted."""
        if self._json:
            return
        _, sign, color = CHANGES[step.kind]
        lead = Text(f"  {sign} {step.document.id if step.document else step.deleted}", style=color)
        lead += Text(f"  {1000 * seconds:.0f} ms", style="dim")
        self._console.print(lead)
        if step.document is not None:
            self._below(Text(f"    {'':{INDENT - 4}}"), _changed(before, step.document.text))

    def answer(self, step: Step, answer: Answer) -> None:
        """A question, what was read for it in every round, and the answer."""
        difference = step.difference(answer, self._template)
        self.asked += 1
        self._seconds += answer.usage.total_seconds
        if difference is not None:
            self.differences.append(f"'{step.question}': {difference}")
        if self._json:
            expected = {
                "answers": step.answers,
                "cited": step.cited,
                "refused": step.refused,
                "never": step.never,
            }
            record = {"step": step.kind, "expected": expected, "difference": difference}
            output.print_json({**record, **output.to_json(answer)})
            return
        self._console.print()
        self._console.print(Text(one_line(step.question), style="bold"))
        for turn in answer.rounds:
            if turn.read or turn.index == 1:
                self._round(turn, step)
        self._verdict(step, answer, difference)

    def _round(self, turn: Round, step: Step) -> None:
        label = f"  round {turn.index}"
        if turn.ranked:
            found = [self._found(document, step) for document in turn.ranked[:SHOWN]]
            if len(turn.ranked) > SHOWN:
                found.append(Text(f"and {len(turn.ranked) - SHOWN} more", style="dim"))
            self._list(Text(f"{label:{INDENT}}finds ", style="cyan"), found)
            label = ""
        read = [Text(f"[{c.number}] {one_line(c.id, 40)}", style="bold") for c in turn.read]
        self._list(Text(f"{label:{INDENT}}reads ", style="cyan"), read or [Text("nothing")])

    def _found(self, document: RankedDocument, step: Step) -> Text:
        """A document with the way by which it was found, where there are two."""
        ways = ["meaning"] if document.layers else []
        ways += ["words"] if document.lexical else []
        name = Text(one_line(document.id, 40), style="green" if document.id in step.cited else "")
        return name + Text(f" (by {' and '.join(ways)})" if self._words else "", style="dim")

    def _verdict(self, step: Step, answer: Answer, difference: str | None) -> None:
        line = Text(one_line(answer.text, 200) or "(none)", style="bold")
        if step.refused is None and not step.answers:
            line += Text("  nothing here answers it any more", style="dim")
        elif difference is None:
            line += Text(f"  {self._mark('✓', 'right')}", style="bold green")
        else:
            right = f"right is: {step.answers[0]}" if step.answers else "nothing here answers it"
            line += Text(f"  {self._mark('✗', 'wrong')} {right}", style="red")
        line += Text(f"  {answer.usage.total_seconds:.1f} s", style="dim")
        self._below(Text(f"{'  answer':{INDENT}}", style="cyan"), line)
        evidence = find_evidence(answer)
        if evidence is None:
            return
        sentence = Text(evidence.sentence, style="italic")
        sentence.stylize("bold reverse", evidence.start, evidence.end)
        width = self._console.width * 3
        start = max(0, min(evidence.start - width // 2, len(sentence) - width))
        quoted = Text("…" if start else "") + sentence[start : start + width]
        quoted += Text("…" if start + width < len(sentence) else "")
        number = Text(f"[{evidence.citation.number}] ", style="bold")
        self._below(Text(" " * INDENT), number + quoted)

    def end(self, *, picked: bool) -> None:
        """How it went, and what to type next."""
        if self._json:
            return
        good = self.asked - len(self.differences)
        self._console.print()
        self._rule()
        seconds = time.perf_counter() - self._started
        self._console.print(
            f"{good} of {output.plural(self.asked, 'answer')} as expected, "
            f"{self._seconds / max(1, self.asked):.1f} s a question, {seconds:.0f} s in all."
        )
        if picked:
            self._console.print(
                "The questions were picked among those of public development sets, to show what it "
                "does; how often it is right stands in docs/results.",
                style="dim",
            )
        self._console.print("\nNow your own files:")
        for command in ("msa index FOLDER --bank bank", 'msa ask "What ...?" --bank bank'):
            self._console.print(Text(f"  {command}", style="bold"))

    def _rule(self, title: str = "", style: str = "") -> None:
        self._console.print(Rule(Text(title, style=style), align="left", style="dim"))

    def _mark(self, sign: str, word: str) -> str:
        return sign if self._unicode else word

    def _list(self, label: Text, entries: list[Text]) -> None:
        """A label and a list after it, wrapped below itself; no entry is broken."""
        line = label.copy()
        for i, entry in enumerate(entries):
            piece = entry + Text(", " if i < len(entries) - 1 else "")
            if len(line) > len(label) and len(line) + len(piece) > self._console.width:
                line.rstrip()
                self._console.print(line, soft_wrap=True)
                line = Text(" " * len(label))
            line += piece
        self._console.print(line, soft_wrap=True)

    def _below(self, label: Text, text: Text) -> None:
        """A label and a text after it, wrapped below itself."""
        width = max(20, self._console.width - len(label))
        for i, line in enumerate(text.wrap(self._console, width)):
            self._console.print((label if i == 0 else Text(" " * len(label))) + line)


def _changed(before: str, after: str) -> Text:
    """A text, with what is new in it highlighted."""
    text = Text(one_line(after), style="italic")
    if before:
        known = set(before.split())
        for match in re.finditer(r"\S+", text.plain):
            if match[0] not in known:
                text.stylize("bold yellow", *match.span())
    return text
