"""The decode loop: one prefill, then token after token behind its cache.

Nothing is routed while tokens are written, and what a row is allowed to write, when it ends and
what is drawn is decided here, on the CPU: a step waits for the device once, for its tokens.

Shapes: B batch, T tokens of the prompts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from msa.errors import ModelError
from msa.inference.batch import Batch, left_padded
from msa.inference.constraints import RoundGrammar, Written
from msa.model.cache import MSACache
from msa.model.modeling_msa import MSAForCausalLM, MSAOutput
from msa.types import MemoryReader


@torch.no_grad()
def prefill(
    model: MSAForCausalLM,
    prompts: Batch,
    memory: MemoryReader | None,
    cache: MSACache | None = None,
    *,
    routing_only: bool = False,
) -> MSAOutput:
    """One forward over whole prompts: what they select, and their last logits.

    Args:
        model: in evaluation mode.
        prompts: of `prompt_batch`.
        memory: selected from in every routing layer; None for none.
        cache: empty; filled, so that tokens can follow. None keeps nothing.
        routing_only: end with the last selection; there are no logits then.
    """
    out: MSAOutput = model(
        prompts.input_ids,
        attention_mask=prompts.attention_mask,
        position_ids=prompts.position_ids,
        cache=cache,
        memory=memory,
        routing_mask=prompts.routing_mask,
        memory_mask=prompts.memory_mask,
        logits_to_keep=1,
        use_cache=cache is not None,
        routing_only=routing_only,
    )
    return out


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


class Decoder:
    """A batch of prompts, and what is written behind them.

    Attributes:
        cache: of the prompts and of all that was fed behind them.
        logits: [B, V] of every row's next token.
        positions: [B], of every row's next token.
    """

    def __init__(
        self, model: MSAForCausalLM, prompts: Batch, memory: MemoryReader | None, pad_token: int
    ) -> None:
        """Prefill.

        Args:
            model: in evaluation mode.
            prompts: of `prompt_batch`.
            memory: selected from now, and not again; None for none.
            pad_token: fills rows that have nothing to say; masked.

        Raises:
            ModelError: the model's logits are not numbers.
        """
        self._model = model
        self._pad = pad_token
        self._length = prompts.length
        self._device = prompts.input_ids.device
        self._prompt_mask = prompts.attention_mask
        self._prompt_ends = list(prompts.next_positions)
        self.cache = MSACache()
        out = prefill(model, prompts, memory, self.cache)
        assert out.logits is not None
        self._prompt_logits = out.logits[:, -1]
        check_logits(self._prompt_logits)
        self._back_to_prompts()

    def _back_to_prompts(self) -> None:
        self.logits = self._prompt_logits
        self._mask = self._prompt_mask
        self.positions = list(self._prompt_ends)

    def rewind(self, rows: Sequence[int] | None = None) -> None:
        """Forget all that was written behind the prompts.

        Args:
            rows: those that stay, in that order; all by default.
        """
        self.cache.truncate(self._length)
        if rows is not None and list(rows) != list(range(len(self._prompt_ends))):
            index = torch.tensor(rows, device=self._device)
            self.cache.batch_select_indices(index)
            self._prompt_logits = self._prompt_logits[index]
            self._prompt_ends = [self._prompt_ends[row] for row in rows]
            if self._prompt_mask is not None:
                self._prompt_mask = self._prompt_mask[index]
        self._back_to_prompts()

    def feed(self, tokens: Sequence[Sequence[int]]) -> None:
        """Run the model on further tokens, and get the logits behind them.

        Args:
            tokens: per row any number of token ids; rows without any get logits of no meaning.
        """
        self.logits = self._run(tokens, 1)[:, -1]

    def log_probability(self, tokens: Sequence[int]) -> list[float]:
        """Of every row going on with these tokens, logarithms; nothing is written thereby.

        Args:
            tokens: at least one.
        """
        rows = len(self.positions)
        logits, mask, positions = self.logits, self._mask, list(self.positions)
        length = self.cache.get_seq_length()
        behind = [logits[:, None]]
        if len(tokens) > 1:
            behind.append(self._run([tokens[:-1]] * rows, len(tokens) - 1))
            self.cache.truncate(length)
            self._mask, self.positions = mask, positions
        by_token = torch.cat(behind, dim=1).float().log_softmax(dim=-1)  # [B, len(tokens), V]
        wanted = torch.tensor(list(tokens), device=self._device).expand(rows, -1)
        total: list[float] = by_token.gather(2, wanted[..., None]).sum(dim=(1, 2)).tolist()
        return total

    @torch.no_grad()
    def _run(self, tokens: Sequence[Sequence[int]], logits_to_keep: int) -> Tensor:
        """Feed tokens; logits [B, logits_to_keep, V] of the last of them."""
        width = max(len(row) for row in tokens)
        padded = any(len(row) != width for row in tokens)
        positions = [
            list(range(start, start + max(1, len(row))))
            for start, row in zip(self.positions, tokens, strict=True)
        ]
        self.positions = [
            start + len(row) for start, row in zip(self.positions, tokens, strict=True)
        ]
        if padded or self._mask is not None:
            new = left_padded([[1] * len(row) for row in tokens], 0, self._device)
            if self._mask is None:
                self._mask = new.new_ones(len(tokens), self.cache.get_seq_length())
            self._mask = torch.cat([self._mask, new], dim=1)
        out: MSAOutput = self._model(
            left_padded(tokens, self._pad, self._device),
            attention_mask=self._mask,
            position_ids=left_padded(positions, None, self._device),
            cache=self.cache,
            logits_to_keep=logits_to_keep,
            use_cache=True,
        )
        logits: Tensor | None = out.logits
        assert logits is not None
        return logits


@dataclass(slots=True)
class Text:
    """What one row wrote freely.

    Attributes:
        tokens: token ids, end mark included.
        log_probability: of all its tokens together, as the model gives it.
        ended: it ends with an end mark.
    """

    tokens: list[int] = field(default_factory=list)
    log_probability: float = 0.0
    ended: bool = False


def write_rounds(
    decoder: Decoder,
    grammars: Sequence[RoundGrammar],
    samplers: Sequence[Sampler],
    prior_weight: float,
) -> list[Written]:
    """Let every row write one round within its grammar.

    A token that alone is legal is written without asking the model, and fed together with those
    around it.

    Args:
        decoder: behind its prompts.
        grammars, samplers: one per row.
        prior_weight: factor of the grammar's log prior; 0 leaves the model's own probabilities.

    Raises:
        ModelError: the model's logits are not numbers.
    """
    writers = [grammar.begin() for grammar in grammars]
    pending = [writer.push_forced() for writer in writers]
    while any(writer.complete is None for writer in writers):
        ready = [w.complete is None and not p for w, p in zip(writers, pending, strict=True)]
        if any(ready):
            legal = [w.legal() if use else {} for w, use in zip(writers, ready, strict=True)]
            scores = _constrained(decoder.logits, legal, prior_weight)
            for row, (token, _) in enumerate(choose(decoder.logits, samplers, scores, ready)):
                if ready[row]:
                    writers[row].push(token)
                    pending[row] = [token, *writers[row].push_forced()]
        if all(writer.complete is not None for writer in writers):
            break
        decoder.feed(
            [p if w.complete is None else [] for w, p in zip(writers, pending, strict=True)]
        )
        pending = [[] for _ in writers]
    return [writer.complete for writer in writers if writer.complete is not None]


def write_texts(
    decoder: Decoder,
    samplers: Sequence[Sampler],
    ends: Sequence[Sequence[int]],
    budgets: Sequence[int],
) -> Iterator[list[Text]]:
    """Let every row write freely until it ends; what is written so far, after every step.

    Args:
        decoder: behind what the rows are to continue.
        samplers: one per row.
        ends: token sequences, each of which ends a row.
        budgets: tokens that a row may write; a row with 0 writes nothing.

    Raises:
        ModelError: the model's logits are not numbers.
    """
    texts = [Text() for _ in samplers]
    open_rows = [budget > 0 for budget in budgets]
    while any(open_rows):
        step: list[list[int]] = [[] for _ in texts]
        chosen = choose(decoder.logits, samplers, None, open_rows)
        for row, (token, log_probability) in enumerate(chosen):
            if not open_rows[row]:
                continue
            text = texts[row]
            text.tokens.append(token)
            text.log_probability += log_probability
            text.ended = any(text.tokens[-len(end) :] == list(end) for end in ends)
            open_rows[row] = not text.ended and len(text.tokens) < budgets[row]
            step[row] = [token] if open_rows[row] else []
        yield texts
        if any(open_rows):
            decoder.feed(step)


def choose(
    logits: Tensor, samplers: Sequence[Sampler], scores: Tensor | None, used: Sequence[bool]
) -> list[tuple[int, float]]:
    """One token per row and the logarithm of the probability that the model gives it.

    Args:
        logits: [B, V] of the model.
        samplers: one per row, all with one temperature and top_p; rows that are not used draw
            nothing.
        scores: [B, V] to choose by in place of the logits.
        used: [B], rows whose token is wanted; the others' are of no meaning.

    Raises:
        ModelError: logits of a row that is used are not numbers.
    """
    logits = logits.float()
    scores = logits if scores is None else scores
    if samplers[0].temperature > 0:
        draws = [s.draw() if use else 0.0 for s, use in zip(samplers, used, strict=True)]
        tokens = _sampled(scores, draws, samplers[0].temperature, samplers[0].top_p)
    else:
        tokens = scores.argmax(dim=-1)
    log_probabilities = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
    step = torch.stack([tokens.float(), log_probabilities, _peaks(logits)])  # exact below 2^24
    chosen, log_probability, peaks = step.tolist()  # the one wait for the device
    _check_peaks([peak for peak, use in zip(peaks, used, strict=True) if use])
    return [(int(token), value) for token, value in zip(chosen, log_probability, strict=True)]


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


def _constrained(logits: Tensor, legal: Sequence[Mapping[int, float]], weight: float) -> Tensor:
    """[B, V] float32: logits of legal tokens, shifted by the weighted prior; -inf for all others.

    A row without any legal token stays as it is.
    """
    logits = logits.float()
    scores = torch.full_like(logits, -math.inf)
    for row, tokens in enumerate(legal):
        if not tokens:
            scores[row] = logits[row]
            continue
        index = torch.tensor(list(tokens), device=logits.device)
        prior = logits.new_tensor(list(tokens.values()))
        shifted = logits[row, index] + weight * prior
        # What the model holds impossible must still win against what is illegal.
        scores[row, index] = shifted.clamp(min=torch.finfo(logits.dtype).min)
    return scores


def _sampled(scores: Tensor, draws: Sequence[float], temperature: float, top_p: float) -> Tensor:
    """[B] int64: from the likeliest tokens that together have probability `top_p`.

    Args:
        scores: [B, V] float32.
        draws: [B] in [0, 1), which token it is.
        temperature: the scores are divided by, above 0.
        top_p: in (0, 1].
    """
    probabilities, tokens = torch.softmax(scores / temperature, dim=-1).sort(
        dim=-1, descending=True, stable=True
    )
    wide = torch.float32 if scores.device.type == "mps" else torch.float64  # Apple's have no more
    reached = probabilities.to(wide).cumsum(dim=-1)
    kept = (reached - probabilities < top_p) & (probabilities > 0)  # the one that crosses, too
    total = (probabilities * kept).to(wide).sum(dim=-1, keepdim=True)
    at = torch.tensor(draws, device=scores.device, dtype=wide)[:, None] * total
    rank = (reached <= at).sum(dim=-1, keepdim=True)
    last = kept.sum(dim=-1, keepdim=True) - 1
    return tokens.gather(1, rank.minimum(last))[:, 0]
