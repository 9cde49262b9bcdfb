"""Numbers in eight bits, one scale per chunk.

A routing key in int8 is a quarter of one in float32. Its scores are a little off, so the best
candidates are scored once more from the keys on disk (`msa.memory.search.layer_keys`). float8 has
the same size and more range, which keys of unit length do not need; int8 is the closer of the two,
and the kernels take it.

Shapes: C chunks, G KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msa.errors import ConfigError, InputError

INT8_MAX = 127.0
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eight-bit integers and their scales: x is about values times scale.

    Rounded to the nearest, ties to even; a chunk's largest number becomes 127 or -127. The result
    for a chunk depends on nothing else, so it can be made again and compared bit for bit.

    Args:
        x: [C, G, D], any float dtype.

    Returns:
        values [C, G, D] int8; scales [C] float32, 0 for a chunk of zeros.

    Raises:
        InputError: a number is not finite.

    Symmetric absmax quantization, off by at most half a scale per number.
    """
    numbers, scales = _scaled(x, INT8_MAX)
    return numbers.round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scales


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float8 (e4m3): values [C, G, D] float8_e4m3fn, scales [C] float32.

    Raises:
        InputError: a number is not finite.
        ConfigError: the device has no float8.

    Off by at most 1/16 of each number, or half a smallest step near zero.
    """
    check_dtype(FP8, x.device)
    numbers, scales = _scaled(x, FP8_MAX)
    return numbers.clamp_(-FP8_MAX, FP8_MAX).to(FP8), scales


def _scaled(x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Numbers divided by their scale, in memory of their own, and the scales."""
    numbers = x.detach().to(torch.float32, copy=True)
    peaks = numbers.flatten(1).abs().amax(1) if numbers.numel() else numbers.new_zeros(len(x))
    if not bool(torch.isfinite(peaks).all()):
        raise InputError(
            "keys to be quantized hold what is no finite number; 'msa bank verify' finds the damage"
        )
    scales = peaks / largest
    # the smallest numbers of float32 have no scale: they are zeros
    scales = scales.masked_fill(scales < torch.finfo(torch.float32).tiny, 0.0)
    divisors = scales.masked_fill(scales == 0, torch.inf)
    return numbers.div_(divisors[:, None, None]), scales


def is_supported(dtype: torch.dtype, device: torch.device | str) -> bool:
    """True when the device can hold numbers of this dtype and turn them into float32 and back."""
    try:
        torch.ones(2, device=device).to(dtype).to(torch.float32)
    except (RuntimeError, TypeError, AssertionError):  # as builds of torch say it
        return False
    return True


def check_dtype(dtype: torch.dtype, device: torch.device | str) -> None:
    """Refuse a precision that a device lacks.

    Raises:
        ConfigError: it lacks it.
    """
    if not is_supported(dtype, device):
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"device '{device}' has no {name}; take float32 or int8 there, or another device"
        )


# ---- content: packed rows

SCALE_BYTES = 4
INT4_MAX = 7.0
PACKED = ("int8", "fp8", "int4")


def packed_width(head_dim: int, precision: str) -> int:
    """Bytes of a packed row of D numbers: the numbers, then their scale."""
    return (head_dim // 2 if precision == "int4" else head_dim) + SCALE_BYTES


def pack(x: Tensor, precision: str) -> Tensor:
    """Numbers in eight or four bits with a scale of their own for every row, in one tensor.

    A row is the D numbers of one KV head of one chunk, and after them the bytes of their float32
    scale; so rows can be copied, selected and hashed like any other.

    Args:
        x: [..., D], any float dtype; D even for "int4".
        precision: "int8", "fp8" (e4m3) or "int4" (two numbers to a byte, the first one low).

    Returns:
        [..., packed_width] uint8.

    Raises:
        InputError: a number is not finite.
        ConfigError: no such precision, or D cannot be packed so.

    Source: symmetric absmax quantization.
    """
    if precision not in PACKED or (precision == "int4" and x.shape[-1] % 2):
        raise ConfigError(
            f"precision={precision} of rows of {x.shape[-1]} numbers: expected one of "
            f"{', '.join(PACKED)}; int4 takes rows of even length"
        )
    rows = x.reshape(-1, 1, x.shape[-1])
    if precision == "int8":
        values, scales = quantize(rows)
    elif precision == "fp8":
        values, scales = quantize_fp8(rows)
    else:
        numbers, scales = _scaled(rows, INT4_MAX)
        nibbles = numbers.round_().clamp_(-INT4_MAX, INT4_MAX).to(torch.int8) + 8
        values = (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).to(torch.uint8)
    body = values.view(torch.uint8).flatten(1)
    packed = torch.cat([body, scales[:, None].view(torch.uint8)], dim=1)
    return packed.view(*x.shape[:-1], packed_width(x.shape[-1], precision))


def unpack(packed: Tensor, precision: str, dtype: torch.dtype) -> Tensor:
    """What `pack` was given, nearly: [..., D] in `dtype` for [..., packed_width] uint8."""
    body, tail = packed[..., :-SCALE_BYTES], packed[..., -SCALE_BYTES:]
    # copies, since a part of a row may begin at any byte
    scales = tail.clone(memory_format=torch.contiguous_format).view(torch.float32)
    if precision == "int4":
        pairs = torch.stack([body & 15, body >> 4], dim=-1).flatten(-2)
        numbers = pairs.float() - 8
    else:
        stored = torch.int8 if precision == "int8" else FP8
        numbers = body.view(stored).float()
    return (numbers * scales).to(dtype)
