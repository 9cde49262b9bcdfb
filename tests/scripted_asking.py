"""Rounds, driven by scripted logits: a random tiny model would write nonsense.

The script only raises the logits of the tokens that a plan wants next; constraints still apply, so
a plan that is not legal does not come to pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from msa.inference import scheduler
from msa.inference.decoding import Decoder
from msa.inference.interleave import AskFormat, Request
from msa.inference.options import AskOptions
from msa.inference.scheduler import Scheduler
from msa.memory.latent import LatentMemory
from msa.memory.store.reports import StoredDocument
from msa.text.prompts import PromptEncoder
from msa.types import Answer, Document, Event

READ, END, STOP = "<|object_ref_end|>", "<End-of-Retrieve>", "<|im_end|>"
LEAD_IN = "The answer to the question is:"
TEXTS = {
    3: "Ada was born in Rome.",
    17: "Bob is Ada's son, a baker.",
    170: "Rome lies on the Tiber.",
    24: "Cid paints.",
    5: "The Tiber is 406 km long, says Dee.",
}


class FakeSnapshot:
    """Documents encoded by the model itself; a row of the memory is an index of `texts`."""

    def __init__(
        self, model: Any, encoder: PromptEncoder, texts: Mapping[int, str], top_k: int = 4
    ) -> None:
        ids = [encoder.document(n, t) for n, t in texts.items()]
        lengths = torch.tensor([len(i) for i in ids])
        padded = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
        for row, tokens in zip(padded, ids, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        with torch.no_grad():
            states = model.encode_documents(padded, lengths)
        self.reader = LatentMemory(states, top_k)
        self.of_row = list(texts)
        self.stored = {
            n: StoredDocument(Document(f"doc-{n}", t), n, len(t), 1) for n, t in texts.items()
        }
        self.read: list[int] = []  # numbers whose texts were asked for

    def numbers(self, rows: Sequence[int]) -> list[int]:
        return [self.of_row[row] for row in rows]

    def ids(self, numbers: Iterable[int]) -> Mapping[int, str]:
        return {n: self.stored[n].document.id for n in numbers if n in self.stored}

    def copies(self, asked: Sequence[tuple[Iterable[int], Iterable[int]]]) -> list[set[int]]:
        text_of = {n: s.document.text for n, s in self.stored.items()}
        texts = [{text_of[n] for n in of if n in text_of} for _, of in asked]
        return [
            {n for n in numbers if text_of.get(n) in some}
            for (numbers, _), some in zip(asked, texts, strict=True)
        ]

    def coverage(self, question: str, texts: Sequence[str]) -> list[float] | None:
        return None

    def texts(self, numbers: Iterable[int]) -> Mapping[int, StoredDocument]:
        numbers = list(numbers)
        self.read += numbers
        return {n: self.stored[n] for n in numbers if n in self.stored}


class Script:
    """Wants what a question's plan says next: its rounds, then its answer."""

    def __init__(self, tokenizer: Any, plans: Mapping[str, Sequence[str]]) -> None:
        self.tokenizer = tokenizer
        # One character per token (byte), so that half a letter compares too.
        self.plans = {self.raw(q): [self.raw(p) for p in plan] for q, plan in plans.items()}
        self.lead_in, self.tail = self.raw(LEAD_IN), self.raw("<|im_end|>\n<|im_start|>")

    def raw(self, text: str) -> str:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return "".join(self.tokenizer.convert_ids_to_tokens(ids))

    def wish(self, text: str) -> str:
        newline = self.raw("\n")
        asked = (p for q, p in self.plans.items() if f"{newline * 2}{q}{newline}" in text)
        plan = next(asked, [])
        rest = text.split(self.tail, 1)[1]
        for i, part in enumerate(plan):
            if not rest.startswith(part):
                return part.removeprefix(rest) if part.startswith(rest) else ""
            rest = rest[len(part) :]
            if part.endswith(READ):  # a text follows
                rest = rest.partition(READ)[2]
            elif part.endswith(END):  # the question, again
                rest = rest.partition(READ)[2]
                if not plan[i + 1 :][:1] or not plan[i + 1].startswith(self.lead_in):
                    rest = rest.removeprefix(self.lead_in)
        return ""

    def token(self, ids: Sequence[int]) -> int | None:
        tokens = self.tokenizer.convert_ids_to_tokens(list(ids))
        text = "".join(t or "?" for t in tokens)  # the model has more ids than the tokenizer
        if not (wish := self.wish(text)):
            return None
        special = next((m for m in (READ, END, STOP) if wish.startswith(m)), wish[0])
        return int(self.tokenizer.convert_tokens_to_ids(special))


def scripted(monkeypatch: pytest.MonkeyPatch, encoder: PromptEncoder) -> Any:
    """`script(plans)`: from then on what is decoded follows the plans.

    Returns the token ids, row by row, of every prefill, and of every prompt with what the engine
    put behind it for the answer.
    """

    def start(plans: Mapping[str, Sequence[str]]) -> list[list[list[int]]]:
        plan = Script(encoder.tokenizer, plans)
        calls: list[list[list[int]]] = []

        class Scripted(Decoder):
            def __init__(self, model: Any, prompts: Any, *rest: Any) -> None:
                super().__init__(model, prompts, *rest)
                mask = prompts.attention_mask
                keep = torch.ones_like(prompts.input_ids) if mask is None else mask
                self.prompts = [
                    ids[kept.bool()].tolist()
                    for ids, kept in zip(prompts.input_ids, keep, strict=True)
                ]
                self.note(self.prompts)
                calls.append(self.prompts)

            def note(self, rows: list[list[int]]) -> None:
                self.rows = rows
                wanted = [plan.token(row) for row in rows]
                self.logits = self.logits.clone()
                for logits, token in zip(self.logits, wanted, strict=True):
                    if token is not None:
                        logits[token] += 1000

            def rewind(self, rows: Sequence[int] | None = None) -> None:
                super().rewind(rows)
                again = range(len(self.rows)) if rows is None else rows
                self.note([self.prompts[i] if i in again else r for i, r in enumerate(self.rows)])

            def select(self, rows: Sequence[int]) -> Any:
                part = super().select(rows)
                part.prompts = [self.prompts[i] for i in rows]
                part.rows = [self.rows[i] for i in rows]
                return part

            def join(self, other: Any) -> None:
                super().join(other)
                self.prompts = self.prompts + other.prompts
                self.rows = self.rows + other.rows

            def feed(
                self, tokens: Sequence[Sequence[int]], then: Sequence[int] = ()
            ) -> list[float]:
                likely = super().feed(tokens, then)
                self.note([[*r, *t] for r, t in zip(self.rows, tokens, strict=True)])
                if any(len(some) > 10 for some in tokens):  # the question, again
                    calls.append(self.rows)
                return likely

        monkeypatch.setattr(scheduler, "Decoder", Scripted)
        return calls

    return start


def run(
    model: Any,
    encoder: PromptEncoder,
    questions: Sequence[str],
    *,
    texts: Mapping[int, str] = TEXTS,
    snapshot: Any = None,
    stream: bool = False,
    **options: Any,
) -> tuple[list[Answer], list[Event]]:
    top_k = model.config.top_k_documents
    snapshot = snapshot or FakeSnapshot(model, encoder, texts, top_k=max(top_k, len(texts)))
    found = list(asked(model, encoder, questions, snapshot, AskOptions(**options), stream=stream))
    answers = {text: e.data for text, e in found if e.kind == "answer"}
    return [answers[text] for text in questions], [e for _, e in found]


def asked(
    model: Any,
    encoder: PromptEncoder,
    questions: Sequence[str],
    snapshot: Any,
    options: AskOptions,
    *,
    stream: bool = False,
) -> Iterator[tuple[str, Any]]:
    form = AskFormat(model, encoder)
    running = Scheduler(model)
    for text in questions:
        form.check_length(text, options)
        running.add(Request(text, snapshot, options, form, stream))
    while not running.idle:
        for request, event in running.step():
            yield request.question, event


def read(answer: Answer) -> list[list[int]]:
    return [[c.number for c in r.read] for r in answer.rounds]
