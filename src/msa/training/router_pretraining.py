"""Routers alone, trained on cached states: seconds per epoch, no model in memory's way.

All routing layers are trained at once, each with Eq. 5 over thousands of documents per step, and
together with Eq. 5 over the mean of their scores, which is how they find documents in the end.
A step stays within one question set, whose documents are the hardest to tell apart.

Shapes: B queries of a step, N documents, C chunks, S states of all queries in a row, T states of
the longest query, E hidden size, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from msa.errors import InputError, TrainingError
from msa.ops.ragged import ragged_range
from msa.ops.routing import document_scores, normalize, reduce_queries, token_weights
from msa.text.prompts import PromptEncoder
from msa.training.losses import routing_loss
from msa.training.negatives import HardNegatives, hard_negatives
from msa.training.question_sets import QuestionSet
from msa.training.router_settings import RouterSettings, StateSettings
from msa.training.router_states import Progress, SetStates, set_states

if TYPE_CHECKING:
    from msa.model.modeling_msa import MSAForCausalLM

RECALLS = (1, 5, 16)
MAX_SKIPPED_IN_A_ROW = 8
EVALUATION_BATCH = 128


@dataclass(frozen=True, slots=True)
class RouterReport:
    """What came of it; recalls are shares of the gold documents among the best k of the whole set.

    Attributes:
        before, after: set -> k -> recall of the layers' mean score, on held-out questions; "all"
            holds the mean over all questions.
        layers_after: routing layer -> recall at the largest k of that layer alone, on all.
        epochs: that were run; `best_epoch` (from 1, 0 for the start) is the one that was kept.
        train_queries, held_out_queries: rounds of questions.
        left_out: queries that ask for held-out and other articles at once.
        skipped_losses: steps whose loss or gradient was not a number.
        cut: documents that were longer than allowed.
        seconds: of the training, without the states.
    """

    before: Mapping[str, Mapping[int, float]]
    after: Mapping[str, Mapping[int, float]]
    layers_after: Mapping[int, float]
    epochs: int
    best_epoch: int
    train_queries: int
    held_out_queries: int
    left_out: int
    skipped_losses: int
    cut: int
    seconds: float


class RouterHeads(nn.Module):
    """The routers of all routing layers, apart from the model, in float32."""

    def __init__(self, model: MSAForCausalLM) -> None:
        super().__init__()
        config = model.config
        self.layers: list[int] = list(config.routing_layers)
        self.groups: int = config.num_key_value_heads
        self.dim: int = config.head_dim
        self.score: str = config.routing_score
        self.reduction: str = config.query_reduction
        self.query = nn.ParameterDict()
        self.key = nn.ParameterDict()
        self.token = nn.ParameterDict()
        for layer in self.layers:
            attention = _attention(model, layer)
            name = str(layer)
            self.query[name] = _copy(attention.router_q_proj[0].weight)
            self.key[name] = _copy(attention.router_k_proj[0].weight)
            if self.reduction == "pooled":
                self.token[name] = _copy(attention.router_token_weight.weight)

    @torch.no_grad()
    def write_to(self, model: MSAForCausalLM) -> None:
        """Put the routers into the model."""
        for layer in self.layers:
            attention, name = _attention(model, layer), str(layer)
            attention.router_q_proj[0].weight.copy_(self.query[name])
            attention.router_k_proj[0].weight.copy_(self.key[name])
            if self.reduction == "pooled":
                attention.router_token_weight.weight.copy_(self.token[name])

    def vectors(self, layer: int, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Routing vectors [B, S, G*D] and their mask, of query states [B, T, E] with [B, T]."""
        queries = (states @ self.query[str(layer)].T).unflatten(-1, (-1, self.dim))
        reduction, weights = self.reduction, None
        if states.shape[1] == 1 and reduction != "max":
            reduction = "last"  # one state stands for the query: it was reduced when it was kept
        elif reduction == "pooled":
            weights = token_weights((states @ self.token[str(layer)].T)[..., 0])
        return reduce_queries(queries, mask, self.groups, self.score, reduction, weights)

    def keys(self, layer: int, states: Tensor) -> Tensor:
        """Routing keys [C, G, D] of pooled document states [C, E] (Eq. 1)."""
        keys = (states @ self.key[str(layer)].T).unflatten(-1, (self.groups, self.dim))
        return normalize(keys) if self.score == "cosine" else keys


def _attention(model: MSAForCausalLM, layer: int) -> Any:
    return cast(Any, model.model.layers[layer]).self_attn


def _copy(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().float().cpu().clone())


def pretrain_routers(
    model: MSAForCausalLM,
    prompts: PromptEncoder,
    sets: Sequence[QuestionSet],
    cache: str | Path,
    *,
    settings: RouterSettings | None = None,
    state_settings: StateSettings | None = None,
    negatives: Mapping[str, HardNegatives] | None = None,
    progress: Progress | None = None,
) -> RouterReport:
    """Train the routers of a frozen model on question sets; they are changed in place.

    Args:
        model: MSA model; nothing but its routers changes.
        prompts: its tokenizer and template.
        sets: labeled (`QuestionSet.load`) or made from texts (`pairs.make_pairs`).
        cache: folder for states and negatives; what is there is not computed again.
        settings, state_settings: by default those of the classes.
        negatives: set's name -> hard negatives of its questions, where they are known already.
        progress: called while states are made and after every epoch.

    Raises:
        InputError: a set without gold documents; too few questions to hold some out.
        TrainingError: the loss is not a number several times in a row, or the disk refused.
    """
    settings = settings or RouterSettings()
    data = []
    for questions in sets:
        states = set_states(model, prompts, questions, cache, state_settings, progress)
        hard = (negatives or {}).get(questions.name)
        if hard is None and settings.negatives:
            hard = hard_negatives(questions, cache=cache)
        data.append(_Data(questions, states, hard, settings))
    trainer = _RouterTrainer(RouterHeads(model), data, settings, model.config.aux_temperature)
    report = trainer.run(progress)
    trainer.heads.write_to(model)
    return report


class _Data:
    """One set, split into training and held-out queries."""

    def __init__(
        self,
        questions: QuestionSet,
        states: SetStates,
        negatives: HardNegatives | None,
        settings: RouterSettings,
    ) -> None:
        self.name = questions.name
        self.states = states
        row = {key: i for i, key in enumerate(questions.documents)}
        self.negatives = [
            () if negatives is None else _rows(negatives.of(q.question, settings.negatives), row)
            for q in states.queries
        ]
        self.starts = states.chunk_counts.cumsum(0) - states.chunk_counts
        self.query_starts = states.query_counts.cumsum(0) - states.query_counts
        held = [_is_held(group, settings) for group in states.groups]
        self.train: list[int] = []
        self.held_out: list[int] = []
        self.left_out = 0
        for index, query in enumerate(states.queries):
            gold = [held[d] for d in (*query.positives, *query.read)]
            if not any(gold):
                self.train.append(index)
            elif all(gold):
                self.held_out.append(index)
            else:
                self.left_out += 1
        random.Random(settings.seed).shuffle(self.held_out)
        self.held_out = self.held_out[: settings.max_held_out]

    def documents(self, layer: int, rows: Tensor) -> Tensor:
        """States [C, E] float32 of the chunks of some documents [n]."""
        chunks = ragged_range(self.starts[rows], self.states.chunk_counts[rows])
        return self.states.documents[layer][chunks].float()

    def queries(self, layer: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """States [B, T, E] float32 of some queries, and which of them are there [B, T]."""
        at = torch.tensor(rows)
        counts = self.states.query_counts[at]
        states = self.states.query_states[layer][
            ragged_range(self.query_starts[at], counts)
        ].float()
        padded = pad_sequence(list(torch.split(states, counts.tolist())), batch_first=True)
        return padded, torch.arange(padded.shape[1]) < counts[:, None]

    def targets(self, queries: Sequence[int], documents: Tensor) -> tuple[Tensor, Tensor]:
        """Positives [B, N] and ignored documents [B, N]: read before, or twins of right ones."""
        place = torch.full((len(self.states.chunk_counts),), -1)
        place[documents] = torch.arange(len(documents))
        twins = self.states.twins
        positives = torch.zeros(len(queries), len(documents), dtype=torch.bool)
        ignored = torch.zeros_like(positives)
        for i, index in enumerate(queries):
            query = self.states.queries[index]
            gold = torch.tensor((*query.positives, *query.read))
            ignored[i] = torch.isin(twins[documents], twins[gold])
            right = place[list(query.positives)]
            positives[i, right[right >= 0]] = True
        return positives, ignored & ~positives


def _rows(keys: Sequence[str], row: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(row[key] for key in keys)


def _is_held(group: str, settings: RouterSettings) -> bool:
    """Decided by the name of the article alone, so that all sets agree on it."""
    digest = hashlib.sha256(f"{settings.seed}/{group}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < settings.held_out


class _RouterTrainer:
    """Runs epochs and keeps the best routers."""

    def __init__(
        self,
        heads: RouterHeads,
        data: Sequence[_Data],
        settings: RouterSettings,
        temperature: float,
    ) -> None:
        self.heads = heads
        self.data = data
        self.settings = settings
        self.temperature = settings.temperature or temperature
        self.skipped = self.skipped_in_a_row = 0
        if not any(d.train for d in data) or not any(d.held_out for d in data):
            raise InputError(
                f"{sum(len(d.states.queries) for d in data)} questions are too few to train on "
                f"and to hold {settings.held_out:.0%} of their articles out; give more, or raise "
                "held_out"
            )

    def run(self, progress: Progress | None) -> RouterReport:
        """Train until recall on held-out questions has not risen for a while."""
        began = time.perf_counter()
        settings = self.settings
        before, _ = self.evaluate()
        best, best_epoch = before, 0
        best_state = {k: v.clone() for k, v in self.heads.state_dict().items()}
        optimizer = torch.optim.AdamW(
            self.heads.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
        )
        steps = sum(math.ceil(len(d.train) / settings.queries) for d in self.data)
        step = epoch = 0
        for epoch in range(1, settings.epochs + 1):
            for queries, data in self._batches(epoch):
                rate = settings.learning_rate * self._rate(step, steps)
                self._step(data, queries, optimizer, rate)
                step += 1
            found, _ = self.evaluate()
            if progress is not None:
                progress("epoch", epoch, settings.epochs)
            if _mean_recall(found) > _mean_recall(best):
                best, best_epoch = found, epoch
                best_state = {k: v.clone() for k, v in self.heads.state_dict().items()}
            elif epoch - best_epoch >= settings.patience:
                break
        self.heads.load_state_dict(best_state)
        after, layers = self.evaluate()
        return RouterReport(
            before=before,
            after=after,
            layers_after=layers,
            epochs=epoch,
            best_epoch=best_epoch,
            train_queries=sum(len(d.train) for d in self.data),
            held_out_queries=sum(len(d.held_out) for d in self.data),
            left_out=sum(d.left_out for d in self.data),
            skipped_losses=self.skipped,
            cut=sum(d.states.cut for d in self.data),
            seconds=time.perf_counter() - began,
        )

    def _rate(self, step: int, steps_per_epoch: int) -> float:
        """Share of the learning rate: up over the warm-up, then down to a tenth along a cosine."""
        settings = self.settings
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / (steps_per_epoch * settings.epochs))
        return min(1.0, (step + 1) / max(1, settings.warmup_steps)) * (0.1 + 0.9 * cosine)

    def _batches(self, epoch: int) -> Iterator[tuple[list[int], _Data]]:
        """All training queries once, in steps of one set each, in random order."""
        rng = random.Random(f"{self.settings.seed}/{epoch}")
        batches = []
        for data in self.data:
            order = rng.sample(data.train, len(data.train))
            size = self.settings.queries
            batches += [(order[i : i + size], data) for i in range(0, len(order), size)]
        rng.shuffle(batches)
        self._rng = rng
        yield from batches

    def _documents(self, data: _Data, queries: Sequence[int]) -> Tensor:
        """Rows of the documents of a step: gold, hard negatives, then others of the set."""
        wanted: dict[int, None] = {}
        for index in queries:
            wanted.update(dict.fromkeys(data.states.queries[index].positives))
        for index in queries:
            wanted.update(dict.fromkeys(data.negatives[index]))
        total = len(data.states.chunk_counts)
        count = min(self.settings.documents, total)
        for row in self._rng.sample(range(total), count):
            if len(wanted) >= count:
                break
            wanted[row] = None
        return torch.tensor(sorted(wanted))

    def _step(
        self, data: _Data, queries: list[int], optimizer: torch.optim.Optimizer, rate: float
    ) -> None:
        documents = self._documents(data, queries)
        positives, ignored = data.targets(queries, documents)
        counts = data.states.chunk_counts[documents]
        layers = self.heads.layers
        total = torch.zeros(())
        loss = torch.zeros(())
        for layer in layers:
            vectors, mask = self.heads.vectors(layer, *data.queries(layer, queries))
            keys = self.heads.keys(layer, data.documents(layer, documents))
            scores = document_scores(vectors, mask, keys, counts)
            loss = loss + routing_loss(scores, positives, self.temperature, ignored) / len(layers)
            total = total + scores / len(layers)
        if self.settings.together and len(layers) > 1:
            both = routing_loss(total, positives, self.temperature, ignored)
            loss = loss + self.settings.together * both
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.heads.parameters(), 1.0)
        if bool(torch.isfinite(loss) & torch.isfinite(norm)):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"the routers' loss was not a number {self.skipped_in_a_row} times in a row (last "
                f"in {data.name}); lower learning_rate, or raise temperature"
            )

    @torch.no_grad()
    def evaluate(self) -> tuple[dict[str, dict[int, float]], dict[int, float]]:
        """Recall of the mean score, by set and over "all", and of each layer at the largest k."""
        sums: dict[str, dict[int, float]] = {}
        alone = dict.fromkeys(self.heads.layers, 0.0)
        everything = sum(len(d.held_out) for d in self.data)
        for data in self.data:
            if not data.held_out:
                continue
            found = self._recalls(data)
            sums[data.name] = {k: v / len(data.held_out) for k, v in found["all"].items()}
            for layer in self.heads.layers:
                alone[layer] += found[str(layer)][RECALLS[-1]] / everything
        sizes = {d.name: len(d.held_out) / everything for d in self.data}
        overall = {k: sum(sizes[name] * r[k] for name, r in sums.items()) for k in RECALLS}
        return {**sums, "all": overall}, alone

    def _recalls(self, data: _Data) -> dict[str, dict[int, float]]:
        """Layer or "all" -> k -> sum of recalls over the held-out queries of a set."""
        documents = torch.arange(len(data.states.chunk_counts))
        keys = {i: self.heads.keys(i, data.states.documents[i].float()) for i in self.heads.layers}
        names = [*map(str, self.heads.layers), "all"]
        found = {name: dict.fromkeys(RECALLS, 0.0) for name in names}
        for start in range(0, len(data.held_out), EVALUATION_BATCH):
            queries = data.held_out[start : start + EVALUATION_BATCH]
            positives, ignored = data.targets(queries, documents)
            scores = {}
            for layer in self.heads.layers:
                vectors, mask = self.heads.vectors(layer, *data.queries(layer, queries))
                counts = data.states.chunk_counts
                scores[str(layer)] = document_scores(vectors, mask, keys[layer], counts)
            scores["all"] = torch.stack(list(scores.values())).mean(0)
            for name, values in scores.items():
                deepest = min(RECALLS[-1], values.shape[1])
                ranked = values.masked_fill(ignored, -torch.inf).topk(deepest, dim=1).indices
                right = positives.gather(1, ranked).float()
                for k in RECALLS:
                    share = right[:, :k].sum(1) / positives.sum(1).clamp(max=k)
                    found[name][k] += float(share.sum())
        return found


def _mean_recall(recalls: Mapping[str, Mapping[int, float]]) -> float:
    return sum(recalls["all"].values()) / len(RECALLS)
