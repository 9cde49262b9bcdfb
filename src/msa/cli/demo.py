"""`msa demo`: what a memory does, on documents that the model has never seen."""

from __future__ import annotations

import json as json_module
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from msa.cli import output
from msa.cli.ask import print_reading, print_routing
from msa.cli.options import DeviceOption, JsonOption, ModelOption, load_model
from msa.cli.output import one_line
from msa.errors import InputError, MSAError
from msa.evaluation.metrics import exact_match
from msa.types import Answer, Document

if TYPE_CHECKING:
    from msa.inference.engine import MemoryEngine
    from msa.memory.bank import MemoryBank

FILES = ("documents.jsonl", "questions.jsonl", "added.json")
HOPS = {1: "one hop", 2: "two hops"}


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its right answer.

    Attributes:
        text: the question.
        answer: the right answer.
        gold: ids of the documents that hold it, in the order in which they must be read.
    """

    text: str
    answer: str
    gold: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Material:
    """What the demo works on: documents, questions, and a document to add with its question."""

    documents: tuple[Document, ...]
    questions: tuple[Question, ...]
    added: Document
    added_question: Question


def load_material() -> Material:
    """The documents and questions that ship with the package.

    Raises:
        InputError: they are missing or damaged.
    """
    folder = resources.files("msa") / "demo" / "worlds"
    try:
        texts = {name: (folder / name).read_text(encoding="utf-8") for name in FILES}
        documents = [json_module.loads(line) for line in texts["documents.jsonl"].splitlines()]
        questions = [json_module.loads(line) for line in texts["questions.jsonl"].splitlines()]
        added = json_module.loads(texts["added.json"])
        document = _document(added["document"])
        return Material(
            documents=tuple(_document(record) for record in documents),
            questions=tuple(_question(record, record["gold"]) for record in questions),
            added=document,
            added_question=_question(added, [document.id]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the demo's documents cannot be read ({error}); install the package again"
        ) from error


def _document(record: Mapping[str, Any]) -> Document:
    return Document(id=record["id"], text=record["text"], title=record.get("title"))


def _question(record: Mapping[str, Any], gold: list[str]) -> Question:
    return Question(record["question"], record["answer"], tuple(gold))


def is_right(answer: str, right: str) -> bool:
    """True if two answers are the same but for case, articles, punctuation and spaces."""
    return exact_match(answer, [right]) == 1.0


def demo(
    model: ModelOption = None,
    worlds: Annotated[
        bool,
        typer.Option("--worlds", help="Use the small model, which fetches nothing."),
    ] = False,
    questions: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Ask only the first N questions."),
    ] = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Build a bank, ask it questions and watch it read; add a document, then delete it.

    The documents and questions ship with the package; the model was not trained on them. The bank
    lies in a temporary folder and is gone afterwards. With --json, an object per question.
    """
    material = load_material()
    checkpoint = load_model("worlds" if worlds else model, device)
    from msa.inference.engine import MemoryEngine
    from msa.memory.bank import MemoryBank

    with tempfile.TemporaryDirectory(prefix="msa-demo-") as folder:
        path = Path(folder, "bank")
        with MemoryBank.create(path, checkpoint) as bank:
            show = _Show(output.stdout(), json=json)
            with output.progress("Reading the documents"):
                report = bank.add(material.documents)
            if report.failed:
                raise InputError(f"demo document {report.failed[0][0]}: {report.failed[0][1]}")
            show.bank(report)
            engine = MemoryEngine(checkpoint.model, checkpoint.tokenizer, bank)
            _run(bank, engine, material, questions, show)


def _run(
    bank: MemoryBank, engine: MemoryEngine, material: Material, limit: int | None, show: _Show
) -> None:
    """Ask, add, ask, delete, ask."""
    for question in material.questions[:limit]:
        show.answer("ask", question, _ask(engine, question))
    question, new = material.added_question, material.added

    show.step(f"A new document is added: {one_line(new.content, 200)}")
    start = time.perf_counter()
    bank.add([new])
    show.note(f"Stored and ready to be asked after {1000 * (time.perf_counter() - start):.0f} ms.")
    show.answer("added", question, _ask(engine, question))

    show.step(f"It is deleted again: {new.id}")
    bank.delete(new.id)
    answer = _ask(engine, question)
    routed = {d.id for turn in answer.rounds for layer in turn.routed.values() for d in layer}
    if new.id in routed or new.id in bank:
        raise MSAError(f"the deleted document {new.id} was still found; this is a fault of ours")
    show.answer("deleted", question, answer)
    show.note(f"Gone: the bank does not hold {new.id} any more, and no layer routes to it.")
    show.total()


def _ask(engine: MemoryEngine, question: Question) -> Answer:
    with output.progress("Asking"):
        answer: Answer = engine.ask(question.text)
    return answer


class _Show:
    """Prints what happens, for people or as JSON, and keeps count."""

    def __init__(self, console: Console, *, json: bool) -> None:
        self._console = console
        self._json = json
        self._asked = 0
        self._right = 0
        self._seconds = 0.0

    def bank(self, report: Any) -> None:
        speed = output.number(report.tokens / max(report.seconds, 1e-9))
        self._print(
            f"A bank of {output.plural(report.added, 'document')} that the model has never seen: "
            f"{output.plural(report.tokens, 'token')}, encoded in {report.seconds:.1f} s "
            f"({speed} tokens/s).\n"
            "Every layer routes to documents of its own; a star marks those that hold the answer."
        )

    def step(self, text: str) -> None:
        if not self._json:
            self._console.print()
            self._console.print(Rule(style="dim", characters="-"))
            self.note(text)

    def note(self, text: str) -> None:
        self._print(text)

    def answer(self, step: str, question: Question, answer: Answer) -> None:
        right = is_right(answer.text, question.answer)
        if step != "deleted":  # then there is no right answer any more
            self._asked += 1
            self._right += right
            self._seconds += answer.usage.total_seconds
        if self._json:
            record = {"step": step, "right_answer": question.answer, "right": right}
            output.print_json({**record, "gold": question.gold, **output.to_json(answer)})
            return
        hops = HOPS.get(len(question.gold), f"{len(question.gold)} hops")
        self._console.print()
        self._console.print(
            Text(one_line(question.text), style="bold") + Text(f"  ({hops})", style="dim"),
            soft_wrap=True,
        )
        for turn in answer.rounds:
            if not turn.read:
                label = Text(f"  round {turn.index} read  ", style="green")
                self._console.print(label + Text("nothing more"))
                continue
            print_routing(self._console, turn, shown=4, marked=question.gold)
            for citation in turn.read:
                print_reading(self._console, citation)
        verdict = Text("  answer        ", style="green")
        verdict += Text(one_line(answer.text) or "(none)", style="bold")
        if step == "deleted":
            verdict += Text(f"  (while the document was there: {question.answer})", style="dim")
        elif right:
            verdict += Text("  right", style="green")
        else:
            verdict += Text(f"  wrong; right is: {question.answer}", style="red")
        verdict += Text(f"  {answer.usage.total_seconds:.2f} s", style="dim")
        self._console.print(verdict, soft_wrap=True)

    def total(self) -> None:
        self._print(
            f"\n{self._right} of {self._asked} answers right, "
            f"{self._seconds / max(1, self._asked):.2f} s a question."
        )
        self._print(
            "Your own documents: msa index FILES... --bank bank/, then msa ask --bank bank/"
        )

    def _print(self, text: str) -> None:
        if not self._json:
            self._console.print(text, soft_wrap=True)
