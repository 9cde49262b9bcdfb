from __future__ import annotations

import pytest
import torch

from msa.errors import ConfigError, InputError
from msa.ops import quantization
from msa.ops.quantization import (
    FP8,
    check_dtype,
    is_supported,
    quantize,
    quantize_fp8,
)


def dequantize(values, scales):
    return values.float() * scales[:, None, None]


each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def keys(count=50, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, generator=generator) * torch.rand(count, 1, 1, generator=generator)
    return x.to(dtype)


@each_dtype
def test_int8_is_off_by_half_a_scale_at_most(dtype):
    x = keys(dtype=dtype)
    values, scales = quantize(x)
    assert values.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert values.shape == x.shape
    assert scales.shape == (50,)
    error = (dequantize(values, scales) - x.float()).abs().flatten(1).amax(1)
    assert bool((error <= 0.5 * scales * 1.0001).all())
    assert values.flatten(1).abs().amax(1).tolist() == [127] * 50


@each_dtype
def test_a_chunk_is_quantized_alike_alone_and_among_others(dtype):
    x = keys(dtype=dtype)
    values, scales = quantize(x)
    for i in (0, 17, 49):
        alone = quantize(x[i : i + 1])
        assert torch.equal(alone[0][0], values[i])
        assert torch.equal(alone[1][0], scales[i])


def test_what_is_given_stays_as_it_is():
    x = keys()
    before = x.clone()
    quantize(x)
    quantize_fp8(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("quantizer", [quantize, quantize_fp8])
def test_zeros_tiny_numbers_and_no_chunks(quantizer):
    x = torch.zeros(3, 2, 4)
    x[1] = 1e-44
    x[2, 0, 0] = 3.0
    values, scales = quantizer(x)
    restored = dequantize(values, scales)
    assert restored[:2].abs().max() == 0
    assert restored[2, 0, 0] == pytest.approx(3.0)
    assert scales[:2].tolist() == [0, 0]
    values, scales = quantizer(torch.empty(0, 2, 4))
    assert dequantize(values, scales).shape == (0, 2, 4)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("quantizer", [quantize, quantize_fp8])
def test_what_is_no_number_is_refused(quantizer, wrong):
    x = keys()
    x[20, 1, 3] = wrong
    with pytest.raises(InputError, match="no finite number"):
        quantizer(x)


def test_float8_is_off_by_a_sixteenth_at_most():
    x = keys()
    values, scales = quantize_fp8(x)
    assert values.dtype == FP8
    error = (dequantize(values, scales) - x).abs()
    # half a unit in the last of three places, or half the smallest step
    allowed = torch.maximum(x.abs() / 16, (scales * 2.0**-10)[:, None, None]) * 1.0001
    assert bool((error <= allowed).all())


def test_int8_is_the_closer_of_the_two_on_keys_of_unit_length():
    x = torch.nn.functional.normalize(keys(500), dim=-1)
    errors = [
        float((dequantize(*quantizer(x)) - x).pow(2).mean())
        for quantizer in (quantize, quantize_fp8)
    ]
    assert errors[0] < errors[1]


def test_a_precision_that_the_device_lacks_is_one_clear_line(monkeypatch):
    assert is_supported(torch.bfloat16, "cpu")
    check_dtype(torch.bfloat16, "cpu")
    assert not is_supported(torch.float32, "cuda:99")
    monkeypatch.setattr(quantization, "is_supported", lambda dtype, device: False)
    with pytest.raises(ConfigError, match=r"device 'cpu' has no float8_e4m3fn; take") as caught:
        quantize_fp8(keys())
    assert "\n" not in str(caught.value)
