"""The cache of a generation grows, joins and parts as if all of it were copied every time."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from msa.model.cache import ROOM, MSACache
from msa.types import Content

LAYERS, HEADS, DIM = 2, 3, 4


def states(rows: int, tokens: int) -> Tensor:
    return torch.randn(rows, HEADS, tokens, DIM)


class Copied:
    """What a cache holds: the tokens of every layer, in tensors of their own."""

    def __init__(self) -> None:
        self.cache = MSACache()
        self.held: list[tuple[Tensor, Tensor]] = []

    def feed(self, rows: int, tokens: int) -> None:
        new = [(states(rows, tokens), states(rows, tokens)) for _ in range(LAYERS)]
        given = [self.cache.update(keys, values, i) for i, (keys, values) in enumerate(new)]
        old = self.held or [(k[:, :, :0], v[:, :, :0]) for k, v in new]
        self.held = [
            (torch.cat([a, c], 2), torch.cat([b, d], 2))
            for (a, b), (c, d) in zip(old, new, strict=True)
        ]
        for got, held in zip(given, self.held, strict=True):
            assert torch.equal(got[0], held[0])
            assert torch.equal(got[1], held[1])

    def check(self) -> None:
        for layer, (keys, values) in zip(self.cache.layers, self.held, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)

    def changed(self, cache: MSACache, change) -> Copied:
        other = Copied()
        other.cache = cache
        other.held = [(change(k), change(v)) for k, v in self.held]
        return other


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_done_to_it_it_holds_what_copies_would(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    caches = [Copied()]
    caches[0].feed(3, 5)
    for _ in range(40):
        some = rng.choice(caches)
        rows, length = some.held[0][0].shape[0], some.held[0][0].shape[2]
        deed = rng.choice(("feed", "feed", "feed", "all", "some", "cut", "drop", "join", "new"))
        if deed == "feed":
            some.feed(rows, rng.choice((1, 1, 2, ROOM, ROOM + 3)))
        elif deed == "all":
            caches.append(some.changed(some.cache.rows(None), torch.clone))
        elif deed == "some":
            index = torch.tensor(rng.sample(range(rows), rng.randint(1, rows)))
            caches.append(some.changed(some.cache.rows(index), lambda t, i=index: t[i]))
        elif deed == "cut" and length > 2:
            some.cache.truncate(length - 1)
            some.held = [(k[:, :, :-1], v[:, :, :-1]) for k, v in some.held]
        elif deed == "drop" and length > 2:
            some.cache.drop_first(1)
            some.held = [(k[:, :, 1:], v[:, :, 1:]) for k, v in some.held]
        elif deed == "join" and len(caches) > 1:
            other = rng.choice([c for c in caches if c is not some])
            caches.remove(other)
            longest = max(length, other.held[0][0].shape[2])

            def padded(t: Tensor, longest: int = longest) -> Tensor:
                return torch.nn.functional.pad(t, (0, 0, longest - t.shape[2], 0))

            some.cache.join(other.cache)
            some.held = [
                (torch.cat([padded(a), padded(c)]), torch.cat([padded(b), padded(d)]))
                for (a, b), (c, d) in zip(some.held, other.held, strict=True)
            ]
        elif deed == "new":
            caches.append(Copied())
            caches[-1].feed(rng.randint(1, 3), rng.randint(1, 6))
        for cache in caches:
            cache.check()


def test_padding_in_front_is_finite() -> None:
    one, two = MSACache(), MSACache()
    for _ in range(20):  # memory that was used before
        torch.full((5, HEADS, 2 * ROOM, DIM), torch.nan)
    one.update(states(2, 3), states(2, 3), 0)
    two.update(states(1, 9), states(1, 9), 0)
    one.join(two)
    assert not one.layers[0].keys[:2, :, :6].any()
    assert not one.layers[0].values[:2, :, :6].any()


def test_few_of_many_tokens_cost_a_copy() -> None:
    cache = MSACache()
    cache.update(states(1, 10), states(1, 10), 0)
    places = set()
    for _ in range(2 * ROOM):
        cache.update(states(1, 1), states(1, 1), 0)
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) <= 3


def test_gradients_reach_what_was_fed() -> None:
    cache = MSACache()
    first, second = states(1, 2).requires_grad_(), states(1, 1).requires_grad_()
    cache.update(first, first, 0)
    keys, values = cache.update(second, second, 0)
    (keys.sum() + 2 * values.sum()).backward()
    assert torch.equal(first.grad, torch.full_like(first, 3.0))
    assert torch.equal(second.grad, torch.full_like(second, 3.0))


def test_content_goes_with_the_rows() -> None:
    cache = MSACache()
    cache.update(states(2, 3), states(2, 3), 0)
    content = Content(torch.randn(2, 4, 1, 2), torch.randn(2, 4, 1, 2), torch.ones(2, 4).bool())
    cache.contents[0] = content
    part = cache.rows(torch.tensor([1]))
    assert torch.equal(part.contents[0].keys, content.keys[1:])
