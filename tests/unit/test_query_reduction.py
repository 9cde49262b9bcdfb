"""How the routing tokens of a question come together, and the model that uses it."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import SMALL, make_tiny_model
from msa import MSAConfig, MSAForCausalLM
from msa.errors import ConfigError, InputError
from msa.memory.latent import LatentMemory
from msa.model.convert import convert_backbone
from msa.ops.routing import (
    QUERY_REDUCTIONS,
    chunk_scores,
    document_scores,
    normalize,
    reduce_queries,
    routing_vectors,
    select_documents,
)

ONE_VECTOR = [name for name in QUERY_REDUCTIONS if name != "max"]
each = pytest.mark.parametrize("reduction", QUERY_REDUCTIONS)


def case(heads=4, groups=2, batch=2, tokens=5, dim=6, chunks=7, seed=0):
    """Queries, a mask with holes and two tokens at least, unit keys, weights of tokens."""
    torch.manual_seed(seed)
    queries = torch.randn(batch, tokens, heads, dim)
    mask = torch.rand(batch, tokens) < 0.6
    mask[:, 1:3] = True
    keys = normalize(torch.randn(chunks, groups, dim))
    return queries, mask, keys, torch.rand(batch, tokens) + 0.1


def one_score(query, key, score):
    """Of one head."""
    product = float(query.double() @ key.double())
    if score == "cosine":
        return product / float(query.double().norm() * key.double().norm())
    return product / len(query) ** 0.5


def naive(queries, keys, score, reduction, weights):
    """Chunk scores of one question, all of whose tokens route: head by head, token by token."""
    tokens, heads, _ = queries.shape
    per_group = heads // keys.shape[1]
    if reduction == "pooled":
        pooled = []
        for head in range(heads):
            total = sum(w * q for w, q in zip(weights.double(), queries[:, head], strict=True))
            pooled.append(total / float(weights.double().sum()))
        queries, tokens, reduction = torch.stack(pooled)[None], 1, "max"
    scores = []
    for key in keys:
        of_tokens = [
            sum(
                one_score(queries[token, head], key[head // per_group], score)
                for head in range(heads)
            )
            / heads
            for token in range(tokens)
        ]
        mean = sum(of_tokens) / tokens
        scores.append({"max": max(of_tokens), "mean": mean, "last": of_tokens[-1]}[reduction])
    return torch.tensor(scores, dtype=torch.float64)


@each
@pytest.mark.parametrize("score", ["cosine", "dot"])
@given(
    shape=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    tokens=st.integers(2, 6),
    seed=st.integers(0, 999),
)
@settings(max_examples=5, deadline=None)
def test_scores_are_those_of_loops_over_heads_and_tokens(reduction, score, shape, tokens, seed):
    heads, groups = shape
    queries, mask, keys, weights = case(heads, groups, tokens=tokens, chunks=4, seed=seed)
    vectors, routes = reduce_queries(queries, mask, groups, score, reduction, weights)
    found = chunk_scores(vectors, routes, keys)
    for row, routing in enumerate(mask):
        some = queries[row, routing], keys, score, reduction, weights[row, routing]
        torch.testing.assert_close(found[row].double(), naive(*some), atol=2e-6, rtol=0)


def test_the_mean_vector_scores_as_the_mean_over_tokens_of_the_scores():
    """Which is `query_reduce_method` "mean" of the released code."""
    queries, mask, keys, _ = case(tokens=9)
    vectors, routes = reduce_queries(queries, mask, 2, "cosine", "mean")
    tokens = routing_vectors(queries, 2, "cosine") @ keys.flatten(1).T
    for row, routing in enumerate(mask):
        wanted = tokens[row, routing].mean(0)
        torch.testing.assert_close(chunk_scores(vectors, routes, keys)[row], wanted)


@each
def test_a_question_is_one_vector_unless_every_token_counts_by_itself(reduction):
    queries, mask, _, _ = case()
    vectors, routes = reduce_queries(queries, mask, 2, "cosine", reduction)
    size = 5 if reduction == "max" else 1
    assert vectors.shape == (2, size, 12)
    assert routes.shape == (2, size)
    assert routes.dtype == torch.bool


@each
@pytest.mark.parametrize("score", ["cosine", "dot"])
def test_of_a_single_token_all_reductions_are_the_same(reduction, score):
    queries, mask, _, weights = case(tokens=4)
    mask[:] = False
    mask[0, 2] = mask[1, 0] = True
    vectors, routes = reduce_queries(queries, mask, 2, score, reduction, weights)
    torch.testing.assert_close(vectors[routes], routing_vectors(queries, 2, score)[mask])


@each
@pytest.mark.parametrize("left", [0, 3])
def test_what_does_not_route_changes_nothing_whatever_it_holds(reduction, left):
    queries, mask, keys, weights = case()
    plain = reduce_queries(queries, mask, 2, "cosine", reduction, weights)
    queries = queries.masked_fill(~mask[..., None, None], torch.nan)
    weights = weights.masked_fill(~mask, torch.nan)
    padded = torch.nn.functional.pad(queries, (0, 0, 0, 0, left, 2), value=torch.nan)
    longer = torch.nn.functional.pad(mask, (left, 2))
    heavier = torch.nn.functional.pad(weights, (left, 2), value=torch.inf)
    vectors, routes = reduce_queries(padded, longer, 2, "cosine", reduction, heavier)
    torch.testing.assert_close(vectors[routes], plain[0][plain[1]])
    torch.testing.assert_close(chunk_scores(vectors, routes, keys), chunk_scores(*plain, keys))


@each
def test_a_row_without_routing_tokens_selects_nothing_and_leaves_the_others_alone(reduction):
    queries, mask, keys, weights = case(batch=3)
    mask[1] = False
    vectors, routes = reduce_queries(queries, mask, 2, "cosine", reduction, weights)
    assert routes.any(1).tolist() == [True, False, True]
    assert torch.isfinite(vectors).all()
    counts = torch.tensor([3, 4])
    selection = select_documents(document_scores(vectors, routes, keys, counts), 2)
    assert selection.documents[1].tolist() == [-1, -1]
    rows = torch.tensor([0, 2])
    alone = reduce_queries(queries[rows], mask[rows], 2, "cosine", reduction, weights[rows])
    torch.testing.assert_close(vectors[rows][alone[1]], alone[0][alone[1]])


def test_weights_of_tokens_are_relative_and_equal_by_default():
    queries, mask, _, weights = case()

    def pooled(some):
        return reduce_queries(queries, mask, 2, "cosine", "pooled", some)[0]

    torch.testing.assert_close(pooled(torch.full_like(weights, 7.0)), pooled(None))
    torch.testing.assert_close(pooled(1e-5 * weights), pooled(weights))
    last = torch.full_like(weights, 1e-6)
    last[:, 1] = 1e6
    alone = torch.zeros_like(mask)
    alone[:, 1] = True
    wanted = reduce_queries(queries, alone, 2, "cosine", "last")[0]
    torch.testing.assert_close(pooled(last), wanted)


@each
def test_vectors_are_float32_even_under_autocast(reduction):
    queries, mask, _, weights = case()
    queries, weights = queries.bfloat16(), weights.bfloat16()
    wanted, _ = reduce_queries(queries.float(), mask, 2, "dot", reduction, weights.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors, _ = reduce_queries(queries, mask, 2, "dot", reduction, weights)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, wanted)


@each
def test_gradients_reach_the_tokens_that_route_and_no_others(reduction):
    queries, mask, keys, weights = case(batch=3)
    mask[2] = False  # a row that routes by nothing
    queries.requires_grad_()
    weights.requires_grad_()
    vectors, routes = reduce_queries(queries, mask, 2, "cosine", reduction, weights)
    scores = document_scores(vectors, routes, keys, torch.tensor([3, 4]))
    scores[:2].sum().backward()
    touched = queries.grad.flatten(2).any(2)
    assert torch.isfinite(queries.grad).all()
    assert not (touched & ~mask).any()
    assert touched[:2].any(1).all()
    if reduction in ("mean", "pooled"):
        assert torch.equal(touched, mask)
    if reduction == "pooled":
        assert torch.equal(weights.grad != 0, mask)


def test_another_reduction_is_refused():
    queries, mask, _, _ = case()
    with pytest.raises(InputError, match=r"reduction='median': expected one of \('max', 'mean'"):
        reduce_queries(queries, mask, 2, "cosine", "median")


# ---- the model


def released(golden_folder, **changes):
    values = json.loads((golden_folder / "checkpoint/config.json").read_text())
    values["msa_config"] |= changes
    return MSAConfig.from_dict(values)


@pytest.mark.parametrize("name", ["max", "mean", "last"])
def test_released_checkpoints_name_their_reduction(golden_folder, name):
    assert released(golden_folder, query_reduce_method=name).query_reduction == name


def test_a_released_reduction_that_is_unknown_is_refused(golden_folder):
    with pytest.raises(ConfigError, match=r"query_reduce_method='sum': expected 'max', 'mean' or"):
        released(golden_folder, query_reduce_method="sum")


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ConfigError, match=r"query_reduction='median': expected one of"):
        MSAConfig(**SMALL, query_reduction="median")


@each
def test_a_model_selects_by_the_reduction_of_its_configuration(reduction):
    model = make_tiny_model(query_reduction=reduction)
    torch.manual_seed(1)
    documents, question = torch.randint(2, 500, (6, 20)), torch.randint(2, 500, (2, 7))
    routing = torch.tensor([[False, True, True, True, False, True, False]] * 2)
    hidden = []
    layer = model.model.layers[2]
    handle = layer.input_layernorm.register_forward_hook(lambda *a: hidden.append(a[2]))
    with torch.no_grad():
        states = model.encode_documents(documents, torch.full((6,), 20))
        hidden.clear()
        memory = LatentMemory(states, 2)
        model(question, memory=memory, routing_mask=routing)
    handle.remove()
    queries = layer.self_attn.router_q_proj(hidden[0]).unflatten(-1, (-1, 16))
    keys = states.layers[2].routing_keys
    for row in range(2):
        some = queries[row, routing[row]].detach()
        wanted = naive(some, keys, "cosine", reduction, torch.ones(len(some)))
        wanted = torch.stack([part.max() for part in wanted.split(3)])
        torch.testing.assert_close(memory.scores[2][row].double(), wanted, atol=1e-5, rtol=0)


def token_weights(model):
    return {n: p for n, p in model.named_parameters() if n.endswith("router_token_weight.weight")}


def test_a_converted_model_weighs_all_tokens_alike():
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(LlamaConfig(**SMALL))
    model = convert_backbone(backbone, query_reduction="pooled", routing_layers=[0, 2])
    assert sorted(token_weights(model)) == [
        f"model.layers.{i}.self_attn.router_token_weight.weight" for i in (0, 2)
    ]
    assert not any(weight.any() for weight in token_weights(model).values())
    assert all(weight.shape == (1, 32) for weight in token_weights(model).values())
    assert not token_weights(convert_backbone(backbone, query_reduction="mean"))


def test_learned_weights_of_tokens_are_saved_loaded_and_used(tmp_path):
    model = make_tiny_model(query_reduction="pooled")
    hidden, mask = torch.randn(1, 6, 64), torch.ones(1, 6, dtype=torch.bool)
    attention = model.model.layers[2].self_attn
    before, _ = attention.routing_vectors(hidden, mask)
    for weight in token_weights(model).values():
        torch.nn.init.normal_(weight)
    after, _ = attention.routing_vectors(hidden, mask)
    assert not torch.allclose(before, after, atol=1e-3)
    queries = attention.router_q_proj(hidden).unflatten(-1, (-1, 16))
    shares = torch.softmax(attention.router_token_weight(hidden)[..., 0], dim=1)
    wanted, _ = reduce_queries(queries, mask, 2, "cosine", "pooled", shares)
    torch.testing.assert_close(after, wanted)
    model.save_pretrained(tmp_path)
    again = MSAForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.config.query_reduction == "pooled"
    for name, weight in token_weights(again).items():
        assert torch.equal(weight, token_weights(model)[name]), name


def test_a_checkpoint_without_weights_of_tokens_loads_with_zeros_and_says_so(tmp_path, caplog):
    make_tiny_model().save_pretrained(tmp_path)
    config = MSAConfig.from_pretrained(tmp_path, query_reduction="pooled")
    logger = logging.getLogger("transformers")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = True
    try:
        model = MSAForCausalLM.from_pretrained(tmp_path, config=config, dtype=torch.float32)
    finally:
        logger.setLevel(level)
        logger.propagate = propagate
    assert "router_token_weight" in caplog.text
    assert len(token_weights(model)) == 2
    assert not any(weight.any() for weight in token_weights(model).values())
