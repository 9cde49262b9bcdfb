"""Haystacks, and question sets in them.

A haystack is common to all questions of a set and is encoded once. It does not depend on the seed,
and a larger one begins with the documents of a smaller one.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import repeat
from pathlib import Path

from msa.errors import InputError
from msa.evaluation.question_sets import Question, QuestionSet, hash_of
from msa.evaluation.tasks.base import Request
from msa.text.splitting import split_text
from msa.types import Document

DOCUMENT_TOKENS = 256
"""Tokens of a document of a haystack, at most."""
SECTION_CHARACTERS = 8000
ENDINGS = (".txt", ".md", ".jsonl", ".txt.gz", ".jsonl.gz")
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""RULER's sentences without meaning."""


@dataclass(frozen=True, slots=True)
class Item:
    """A question and the documents that are its own."""

    question: Question
    documents: tuple[Document, ...]


def drawing(request: Request, name: str) -> random.Random:
    """The source of all that a task draws: by its name, the split and the seed."""
    return random.Random(f"{name}/{request.split}/{request.seed}")


def noise_haystack(request: Request) -> list[Document]:
    """Documents of RULER's noise, all equal, `request.size` tokens of them."""
    one = max(1, request.count_tokens(NOISE))
    text = "\n".join([NOISE] * max(1, DOCUMENT_TOKENS // one))
    return fill(repeat(text), request.size, request.count_tokens)


def text_haystack(request: Request) -> list[Document]:
    """Real text from the folder `request.texts`, `request.size` tokens of it.

    The folder's files are taken by turns, a document of each, so that a small haystack has text of
    every kind. They are plain text or Markdown (`.txt`, `.md`) or JSON lines with a `text`
    (`.jsonl`), packed (`.gz`) or not.

    Raises:
        InputError: no folder was given, it has no such file, or too little text.
    """
    if not request.size:
        return []
    return list(_text_documents(request.text_folder(), request.size, request.count_tokens))


@lru_cache(maxsize=1)  # the tasks of a family are loaded one after the other
def _text_documents(
    folder: Path, size: int, count_tokens: Callable[[str], int]
) -> tuple[Document, ...]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --texts takes a folder with text files")
    paths = sorted(p for p in folder.rglob("*") if p.name.endswith(ENDINGS) and p.is_file())
    if not paths:
        raise InputError(f"{folder}: holds no text; expected files {', '.join(ENDINGS)}")
    parts = _by_turns([_parts(path, count_tokens) for path in paths])
    found = fill(parts, size, count_tokens)
    if next(parts, None) is None:
        held = sum(count_tokens(d.text) for d in found)
        if held < size - DOCUMENT_TOKENS:
            raise InputError(
                f"{folder}: holds {held:,} tokens, and {size:,} were asked for; give a folder with "
                "more text, or a smaller size"
            )
    return tuple(found)


def fill(texts: Iterable[str], size: int, count_tokens: Callable[[str], int]) -> list[Document]:
    """Documents "hay-0", "hay-1", ... of these texts, as many as fit in `size` tokens."""
    found: list[Document] = []
    left, last, tokens = size, None, 0
    if left <= 0:
        return found
    for text in texts:
        if text is not last:  # noise repeats one text
            last, tokens = text, count_tokens(text)
        left -= tokens
        if left < 0:
            break
        found.append(Document(f"hay-{len(found)}", text))
    return found


def _by_turns(sources: Sequence[Iterator[str]]) -> Iterator[str]:
    """One from each, again and again, until all have ended."""
    left = list(sources)
    while left:
        for source in list(left):
            one = next(source, None)
            if one is None:
                left.remove(source)
            else:
                yield one


def _parts(path: Path, count_tokens: Callable[[str], int]) -> Iterator[str]:
    """The texts of a file as documents of a haystack."""
    for text in _sections(path):
        yield from split_text(text, DOCUMENT_TOKENS, count_tokens, markdown=False)


def _sections(path: Path) -> Iterator[str]:
    """The texts of a file; a plain text as pieces of some paragraphs."""
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            if ".jsonl" not in path.suffixes:
                held = ""
                for paragraph in file.read().split("\n\n"):
                    held += paragraph + "\n\n"
                    if len(held) >= SECTION_CHARACTERS:
                        yield held
                        held = ""
                yield held
                return
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise InputError(f"{path}:{number}: expected an object with a text")
                yield row["text"]
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error


def own(prefix: str, texts: Iterable[str], titles: Iterable[str] | None = None) -> list[Document]:
    """Documents of one question: "PREFIX.0", "PREFIX.1", ..."""
    if titles is None:
        return [Document(f"{prefix}.{i}", text) for i, text in enumerate(texts)]
    both = zip(texts, titles, strict=True)
    return [Document(f"{prefix}.{i}", text, title) for i, (text, title) in enumerate(both)]


def question_set(
    name: str, request: Request, haystack: Sequence[Document], items: Sequence[Item]
) -> QuestionSet:
    """The set of a haystack and of questions with documents of their own.

    Several questions may share documents (those of one conversation, say).
    """
    mine = {d.id: d for item in items for d in item.documents}
    questions = tuple(
        replace(item.question, own=tuple(d.id for d in item.documents)) for item in items
    )
    documents = (*haystack, *mine.values())
    return QuestionSet(name, request.split, documents, questions, hash_of([*documents, *questions]))
