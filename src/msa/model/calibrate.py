"""Routers that find something before any training: whitened projections of the backbone's states.

The hidden states of a language model lie in a narrow cone: a few directions carry most of their
length and none of the difference between texts. Projecting onto the leading components of their
second moment, without the first, each divided by the root of its eigenvalue, spreads them evenly,
and cosines of averages then find related texts. For sentence embeddings of BERT the same steps are
known as whitening (Su et al., arXiv 2103.15316; Huang et al., arXiv 2104.01767).

Shapes: N texts, L tokens of the longest, C chunks, E hidden size, H query heads, G KV heads,
D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa.errors import InputError
from msa.ops.pooling import chunk_counts, pool_chunks

if TYPE_CHECKING:
    from msa.model.modeling_msa import MSAForCausalLM
    from msa.text.prompts import LocalContext

# Texts below which the second moment of their states says more about them than about language.
MIN_TEXTS = 64
# Questions weigh as much as so many chunks: there are fewer of them than chunks.
QUESTION_WEIGHT = 4.0
# Share of the mean eigenvalue that is added to each, so that no direction is blown up.
EIGENVALUE_FLOOR = 1e-2
# Chosen layers must add at least this much to recall@16 on the pairs of the texts.
MIN_GAIN = 0.005
MAX_LAYERS = 3
BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class RouterStates:
    """What the routers of some layers see, pooled as routing pools it.

    Attributes:
        chunk_counts: [N] int64, chunks of each document.
        documents: layer -> [C, E] float32, means of the router's input over each chunk. A linear
            projection of a mean is the mean of the projections, so these stand for Eq. 1.
        questions: layer -> [Q, E] float32, means over the routing tokens.
    """

    chunk_counts: Tensor
    documents: Mapping[int, Tensor]
    questions: Mapping[int, Tensor]


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What was chosen, and what recall to expect.

    Attributes:
        layers: the routing layers.
        pairs: questions (a sentence taken out of its text) over how many texts it was measured.
        recall_at_1, recall_at_16: share of them whose text was among the best, layers together.
        per_layer: layer -> recall@16 of it alone, for all layers that were considered.
    """

    layers: tuple[int, ...]
    pairs: int
    recall_at_1: float
    recall_at_16: float
    per_layer: Mapping[int, float]


@torch.no_grad()
def router_inputs(
    model: MSAForCausalLM,
    input_ids: Tensor,
    layers: Sequence[int],
    position_ids: Tensor | None = None,
) -> dict[int, Tensor]:
    """Input of the attention block after its norm, layer -> [N, L, E], for texts without memory.

    Args:
        model: only its layers up to the last of `layers` are run.
        input_ids: [N, L] int64, right-padded; causal attention keeps the padding out.
        layers: indices.
        position_ids: [N, L] int64; by default from 0, as documents have them.
    """
    inner: Any = model.model
    hidden = inner.embed_tokens(input_ids)
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    rotary = inner.rotary_emb(hidden, position_ids)
    wanted, states = set(layers), {}
    step = _plain_step()
    for index, layer in enumerate(inner.layers):
        if index in wanted:
            states[index] = cast(nn.Module, layer.input_layernorm)(hidden)
        if index == max(wanted):
            break
        hidden = layer(hidden, position_embeddings=rotary, step=step)
    return states


def _plain_step() -> Any:
    from msa.model.modeling_msa import Step

    return Step()


def router_states(
    model: MSAForCausalLM,
    documents: Sequence[Sequence[int]],
    questions: Sequence[LocalContext],
    layers: Sequence[int],
) -> RouterStates:
    """Pooled router inputs of documents and questions.

    Args:
        model: in evaluation mode.
        documents: token ids as stage 1 encodes them.
        questions: local contexts of round 1; their routing tokens are averaged.
        layers: indices.
    """
    size = model.config.chunk_size
    counts = chunk_counts(torch.tensor([len(d) for d in documents]), size)
    chunks: dict[int, list[Tensor]] = {i: [torch.empty(0)] * len(documents) for i in layers}
    for rows, ids, lengths in _batches(documents, model.device):
        for layer, states in router_inputs(model, ids, layers).items():
            pooled = pool_chunks(states.float()[:, :, None], lengths, size)[:, 0].cpu()
            parts = torch.split(pooled, chunk_counts(lengths, size).tolist())
            for row, part in zip(rows, parts, strict=True):
                chunks[layer][row] = part
    asked: dict[int, list[Tensor]] = {i: [torch.empty(0)] * len(questions) for i in layers}
    masks = [torch.tensor(q.routes) for q in questions]
    for rows, ids, _ in _batches([q.input_ids for q in questions], model.device):
        for layer, states in router_inputs(model, ids, layers).items():
            for row, state in zip(rows, states, strict=True):
                mask = masks[row].to(state.device)
                asked[layer][row] = state[: len(mask)][mask].float().mean(0).cpu()
    return RouterStates(
        counts,
        {i: torch.cat(parts) for i, parts in chunks.items()},
        {i: torch.stack(parts) if parts else torch.empty(0) for i, parts in asked.items()},
    )


def _batches(
    texts: Sequence[Sequence[int]], device: torch.device
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Rows, padded ids [n, L] and lengths [n], texts of similar length together."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * len(texts[order[stop]]) <= BATCH_TOKENS:
            stop += 1
        rows = order[start:stop]
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(texts[i]) for i in rows], batch_first=True, padding_value=0
        )
        lengths = torch.tensor([len(texts[i]) for i in rows])
        yield rows, ids.to(device), lengths.to(device)
        start = stop


def whitening(states: Tensor, components: int, weights: Tensor | None = None) -> Tensor:
    """Projection [components, E] onto the whitened leading directions without the first.

    Args:
        states: [n, E] float32.
        components: rows of the result; rows beyond E - 1 are zeros.
        weights: [n] float; equal by default.
    """
    x = states.double()
    weighted = x if weights is None else x * weights[:, None].double()
    moment = weighted.T @ x / (len(x) if weights is None else weights.sum())
    values, vectors = torch.linalg.eigh(moment)
    values, vectors = values.flip(0), vectors.flip(1)
    used = slice(1, min(components + 1, len(values)))
    values, vectors = values[used].clamp(min=0), vectors[:, used]
    scaled: Tensor = vectors / (values + EIGENVALUE_FLOOR * values.mean()).sqrt()
    result = scaled.new_zeros(components, x.shape[1])
    result[: scaled.shape[1]] = scaled.T
    return result.float()


def set_router(attention: Any, projection: Tensor) -> None:
    """Write one projection into both routers of a layer.

    Args:
        attention: the `MSAAttention` of a routing layer.
        projection: [G*D, E], leading component first. Components are dealt out over the KV heads,
            so that each head has its share of the strong ones; the query heads of a group get
            their key's.
    """
    dim = attention.head_dim
    groups = projection.shape[0] // dim
    heads = attention.router_q_proj[0].weight.shape[0] // dim
    keys = projection.view(dim, groups, -1).transpose(0, 1)  # [G, D, E]
    queries = keys.repeat_interleave(heads // groups, dim=0)
    attention.router_k_proj[0].weight.data.copy_(keys.flatten(0, 1))
    attention.router_q_proj[0].weight.data.copy_(queries.flatten(0, 1))


def whitened_scores(states: RouterStates, layer: int, projection: Tensor, groups: int) -> Tensor:
    """Document scores [Q, N] of pooled queries with both routers set to one projection."""
    dim = projection.shape[0] // groups
    heads = projection.view(dim, groups, -1).transpose(0, 1).flatten(0, 1)

    def unit(x: Tensor) -> Tensor:
        return F.normalize((x @ heads.T).view(len(x), groups, dim), dim=-1).flatten(1)

    scores = unit(states.questions[layer]) @ unit(states.documents[layer]).T / groups
    documents = torch.repeat_interleave(states.chunk_counts).expand_as(scores)
    best = scores.new_full((len(scores), len(states.chunk_counts)), -torch.inf)
    return best.scatter_reduce(1, documents, scores, reduce="amax")


def recall(scores: Tensor, gold: Tensor, k: int) -> float:
    """Share of rows of [Q, N] scores whose gold document [Q] is among the best k."""
    own = scores.gather(1, gold[:, None])
    return float(((scores > own).sum(1) < k).float().mean())


def standardize(scores: Tensor) -> Tensor:
    """Scores [Q, N] with mean 0 and standard deviation 1 in every row."""
    return (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True).clamp(min=1e-6)


def choose_layers(scores: Mapping[int, Tensor], gold: Tensor) -> tuple[int, ...]:
    """The layers whose standardized scores find most together, greedily, low ones first.

    A layer is added when recall@1 and recall@16 together rise by at least `MIN_GAIN` each on
    average; of layers that are as good, the lower one is taken, since stage 1 ends at the last.
    """
    chosen: list[int] = []
    total, reached = torch.zeros(()), 0.0
    while len(chosen) < MAX_LAYERS:
        best, best_value = -1, reached + 2 * MIN_GAIN
        for layer in sorted(set(scores) - set(chosen)):
            together = total + standardize(scores[layer])
            value = recall(together, gold, 1) + recall(together, gold, 16)
            if value > best_value or (best < 0 and not chosen):
                best, best_value = layer, value + 1e-9
        if best < 0:
            break
        chosen.append(best)
        total, reached = total + standardize(scores[best]), best_value
    return tuple(sorted(chosen))


def calibrate_routers(
    model: MSAForCausalLM,
    documents: Sequence[Sequence[int]],
    questions: Sequence[LocalContext],
    gold: Sequence[int],
    candidates: Sequence[int] | None = None,
) -> CalibrationReport:
    """Whiten the routers on texts, choosing the routing layers by recall when asked to.

    Args:
        model: its routing layers get new routers, in place. With `candidates`, all of these must
            be routing layers of it.
        documents: token ids of at least `MIN_TEXTS` texts, as stage 1 encodes them.
        questions: local contexts of questions that the texts answer, such as one sentence each.
        gold: per question the row of its document.
        candidates: layers to choose from; None keeps the model's routing layers.

    Returns:
        The report; its `layers` are those to keep. Recall is measured on every second question,
        whose states the whitening did not see.

    Raises:
        InputError: there are too few texts.
    """
    if len(documents) < MIN_TEXTS or len(questions) < 2:
        raise InputError(
            f"{len(documents)} texts with {len(questions)} questions: routers are whitened on at "
            f"least {MIN_TEXTS} texts; give more, or longer ones"
        )
    config = model.config
    layers = list(candidates or config.routing_layers)
    groups: int = config.num_key_value_heads
    states = router_states(model, documents, questions, layers)
    seen = torch.arange(len(questions)) % 2 == 0
    target = torch.tensor(gold)[~seen]
    scores = {}
    for layer in layers:
        chunks, asked = states.documents[layer], states.questions[layer]
        both = torch.cat([chunks, asked[seen]])
        weights = torch.ones(len(both))
        weights[len(chunks) :] = QUESTION_WEIGHT
        projection = whitening(both, groups * config.head_dim, weights)
        set_router(cast(Any, model.model.layers[layer]).self_attn, projection)
        scores[layer] = whitened_scores(states, layer, projection, groups)[~seen]
    chosen = choose_layers(scores, target) if candidates else tuple(layers)
    together = torch.stack([standardize(scores[i]) for i in chosen]).sum(0)
    return CalibrationReport(
        chosen,
        len(target),
        recall(together, target, 1),
        recall(together, target, 16),
        {i: recall(s, target, 16) for i, s in scores.items()},
    )
