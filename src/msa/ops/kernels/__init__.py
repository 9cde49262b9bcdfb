"""Fast twins of the references in `msa.ops`: same signature, same guarantee.

Shapes: B batch, T query tokens, N documents, C chunks, G KV heads, D head dim, K selected
documents.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from msa.ops.kernels import routing_cpu
from msa.types import Selection


def route_documents(
    vectors: Tensor,
    routing_mask: Tensor,
    routing_keys: Tensor,
    chunk_counts: Tensor,
    top_k: int,
    document_mask: Tensor | None = None,
    scales: Tensor | None = None,
) -> Selection:
    """`msa.ops.routing.route_documents` by the kernel for the device of the keys.

    Triton on CUDA where it is installed; else the blocked one, which runs on any device.

    Args and returns: as the reference.
    """
    if routing_keys.is_cuda and find_spec("triton") is not None:
        from msa.ops.kernels import routing_triton

        kernel = routing_triton.route_documents
    else:
        kernel = routing_cpu.route_documents
    return kernel(
        vectors,
        routing_mask,
        routing_keys,
        chunk_counts,
        top_k,
        document_mask,
        scales,
    )
