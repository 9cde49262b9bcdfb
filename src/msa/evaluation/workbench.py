"""Systems by name over one question set; what they share is made once, when it is needed.

Names: `bm25-K`, `minilm-K`, `hybrid-K` (both), `backbone-K` (mean-pooled states of the model): the
model's reader, given the K best documents of a retriever, perhaps with `+rerank` after it (the
best put into another order by the model); `full` (given as many documents as there is room for);
`gold` (given the gold documents) and `closed` (given none); each perhaps with `+memory` after it
(and the compressed memory to attend to); `msa` (a memory bank), perhaps with options of
`MemoryEngine.ask` after it, as in `msa:max_rounds=1,lexical_weight=0`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from msa.errors import InputError
from msa.evaluation.backbone import BackboneRetriever
from msa.evaluation.banks import HaystackBanks
from msa.evaluation.corpus_words import CorpusWords
from msa.evaluation.minilm import minilm_folder
from msa.evaluation.question_sets import QuestionSet
from msa.evaluation.reader import TextReader
from msa.evaluation.rerank import Reranker
from msa.evaluation.retrieval import (
    BM25Retriever,
    DenseRetriever,
    HybridRetriever,
    JoinedRetriever,
    Progress,
    Retriever,
    SentenceEncoder,
)
from msa.evaluation.routing import bank_states
from msa.evaluation.systems import (
    FullSystem,
    GoldSystem,
    MemorySystem,
    ReaderSystem,
    System,
)
from msa.evaluation.tasks.base import Change
from msa.inference.engine import MemoryEngine
from msa.memory.bank import MemoryBank
from msa.memory.ingest.encoder import DEFAULT_BATCH_TOKENS
from msa.memory.latent import LatentMemory
from msa.model.checkpoint import Checkpoint
from msa.types import Document, LatentStates

RETRIEVERS = ("bm25", "minilm", "hybrid", "backbone")
ABLATIONS = {
    "@documents": tuple(
        f"msa:max_rounds=1,min_documents_per_round={n},max_documents_per_round={n}"
        for n in (1, 2, 4)
    ),
    "@interleave": ("msa", "msa:max_rounds=1"),
    "@text": ("gold", "gold+memory", "closed+memory", "closed"),
    "@depths": tuple(f"{name}-{k}" for name in RETRIEVERS for k in (1, 5, 10)),
    "@rerank": tuple(f"{name}-{k}+rerank" for name in RETRIEVERS for k in (1, 5, 10)),
}
"""Groups of systems by name; `@layers` (the memory ranked by one layer alone) depends on the
model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """Where a workbench keeps what it makes, and how it works.

    Attributes:
        banks: folder of memory banks, each under the hash of its data and model.
        cache: folder of embeddings.
        minilm: folder of the dense baseline; None to fetch it.
        batch_tokens: of documents encoded at once.
        progress: makes a function that is told what is done, from a name of the work and its unit.
    """

    banks: Path
    cache: Path
    minilm: Path | None = None
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    progress: Callable[[str, str], Progress] | None = None


class Workbench:
    """One set's systems.

    Args:
        checkpoint: the model of all of them; None for retrievers only.
        questions: the set.
        workplace: where things are kept.
        base: the set before its documents were changed, and the changes, if it is one that was.
        seed: of what `full` draws.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        questions: QuestionSet,
        workplace: Workplace,
        *,
        base: tuple[QuestionSet, Sequence[Change]] | None = None,
        seed: int = 0,
    ) -> None:
        self._given = checkpoint
        self._set = questions
        self._place = workplace
        self._base = base
        self._seed = seed
        self._owned = questions.owned()
        self._shared, self._own = _parted(questions)
        self._documents = (*self._shared, *self._own)

    def close(self) -> None:
        """Close the bank, if one was opened."""
        engine = self.__dict__.pop("_engine", None)
        if engine is not None:
            engine.close()
            engine.bank.close()

    def system(self, name: str) -> System:
        """The system of that name.

        Raises:
            InputError: there is none, or it would show questions what they must not see.
        """
        documents, owned = self._documents, self._owned
        found = parse_system(name)
        if found.memory and (owned or any(q.hidden for q in self._set.questions)):
            raise InputError(
                f"system {name!r}: +memory shows every document to every question, and here some "
                "see documents that others must not; leave +memory out"
            )
        if found.kind == "msa":
            return MemorySystem(self._engine, documents, found.options, owned=owned)
        if found.kind in ("gold", "closed"):
            depth = None if found.kind == "gold" else 0
            return GoldSystem(self._reader(found.memory), documents, depth)
        if found.kind == "full":
            reader = self._reader(found.memory)
            return FullSystem(reader, documents, owned=owned, seed=self._seed)
        retriever: Retriever = getattr(self, found.kind)
        return ReaderSystem(
            self._reader(found.memory),
            retriever,
            documents,
            found.depth,
            owned=owned,
            reranker=Reranker(self._checkpoint) if found.rerank else None,
        )

    @property
    def _checkpoint(self) -> Checkpoint:
        if self._given is None:
            raise InputError("a model is needed; give --model")
        return self._given

    @cached_property
    def bm25(self) -> Retriever:
        """Over the whole corpus."""
        return BM25Retriever(self._documents)

    @cached_property
    def minilm(self) -> Retriever:
        """Over the whole corpus."""
        encoder = SentenceEncoder(self._place.minilm or minilm_folder())
        tell = self._progress("embedding", "documents")
        return self._joined(lambda part: DenseRetriever(encoder, part, self._place.cache, tell))

    @cached_property
    def hybrid(self) -> Retriever:
        """Z-scores of the two, added."""
        return HybridRetriever([self.bm25, self.minilm])

    @cached_property
    def backbone(self) -> Retriever:
        """Over the whole corpus."""
        tell = self._progress("embedding", "documents")
        tokens, cache = self._place.batch_tokens, self._place.cache
        return self._joined(
            lambda part: BackboneRetriever(self._checkpoint, part, tokens, tell, cache)
        )

    def _joined(self, make: Callable[[Sequence[Document]], Retriever]) -> Retriever:
        """Of the haystack, kept for other sets that have the same, and of what is added to it."""
        parts = [part for part in (self._shared, self._own) if part]
        return JoinedRetriever([make(part) for part in parts])

    @cached_property
    def states(self) -> LatentStates:
        """Latent states of the whole corpus, in memory."""
        with MemoryBank.open(self._bank, read_only=True) as bank:
            return bank_states(bank, self._documents)

    @cached_property
    def _bank(self) -> Path:
        """Folder of a bank of the whole corpus."""
        banks = HaystackBanks(
            self._place.banks,
            self._checkpoint,
            batch_tokens=self._place.batch_tokens,
            progress=self._progress,
        )
        if self._base is None:
            return banks.bank(self._shared, self._own)
        before, changes = self._base
        return banks.changed(banks.bank(*_parted(before)), changes, self._owned)

    @cached_property
    def _engine(self) -> MemoryEngine:
        return MemoryEngine(MemoryBank.open(self._bank, self._checkpoint, read_only=True))

    def _reader(self, with_memory: bool) -> TextReader:
        """The model's reader; with the whole corpus as its memory if asked for."""
        held = self._checkpoint
        top_k = held.model.config.top_k_documents
        memory = LatentMemory(self.states, top_k) if with_memory else None
        tokens = held.ask_options.max_new_tokens

        def coverage(question: str, texts: Sequence[str]) -> list[float]:
            return self._words.coverage(question, texts)  # counted only where a reader asks

        return TextReader(held, max_new_tokens=tokens, memory=memory, coverage=coverage)

    @cached_property
    def _words(self) -> CorpusWords:
        """Of the whole corpus."""
        return CorpusWords(document.content for document in self._documents)

    def _progress(self, work: str, unit: str) -> Progress:
        if self._place.progress is None:
            return lambda done, whole: None
        return self._place.progress(f"{self._set.name}: {work}", unit)


def expanded_systems(names: Sequence[str], layers: Sequence[int]) -> list[str]:
    """Names of systems, groups of ablations spelt out, none twice.

    Args:
        names: of systems and groups.
        layers: the model's routing layers.

    Raises:
        InputError: there is no such group, or no such system.
    """
    alone = (f'msa:layer_weights={{"{layer}": 1}},lexical_weight=0' for layer in layers)
    groups = {**ABLATIONS, "@layers": tuple(alone)}
    unknown = [name for name in names if name.startswith("@") and name not in groups]
    if unknown:
        raise InputError(f"no group {unknown[0]!r}; there are: {', '.join(groups)}")
    found = list(dict.fromkeys(one for name in names for one in groups.get(name, (name,))))
    for name in found:
        parse_system(name)
    return found


@dataclass(frozen=True, slots=True)
class SystemName:
    """A system's name, taken apart.

    Attributes:
        kind: "msa", "full", "gold", "closed", or a retriever.
        depth: documents passed on by a retriever; 0 for the others.
        memory: whether the compressed memory is attended to.
        rerank: whether the model puts the best documents into another order.
        options: of `MemoryEngine.ask`.
    """

    kind: str
    depth: int = 0
    memory: bool = False
    rerank: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_system(name: str) -> SystemName:
    """Take a system's name apart.

    Raises:
        InputError: there is no such system.
    """
    first, _, options = name.partition(":")
    if first == "msa":
        return SystemName("msa", options=ask_options(options))
    first, *more = first.split("+")
    kind, _, depth = first.partition("-")
    ranks = kind in RETRIEVERS and depth.isdecimal() and int(depth) > 0
    allowed = {"memory", "rerank"} if ranks else {"memory"}
    if not options and set(more) <= allowed and (ranks or first in ("full", "gold", "closed")):
        return SystemName(kind, int(depth or 0), "memory" in more, "rerank" in more)
    raise InputError(
        f"system {name!r}: expected one of {'-K, '.join(RETRIEVERS)}-K (perhaps with +rerank), "
        "full, gold or closed, perhaps with +memory after it, or msa:OPTION=VALUE,..."
    )


def _parted(questions: QuestionSet) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Documents that all questions see, and those that are some question's own."""
    owned = questions.owned()
    shared = tuple(d for d in questions.documents if d.id not in owned)
    return shared, tuple(d for d in questions.documents if d.id in owned)


def ask_options(text: str) -> dict[str, Any]:
    """`max_rounds=1,lexical_weight=0` as names and values.

    Raises:
        InputError: a part is no NAME=VALUE with a JSON value.
    """
    found: dict[str, Any] = {}
    for part in re.split(r",(?=\w+=)", text) if text else []:
        name, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"option {part!r}: expected NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError as error:
            raise InputError(f"option {part!r}: {value!r} is no JSON value") from error
    return found
