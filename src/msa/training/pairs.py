"""Self-supervised pairs: questions and their documents made from texts alone, without labels.

Three kinds of query lead to a passage: a sentence of it, which is mostly taken out of the passage
(the inverse cloze task, arXiv 1906.00300); its title or heading; a question made from one of its
sentences by simple English rules. The result is a `QuestionSet` like any other.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from msa.errors import InputError
from msa.memory.store.reports import part_id
from msa.text.loaders import LoadFailure, load_documents
from msa.training.question_sets import QuestionSet, TrainingQuestion
from msa.training.questions import question_from, sentences
from msa.training.router_settings import PairSettings
from msa.types import Document

MIN_PASSAGE_WORDS = 24
SENTENCE_WORDS = (6, 60)
MAX_SAME_TITLE = 4
"""A title that more passages share says too little about each."""
_WORD = re.compile(r"[^\W\d_]{4,}")
_HEADING = re.compile(r"\A#{1,6} +(\S[^\n]*)\n+")


def count_words(text: str) -> int:
    """Words between white space."""
    return len(text.split())


def read_documents(paths: Sequence[str | Path]) -> tuple[list[Document], list[str]]:
    """Documents of files and folders, and one line for everything that gave none.

    What a folder happens to hold beside documents is not counted.
    """
    documents, failures = [], []
    for found in load_documents(paths):
        if not isinstance(found, LoadFailure):
            documents.append(found.document)
        elif not found.ignored:
            failures.append(f"{found.source}: {found.reason}")
    return documents, failures


def split_passages(
    documents: Iterable[Document],
    max_tokens: int = 120,
    count_tokens: Callable[[str], int] = count_words,
) -> Iterator[Document]:
    """Documents cut into passages where they are longer; ids of parts are those of a bank.

    Args:
        documents: of any length.
        max_tokens: of a passage.
        count_tokens: the tokenizer's count, or words.
    """
    from msa.text.splitting import split_text

    for document in documents:
        parts = split_text(document.text, max_tokens, count_tokens)
        if len(parts) == 1:
            yield document
            continue
        for number, text in enumerate(parts, 1):
            yield replace(document, id=part_id(document.id, number), text=text)


def make_pairs(
    passages: Iterable[Document],
    *,
    name: str = "pairs",
    seed: int = 0,
    limit: int | None = None,
    settings: PairSettings | None = None,
) -> QuestionSet:
    """A question set made from passages.

    Every passage is a document of the set; one of a few words is asked for by nothing. What would
    be asked of several passages in the same words leads to none, and is not asked.

    Args:
        passages: of the length that a bank holds; see `split_passages`.
        name: of the set.
        seed: with the passages' ids, decides everything.
        limit: passages used at most, drawn at random.
        settings: by default all kinds.

    Raises:
        InputError: no passage gives a query.
    """
    settings = settings or PairSettings()
    kept = list(passages)
    if limit is not None and len(kept) > limit:
        chosen = sorted(random.Random(f"{seed}/limit").sample(range(len(kept)), limit))
        kept = [kept[i] for i in chosen]
    titled = [_headed(passage) for passage in kept]
    shared: dict[str, int] = {}
    for title, _ in titled:
        shared[title] = shared.get(title, 0) + 1
    documents: dict[str, Document] = {}
    questions: list[TrainingQuestion] = []
    asked: dict[str, list[str]] = {}
    for passage, (title, body) in zip(kept, titled, strict=True):
        rng = random.Random(f"{seed}/{passage.id}")
        telling = title and shared[title] <= MAX_SAME_TITLE and _tells(title, body)
        if telling and rng.random() < settings.title:
            asked.setdefault(title, []).append(passage.id)
            passage = replace(passage, title=None, text=body)
        documents[passage.id], queries = _queries(passage, rng, settings)
        questions += queries
    for title, ids in asked.items():
        questions.append(TrainingQuestion(f"{ids[0]}/title", title, (), tuple(ids)))
    times = Counter(q.question.casefold() for q in questions)
    questions = [q for q in questions if times[q.question.casefold()] == 1]
    if not questions:
        raise InputError(
            f"no pairs can be made from {len(kept)} passages; give texts of at least "
            f"{MIN_PASSAGE_WORDS} words in whole sentences"
        )
    return QuestionSet(name, documents, tuple(questions))


def _headed(passage: Document) -> tuple[str, str]:
    """The title or the Markdown heading of a passage, and its text without that heading."""
    heading = _HEADING.match(passage.text)
    if heading:
        return passage.title or heading[1].strip(), passage.text[heading.end() :]
    return passage.title or "", passage.text


def _tells(title: str, body: str) -> bool:
    """True if the title has something to do with the text: a word in common."""
    words = {word.casefold() for word in _WORD.findall(title)}
    return any(word.casefold() in words for word in _WORD.findall(body))


def _queries(
    passage: Document, rng: random.Random, settings: PairSettings
) -> tuple[Document, list[TrainingQuestion]]:
    """The passage, perhaps without a sentence, and what is asked of it."""
    found = [s for s in sentences(passage.text) if _is_prose(s)]
    if count_words(passage.text) < MIN_PASSAGE_WORDS or not found:
        return passage, []
    rng.shuffle(found)
    gold = (passage.id,)
    queries: list[TrainingQuestion] = []
    if rng.random() < settings.question:
        for sentence in found[1:] or found:
            made = question_from(sentence, rng)
            if made is not None:
                question, answer = made
                queries.append(
                    TrainingQuestion(f"{passage.id}/question", question, (answer,), gold)
                )
                break
    if rng.random() < settings.sentence:
        asked = " ".join(found[0].split())
        queries.append(TrainingQuestion(f"{passage.id}/sentence", asked, (), gold))
        if len(found) > 2 and rng.random() < settings.removed:
            passage = replace(passage, text=_without(passage.text, found[0]))
    return passage, queries


def _is_prose(sentence: str) -> bool:
    words = count_words(sentence)
    letters = sum(c.isalpha() or c.isspace() for c in sentence)
    return SENTENCE_WORDS[0] <= words <= SENTENCE_WORDS[1] and letters >= 0.8 * len(sentence)


def _without(text: str, sentence: str) -> str:
    before, _, after = text.partition(sentence)
    return f"{before.rstrip()} {after.lstrip()}".strip()
