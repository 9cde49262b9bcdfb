"""The decode loop: one prefill, then token after token on its cache.

Nothing is routed while tokens are written, and what a row is allowed to write, when it ends and
what is drawn is decided here, on the CPU: a step waits for the device once, for its tokens.

Shapes: B batch, T tokens of the prompts, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from msa.inference.batch import Batch, left_padded
from msa.inference.choosing import (
    GUIDED_TOKENS,
    Sampler,
    check_logits,
    choose,
    constrained,
)
from msa.inference.constraints import RoundGrammar, Written
from msa.inference.refusal import logit
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
    logits_to_keep: int = 1,
) -> MSAOutput:
    """One forward over whole prompts: what they select, and their last logits.

    Args:
        model: in evaluation mode.
        prompts: of `prompt_batch`.
        memory: selected from in every routing layer; None for none.
        cache: empty; filled, so that tokens can follow. None keeps nothing.
        routing_only: end with the last selection; there are no logits then.
        logits_to_keep: of how many last tokens there are logits.
    """
    out: MSAOutput = model(
        prompts.input_ids,
        attention_mask=prompts.attention_mask,
        position_ids=prompts.position_ids,
        cache=cache,
        memory=memory,
        routing_mask=prompts.routing_mask,
        memory_mask=prompts.memory_mask,
        logits_to_keep=logits_to_keep,
        use_cache=cache is not None,
        routing_only=routing_only,
    )
    return out


class Decoder:
    """A batch of prompts, and what is written after them. Rows may leave, and others join.

    Attributes:
        cache: of the prompts and of all that was fed after them.
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
        self._device = prompts.input_ids.device
        self._mask = prompts.attention_mask
        self.cache = MSACache()
        out = prefill(model, prompts, memory, self.cache)
        assert out.logits is not None
        self.logits = out.logits[:, -1]
        check_logits(self.logits)
        self.positions = list(prompts.next_positions)
        self._prompts = _Prompts(self._mask, prompts.length, self.logits, list(self.positions))

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def length(self) -> int:
        """Columns of the cache, those that pad a row included."""
        columns: int = self.cache.get_seq_length()
        return columns

    def rewind(self, rows: Sequence[int] | None = None) -> None:
        """Forget all that was written after the prompts.

        Args:
            rows: of which it is forgotten; all by default.
        """
        prompts = self._prompts
        if rows is None:
            self.cache.truncate(prompts.length)
            self._mask, self.logits = prompts.mask, prompts.logits
            self.positions = list(prompts.ends)
            return
        mask, before = self._whole_mask().clone(), prompts.whole_mask(self.length)
        self.logits = self.logits.clone()
        for row in rows:
            mask[row], self.logits[row] = before[row], prompts.logits[row]
            self.positions[row] = prompts.ends[row]
        self._mask = mask

    def select(self, rows: Sequence[int]) -> Decoder:
        """Some of the rows, in that order, as a decoder of their own."""
        part = copy.copy(self)
        if list(rows) == list(range(len(self))):
            part.cache = self.cache.rows(None)
            return part
        index = torch.tensor(rows, device=self._device)
        part.cache = self.cache.rows(index)
        part.logits = self.logits[index]
        part.positions = [self.positions[row] for row in rows]
        part._mask = None if self._mask is None else self._mask[index]
        part._prompts = self._prompts.select(rows, index)
        part._drop_padding()
        return part

    def join(self, other: Decoder) -> None:
        """Take in the rows of another decoder of the same model, after its own."""
        length, wider = self.length, other.length - self.length
        mask, other_mask = self._whole_mask(), other._whole_mask()
        if wider > 0:
            mask = F.pad(mask, (wider, 0))
        other_mask = F.pad(other_mask, (max(0, -wider), 0))
        self._prompts = self._prompts.joined(other._prompts, length, other.length)
        self.cache.join(other.cache)
        self._mask = torch.cat([mask, other_mask])
        self.logits = torch.cat([self.logits, other.logits])
        self.positions = self.positions + other.positions

    def _whole_mask(self) -> Tensor:
        if self._mask is not None:
            return self._mask
        return torch.ones(len(self), self.length, dtype=torch.long, device=self._device)

    def _drop_padding(self) -> None:
        """Columns in front that no row uses any more."""
        if self._mask is None:
            return
        unused = int(self._mask.any(dim=0).long().argmax())
        if unused:
            self.cache.drop_first(unused)
            self._mask = self._mask[:, unused:]
            self._prompts = self._prompts.without_first(unused)

    def feed(self, tokens: Sequence[Sequence[int]], then: Sequence[int] = ()) -> list[float]:
        """Run the model on further tokens, and get the logits after them.

        Args:
            tokens: per row any number of token ids; rows without any get logits of no meaning.
            then: tokens of which it is asked how likely they come next; they are not written.

        Returns:
            The logarithm of the probability of `then` for every row; nothing without any.
        """
        logits = self._run([[*row, *then[:-1]] for row in tokens], max(1, len(then)))
        self.logits = logits[:, 0]
        self._forget(len(then[:-1]))
        return _log_probabilities(logits, then) if then else []

    def log_probability(self, tokens: Sequence[int]) -> list[float]:
        """Of every row going on with these tokens, logarithms; nothing is written thereby.

        Args:
            tokens: at least one.
        """
        logits = self.logits[:, None]
        if tried := tokens[:-1]:
            logits = torch.cat([logits, self._run([tried] * len(self), len(tried))], dim=1)
            self._forget(len(tried))
        return _log_probabilities(logits, tokens)

    def _forget(self, tokens: int) -> None:
        """The last tokens of every row; the logits are not touched."""
        if tokens:
            self.cache.truncate(self.length - tokens)
            self._mask = None if self._mask is None else self._mask[:, :-tokens]
            self.positions = [end - tokens for end in self.positions]

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


def _log_probabilities(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """Of tokens in a row, for every row of the batch.

    Args:
        logits: [B, n, V], those that each of them is chosen by.
        tokens: n of them.
    """
    wanted = torch.tensor(list(tokens), device=logits.device).expand(len(logits), -1)
    by_token = logits.float().log_softmax(dim=-1)
    total: list[float] = by_token.gather(2, wanted[..., None]).sum(dim=(1, 2)).tolist()
    return total


@dataclass(frozen=True, slots=True)
class _Prompts:
    """Where the rows of a decoder stood when they had been prefilled.

    Attributes:
        mask: [B, length], 0 for padding; None when there is none.
        length: columns of the cache after which nothing but written tokens lies.
        logits: [B, V].
        ends: [B], position of the token that follows each row.
    """

    mask: Tensor | None
    length: int
    logits: Tensor
    ends: list[int]

    def whole_mask(self, columns: int) -> Tensor:
        """[B, columns], 0 for padding and for what was written after the prompts."""
        mask = self.mask
        if mask is None:
            shape = len(self.ends), self.length
            mask = torch.ones(shape, dtype=torch.long, device=self.logits.device)
        return F.pad(mask, (0, columns - self.length))

    def select(self, rows: Sequence[int], index: Tensor) -> _Prompts:
        mask = None if self.mask is None else self.mask[index]
        return _Prompts(mask, self.length, self.logits[index], [self.ends[row] for row in rows])

    def without_first(self, columns: int) -> _Prompts:
        assert self.mask is not None
        return replace(self, mask=self.mask[:, columns:], length=self.length - columns)

    def joined(self, other: _Prompts, columns: int, others: int) -> _Prompts:
        """Rows of both, whose caches have so many columns each and end together."""
        longest = max(columns, others)
        shift, shift_other = longest - columns, longest - others
        length = max(self.length + shift, other.length + shift_other)
        masks = [
            F.pad(prompts.whole_mask(length - by), (by, 0))
            for prompts, by in ((self, shift), (other, shift_other))
        ]
        logits = torch.cat([self.logits, other.logits])
        return _Prompts(torch.cat(masks), length, logits, self.ends + other.ends)


# What is added to the score of a text, given as its tokens so far; at most 0.
Preference = Callable[[Sequence[int]], float]


class Writer(Protocol):
    """What one row writes, token by token.

    Attributes:
        sampler: chooses its tokens.
        pending: tokens that are written and not yet fed.
        barred: tokens that may not come next.
        guide: what is added to the score of a token that may come next, where the likeliest of a
            few is taken, at most 0; None for nothing.
    """

    sampler: Sampler
    pending: list[int]

    @property
    def barred(self) -> Sequence[int]:
        """See above."""
        ...

    @property
    def guide(self) -> Callable[[int], float] | None:
        """See above."""
        ...

    @property
    def done(self) -> bool:
        """Whether there is nothing more to write."""
        ...

    def legal(self) -> Mapping[int, float] | None:
        """Tokens that may come next, each with what is added to its logit; None for all."""
        ...

    def take(self, token: int, log_probability: float) -> None:
        """Write a token that was chosen, with the logarithm of what the model gives it."""
        ...


class RoundRow:
    """A `Writer` of one round, within its grammar.

    A token that alone is legal is written without asking the model, and fed together with those
    around it.

    Attributes:
        end_log_odds: of ending the retrieval here against reading on, as the model gives them; None
            until it has chosen, and where it had no choice.
    """

    def __init__(
        self, grammar: RoundGrammar, sampler: Sampler, prior_weight: float, end_shift: float = 0.0
    ) -> None:
        """Begin a round.

        Args:
            grammar: what may be written.
            sampler: chooses.
            prior_weight: factor of the grammar's log prior; 0 leaves the model's own probabilities.
            end_shift: added to the log odds of ending the retrieval.
        """
        self.sampler = sampler
        self.end_log_odds: float | None = None
        self._prior_weight = prior_weight
        self._end, self._end_shift = grammar.end, end_shift
        self._writer = grammar.begin()
        self.pending = self._writer.push_forced()

    @property
    def written(self) -> Written | None:
        """The round, once it is complete."""
        return self._writer.complete

    @property
    def barred(self) -> Sequence[int]:
        """See `Writer.barred`."""
        return ()

    @property
    def guide(self) -> None:
        """See `Writer.guide`."""

    @property
    def done(self) -> bool:
        """See `Writer.done`."""
        return self._writer.complete is not None

    def legal(self) -> Mapping[int, float]:
        """See `Writer.legal`."""
        weight = self._prior_weight
        legal = {token: weight * prior for token, prior in self._writer.legal().items()}
        if not self._writer.tokens and self._end in legal:
            legal[self._end] += self._end_shift
        return legal

    def take(self, token: int, log_probability: float) -> None:
        """See `Writer.take`."""
        if not self._writer.tokens and self._end in self._writer.legal():
            odds = logit(log_probability)
            self.end_log_odds = odds if token == self._end else -odds
        self._writer.push(token)
        self.pending = [token, *self._writer.push_forced()]


@dataclass(slots=True)
class TextRow:
    """A `Writer` of free text, until it ends.

    Attributes:
        sampler: chooses.
        ends: token sequences, each of which ends the text.
        budget: tokens that may be written, at most.
        not_first: tokens that the text must not begin with.
        preference: what is added to the score of the text with a token more; None for nothing.
        tokens: token ids, end mark included.
        log_probability: of all its tokens together, as the model gives it.
        ended: it ends with an end mark.
        score: `log_probability` and preference, by which it is chosen; -inf until it is complete.
        rivals: texts that are written in place of this one (`begin_texts`), this one among them. It
            is done as soon as one of them is complete that it cannot be better than.
    """

    sampler: Sampler
    ends: Sequence[Sequence[int]]
    budget: int
    not_first: Sequence[int] = ()
    preference: Preference | None = None
    tokens: list[int] = field(default_factory=list)
    log_probability: float = 0.0
    ended: bool = False
    pending: list[int] = field(default_factory=list)
    score: float = -math.inf
    rivals: Sequence[TextRow] = field(default=(), repr=False, compare=False)

    @property
    def done(self) -> bool:
        """See `Writer.done`."""
        return self._complete or any(row.score >= self.log_probability for row in self.rivals)

    @property
    def _complete(self) -> bool:
        return self.ended or len(self.tokens) >= self.budget

    def legal(self) -> None:
        """Any token but those barred."""

    @property
    def barred(self) -> Sequence[int]:
        """See `Writer.barred`."""
        return () if self.tokens else self.not_first

    @property
    def guide(self) -> Callable[[int], float] | None:
        """See `Writer.guide`."""
        preference = self.preference
        return None if preference is None else lambda token: preference([*self.tokens, token])

    def take(self, token: int, log_probability: float) -> None:
        """See `Writer.take`."""
        self.tokens.append(token)
        self.log_probability += log_probability
        self.ended = any(self.tokens[-len(end) :] == list(end) for end in self.ends)
        self.pending = [token]
        if self._complete:
            preferred = 0.0 if self.preference is None else self.preference(self.tokens)
            self.score = self.log_probability + preferred


CLOSE_BEGINNING = 2.0
"""How far below the best first token another may score to be written on from."""


def begin_texts(logits: Tensor, row: TextRow, count: int) -> list[TextRow]:
    """Texts that begin with each of the best first tokens, to be written side by side.

    A small model's first word decides what it answers, and the right one is mostly among a few.
    What is written from each, and scored as a whole, tells more than the first token does.

    Args:
        logits: [V], of the first token.
        row: of which nothing is written.
        count: texts, at most; those close to the best, of `GUIDED_TOKENS`.

    Returns:
        At least one, best beginning first, with its first token pending; rivals of each other.

    Raises:
        ModelError: the model's logits are not numbers.
    """
    check_logits(logits[None])
    allowed = constrained(logits[None], [None], [row.barred])[0]
    likely = allowed.topk(min(GUIDED_TOKENS, len(allowed)))
    logs = (likely.values - logits.float().logsumexp(dim=-1)).tolist()
    guide = row.guide or (lambda token: 0.0)
    pairs = zip(likely.indices.tolist(), logs, strict=True)
    first = sorted(((log + guide(token), token, log) for token, log in pairs), key=lambda x: -x[0])
    texts: list[TextRow] = []
    for score, token, log_probability in first[:count]:
        if not texts or first[0][0] - score <= CLOSE_BEGINNING:
            text = replace(row, tokens=[], pending=[], rivals=texts)
            text.take(token, log_probability)
            texts.append(text)
    return texts


def choose_next(decoder: Decoder, writers: Sequence[Writer]) -> None:
    """Let every row that is waiting for its next token choose it.

    Args:
        decoder: after all that is not pending.
        writers: one per row.

    Raises:
        ModelError: the model's logits are not numbers.
    """
    ready = [not writer.done and not writer.pending for writer in writers]
    if not any(ready):
        return
    legal = [w.legal() if use else None for w, use in zip(writers, ready, strict=True)]
    barred = [w.barred if use else () for w, use in zip(writers, ready, strict=True)]
    scores = None
    if any(barred) or any(tokens is not None for tokens in legal):
        scores = constrained(decoder.logits, legal, barred)
    guides = [w.guide if use else None for w, use in zip(writers, ready, strict=True)]
    chosen = choose(decoder.logits, [w.sampler for w in writers], scores, ready, guides)
    for writer, use, (token, log_probability) in zip(writers, ready, chosen, strict=True):
        if use:
            writer.take(token, log_probability)


def feed_pending(decoder: Decoder, writers: Sequence[Writer]) -> None:
    """Run the model on what was written, of all rows that are not done."""
    tokens = [[] if writer.done else writer.pending for writer in writers]
    if any(tokens):
        decoder.feed(tokens)
    for writer in writers:
        writer.pending = []


def write_all(decoder: Decoder, writers: Sequence[Writer]) -> None:
    """Let every row write until it is done.

    Raises:
        ModelError: the model's logits are not numbers.
    """
    while not all(writer.done for writer in writers):
        choose_next(decoder, writers)
        feed_pending(decoder, writers)
