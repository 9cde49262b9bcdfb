"""Rows of tensors that hold runs of different length, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def ragged_range(starts: Tensor, counts: Tensor) -> Tensor:
    """Indices of runs of rows: starts[0], starts[0] + 1, ..., starts[1], ...; int64.

    Args:
        starts: [N] int64, first row of every run.
        counts: [N] int64, its length; 0 is allowed.
    """
    offsets = counts.cumsum(0) - counts
    shift = torch.repeat_interleave(starts - offsets, counts)
    return shift + torch.arange(len(shift), device=shift.device)
