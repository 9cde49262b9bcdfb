"""How far a score of a matrix product can be from the exact one (ours).

The kernels score every chunk with a matrix product, whose rounding depends on how it is blocked,
and score the few candidates once more, exactly (`msa.ops.routing.exact_dots`). What a product of
length n computes for q . k, in any order of additions, with or without fused multiply-add, is off
by at most n u |q| |k| / (1 - n u), u the unit roundoff of its sums (Higham, Accuracy and Stability
of Numerical Algorithms, 3.1, with Cauchy-Schwarz). If the inputs are rounded before, by u' each,
2 u' |q| |k| more. So a chunk whose score is lower than a threshold by more than this bound is lower
in truth as well, and may be passed over; all others are candidates, however many they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Unit roundoff of the inputs of a float32 product, by torch's setting; "highest" rounds nothing.
_INPUT_ROUNDOFF = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}
_FLOAT32 = 2.0**-24
_BFLOAT16 = 2.0**-8


def error_bound(width: int, dtype: torch.dtype = torch.float32) -> float:
    """Bound of |computed - exact| / (|q| |k|) for products over `width` numbers.

    Args:
        width: n, numbers per vector.
        dtype: float32 (inputs rounded as `torch.get_float32_matmul_precision` allows), or bfloat16:
            queries and results rounded to bfloat16, sums in float32.

    Returns:
        The factor, a few roundings (of the result, of scales, of thresholds) included.
    """
    sums = (2 * width + 16) * _FLOAT32  # twice n: some units truncate instead of rounding
    if dtype == torch.bfloat16:
        return (sums + 2 * _BFLOAT16) * 1.05
    return (sums + 2 * _INPUT_ROUNDOFF[torch.get_float32_matmul_precision()]) * 1.05


def longest(vectors: Tensor) -> float:
    """Length of the longest of some vectors [c, n], or a little more; 0 where there are none.

    Vectors that are not finite do not count: their scores are NaN or infinite, in the product as in
    truth.
    """
    if not len(vectors):
        return 0.0
    lengths = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float32)
    return float(lengths.nan_to_num(0.0, posinf=0.0).max()) * 1.001
