"""Cases in which a routing kernel must give what the reference gives.

That is the same selection, except among documents whose scores are within 1e-5 of each other.

As a program it runs all of them in Triton's interpreter (see tests/unit/test_routing_kernels.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from msa.ops.routing import normalize, route_documents
from msa.types import Selection


def make(
    counts,
    batch=2,
    tokens=5,
    groups=2,
    dim=8,
    top_k=4,
    dtype=torch.float32,
    seed=0,
    **more: Any,
) -> dict[str, Any]:
    """Arguments of a call; what must not be looked at is NaN."""
    torch.manual_seed(seed)
    counts = torch.as_tensor(counts, dtype=torch.int64)
    chunks = int(counts.sum())
    keys = normalize(torch.randn(chunks, groups, dim))
    vectors = torch.randn(batch, tokens, groups * dim) / dim**0.5
    mask = torch.rand(batch, tokens) < 0.7
    mask[:, :1] = True
    case = {
        "vectors": vectors,
        "routing_mask": mask,
        "routing_keys": keys,
        "chunk_counts": counts,
        "top_k": top_k,
        **more,
    }
    if dtype == torch.int8:
        scales = keys.flatten(1).abs().amax(1) / 127
        case["routing_keys"] = (keys / scales[:, None, None]).round().to(dtype)
        case["scales"] = scales
    else:
        case["routing_keys"] = case["routing_keys"].to(dtype)
    return case


def changed(case: dict[str, Any], **parts: Callable[[torch.Tensor], torch.Tensor]):
    return {**case, **{name: change(case[name]) for name, change in parts.items()}}


def put(*index: Any, value: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


def ragged(seed: int, documents: int, most: int) -> torch.Tensor:
    return torch.randint(1, most + 1, (documents,), generator=torch.Generator().manual_seed(seed))


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    torch.manual_seed(0)
    many = ragged(1, 60, 9)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        yield f"ragged documents, {dtype}", make(many, dtype=dtype)
        yield (
            f"a filter per question, {dtype}",
            make(many, batch=3, dtype=dtype, document_mask=torch.rand(3, len(many)) < 0.3),
        )
        yield f"one vector, {dtype}", make(many, batch=1, tokens=1, dtype=dtype)
        yield (
            f"one vector per question, {dtype}",
            changed(make(many, batch=5, tokens=1, dtype=dtype), routing_mask=put(3, value=False)),
        )
    yield "one vector for each of many questions", make(many, batch=19, tokens=1)
    yield "odd sizes", make(ragged(2, 43, 3), batch=3, tokens=7, groups=3, dim=7, top_k=5)
    yield "one number per key", make(ragged(3, 20, 4), groups=1, dim=1)
    yield "wide keys, many tokens", make(ragged(4, 30, 5), tokens=70, groups=5, dim=30)
    yield "one chunk each", make([1] * 150)
    yield "one document", make([77])
    yield "one long document among others", make([1, 2, 140, 1, 3], top_k=3)
    yield "documents without chunks", make([0, 3, 0, 0, 2, 1, 0, 70, 0], top_k=9)
    yield "fewer documents than k", make([2, 1, 3], top_k=8)
    yield "an empty bank", make([])
    yield "no chunk at all", make([0, 0])
    yield "no question", make(many, batch=0)
    silent = changed(make(many, batch=3), routing_mask=put(1, value=False))
    yield "a row without routing tokens", silent
    yield "no routing token", changed(silent, routing_mask=put(..., value=False))

    yield "deleted documents", make(many, document_mask=torch.rand(len(many)) < 0.8)
    only = torch.zeros(len(many), dtype=torch.bool)
    yield "all deleted", make(many, document_mask=only)
    only = put(-1, value=True)(only)
    yield "only the last one left", make(many, document_mask=only)
    yield "only the first one left", make(many, document_mask=only.flip(0))
    apart = torch.stack([only, only.flip(0)])
    yield "questions that share no document", make(many, document_mask=apart)
    yield (
        "one question may choose nothing",
        make(many, document_mask=put(1, value=False)(apart.clone())),
    )

    equal = changed(make([2] * 300, top_k=16), routing_keys=lambda k: k[:2].repeat(300, 1, 1))
    yield "300 equal documents", equal
    yield "300 equal documents, some deleted", {**equal, "document_mask": torch.rand(300) < 0.5}
    yield "keys of zeros", changed(make(many), routing_keys=torch.zeros_like)
    yield "vectors of zeros", changed(make(many), vectors=torch.zeros_like)
    coarse = changed(make(many), routing_keys=lambda k: (2 * k).round(), vectors=torch.round)
    yield "many equal scores", coarse
    close = changed(equal, routing_keys=lambda k: k * (1 + 1e-7 * torch.randn(len(k), 1, 1)))
    yield "scores that rounding swaps", close
    yield "long keys", changed(make(many), routing_keys=lambda k: 1e4 * k)

    yield "a key of NaN", changed(make(many), routing_keys=put(17, value=torch.nan))
    yield "a NaN in a key", changed(make(many), routing_keys=put(40, 1, 2, value=torch.nan))
    yield "a token of NaN", changed(make(many), vectors=put(0, 0, value=torch.nan))


def hidden(case: dict[str, Any], device: str) -> dict[str, Any]:
    """The call with NaN in everything that must not be looked at, on a device."""
    vectors = case["vectors"].masked_fill(~case["routing_mask"][:, :, None], torch.nan)
    keys = case["routing_keys"]
    case = {**case, "vectors": vectors}
    if keys.is_floating_point():  # keys lie in a larger buffer, as those of a bank that grows
        room = keys.new_full((len(keys) + 50, *keys.shape[1:]), torch.nan)
        room[: len(keys)] = keys
        case["routing_keys"] = room[: len(keys)]
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.items()}


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that was not written to holds NaN, or large numbers where it holds integers."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor.fill_(1 if tensor.dtype == torch.bool else 99)

        return made

    with (
        patch.object(torch, "empty", poison(torch.empty)),
        patch.object(torch, "empty_like", poison(torch.empty_like)),
        patch.object(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty)),
    ):
        yield


def same(found: Selection, expected: Selection, tolerance: float = 1e-5) -> None:
    """Assert that two selections differ only among documents with nearly equal scores."""
    torch.testing.assert_close(found.scores, expected.scores, atol=tolerance, rtol=0)
    assert (found.documents < 0).tolist() == (expected.documents < 0).tolist()
    last = expected.scores[:, -1:].tolist()
    for row, documents in enumerate(found.documents.tolist()):
        scores = expected.scores[row].tolist()
        wanted = dict(zip(expected.documents[row].tolist(), scores, strict=True))
        for document, score in zip(documents, found.scores[row].tolist(), strict=True):
            if document >= 0:  # what was not expected at all must be nearly as good as the last
                assert abs(wanted.get(document, *last[row]) - score) <= 2 * tolerance


def tolerance(case: dict[str, Any]) -> float:
    """1e-5, times the lengths of the longest vector and key if those are more than 1."""
    keys = case["routing_keys"].flatten(1).float()
    if "scales" in case:
        keys = keys * case["scales"][:, None]
    longest = [
        torch.linalg.vector_norm(x.nan_to_num(0.0), dim=-1).max().item() if x.numel() else 0.0
        for x in (case["vectors"], keys)
    ]
    return 1e-5 * max(1.0, longest[0] * longest[1])


def check(kernel: Callable[..., Any], case: dict[str, Any], device: str = "cpu") -> None:
    """Assert that the kernel gives the reference's selection."""
    call, room = hidden(case, device), tolerance(case)
    expected = route_documents(**call)
    every = route_documents(**{**call, "top_k": max(1, len(case["chunk_counts"]))})
    with poisoned():
        found = kernel(**call)
    assert found.documents.dtype == torch.int64
    assert found.scores.dtype == torch.float32
    same(found, expected, room)
    for row, documents in enumerate(found.documents.tolist()):
        own = dict(zip(every.documents[row].tolist(), every.scores[row].tolist(), strict=True))
        chosen = [
            (-score, document)
            for document, score in zip(documents, found.scores[row].tolist(), strict=True)
            if document >= 0
        ]
        assert chosen == sorted(chosen)  # best first, ties by row
        assert len({document for _, document in chosen}) == len(chosen)
        for score, document in chosen:
            assert abs(own[document] + score) <= room


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    from msa.ops.kernels import routing_triton

    for name, case in cases():
        try:
            check(routing_triton.route_documents, case)
        except Exception as error:
            raise AssertionError(name) from error
    print("all the same")
