from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msa.ops.pooling import chunk_counts, pool_chunks

ragged = given(
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=5),
    chunk_size=st.integers(1, 9),
    extra=st.integers(0, 7),
)
few = settings(max_examples=30, deadline=None)


def values(lengths, extra=0, seed=0):
    torch.manual_seed(seed)
    return torch.randn(len(lengths), max(lengths) + extra, 2, 3), torch.tensor(lengths)


def naive(x, lengths, chunk_size):
    """Eq. 1 by hand: every document split on its own, every piece averaged."""
    return torch.stack(
        [
            piece.double().mean(0)
            for row, length in zip(x, lengths.tolist(), strict=True)
            for piece in row[:length].split(chunk_size)
        ]
    )


@ragged
@few
def test_means_equal_a_naive_loop(lengths, chunk_size, extra):
    x, true = values(lengths, extra)
    pooled = pool_chunks(x, true, chunk_size)
    expected = naive(x, true, chunk_size)
    assert pooled.shape == expected.shape
    assert torch.allclose(pooled.double(), expected, atol=1e-6)
    assert chunk_counts(true, chunk_size).tolist() == [-(-n // chunk_size) for n in lengths]


@ragged
@few
def test_what_stands_in_the_padding_never_matters(lengths, chunk_size, extra):
    x, true = values(lengths, extra)
    poisoned = x.clone()
    for row, length in enumerate(lengths):
        poisoned[row, length:] = torch.nan
    poisoned.requires_grad_()
    pooled = pool_chunks(poisoned, true, chunk_size)
    assert torch.equal(pooled, pool_chunks(x, true, chunk_size))
    pooled.sum().backward()
    assert torch.isfinite(poisoned.grad).all()
    for row, length in enumerate(lengths):
        assert (poisoned.grad[row, length:] == 0).all()


def test_a_chunk_never_spans_documents():
    """Changing one document changes its own chunks and no others."""
    x, lengths = values([5, 9, 4])
    before = pool_chunks(x, lengths, 4)
    x[1] += 1
    changed = (pool_chunks(x, lengths, 4) != before).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, True, True, False]


def test_a_short_last_chunk_is_divided_by_its_own_length():
    x = torch.ones(1, 8, 1, 1)
    assert pool_chunks(x, torch.tensor([6]), 4).flatten().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_at_the_end(dtype):
    """The sum stays float32: 700 values of about 100 are past float16's largest number."""
    torch.manual_seed(0)
    x = (100 + torch.randn(2, 1400, 4, 8)).to(dtype)
    pooled = pool_chunks(x, torch.tensor([1400, 1300]), 700)
    assert pooled.dtype == dtype
    assert torch.equal(pooled, naive(x, torch.tensor([1400, 1300]), 700).float().to(dtype))
