"""Make a question set of needles: short facts, hidden in documents, that only reading can answer.

    python tools/make_needles.py data/needles --texts data/text/openstax.jsonl.gz

writes FOLDER/corpus.jsonl.gz and FOLDER/questions.train.jsonl.gz, a set as docs/training.md
describes it. A fact gives a key a value; keys are two words, values are numbers, words or codes.
Half of the questions ask for all values of a key, or for the values of several keys. Some facts
stand alone, others between sentences of real text; every fact has a neighbor with a similar key.
Words and sentences come from the texts; everything follows from the seed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from msa.errors import InputError
from msa.text.loaders import LoadedDocument, load_documents

FACTS = (
    "One of the special magic {kind}s for {key} is: {value}.",
    "The special magic {kind} for {key} is {value}.",
    "The {kind} of {key} is {value}.",
    "{key}: {kind} {value}.",
    "Remember that the {kind} for {key} is {value}.",
    "For {key}, the {kind} to use is {value}.",
    "{value} is the {kind} that belongs to {key}.",
    "Note: {key} has the {kind} {value}.",
)
QUESTIONS = (
    "What is the special magic {kind} for {key}?",
    "What is the special magic {kind} for {key} mentioned in the provided text?",
    "What is the {kind} of {key}?",
    "Which {kind} belongs to {key}?",
    "What {kind} does {key} have?",
)
SEVERAL = (
    "What are all the special magic {kind}s for {key} mentioned in the provided text?",
    "What are all the special magic {kind}s for {key}?",
    "List all {kind}s of {key}.",
    "Which {kind}s belong to {key}?",
)
KINDS = ("number", "number", "number", "word", "uuid", "code")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--questions", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    try:
        maker = Maker(sentences(args.texts), random.Random(args.seed))
    except InputError as error:
        sys.exit(f"error: {error}")
    while len(maker.questions) < args.questions:
        maker.add()
    args.folder.mkdir(parents=True, exist_ok=True)
    write(args.folder / "corpus.jsonl.gz", maker.documents)
    write(args.folder / "questions.train.jsonl.gz", maker.questions)


class Maker:
    """Facts, the documents that hold them, and questions.

    Args:
        passages: sentences of real text, a list for each text.
        rng: source of everything drawn.
    """

    def __init__(self, passages: Sequence[Sequence[str]], rng: random.Random) -> None:
        self.passages, self.rng = passages, rng
        counts = Counter(
            word
            for part in passages
            for line in part
            for word in re.findall(r"\b[a-z]{4,9}\b", line)
        )
        self.words = sorted(word for word, count in counts.items() if 2 <= count <= 200)
        self.documents: list[dict[str, object]] = []
        self.questions: list[dict[str, object]] = []

    def add(self) -> None:
        """A question, its facts, and a neighbor with a key that shares a word."""
        rng = self.rng
        kind, first, second = rng.choice(KINDS), *rng.sample(self.words, 2)
        key = f"{first}-{second}" if rng.random() < 0.6 else f"{first} {second}"
        shape = rng.random()
        if shape < 0.5:
            pairs = [(key, self._value(kind))]
            question = rng.choice(QUESTIONS).format(kind=kind, key=key)
        elif shape < 0.75:
            pairs = [(key, self._value(kind)) for _ in range(rng.randint(2, 4))]
            question = rng.choice(SEVERAL).format(kind=kind, key=key)
        else:
            keys = [key, *(self._key() for _ in range(rng.randint(1, 3)))]
            pairs = [(each, self._value(kind)) for each in keys]
            named = f"{', '.join(keys[:-1])} and {keys[-1]}"
            question = rng.choice(SEVERAL).format(kind=kind, key=named)
            rng.shuffle(pairs)  # read, and answered, in another order than asked
        template = rng.choice(FACTS)
        gold = [self._document(template.format(kind=kind, key=k, value=v)) for k, v in pairs]
        near = f"{first}-{rng.choice(self.words)}"
        self._document(template.format(kind=kind, key=near, value=self._value(kind)))
        self.questions.append(
            {
                "id": f"needle-{len(self.questions)}",
                "question": question,
                "answers": [", ".join(value for _, value in pairs)],
                "gold": gold,
                "hops": 1,
            }
        )

    def _key(self) -> str:
        return "-".join(self.rng.sample(self.words, 2))

    def _value(self, kind: str) -> str:
        rng = self.rng
        if kind == "number":
            return (
                str(rng.randrange(10**6, 10**7))
                if rng.random() < 0.7
                else str(rng.randrange(10**5))
            )
        if kind == "word":
            return self._key() if rng.random() < 0.7 else rng.choice(self.words)
        if kind == "uuid":
            return str(uuid.UUID(int=rng.getrandbits(128)))
        return "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ23456789", k=rng.randint(4, 8)))

    def _document(self, fact: str) -> str:
        """The fact alone, or between sentences of real text; the id of its document."""
        fact = fact[0].upper() + fact[1:]
        lines = [fact]
        if self.rng.random() < 0.5:
            passage = self.rng.choice(self.passages)
            start = self.rng.randrange(len(passage))
            lines = list(passage[start : start + 4])
            lines.insert(self.rng.randint(0, len(lines)), fact)
        name = f"needle-document-{len(self.documents)}"
        self.documents.append({"id": name, "title": "", "text": " ".join(lines)})
        return name


def sentences(paths: Sequence[Path]) -> list[list[str]]:
    """Sentences of every text, those that are neither very short nor very long."""
    found = []
    for document in texts(paths):
        lines = re.split(r"(?<=[.!?])\s+", document)
        kept = [line for line in lines if 20 <= len(line) <= 240]
        if len(kept) >= 4:
            found.append(kept)
    return found


def texts(paths: Sequence[Path]) -> Iterator[str]:
    """Texts of files and folders."""
    for loaded in load_documents(paths):
        if isinstance(loaded, LoadedDocument):
            yield loaded.document.text
        elif not loaded.ignored:
            raise InputError(f"{loaded.source}: {loaded.reason}")


def write(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """JSON lines, packed; the same rows give the same bytes."""
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    main()
