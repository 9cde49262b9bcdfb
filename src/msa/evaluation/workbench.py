"""Systems by name over one question set; what they share is made once, when it is needed.

Names: `bm25-K`, `minilm-K`, `hybrid-K` (both), `backbone-K` (mean-pooled states of the model): the
model's reader, handed the K best documents of a retriever; `gold` (handed the gold documents) and
`closed` (handed none); each perhaps with `+memory` behind it (and the compressed memory to attend
to); `msa` (a memory bank), perhaps with options of `MemoryEngine.ask` behind it, as in
`msa:max_rounds=1,lexical_weight=0`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from msa.errors import InputError
from msa.evaluation.backbone import BackboneRetriever
from msa.evaluation.minilm import minilm_folder
from msa.evaluation.question_sets import QuestionSet
from msa.evaluation.reader import TextReader
from msa.evaluation.retrieval import (
    BM25Retriever,
    DenseRetriever,
    HybridRetriever,
    Progress,
    Retriever,
    SentenceEncoder,
)
from msa.evaluation.routing import bank_states
from msa.evaluation.systems import GoldSystem, MemorySystem, ReaderSystem, System, bank_documents
from msa.inference.engine import MemoryEngine
from msa.memory.bank import MemoryBank
from msa.memory.ingest.encoder import DEFAULT_BATCH_TOKENS
from msa.memory.latent import LatentMemory
from msa.model.checkpoint import Checkpoint
from msa.model.identity import model_fingerprints
from msa.types import LatentStates

RETRIEVERS = ("bm25", "minilm", "hybrid", "backbone")
ABLATIONS = {
    "@documents": tuple(
        f"msa:max_rounds=1,min_documents_per_round={n},max_documents_per_round={n}"
        for n in (1, 2, 4)
    ),
    "@interleave": ("msa", "msa:max_rounds=1"),
    "@text": ("gold", "gold+memory", "closed+memory", "closed"),
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
        max_new_tokens: of a reader's answer; by default as the checkpoint's options say.
        progress: makes a function that is told what is done, from a name of the work and its unit.
    """

    banks: Path
    cache: Path
    minilm: Path | None = None
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    max_new_tokens: int | None = None
    progress: Callable[[str, str], Progress] | None = None


class Workbench:
    """One set's systems.

    Args:
        checkpoint: the model of all of them; None for retrievers only.
        questions: the set.
        workplace: where things are kept.
    """

    def __init__(
        self, checkpoint: Checkpoint | None, questions: QuestionSet, workplace: Workplace
    ) -> None:
        self._given = checkpoint
        self._set = questions
        self._place = workplace

    def expanded(self, names: Sequence[str]) -> list[str]:
        """Names of systems, groups of ablations spelt out, none twice.

        Raises:
            InputError: there is no such group.
        """
        layers = self._checkpoint.model.config.routing_layers
        alone = (f'msa:layer_weights={{"{layer}": 1}},lexical_weight=0' for layer in layers)
        groups = {**ABLATIONS, "@layers": tuple(alone)}
        unknown = [name for name in names if name.startswith("@") and name not in groups]
        if unknown:
            raise InputError(f"no group {unknown[0]!r}; there are: {', '.join(groups)}")
        return list(dict.fromkeys(one for name in names for one in groups.get(name, (name,))))

    def system(self, name: str) -> System:
        """The system of that name.

        Raises:
            InputError: there is none.
        """
        first, _, options = name.partition(":")
        documents = self._set.documents
        if first == "msa":
            return MemorySystem(self._engine, documents, ask_options(options))
        first, _, more = first.partition("+")
        kind, _, depth = first.partition("-")
        if not options and more in ("", "memory"):
            if first in ("gold", "closed"):
                return GoldSystem(
                    self._reader(bool(more)), documents, None if first == "gold" else 0
                )
            if kind in RETRIEVERS and depth.isdecimal() and int(depth):
                retriever: Retriever = getattr(self, kind)
                return ReaderSystem(self._reader(bool(more)), retriever, documents, int(depth))
        raise InputError(
            f"system {name!r}: expected one of {'-K, '.join(RETRIEVERS)}-K, gold or closed, "
            "perhaps with +memory behind it, or msa:OPTION=VALUE,..."
        )

    @property
    def _checkpoint(self) -> Checkpoint:
        if self._given is None:
            raise InputError("a model is needed; give --model")
        return self._given

    @cached_property
    def bm25(self) -> Retriever:
        """Over the whole corpus."""
        return BM25Retriever(self._set.documents)

    @cached_property
    def minilm(self) -> Retriever:
        """Over the whole corpus."""
        encoder = SentenceEncoder(self._place.minilm or minilm_folder())
        tell = self._progress("embedding", "documents")
        return DenseRetriever(encoder, self._set.documents, self._place.cache, tell)

    @cached_property
    def hybrid(self) -> Retriever:
        """Z-scores of the two, added."""
        return HybridRetriever([self.bm25, self.minilm])

    @cached_property
    def backbone(self) -> Retriever:
        """Over the whole corpus."""
        tell = self._progress("embedding", "documents")
        return BackboneRetriever(
            self._checkpoint, self._set.documents, self._place.batch_tokens, tell
        )

    @cached_property
    def states(self) -> LatentStates:
        """Latent states of the whole corpus, in memory."""
        with MemoryBank.open(self._bank, read_only=True) as bank:
            return bank_states(bank, self._set.documents)

    @cached_property
    def _bank(self) -> Path:
        """Folder of a bank of the whole corpus; one that was left unfinished is gone on with."""
        held = self._checkpoint
        model = model_fingerprints(held.model)[0][:16]
        data = self._set.data_hash.replace("/", "-")
        folder = self._place.banks / f"{self._set.name}-{data}-{model}"
        exists = (folder / "bank.json").is_file()
        make = MemoryBank.open if exists else MemoryBank.create
        with make(folder, held) as bank:
            if bank.info().num_ids < len(self._set.documents):
                tell = self._progress("indexing", "documents")
                bank.add(
                    bank_documents(self._set.documents),
                    on_duplicate="skip",
                    batch_tokens=self._place.batch_tokens,
                    progress=lambda state: tell(state.documents, len(self._set.documents)),
                )
        return folder

    @cached_property
    def _engine(self) -> MemoryEngine:
        return MemoryEngine(MemoryBank.open(self._bank, self._checkpoint, read_only=True))

    def _reader(self, with_memory: bool) -> TextReader:
        """The model's reader; with the whole corpus as its memory if asked for."""
        held = self._checkpoint
        top_k = held.model.config.top_k_documents
        memory = LatentMemory(self.states, top_k) if with_memory else None
        tokens = self._place.max_new_tokens or held.ask_options.max_new_tokens
        return TextReader(held, max_new_tokens=tokens, memory=memory)

    def _progress(self, work: str, unit: str) -> Progress:
        if self._place.progress is None:
            return lambda done, whole: None
        return self._place.progress(f"{self._set.name}: {work}", unit)


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
