"""The Triton kernel on the device itself: the same cases as in the interpreter, and a large one."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from msa.types import Selection
from routing_twins import cases, check, make, ragged, same, tolerance

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]
CASES = dict(cases())


@pytest.mark.parametrize("name", CASES)
def test_the_triton_kernel_is_a_twin(name):
    from msa.ops.kernels import routing_triton

    check(routing_triton.route_documents, CASES[name], "cuda")


@pytest.mark.parametrize("name", CASES)
def test_so_is_the_blocked_kernel(name):
    from msa.ops.kernels import routing_cpu

    check(routing_cpu.route_documents, CASES[name], "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_large_bank_is_routed_on_the_device_as_on_the_processor(dtype):
    from msa.ops.kernels import route_documents

    case = make(ragged(9, 40_000, 9), batch=3, tokens=40, groups=8, dim=32, top_k=16, dtype=dtype)
    expected = route_documents(**case)
    found = route_documents(**{k: v.cuda() if torch.is_tensor(v) else v for k, v in case.items()})
    assert found.documents.is_cuda
    same(Selection(found.documents.cpu(), found.scores.cpu()), expected, tolerance(case))
