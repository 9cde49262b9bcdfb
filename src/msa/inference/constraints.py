"""What the model may write in a round: numbers of routed documents, or the end of retrieval.

A round is `[17][3]<|object_ref_end|>` or, at its very start, `<End-of-Retrieve>` (template
strings). `RoundGrammar` knows which tokens are legal next, for one row; `RetrievalConstraint` and
`RoundComplete` plug it into transformers' `generate()`. Everything works on token sequences: a
tokenizer may split numbers and marks in any way, so long as numbers are written as
`PromptEncoder.written` writes them, each by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from msa.errors import ModelError

_MIN_PRIOR = 1e-9  # a document whose prior underflows stays possible


@dataclass(slots=True)
class _Node:
    """A node of the trie over the tokens of the documents' numbers."""

    children: dict[int, _Node] = field(default_factory=dict)
    members: set[int] = field(default_factory=set)  # numbers that pass through here
    number: int | None = None  # the number that is complete here


@dataclass(frozen=True, slots=True)
class _State:
    """One way to read what was written so far.

    Attributes:
        numbers: complete numbers, in the order written.
        node: where in the number that is being written; the root between numbers.
        mark: what is still to come of an end mark that was begun; `None` when none was.
        ends: the mark is that of the end of retrieval.
    """

    numbers: tuple[int, ...]
    node: _Node
    mark: tuple[int, ...] | None = None
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Written:
    """A complete round.

    Attributes:
        numbers: the documents named, in the order written; empty at the end of retrieval.
        ended: the model asked for no document.
        length: tokens written, marks included.
    """

    numbers: tuple[int, ...]
    ended: bool
    length: int


class RoundGrammar:
    """What one row may write in one round.

    Several readings of the same tokens are followed side by side (a number's tokens may be the
    beginning of another's), so no tokenizer is assumed to be kind.
    """

    def __init__(
        self,
        numbers: Mapping[int, Sequence[int]],
        end_of_read: Sequence[int],
        end_of_retrieve: Sequence[int],
        *,
        max_documents: int,
        may_end: bool,
        prior: Mapping[int, float] | None = None,
    ) -> None:
        """Lay down the rules.

        Args:
            numbers: legal document numbers -> their tokens. Without any, the retrieval can only
                end.
            end_of_read: tokens that end the numbers.
            end_of_retrieve: tokens that end the retrieval.
            max_documents: numbers in this round, at most.
            may_end: whether the retrieval may end.
            prior: number -> prior probability (any positive scale); uniform when `None`.
        """
        if not end_of_read or not end_of_retrieve or not all(numbers.values()):
            raise ModelError(
                "The tokenizer turns a document number or an end mark of the prompt template into "
                "no tokens; use the tokenizer that belongs to the model."
            )
        self._end_of_read = tuple(end_of_read)
        self._end_of_retrieve = tuple(end_of_retrieve)
        self._max_documents = max_documents
        self._may_end = may_end or not numbers
        self._prior = {n: max(prior.get(n, 0.0), _MIN_PRIOR) if prior else 1.0 for n in numbers}
        self._root = _Node()
        for number, tokens in numbers.items():
            node = self._root
            node.members.add(number)
            for token in tokens:
                node = node.children.setdefault(token, _Node())
                node.members.add(number)
            node.number = number

    def legal(self, written: Sequence[int]) -> dict[int, float]:
        """Tokens that may come next, each with what the prior has against it.

        A token is worth its best document: the prior of the best of the unread documents that it
        leads to, over that of the best that could still be written. In logarithm that is 0 for the
        way to the best document, and for the end marks, about which a prior over documents says
        nothing; along a document's number it adds up to the document's own. (Not the sum over the
        documents: greedy decoding would follow the digit that many poor ones share.)

        Args:
            written: tokens since the prompt.

        Returns:
            Token -> log of that ratio, at most 0; empty when the round is complete (or was never
            legal).
        """
        states, complete = self._read(written)
        if complete is not None:
            return {}
        ratios: dict[int, float] = {}
        for state in states:
            for token, (_, ratio) in self._steps(state).items():
                ratios[token] = max(ratios.get(token, 0.0), ratio)
        return {token: math.log(ratio) for token, ratio in ratios.items()}

    def parse(self, written: Sequence[int]) -> Written | None:
        """The round as written, or `None` while it is not complete."""
        return self._read(written)[1]

    def _read(self, written: Sequence[int]) -> tuple[list[_State], Written | None]:
        """Follow all readings of `written`; tokens behind the end of the round do not count."""
        states = [_State((), self._root)]
        for i, token in enumerate(written):
            following: list[_State] = []
            for state in states:
                step = self._steps(state).get(token)
                following += step[0] if step else []
            states = following
            for state in states:
                if state.mark == ():
                    return states, Written(state.numbers, state.ends, i + 1)
        return states, None

    def _steps(self, state: _State) -> dict[int, tuple[list[_State], float]]:
        """Legal tokens from one state -> the states that they lead to, and the prior's ratio."""
        if state.mark is not None:
            head, rest = state.mark[0], state.mark[1:]
            return {head: ([_State(state.numbers, state.node, rest, state.ends)], 1.0)}
        steps: dict[int, tuple[list[_State], float]] = {}
        if len(state.numbers) < self._max_documents:
            best = self._best(state.node, state.numbers)
            for token, child in state.node.children.items():
                if prior := self._best(child, state.numbers):
                    steps[token] = (self._enter(child, state.numbers), prior / best)
        if state.node is self._root:
            mark, ends = None, False
            if state.numbers:
                mark = self._end_of_read
            elif self._may_end:
                mark, ends = self._end_of_retrieve, True
            if mark is not None:
                after = _State(state.numbers, self._root, mark[1:], ends)
                others, _ = steps.get(mark[0], ([], 0.0))
                steps[mark[0]] = ([*others, after], 1.0)
        return steps

    def _enter(self, node: _Node, numbers: tuple[int, ...]) -> list[_State]:
        states = []
        if node.number is not None and node.number not in numbers:
            states.append(_State((*numbers, node.number), self._root))
        if any(self._best(child, numbers) for child in node.children.values()):
            states.append(_State(numbers, node))
        return states

    def _best(self, node: _Node, numbers: tuple[int, ...]) -> float:
        """Prior of the best document under a node that is not among `numbers`; 0 without one."""
        return max((self._prior[n] for n in node.members if n not in numbers), default=0.0)


class Grammars:
    """The grammars of a batch's rows, made when the first token is asked for.

    Which documents are legal is known only after the prefill has routed, and the prefill happens
    inside `generate()`: so they are made from a function, once.
    """

    def __init__(self, make: Callable[[], Sequence[RoundGrammar]]) -> None:
        self._make = make
        self._rows: Sequence[RoundGrammar] | None = None

    @property
    def rows(self) -> Sequence[RoundGrammar]:
        """One grammar per row of the batch."""
        if self._rows is None:
            self._rows = self._make()
        return self._rows


class RetrievalConstraint(LogitsProcessor):
    """Keeps every row of a batch within its grammar (text format of DESIGN; the prior is ours)."""

    def __init__(
        self, grammars: Grammars, prompt_length: int, pad_token: int, prior_weight: float = 0.0
    ) -> None:
        """Constrain what comes behind a prompt.

        Args:
            grammars: one per row.
            prompt_length: columns of the (left-padded) prompt.
            pad_token: written by rows that are complete while others go on.
            prior_weight: factor of the log prior; 0 leaves the model's own probabilities.
        """
        self._grammars = grammars
        self._prompt_length = prompt_length
        self._pad_token = pad_token
        self._prior_weight = prior_weight

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of legal tokens, shifted by the prior; -inf for all others.

        Args:
            input_ids: [B, T] int64, prompt and what was written.
            scores: [B, V] logits.

        Returns:
            [B, V], of the dtype of `scores`.

        Raises:
            ModelError: the model's logits are not numbers.
        """
        check_logits(scores)
        constrained = torch.full_like(scores, -math.inf)
        written = input_ids[:, self._prompt_length :].tolist()
        for row, grammar in enumerate(self._grammars.rows):
            legal = grammar.legal(written[row])
            if not legal:
                constrained[row, self._pad_token] = 0.0
                continue
            tokens = torch.tensor(list(legal), device=scores.device)
            prior = scores.new_tensor(list(legal.values()))
            shifted = scores[row, tokens] + self._prior_weight * prior
            # What the model holds impossible must still win against what is illegal.
            constrained[row, tokens] = shifted.clamp(min=torch.finfo(scores.dtype).min)
        return constrained


class RoundComplete(StoppingCriteria):
    """Stops a row when its round is complete."""

    def __init__(self, grammars: Grammars, prompt_length: int) -> None:
        self._grammars = grammars
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        """[B] bool, True for rows that are complete."""
        written = input_ids[:, self._prompt_length :].tolist()
        done = [g.parse(w) is not None for g, w in zip(self._grammars.rows, written, strict=True)]
        return torch.tensor(done, device=input_ids.device)


class CheckLogits(LogitsProcessor):
    """Passes scores on, unless they are not numbers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The same scores [B, V].

        Raises:
            ModelError: the model's logits are not numbers.
        """
        check_logits(scores)
        return scores


def check_logits(scores: Tensor) -> None:
    """Refuse logits that are not numbers: any token would do, and the answer would be made up.

    Raises:
        ModelError: there is a NaN or +inf, or a row without any finite value.
    """
    finite = torch.isfinite(scores)
    if not bool((finite | torch.isneginf(scores)).all()) or not bool(finite.any(dim=-1).all()):
        raise ModelError(
            "The model's logits are not finite (NaN or infinity): its weights are damaged, or "
            "overflow in this dtype. Load the checkpoint again, or in float32."
        )
