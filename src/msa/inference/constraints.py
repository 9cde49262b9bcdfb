"""What the model may write in a round: numbers of routed documents, or the end of retrieval.

A round is `[17][3]<|object_ref_end|>` or, at its very start, `<End-of-Retrieve>` (template
strings). `RoundGrammar` holds the rules of one row, `RoundWriter` follows what is written by them.
Everything works on token sequences: a tokenizer may split numbers and marks in any way, so long as
numbers are written as `PromptEncoder.written` writes them, each by itself. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from msa.errors import ModelError

_MIN_PRIOR = 1e-300  # a document whose prior underflows stays possible
_SEVERAL = 2  # documents named from which on the ranking has a say in how many there are
_LEAST_ENOUGH = 1e-3  # what this leaves of the end mark


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

    Attributes:
        end: first token of what ends the retrieval.
    """

    def __init__(
        self,
        numbers: Mapping[int, Sequence[int]],
        end_of_read: Sequence[int],
        end_of_retrieve: Sequence[int],
        *,
        max_documents: int,
        min_documents: int = 1,
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
            min_documents: numbers before the mark that ends them, at least; all of `numbers` if
                those are fewer.
            may_end: whether the retrieval may end.
            prior: number -> prior probability (any positive scale); uniform when `None`.
        """
        if not end_of_read or not end_of_retrieve or not all(numbers.values()):
            raise ModelError(
                "The tokenizer turns a document number or an end mark of the prompt template into "
                "no tokens; use the tokenizer that belongs to the model."
            )
        self.end = end_of_retrieve[0]
        self._end_of_read = tuple(end_of_read)
        self._end_of_retrieve = tuple(end_of_retrieve)
        self._max_documents = max_documents
        self._min_documents = max(1, min(min_documents, max_documents, len(numbers)))
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

    def begin(self) -> RoundWriter:
        """A round of which nothing is written yet."""
        return RoundWriter(self, [_State((), self._root)])

    def steps(self, state: _State) -> dict[int, tuple[list[_State], float]]:
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
            mark, ends, ratio = None, False, 1.0
            if len(state.numbers) >= self._min_documents:
                mark, ratio = self._end_of_read, self._enough(state.numbers)
            elif not state.numbers and self._may_end:
                mark, ends = self._end_of_retrieve, True
            if mark is not None:
                after = _State(state.numbers, self._root, mark[1:], ends)
                others, other = steps.get(mark[0], ([], 0.0))
                steps[mark[0]] = ([*others, after], max(ratio, other))
        return steps

    def _enter(self, node: _Node, numbers: tuple[int, ...]) -> list[_State]:
        states = []
        if node.number is not None and node.number not in numbers:
            states.append(_State((*numbers, node.number), self._root))
        if any(self._best(child, numbers) for child in node.children.values()):
            states.append(_State(numbers, node))
        return states

    def _enough(self, numbers: tuple[int, ...]) -> float:
        """How far the best unread document falls behind the best that is named, in [0, 1].

        0 is where the best of `numbers` stands, 1 where the last of all documents does, on the
        scale of the log prior. 1 for fewer than `_SEVERAL`: one document or several is for the
        model to say. Of several, a model that was taught on two or three stops there, when the
        ranking sees a fourth that is as good.
        """
        if len(numbers) < _SEVERAL or not (best := self._best(self._root, numbers)):
            return 1.0
        last = min(self._prior.values())
        first = max(self._prior[number] for number in numbers)
        if first <= last:
            return 1.0
        return max(_LEAST_ENOUGH, math.log(first / best) / math.log(first / last))

    def _best(self, node: _Node, numbers: tuple[int, ...]) -> float:
        """Prior of the best document under a node that is not among `numbers`; 0 without one."""
        return max((self._prior[n] for n in node.members if n not in numbers), default=0.0)


class RoundWriter:
    """One round while it is written.

    Attributes:
        tokens: what is written so far.
        complete: the round, once it is complete; nothing can be written then.
    """

    def __init__(self, grammar: RoundGrammar, states: list[_State]) -> None:
        self._grammar = grammar
        self._states = states
        self.tokens: list[int] = []
        self.complete: Written | None = None

    def legal(self) -> dict[int, float]:
        """Tokens that may come next, each with what the prior has against it.

        A token is worth its best document: the prior of the best of the unread documents that it
        leads to, over that of the best that could still be written. In logarithm that is 0 for the
        way to the best document; along a document's number it adds up to the document's own. (Not
        the sum over the documents: greedy decoding would follow the digit that many poor ones
        share.) The end mark is worth 1 until several documents are named, then how far the next
        one falls behind them; the end of retrieval, of which the prior knows nothing, is worth 1.

        Returns:
            Token -> log of that ratio, at most 0; empty when the round is complete.
        """
        if self.complete is not None:
            return {}
        ratios: dict[int, float] = {}
        for state in self._states:
            for token, (_, ratio) in self._grammar.steps(state).items():
                ratios[token] = max(ratios.get(token, 0.0), ratio)
        return {token: math.log(ratio) for token, ratio in ratios.items()}

    def push(self, token: int) -> None:
        """Write a legal token.

        Raises:
            ValueError: it is not legal.
        """
        following: list[_State] = []
        for state in self._states if self.complete is None else ():
            step = self._grammar.steps(state).get(token)
            following += step[0] if step else []
        if not following:
            raise ValueError(f"token {token} is not legal after {self.tokens}")
        self.tokens.append(token)
        self._states = following
        for state in following:
            if state.mark == ():
                self.complete = Written(state.numbers, state.ends, len(self.tokens))
                return

    def push_forced(self) -> list[int]:
        """Write tokens for as long as exactly one is legal; those tokens."""
        forced: list[int] = []
        while len(legal := self.legal()) == 1:
            forced += legal
            self.push(forced[-1])
        return forced
