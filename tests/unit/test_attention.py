from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msa.ops.attention import (
    attend,
    gather_content,
    local_mask,
    memory_mask_of,
    rows_alone,
)
from msa.types import Content

few = settings(max_examples=30, deadline=None)


@given(data=st.data())
@few
def test_gathered_content_equals_a_loop(data):
    """Ragged documents, any selection; -1 may stand anywhere."""
    counts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    width = data.draw(st.integers(1, 4))
    row = st.lists(st.integers(-1, len(counts) - 1), min_size=width, max_size=width)
    documents = data.draw(st.lists(row, min_size=1, max_size=3))
    keys = torch.arange(sum(counts) * 6.0).view(-1, 2, 3)
    values = -keys
    content = gather_content(keys, values, torch.tensor(counts), torch.tensor(documents))
    parts = keys.split(counts)
    longest = 0
    for i, chosen in enumerate(documents):
        expected = torch.cat([keys[:0], *(parts[d] for d in chosen if d >= 0)])
        mask = content.mask[i]
        assert torch.equal(content.keys[i, mask], expected)
        assert torch.equal(content.values[i, mask], -expected)
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)  # padding behind
        longest = max(longest, len(expected))
    assert content.mask.shape == (len(documents), longest)


def test_gradient_flows_through_the_content_to_the_selected_chunks_only():
    keys = torch.randn(6, 1, 2, requires_grad=True)
    values = torch.randn(6, 1, 2, requires_grad=True)
    documents = torch.tensor([[1, -1], [1, 0]])
    content = gather_content(keys, values, torch.tensor([2, 1, 3]), documents)
    (content.keys * content.mask[..., None, None]).sum().backward()
    assert keys.grad[:, 0, 0].tolist() == [1, 1, 2, 0, 0, 0]
    assert values.grad is None


def naive_attention(queries, keys, values, mask, scaling):
    batch, tokens, heads, _ = queries.shape
    share = heads // keys.shape[2]
    out = torch.zeros(*queries.shape[:3], values.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for t in range(tokens):
            for h in range(heads):
                scores = keys[b, :, h // share].double() @ queries[b, t, h].double() * scaling
                scores = scores.masked_fill(~mask[b % len(mask), t], -torch.inf)
                out[b, t, h] = scores.softmax(0) @ values[b, :, h // share].double()
    return out


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("rows", [1, 2])
def test_attention_equals_a_naive_softmax(heads, groups, rows):
    torch.manual_seed(heads + groups)
    queries = torch.randn(2, 5, heads, 3)
    keys, values = torch.randn(2, 7, groups, 3), torch.randn(2, 7, groups, 3)
    mask = torch.rand(rows, 5, 7) < 0.5
    mask[:, :, 2] = True
    out = attend(queries, keys, values, mask, 0.7)
    assert torch.allclose(
        out.double(), naive_attention(queries, keys, values, mask, 0.7), atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
def test_a_single_token_sees_all_that_its_mask_lets_it(dtype, masked):
    torch.manual_seed(0)
    queries = torch.randn(3, 1, 6, 4, dtype=dtype)
    keys, values = (torch.randn(3, 9, 2, 4, dtype=dtype) for _ in range(2))
    mask = torch.rand(3, 1, 9) < 0.5
    mask[:, :, 4] = True
    everything = torch.ones_like(mask)
    out = attend(queries, keys, values, mask if masked else None, 0.7)
    assert out.dtype == dtype
    expected = naive_attention(
        queries.float(), keys.float(), values.float(), mask if masked else everything, 0.7
    )
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert torch.allclose(out.double(), expected, atol=tolerance)


def test_no_mask_is_causal_attention():
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(1, 6, n, 4) for n in (4, 2, 2))
    causal = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    out = attend(queries, keys, values, None, 0.5)
    assert torch.allclose(
        out.double(), naive_attention(queries, keys, values, causal, 0.5), atol=1e-5
    )


@given(
    queries=st.integers(1, 4),
    past=st.integers(0, 4),
    pads=st.lists(st.integers(0, 5), min_size=1, max_size=3),
)
@few
def test_local_mask_is_causal_without_padding_and_never_empty(queries, past, pads):
    keys = queries + past
    attention = torch.tensor([[int(k >= p) for k in range(keys)] for p in pads])
    mask = local_mask(queries, attention, keys, torch.device("cpu"))
    for row, pad in enumerate(pads):
        for t in range(queries):
            position = past + t
            sees = [k for k in range(keys) if mask[row, t, k]]
            assert sees == sorted({k for k in range(position + 1) if k >= pad} | {position})
    free = local_mask(queries, None, keys, torch.device("cpu"))
    assert torch.equal(free, local_mask(queries, torch.ones(1, keys), keys, torch.device("cpu")))


def test_memory_stands_in_front_and_is_seen_by_those_that_may():
    content_mask = torch.tensor([[True, True, False], [True, False, False]])
    content = Content(torch.zeros(2, 3, 1, 1), torch.zeros(2, 3, 1, 1), content_mask)
    local = local_mask(2, None, 2, torch.device("cpu"))
    everyone = memory_mask_of(local, content, None)
    assert everyone.shape == (2, 2, 5)
    assert torch.equal(everyone[:, :, 3:], local.expand(2, 2, 2))
    assert torch.equal(everyone[:, 0, :3], content_mask)
    some = memory_mask_of(local, content, torch.tensor([[False, True], [True, False]]))
    assert not some[0, 0, :3].any()
    assert torch.equal(some[0, 1, :3], content_mask[0])
    assert torch.equal(some[1, 0, :3], content_mask[1])
    assert torch.equal(some[:, :, 3:], everyone[:, :, 3:])


def test_rows_of_a_padded_batch_see_by_themselves_what_they_see_together():
    used = torch.tensor(
        [
            [1, 1, 1, 1, 1, 1],  # nothing is padded
            [0, 0, 1, 1, 1, 1],  # in front
            [0, 1, 1, 0, 0, 1],  # a gap, and padding among what is fed
            [1, 1, 1, 0, 0, 0],  # nothing is fed
            [0, 0, 0, 0, 1, 1],  # nothing stood before
        ]
    )
    rows = rows_alone(used, 3)
    assert [row.tokens for row in rows] == [3, 3, 1, 0, 2]
    together = local_mask(3, used, 6, used.device)
    for i, row in enumerate(rows):
        keys = torch.arange(6)[row.keys]
        assert keys.tolist() == used[i].nonzero()[:, 0].tolist()
        if row.tokens:
            own = together[i, 3 - row.tokens :, keys]
            mask = row.mask
            if mask is None:
                mask = local_mask(row.tokens, None, len(keys), used.device)
            assert torch.equal(mask[0], own)
    assert rows_alone(torch.tensor([[1, 1, 0]]), 2) is None  # padded behind


def test_a_row_of_content_has_no_padding():
    keys = torch.arange(12.0).view(2, 3, 1, 2)
    content = Content(keys, -keys, torch.tensor([[True, True, False], [True, False, True]]))
    row = content.row(1)
    assert torch.equal(row.keys, keys[1:, [0, 2]])
    assert torch.equal(row.values, -keys[1:, [0, 2]])
    assert row.mask.tolist() == [[True, True]]
