"""Hard negatives: documents that look right for a question and are not.

Two kinds: documents that BM25 ranks high, and other documents with the title of a gold one (the
same article). What may be right after all is left out: documents that hold the text of a gold one,
and documents that hold an answer, when the answer is specific enough to tell.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msa.errors import TrainingError
from msa.memory.store.durable_files import write_file
from msa.text.bm25 import BM25Index
from msa.training.question_sets import QuestionSet, TrainingQuestion
from msa.types import Document

FORMAT_VERSION = 1
MIN_ANSWER_CHARACTERS = 5
"""Shorter answers stand in too many documents by chance."""
VAGUE_ANSWERS = frozenset({"true", "false", "maybe", "never", "always", "unknown", "neither"})
RETRIEVED_PER_NEGATIVE = 3
"""Documents ranked by BM25 for every negative that is kept; some are left out."""
BATCH = 2048

_WORDS = re.compile(r"[^\W_]+")

Rows = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class HardNegatives:
    """Hard negatives of every question of a set, in the order of its questions.

    Attributes:
        lexical: ids of documents that BM25 ranks high for the question, best first.
        same_title: ids of other documents with the title of a gold one, in random order.
    """

    lexical: Rows
    same_title: Rows

    def of(self, index: int, count: int) -> tuple[str, ...]:
        """Up to `count` negatives of question `index`: three lexical ones for one of its article.

        Where one kind runs out, the other fills up.
        """
        words, article, share = self.lexical[index], self.same_title[index], count // 4
        first = (*words[: count - share], *article[:share])
        return tuple(dict.fromkeys((*first, *words[count - share :], *article[share:])))[:count]


def hard_negatives(
    questions: QuestionSet, count: int = 16, *, cache: str | Path | None = None, seed: int = 0
) -> HardNegatives:
    """Find hard negatives of every question among the documents of its set.

    Args:
        questions: a set; of an unanswerable question, every document is a negative.
        count: documents of each kind, at most.
        cache: folder where the result is kept, under a hash of the data and of the settings, and
            found the next time.
        seed: of the draw among documents with the same title.

    Raises:
        InputError: `bm25s` is not installed.
        TrainingError: the cache cannot be written.
    """
    path = None
    if cache is not None:
        key = _hash(questions, count, seed)
        path = Path(cache) / f"negatives-{questions.name}-{key[:16]}.json"
        found = _read(path, questions)
        if found is not None:
            return found
    answer_filter = _Filter(questions.documents)
    negatives = HardNegatives(
        _lexical(questions, count, answer_filter),
        _same_title(questions, count, answer_filter, seed),
    )
    if path is not None:
        _write(path, negatives, questions)
    return negatives


def plain_words(text: str) -> str:
    """Lower-case words of a text between single spaces, for comparing what two texts say."""
    return " " + " ".join(_WORDS.findall(text.casefold())) + " "


class _Filter:
    """Tells which documents may be right after all."""

    def __init__(self, documents: Mapping[str, Document]) -> None:
        self._documents = documents
        self._words: dict[str, str] = {}

    def keep(self, question: TrainingQuestion, candidates: Iterable[str], count: int) -> list[str]:
        """The first `count` candidates that are wrong for the question."""
        gold = [self._plain(key) for key in question.gold]
        answers = [plain_words(a) for a in question.answers if _is_specific(a)]
        kept: list[str] = []
        for key in candidates:
            if key in question.gold or key in kept:
                continue
            words = self._plain(key)
            if not any(text in words for text in gold) and not any(a in words for a in answers):
                kept.append(key)
                if len(kept) == count:
                    break
        return kept

    def _plain(self, key: str) -> str:
        words = self._words.get(key)
        if words is None:
            words = self._words[key] = plain_words(self._documents[key].text)
        return words


def _is_specific(answer: str) -> bool:
    return len(answer) >= MIN_ANSWER_CHARACTERS and answer.casefold() not in VAGUE_ANSWERS


def _lexical(questions: QuestionSet, count: int, answer_filter: _Filter) -> Rows:
    ids = list(questions.documents)
    if not ids:
        return ((),) * len(questions.questions)
    index = BM25Index([document.content for document in questions.documents.values()], "train")
    k = min(count * RETRIEVED_PER_NEGATIVE, len(ids))
    rows: list[tuple[str, ...]] = []
    for start in range(0, len(questions.questions), BATCH):
        batch = questions.questions[start : start + BATCH]
        found = index.best([q.rewrite or q.question for q in batch], k)
        for question, best in zip(batch, found, strict=True):
            rows.append(tuple(answer_filter.keep(question, (ids[i] for i in best), count)))
    return tuple(rows)


def _same_title(questions: QuestionSet, count: int, answer_filter: _Filter, seed: int) -> Rows:
    by_title: dict[str, list[str]] = {}
    for document in questions.documents.values():
        if document.title:
            by_title.setdefault(document.title, []).append(document.id)
    rows = []
    for index, question in enumerate(questions.questions):
        rng = random.Random(f"{seed}/{questions.name}/{index}")
        titles = {questions.documents[key].title or "" for key in question.gold}
        candidates = [key for title in sorted(titles) for key in by_title.get(title, ())]
        rng.shuffle(candidates)
        rows.append(tuple(answer_filter.keep(question, candidates, count)))
    return tuple(rows)


def data_hash(questions: QuestionSet) -> str:
    """SHA-256 of the documents and questions of a set, in hexadecimal."""
    digest = hashlib.sha256()
    for d in questions.documents.values():
        digest.update(json.dumps([d.id, d.title, d.text]).encode())
    for q in questions.questions:
        digest.update(json.dumps([q.id, q.question, q.rewrite, q.answers, q.gold]).encode())
    return digest.hexdigest()


def _hash(questions: QuestionSet, count: int, seed: int) -> str:
    settings = [FORMAT_VERSION, count, seed, RETRIEVED_PER_NEGATIVE, data_hash(questions)]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _write(path: Path, negatives: HardNegatives, questions: QuestionSet) -> None:
    """Keep the lists as rows of the corpus."""
    row = {key: i for i, key in enumerate(questions.documents)}
    lists = {
        name: [[row[key] for key in keys] for keys in rows]
        for name, rows in (("lexical", negatives.lexical), ("same_title", negatives.same_title))
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of other data, or damaged
        write_file(path, [json.dumps(lists, separators=(",", ":")).encode()])
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be written ({error.strerror}); free space, or choose another folder"
        ) from error


def _read(path: Path, questions: QuestionSet) -> HardNegatives | None:
    """What was kept; None where nothing usable is."""
    ids: Sequence[str] = list(questions.documents)
    try:
        lists = json.loads(path.read_bytes())
        lexical, same_title = (
            tuple(tuple(ids[i] for i in row) for row in lists[name])
            for name in ("lexical", "same_title")
        )
    except (OSError, ValueError, LookupError, TypeError):
        return None
    count = len(questions.questions)
    if len(lexical) != count or len(same_title) != count:
        return None
    return HardNegatives(lexical, same_title)
