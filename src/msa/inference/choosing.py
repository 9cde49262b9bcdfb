"""The next token of every row: the likeliest, the likeliest with what speaks for it, or a draw.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from msa.errors import ModelError

GUIDED_TOKENS = 8
"""Of the likeliest tokens, those that a guide chooses among."""


class Sampler:
    """Chooses the tokens of one question; what it draws depends on its seed alone."""

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        """Start drawing.

        Args:
            temperature: 0 takes the likeliest token.
            top_p: draw from the smallest set of tokens that has this much probability.
            seed: of this question's own generator; None takes one from torch's global generator.
        """
        self.temperature = temperature
        self.top_p = top_p
        self._generator = torch.Generator()
        if temperature > 0:
            fresh = int(torch.randint(2**63 - 1, ())) if seed is None else seed
            self._generator.manual_seed(fresh)

    def draw(self) -> float:
        """A number in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def choose(
    logits: Tensor,
    samplers: Sequence[Sampler],
    scores: Tensor | None,
    used: Sequence[bool],
    guides: Sequence[Callable[[int], float] | None] = (),
) -> list[tuple[int, float]]:
    """One token per row and the logarithm of the probability that the model gives it.

    Args:
        logits: [B, V] of the model.
        samplers: one per row; rows that are not used draw nothing.
        scores: [B, V] to choose by in place of the logits.
        used: [B], rows whose token is wanted; the others' are of no meaning.
        guides: of every row (`Writer.guide`), or none at all; None for rows that draw.

    Raises:
        ModelError: logits of a row that is used are not numbers.
    """
    logits = logits.float()
    scores = logits if scores is None else scores
    tokens = scores.argmax(dim=-1)
    drawing = [row for row, s in enumerate(samplers) if used[row] and s.temperature > 0]
    if drawing:
        tokens[drawing] = _sampled(scores[drawing], [samplers[row] for row in drawing])
    tokens = tokens[:, None]
    if any(guides):
        likely = scores.topk(min(GUIDED_TOKENS, scores.shape[-1])).indices
        tokens = torch.cat([tokens, likely], dim=1)
    log_probabilities = logits.gather(1, tokens) - logits.logsumexp(dim=-1, keepdim=True)
    parts = [tokens.float(), log_probabilities, scores.gather(1, tokens), _peaks(logits)[:, None]]
    step = torch.cat(parts, dim=1).tolist()  # the one wait for the device; exact below 2^24
    _check_peaks([row[-1] for row, use in zip(step, used, strict=True) if use])
    width = tokens.shape[1]
    chosen = []
    for i, row in enumerate(step):
        at, guide = 0, guides[i] if guides else None
        if guide is not None:
            at = 1 + _guided(row[1:width], row[2 * width + 1 : 3 * width], guide)
        chosen.append((int(row[at]), row[width + at]))
    return chosen


def _guided(tokens: Sequence[float], scores: Sequence[float], guide: Callable[[int], float]) -> int:
    """Which of some tokens, likeliest first, has the best score with what the guide adds to it."""
    at, best = 0, -math.inf
    for i, (token, score) in enumerate(zip(tokens, scores, strict=True)):
        if score <= best:  # a guide only takes away
            break
        total = score + guide(int(token))
        if total > best:
            at, best = i, total
    return at


def check_logits(logits: Tensor) -> None:
    """Refuse logits that are not numbers: any token would do, and the answer would be made up.

    Args:
        logits: [B, V].

    Raises:
        ModelError: there is a NaN or +inf, or a row without any finite value.
    """
    _check_peaks(_peaks(logits).tolist())


def _peaks(logits: Tensor) -> Tensor:
    """[B], finite if and only if a row has a finite value, and neither NaN nor +inf."""
    return logits.amax(dim=-1)


def _check_peaks(peaks: Sequence[float]) -> None:
    if not all(math.isfinite(peak) for peak in peaks):
        raise ModelError(
            "The model's logits are not finite (NaN or infinity): its weights are damaged, or "
            "overflow in this dtype. Load the checkpoint again, or in float32."
        )


def constrained(
    logits: Tensor,
    legal: Sequence[Mapping[int, float] | None],
    barred: Sequence[Sequence[int]],
) -> Tensor:
    """[B, V] float32: logits of legal tokens, with what is added to them; -inf for all others.

    A row of which nothing is said stays as it is, but for the tokens that are barred.
    """
    logits = logits.float()
    scores = torch.full_like(logits, -math.inf)
    for row, tokens in enumerate(legal):
        if tokens is None:
            scores[row] = logits[row]
            scores[row, list(barred[row])] = -math.inf
            continue
        index = torch.tensor(list(tokens), device=logits.device)
        shifted = logits[row, index] + logits.new_tensor(list(tokens.values()))
        # What the model holds impossible must still win against what is illegal.
        scores[row, index] = shifted.clamp(min=torch.finfo(logits.dtype).min)
    return scores


def _sampled(scores: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """[B] int64: from the likeliest tokens that together have probability `top_p`.

    Args:
        scores: [B, V] float32.
        samplers: one per row, with temperatures above 0.
    """
    wide = torch.float32 if scores.device.type == "mps" else torch.float64  # Apple's have no more

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=scores.device, dtype=wide)[:, None]

    temperature = column([s.temperature for s in samplers]).to(scores.dtype)
    probabilities, tokens = torch.softmax(scores / temperature, dim=-1).sort(
        dim=-1, descending=True, stable=True
    )
    reached = probabilities.to(wide).cumsum(dim=-1)
    top_p = column([s.top_p for s in samplers])
    kept = (reached - probabilities < top_p) & (probabilities > 0)  # the one that crosses, too
    total = (probabilities * kept).to(wide).sum(dim=-1, keepdim=True)
    at = column([s.draw() for s in samplers]) * total
    rank = (reached <= at).sum(dim=-1, keepdim=True)
    last = kept.sum(dim=-1, keepdim=True) - 1
    return tokens.gather(1, rank.minimum(last))[:, 0]
