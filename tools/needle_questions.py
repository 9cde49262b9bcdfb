"""Write a question set of needles to train on: short facts, keys and their values.

    python tools/needle_questions.py data/needles --questions 20000 --seed 1

makes `corpus.jsonl.gz`, `questions.train.jsonl.gz` and `questions.dev.jsonl.gz` in the schema of
docs/training.md. Keys are words, numbers or UUIDs, and so are values; a key has one value or
several, and a question asks about one key or several. A part are variables that are handed on, and
a part asks about keys that have no document. All words of keys, all variables and what they are
assigned are of the part for training (`msa.evaluation.tasks.words`): no key of a test of RULER's is
among them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

from msa.evaluation.tasks.ruler import NEEDLE
from msa.evaluation.tasks.words import (
    draw_assigned,
    draw_distinct,
    draw_letters,
    draw_number,
    draw_uuid,
    draw_words,
    listed,
)

DEV_SHARE = 0.02
CHAIN_SHARE, UNANSWERABLE_SHARE = 0.1, 0.05
HOPS = (1, 2, 3, 4)
SHAPES = {(1, 1): 10, (2, 1): 2, (3, 1): 1, (4, 1): 2, (1, 2): 1, (1, 3): 1, (1, 4): 2}
"""(keys asked about, values of each) -> weight."""
KINDS = {
    # kind of value -> how it is called; one of a needle's own kind is RULER's
    "numbers": ("magic number", "access code", "ticket number", "number"),
    "words": ("magic word", "password", "code name", "watchword"),
    "uuids": ("magic uuid", "identifier", "token", "serial number"),
}
FORMS = (
    ("The {name} of {key} is {value}.", "What is the {name} of {key}?"),
    ("The {name} for {key}: {value}", "Which {name} is there for {key}?"),
    ("Remember that {key} has the {name} {value}.", "Which {name} does {key} have?"),
    ("{key} was given {value} as its {name}.", "What was {key} given as its {name}?"),
    ("Whoever asks for {key} hears the {name} {value}.", "What {name} belongs to {key}?"),
)
SEVERAL = "What are all the {name}s of {key}?"
RULER_SHARE = 0.4

Row = dict[str, object]
Draw = Callable[[random.Random], str]
DRAW: dict[str, Draw] = {
    "numbers": draw_number,
    "words": partial(draw_words, part="training"),
    "uuids": draw_uuid,
}


class Writer:
    """Draws documents and questions."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"needles to train on/{seed}")
        self.used: set[str] = set()
        self.documents: list[Row] = []
        self.questions: list[Row] = []

    def question(self) -> None:
        """One more question, with its documents."""
        draw = self.rng.random()
        if draw < CHAIN_SHARE:
            self._chain()
        else:
            self._needles(answered=draw > CHAIN_SHARE + UNANSWERABLE_SHARE)

    def _needles(self, answered: bool) -> None:
        rng = self.rng
        asked, values_each = rng.choices(list(SHAPES), list(SHAPES.values()))[0]
        key_kind, value_kind = rng.choice(list(DRAW)), rng.choice(list(DRAW))
        keys = self._new(DRAW[key_kind], asked)
        values = [self._new(DRAW[value_kind], values_each) for _ in keys]
        told, ask = self._form(value_kind, asked * values_each == 1)
        ids = [
            self._document(told.format(key=key, value=value))
            for key, row in zip(keys, values, strict=True)
            for value in row
        ]
        if answered:
            self._ask(ask.format(key=listed(keys)), [v for row in values for v in row], ids, 1)
        else:
            other = self._new(DRAW[key_kind], asked)
            self._ask(ask.format(key=listed(other)), [], ids, 0)

    def _form(self, kind: str, single: bool) -> tuple[str, str]:
        """Sentence and question, with {key} and {value} left to fill in."""
        if self.rng.random() < RULER_SHARE:
            told = NEEDLE.replace("{kind}", kind)
            what = (
                f"is the special magic {kind[:-1]}"
                if single
                else f"are all the special magic {kind}"
            )
            return told, f"What {what} for {{key}} mentioned in the provided text?"
        name = self.rng.choice(KINDS[kind])
        told, ask = self.rng.choice(FORMS)
        ask = ask if single else SEVERAL
        return told.replace("{name}", name), ask.replace("{name}", name)

    def _chain(self) -> None:
        rng = self.rng
        names = self._new(partial(draw_letters, part="training"), rng.choice(HOPS) + 1)
        (value,) = self._new(partial(draw_assigned, part="training"), 1)
        ids = [self._document(f"VAR {names[0]} = {value}")]
        ids += [self._document(f"VAR {b} = VAR {a}") for a, b in pairwise(names)]
        text = f"Find all variables that are assigned the value {value} in the text above."
        self._ask(text, names, ids, len(ids))

    def _new(self, draw: Draw, count: int) -> list[str]:
        return draw_distinct(lambda: draw(self.rng), count, self.used)

    def _document(self, text: str) -> str:
        self.documents.append({"id": f"n{len(self.documents)}", "text": text})
        return str(self.documents[-1]["id"])

    def _ask(self, text: str, answers: list[str], ids: list[str], hops: int) -> None:
        row: Row = {"id": f"q{len(self.questions)}", "question": text}
        if answers:
            row |= {"answers": [", ".join(answers)], "gold": ids, "hops": hops}
        else:
            row |= {"answers": [], "gold": [], "unanswerable": True, "context_doc": ids}
        self.questions.append(row)


def write(folder: Path, questions: int, seed: int) -> Writer:
    """The three files."""
    writer = Writer(seed)
    for _ in range(questions):
        writer.question()
    writer.rng.shuffle(writer.documents)
    dev = round(questions * DEV_SHARE)
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "corpus": writer.documents,
        "questions.train": writer.questions[dev:],
        "questions.dev": writer.questions[:dev],
    }
    for name, rows in files.items():
        # no time in the file: one seed gives one file, byte for byte
        with (
            (folder / f"{name}.jsonl.gz").open("wb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file,
        ):
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
    return writer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the set")
    parser.add_argument("--questions", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    made = write(args.output, args.questions, args.seed)
    print(f"{args.output}: {len(made.documents):,} documents, {len(made.questions):,} questions")


if __name__ == "__main__":
    main()
