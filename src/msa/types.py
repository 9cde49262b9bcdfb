"""Frozen values that pass between stages, and the protocol between model and memory.

Shape letters used in this package: B batch, T query tokens, N documents, C chunks, H query heads,
G key-value heads, D head dim, K selected documents per row, M memory rows (chunks of the selected
documents). One tensor layout everywhere: tokens or chunks before heads (BTHD).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from msa.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# After a title: nothing, white space, or marks that end a word, with white space after them.
_WORD_ENDS = re.compile(r"[.,:;!?…)\]}\"'”’»–—-]*(?:\s|$)|[。，：；、！？）」』]")

JSON = str | int | float | bool | None | list["JSON"] | dict[str, "JSON"]


@dataclass(frozen=True, slots=True)
class Document:
    """The unit of memory: what is routed to, cited, added and deleted.

    Attributes:
        id: the caller's string, unique in a bank.
        text: what is encoded, and what the model is given when it asks for the document.
        title: optional; shown to people, encoded in front of the text when given.
        metadata: JSON values of the caller's own; kept, returned, filtered on.
    """

    id: str
    text: str
    title: str | None = None
    metadata: Mapping[str, JSON] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """What the model sees: the title (unless the text begins with it), then the text."""
        if not self.title or _begins_with(self.text, self.title):
            return self.text
        return f"{self.title}. {self.text}"


def _begins_with(text: str, title: str) -> bool:
    """True for "Anna" and "Anna was born", not for "Annapolis is", nor for "C" and "C# is"."""
    return text.startswith(title) and _WORD_ENDS.match(text, len(title)) is not None


@dataclass(frozen=True, slots=True)
class LayerStates:
    """Latent states of some documents in one routing layer, chunks of all documents in a row.

    Attributes:
        pooled_keys: [C, G, D]; mean over each chunk of the keys after RoPE.
        pooled_values: [C, G, D]; mean over each chunk of the values.
        routing_keys: [C, G, D]; mean over each chunk of the router's keys; unit length per head
            when routing is by cosine.
    """

    pooled_keys: Tensor
    pooled_values: Tensor
    routing_keys: Tensor


@dataclass(frozen=True, slots=True)
class LatentStates:
    """The latent states of encoded documents (stage 1).

    Attributes:
        chunk_counts: [N] int64, chunks of each document, all >= 1. The chunks of document i are
            rows `chunk_counts[:i].sum()` to `chunk_counts[:i + 1].sum()` of every layer.
        layers: routing layer index -> its states; C = `chunk_counts.sum()`.
    """

    chunk_counts: Tensor
    layers: Mapping[int, LayerStates]


@dataclass(frozen=True, slots=True)
class Selection:
    """The documents that one routing layer chose for each row of a batch.

    Attributes:
        documents: [B, K] int64 rows of the memory (not document numbers), best first; -1 where a
            row has fewer than K documents.
        scores: [B, K] float32 document scores s_i of Eq. 2; -inf where `documents` is -1.
    """

    documents: Tensor
    scores: Tensor


@dataclass(frozen=True, slots=True)
class Content:
    """Compressed keys and values of the selected documents, ready for attention.

    Attributes:
        keys: [B, M, G, D] pooled keys.
        values: [B, M, G, D] pooled values.
        mask: [B, M] bool, False for padding rows.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor

    def row(self, index: int) -> Content:
        """One row of the batch, without padding."""
        part, used = slice(index, index + 1), self.mask[index]
        return Content(self.keys[part, used], self.values[part, used], self.mask[part, used])


@runtime_checkable
class MemoryReader(Protocol):
    """What the model asks of a memory: the whole of it. The model knows nothing else of banks.

    Implementations: an in-memory one for training, the loaded bank for inference.
    """

    def route(self, layer: int, vectors: Tensor, routing_mask: Tensor) -> Selection:
        """Choose documents for every row of a batch.

        Args:
            layer: index of the routing layer.
            vectors: [B, T, G*D] float32 routing vectors, of `msa.ops.routing.reduce_queries`.
            routing_mask: [B, T] bool, True for vectors that route. A row without any gets an empty
                selection.
        """
        ...

    def content(self, layer: int, selection: Selection) -> Content:
        """Fetch pooled keys and values of the selected documents of that layer."""
        ...


@dataclass(frozen=True, slots=True)
class Hit:
    """A document found by `MemoryEngine.retrieve`.

    Attributes:
        id: the document's id.
        number: the integer by which the model knows it.
        score: fused over the layers that selected it; higher is better.
        layer_scores: routing layer -> document score of Eq. 2, for the layers that selected it.
        title, text, metadata: as stored.
    """

    id: str
    number: int
    score: float
    layer_scores: Mapping[int, float]
    title: str | None
    text: str
    metadata: Mapping[str, JSON]


@dataclass(frozen=True, slots=True)
class Citation:
    """A document that the answer rests on: its text was read.

    Attributes:
        id, number, title, text: of the document.
        round: in which it was read, from 1.
        span: where in `text` the answer stands, (first character, first after it); None while
            there is no answer, and where the answer does not stand in this text word for word.
    """

    id: str
    number: int
    title: str | None
    text: str
    round: int
    span: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class RoutedDocument:
    """One entry of a routing trace."""

    id: str
    number: int
    score: float


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """One entry of the ranking that is fused from all routing layers and from the words.

    Attributes:
        id: the document's id.
        number: the integer by which the model knows it.
        score: fused score.
        prior: softmax of the scores over all candidates.
        layers: routing layers among whose candidates it was.
        lexical: how well its words fit, in [0, 1]; None if it was not found by words.
        judged: how likely the question is after its text, in [0, 1]; None if it was not tried.
    """

    id: str
    number: int
    score: float
    prior: float
    layers: tuple[int, ...]
    lexical: float | None
    judged: float | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """One turn of Memory Interleave: what was routed to, what was named and read.

    Attributes:
        index: 1 for the first round.
        routed: routing layer -> the documents that the model attended to there, best first.
        read: documents that the model named and was given, in the order written.
        ranked: documents that some layer attended to or that could be named, best first by fused
            score.
        end_log_odds: of ending the retrieval here against reading on, as the model gave them; None
            where it had no choice.
    """

    index: int
    routed: Mapping[int, tuple[RoutedDocument, ...]]
    read: tuple[Citation, ...]
    ranked: tuple[RankedDocument, ...] = ()
    end_log_odds: float | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts and times of one question.

    Attributes:
        prompt_tokens: tokens prefilled, all rounds together.
        generated_tokens: tokens that the model wrote.
        routing_seconds, total_seconds: wall time.
    """

    prompt_tokens: int
    generated_tokens: int
    routing_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one question.

    Attributes:
        question: as asked.
        text: the answer; empty when the model gave none; the template's refusal when refused.
        citations: documents read on the way, in reading order; none when refused.
        rounds: every round with its routing trace.
        usage: token counts and times.
        stopped: why the answer ended: "answered"; "not_found" (refused: what was read does not hold
            the answer, or nothing was left to read); "max_tokens" (it was cut); or the engine ended
            the retrieval: "max_rounds", or "max_positions" (no room for what the model named).
        scores: what speaks for and against a refusal (`msa.inference.refusal`): the features that
            were computed, and with a threshold the score itself as "refusal".
    """

    question: str
    text: str
    citations: tuple[Citation, ...]
    rounds: tuple[Round, ...]
    usage: Usage
    stopped: str
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Event:
    """One step of a streamed answer.

    Attributes:
        kind: "routing" (data: `Round` without reads), "reading" (data: `Citation`), "token"
            (data: str, a piece of the answer) or "answer" (data: `Answer`, always last).
        round: the round it belongs to, from 1.
        data: as said under `kind`.
    """

    kind: str
    round: int
    data: Any


def whole_number(value: object, name: str, least: int | None = None) -> int:
    """An integer of any kind (Python's, NumPy's, torch's) as Python's.

    Args:
        value: what was given.
        name: of the argument, for the message.
        least: the smallest that is allowed; any by default.

    Raises:
        InputError: it is a float, text, a truth value, or below `least`.
    """
    kind = type(value).__name__
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise InputError(f"{name}={value!r} is a {kind}: expected a whole number")
    if least is not None and number < least:
        raise InputError(f"{name}={number}: expected at least {least}")
    return number
