from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from msa.ops import routing
from msa.ops.routing import (
    document_scores,
    normalize,
    reduce_queries,
    routing_vectors,
    select_documents,
)

HEADS = [(4, 4), (4, 2), (6, 1)]
few = settings(max_examples=25, deadline=None)


def naive(queries, mask, keys, counts, score, document_mask=None):
    """Eq. 2 as it is written: heads, then tokens, then chunks, one number at a time."""
    batch, tokens, heads, dim = queries.shape
    groups = keys.shape[1]
    result = torch.full((batch, len(counts)), -torch.inf, dtype=torch.float64)
    for row in range(batch):
        start = 0
        for document, count in enumerate(counts):
            for chunk in range(start, start + count):
                for token in range(tokens):
                    if not mask[row, token]:
                        continue
                    total = 0.0
                    for head in range(heads):
                        query = queries[row, token, head].double()
                        key = keys[chunk, head // (heads // groups)].double()
                        if score == "cosine":
                            total += float(query @ key / query.norm() / key.norm())
                        else:
                            total += float(query @ key) / dim**0.5
                    result[row, document] = max(result[row, document], total / heads)
            start += count
            if document_mask is not None and not document_mask[document]:
                result[row, document] = -torch.inf
    return result


def case(heads=4, groups=2, counts=(3, 1, 4), batch=2, tokens=3, dim=5, seed=0, score="cosine"):
    torch.manual_seed(seed)
    queries = torch.randn(batch, tokens, heads, dim)
    keys = torch.randn(sum(counts), groups, dim)
    mask = torch.rand(batch, tokens) < 0.7
    return queries, mask, normalize(keys) if score == "cosine" else keys, torch.tensor(counts)


def scores_of(queries, mask, keys, counts, score="cosine", document_mask=None):
    """Document scores by every token's vector, as "max" has it."""
    vectors, mask = reduce_queries(queries, mask, keys.shape[1], score)
    return document_scores(vectors, mask, keys, counts, document_mask)


def same(scores, expected):
    assert torch.equal(torch.isneginf(scores), torch.isneginf(expected))
    assert torch.allclose(scores.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("score", ["cosine", "dot"])
@pytest.mark.parametrize(("heads", "groups"), HEADS)
@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    block=st.integers(1, 20),
)
@settings(max_examples=5, deadline=None)
def test_scores_equal_equation_2_written_out(score, heads, groups, counts, seed, block):
    """For any ratio of heads, masked tokens and documents, and any size of blocks."""
    queries, mask, keys, counts = case(heads, groups, counts, seed=seed, score=score)
    document_mask = torch.rand(len(counts)) < 0.7
    expected = naive(queries, mask, keys, counts.tolist(), score, document_mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "CHUNK_BLOCK", block)
        same(scores_of(queries, mask, keys, counts, score, document_mask), expected)
        with_gradient = scores_of(
            queries.requires_grad_(), mask, keys, counts, score, document_mask
        )
    assert with_gradient.requires_grad
    same(with_gradient.detach(), expected)


def test_masked_documents_take_no_part_and_leave_the_others_alone():
    queries, mask, keys, counts = case()
    free = scores_of(queries, mask, keys, counts)
    masked = scores_of(queries, mask, keys, counts, document_mask=torch.tensor([True, False, True]))
    assert torch.isneginf(masked[:, 1]).all()
    assert torch.equal(masked[:, ::2], free[:, ::2])


def test_gradient_of_a_score_reaches_only_its_best_chunk():
    queries, _, keys, counts = case()
    mask = torch.ones(2, 3, dtype=torch.bool)
    keys = keys.clone().requires_grad_()
    scores_of(queries[:1], mask[:1], keys, counts)[0, 2].backward()
    touched = keys.grad.flatten(1).any(1)
    assert touched.sum() == 1
    assert touched[4:].any()  # the third document's chunks are the last four


def test_gradients_stay_finite_when_a_row_routes_by_nothing():
    queries, mask, keys, counts = case()
    mask[0], mask[1] = False, True
    queries.requires_grad_()
    scores = scores_of(queries, mask, keys, counts)
    scores[1].sum().backward()
    assert torch.isfinite(queries.grad).all()
    assert (queries.grad[0] == 0).all()


def test_bfloat16_is_scored_in_float32_even_under_autocast():
    queries, mask, keys, counts = case(seed=3)
    queries, keys = queries.bfloat16(), keys.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = scores_of(queries, mask, keys, counts, "dot")
    assert scores.dtype == torch.float32
    same(scores, naive(queries, mask, keys, counts.tolist(), "dot"))


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("gradient", [False, True])
def test_no_tensor_over_heads_tokens_and_chunks_is_built(gradient):
    heads, tokens, chunks = 8, 5, 600
    queries, mask, keys, counts = case(heads, 2, [2] * (chunks // 2), 1, tokens, dim=4)
    with Largest() as largest:
        scores_of(queries.requires_grad_(gradient), mask, keys, counts)
    assert largest.elements < heads * tokens * chunks / 2


@given(
    scores=st.lists(
        st.lists(st.sampled_from([-torch.inf, 0.0, 0.25, 0.5, 1.0]), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    ),
    top_k=st.integers(1, 5),
)
@few
def test_selection_is_the_best_first_then_nothing(scores, top_k):
    selection = select_documents(torch.tensor(scores), top_k)
    for row, documents, values in zip(
        scores, selection.documents.tolist(), selection.scores.tolist(), strict=True
    ):
        allowed = sorted((s for s in row if s > -torch.inf), reverse=True)[:top_k]
        width = min(top_k, 3)
        assert values == allowed + [-torch.inf] * (width - len(allowed))
        assert documents[len(allowed) :] == [-1] * (width - len(allowed))
        best = sorted(range(3), key=lambda d: (-row[d], d))  # equal scores: the lower row first
        assert documents[: len(allowed)] == best[: len(allowed)]


@pytest.mark.parametrize(("documents", "top_k"), [(10, 1), (10, 4), (100, 1), (100, 16), (5000, 4)])
def test_equal_scores_are_decided_in_favour_of_the_lower_row(documents, top_k):
    scores = torch.zeros(2, documents)
    scores[1, -1] = 1.0
    selection = select_documents(scores, top_k)
    assert selection.documents[0].tolist() == list(range(top_k))
    assert selection.documents[1].tolist() == [documents - 1, *range(top_k - 1)]


def test_a_row_without_routing_tokens_selects_nothing():
    queries, mask, keys, counts = case()
    mask[0], mask[1] = True, False
    selection = select_documents(scores_of(queries, mask, keys, counts), 2)
    assert (selection.documents[0] >= 0).all()
    assert selection.documents[1].tolist() == [-1, -1]
    assert torch.isneginf(selection.scores[1]).all()


def test_selection_holds_no_gradient():
    selection = select_documents(torch.rand(1, 4, requires_grad=True), 2)
    assert not selection.scores.requires_grad


@given(order=st.permutations(range(4)), seed=st.integers(0, 99))
@few
def test_the_order_of_the_documents_only_permutes_the_scores(order, seed):
    queries, mask, keys, counts = case(counts=(3, 1, 4, 2), seed=seed)
    mask[:, 0] = True
    parts = keys.split(counts.tolist())
    scores = scores_of(queries, mask, keys, counts)
    moved = scores_of(
        queries, mask, torch.cat([parts[i] for i in order]), counts[torch.tensor(order)]
    )
    assert torch.allclose(moved, scores[:, torch.tensor(order)], atol=1e-6)
    chosen = select_documents(moved, 2).documents
    same_documents = torch.tensor(order)[chosen]
    assert torch.equal(same_documents, select_documents(scores, 2).documents)


def test_folding_the_heads_of_a_group_keeps_the_mean_over_heads():
    """The vector of a token is the sum of its group's unit queries, over H."""
    queries = torch.randn(1, 2, 4, 3)
    vectors = routing_vectors(queries, 2, "cosine").view(1, 2, 2, 3)
    unit = queries / queries.norm(dim=-1, keepdim=True)
    assert torch.allclose(vectors[0, 1, 1], (unit[0, 1, 2] + unit[0, 1, 3]) / 4, atol=1e-6)
