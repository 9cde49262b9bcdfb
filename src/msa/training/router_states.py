"""What the routers of a frozen model see, computed once and kept on disk.

A router is a linear projection of its layer's input. Documents are pooled after it (Eq. 1), and the
mean of projections is the projection of the mean: the inputs' means per chunk are all that a
router's training needs of a document. The same holds for questions when their routing tokens are
averaged ("pooled") or one is taken ("last"); for the other reductions the states of all routing
tokens are kept, some ten to twenty times as much.

Shapes: N documents, C chunks of all documents in a row, Q queries, S kept states of all queries in
a row, E hidden size.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from msa.errors import InputError, TrainingError
from msa.memory.ingest.encoder import length_buckets
from msa.memory.store.durable_files import write_file
from msa.memory.store.manifest import tokenizer_fingerprint
from msa.model.calibrate import router_inputs
from msa.model.identity import model_fingerprints
from msa.ops.pooling import chunk_counts, pool_chunks
from msa.text.prompts import LocalContext, PromptEncoder, Reading
from msa.training.negatives import data_hash, plain_words
from msa.training.question_sets import QuestionSet
from msa.training.router_settings import StateSettings

if TYPE_CHECKING:
    from msa.model.modeling_msa import MSAForCausalLM

FORMAT_VERSION = 1
SHARD = 256
"""Documents or queries of a file; what a run that was interrupted does again, at most."""

ENCODED = (
    "prefix",
    "document",
    "question",
    "question_end",
    "tail",
    "number",
    "read",
    "end_of_read",
)
"""Fields of the template that stand in what is run; another refusal changes no state."""

Progress = Callable[[str, int, int], None]
"""Called with what is done ("documents of squad"), how many are done, and of how many."""


@dataclass(frozen=True, slots=True)
class Query:
    """One question at the beginning of a round, with what is right.

    Attributes:
        question: row of the question in its set.
        text: as it is asked.
        positives: rows of the documents that it asks for.
        read: rows of documents that were read before, which are neither right nor wrong.
    """

    question: int
    text: str
    positives: tuple[int, ...]
    read: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SetStates:
    """Router inputs of a question set, layer by layer.

    Attributes:
        name: of the set.
        chunk_counts: [N] int64.
        documents: layer -> [C, E] means per chunk.
        queries: what was asked, Q of them.
        query_counts: [Q] int64, states of each query; all 1 where one stands for the query.
        query_states: layer -> [S, E].
        twins: [N] int64, the same number for documents of the same words.
        groups: [N] names of what documents belong together (their title, or their id).
        cut: documents that were longer than allowed.
    """

    name: str
    chunk_counts: Tensor
    documents: Mapping[int, Tensor]
    queries: tuple[Query, ...]
    query_counts: Tensor
    query_states: Mapping[int, Tensor]
    twins: Tensor
    groups: tuple[str, ...]
    cut: int


def set_states(
    model: MSAForCausalLM,
    prompts: PromptEncoder,
    questions: QuestionSet,
    cache: str | Path,
    settings: StateSettings | None = None,
    progress: Progress | None = None,
) -> SetStates:
    """Router inputs of a set's documents and questions, from disk where they are there.

    Only layers up to the last routing layer are run. Questions are run without a memory: before
    any training nothing useful comes out of it. A run that was interrupted goes on after the last
    file that it finished.

    Args:
        model: frozen; put into evaluation mode meanwhile.
        prompts: the model's tokenizer and template.
        questions: questions without gold documents are left out.
        cache: folder; each set gets a folder in it, named by a hash of model and data.
        settings: by default those of `StateSettings`.
        progress: called after every batch.

    Raises:
        InputError: the set has no question with gold documents.
        TrainingError: the cache cannot be written or read; states are not finite numbers.
    """
    settings = settings or StateSettings()
    queries = make_queries(questions, settings)
    if not queries:
        raise InputError(
            f"{questions.name}: no question names a gold document, so routers cannot learn from "
            "it; leave the set out"
        )
    key = _key(model, prompts, questions, settings)
    folder = Path(cache) / f"states-{questions.name}-{key[:16]}"
    texts = [d.content for d in questions.documents.values()]
    encoder = _StateEncoder(model, prompts, texts, queries, settings)
    training = model.training
    model.eval()
    try:
        say = _Say(progress, questions.name)
        documents = _shards(folder, "documents", len(texts), encoder.documents, say)
        asked = _shards(folder, "queries", len(queries), encoder.queries, say)
    finally:
        model.train(training)
    layers = list(model.config.routing_layers)
    twin_of: dict[str, int] = {}
    twins = [twin_of.setdefault(plain_words(text), i) for i, text in enumerate(texts)]
    return SetStates(
        name=questions.name,
        chunk_counts=documents["counts"],
        documents={i: documents[f"layer.{i}"] for i in layers},
        queries=tuple(queries),
        query_counts=asked["counts"],
        query_states={i: asked[f"layer.{i}"] for i in layers},
        twins=torch.tensor(twins),
        groups=tuple(d.title or d.id for d in questions.documents.values()),
        cut=int(documents["cut"].sum()),
    )


def make_queries(questions: QuestionSet, settings: StateSettings) -> list[Query]:
    """What is asked of a set: round 1 of every question, and round 2 where there is one."""
    row = {key: i for i, key in enumerate(questions.documents)}
    made = []
    for index, question in enumerate(questions.questions):
        gold = tuple(row[key] for key in question.gold)
        if not gold:
            continue
        text = question.rewrite or question.question
        made.append(Query(index, text, gold))
        if settings.later_rounds and len(gold) > 1:
            read = random.Random(f"{settings.seed}/{questions.name}/{index}").choice(gold)
            others = tuple(g for g in gold if g != read)
            made.append(Query(index, text, others, (read,)))
    return made


def context_of(prompts: PromptEncoder, query: Query, texts: Sequence[str]) -> LocalContext:
    """The local context of a query; documents have the number of their row, from 1."""
    readings = [Reading(((row + 1, texts[row]),)) for row in query.read]
    return prompts.context(query.text, readings)


@dataclass(frozen=True, slots=True)
class _Say:
    """Progress of one set."""

    progress: Progress | None
    name: str

    def __call__(self, kind: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(f"{kind} of {self.name}", done, total)


class _StateEncoder:
    """Runs documents and queries through the model, up to the last routing layer."""

    def __init__(
        self,
        model: MSAForCausalLM,
        prompts: PromptEncoder,
        texts: Sequence[str],
        queries: Sequence[Query],
        settings: StateSettings,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.texts = texts
        self.asked = queries
        self.settings = settings
        self.layers: list[int] = list(model.config.routing_layers)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        # adapters and routers in float32 on a frozen base in bfloat16
        self.mixed = len({p.dtype for p in model.parameters()}) > 1

    @torch.no_grad()
    def documents(self, start: int, stop: int) -> dict[str, Tensor]:
        """States [C, E] of each layer, means per chunk, "counts" [n], and "cut" [n] bool."""
        most, size = self.settings.max_document_tokens, self.model.config.chunk_size
        tokens = [self.prompts.document(i + 1, self.texts[i]) for i in range(start, stop)]
        cut = torch.tensor([len(ids) > most for ids in tokens])
        rows: list[dict[str, Tensor]] = [{}] * len(tokens)
        for places, lengths, states in self._run([ids[:most] for ids in tokens]):
            counts = chunk_counts(lengths, size).tolist()
            for layer, state in states.items():
                pooled = pool_chunks(state.float()[:, :, None], lengths, size)[:, 0]
                for place, part in zip(places, torch.split(pooled, counts), strict=True):
                    rows[place] = rows[place] | {f"layer.{layer}": part}
        return self._joined(rows) | {"cut": cut}

    @torch.no_grad()
    def queries(self, start: int, stop: int) -> dict[str, Tensor]:
        """States [S, E] of each layer: one of a query, or those of all its routing tokens."""
        contexts = [context_of(self.prompts, q, self.texts) for q in self.asked[start:stop]]
        reduction = self.model.config.query_reduction
        single = reduction in ("pooled", "last") and not self.settings.token_states
        rows: list[dict[str, Tensor]] = [{}] * len(contexts)
        top_k = self.model.config.top_k_documents
        positions = [context.positions(top_k) for context in contexts]
        for places, _, states in self._run([c.input_ids for c in contexts], positions):
            for layer, batch in states.items():
                for place, states_of_row in zip(places, batch, strict=True):
                    mask = torch.tensor(contexts[place].routes, device=self.model.device)
                    state = states_of_row[: len(mask)][mask].float()
                    if single and reduction == "last":
                        state = state[-1:]
                    elif single:
                        state = (self._weights(layer, state) @ state)[None]
                    rows[place] = rows[place] | {f"layer.{layer}": state}
        return self._joined(rows)

    def _weights(self, layer: int, states: Tensor) -> Tensor:
        """[s] weights of the routing tokens in the pooled query, as the model has them."""
        attention = cast(Any, self.model.model.layers[layer]).self_attn
        weight = attention.router_token_weight.weight[0].float()
        weights = (states @ weight).clamp(-15, 15).exp()
        return cast(Tensor, weights / weights.sum())

    @torch.no_grad()
    def _run(
        self, tokens: Sequence[Sequence[int]], positions: Sequence[Sequence[int]] | None = None
    ) -> Iterator[tuple[list[int], Tensor, dict[int, Tensor]]]:
        """Places, lengths [n] and layer -> states [n, L, E], in batches of similar length."""
        device = self.model.device
        for batch in length_buckets(list(enumerate(tokens)), self.settings.batch_tokens):
            places = [place for place, _ in batch]
            ids = pad_sequence([torch.tensor(t) for _, t in batch], batch_first=True).to(device)
            lengths = torch.tensor([len(t) for _, t in batch], device=device)
            at = None
            if positions is not None:
                rows = [torch.tensor(positions[place]) for place in places]
                at = pad_sequence(rows, batch_first=True).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.mixed):
                states = router_inputs(self.model, ids, self.layers, at)
            yield places, lengths, states

    def _joined(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        joined = {name: torch.cat([r[name] for r in rows]) for name in rows[0]}
        joined = {name: t.to("cpu", self.dtype) for name, t in joined.items()}
        if not all(bool(t.isfinite().all()) for t in joined.values()):
            raise TrainingError(
                f"router inputs are NaN, or infinite in {self.settings.dtype}; keep them in "
                "bfloat16, or load the model again in float32"
            )
        joined["counts"] = torch.tensor([len(next(iter(r.values()))) for r in rows])
        return joined


def _shards(
    folder: Path,
    kind: str,
    count: int,
    encode: Callable[[int, int], dict[str, Tensor]],
    say: _Say,
) -> dict[str, Tensor]:
    """States of all items in a row; missing files are made."""
    read: list[dict[str, Tensor]] = []
    for start in range(0, count, SHARD):
        stop = min(start + SHARD, count)
        path = folder / f"{kind}-{start // SHARD:05d}.safetensors"
        found = _read(path, stop - start)
        if found is None:
            found = encode(start, stop)
            _write(path, found)
        say(kind, stop, count)
        read.append(found)
    return {name: torch.cat([r[name] for r in read]) for name in read[0]}


def _read(path: Path, count: int) -> dict[str, Tensor] | None:
    """What an earlier run left; None where nothing usable is."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return None
    return found if len(found.get("counts", ())) == count else None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of other data, or damaged
        write_file(path, [save(tensors)])
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be written ({error.strerror}); free space, or choose another folder"
        ) from error


def _key(
    model: MSAForCausalLM, prompts: PromptEncoder, questions: QuestionSet, settings: StateSettings
) -> str:
    """Hash of everything that decides the states."""
    config = model.config
    parts: list[Any] = [
        FORMAT_VERSION,
        model_fingerprints(model).states,
        tokenizer_fingerprint(prompts.tokenizer),
        [getattr(prompts.template, name) for name in ENCODED],
        [config.chunk_size, config.routing_layers, config.query_reduction],
        asdict(settings),
        data_hash(questions),
    ]
    if config.query_reduction == "pooled" and not settings.token_states:
        for layer in config.routing_layers:
            attention = cast(Any, model.model.layers[layer]).self_attn
            parts.append(attention.router_token_weight.weight[0].tolist())
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
