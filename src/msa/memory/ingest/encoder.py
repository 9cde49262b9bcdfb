"""Stage 1 in bulk: documents to latent states, batches of similar length.

Shapes: N documents of a batch, L tokens of its longest.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

import torch

from msa.errors import InputError, ModelError
from msa.memory.store.records import EncodedBatch
from msa.ops.quantization import pack
from msa.text.prompts import PromptEncoder, PromptTemplate
from msa.types import Document, LatentStates, LayerStates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from msa.model.modeling_msa import MSAForCausalLM

DEFAULT_BATCH_TOKENS = 16384
MAX_PADDING = 0.1
"""Share of a batch; a batch with room is closed rather than padded more, once it is worth a run."""
WORTH_A_RUN = 8
"""That is, once it holds this part (an eighth) of the tokens that it may."""

MAX_THREADS = 4
"""Batches that are encoded side by side on a CPU, at most."""

Tokens = tuple[int, Sequence[int]]
"""A document's number and token ids."""


def length_buckets(
    documents: Sequence[Tokens], batch_tokens: int = DEFAULT_BATCH_TOKENS
) -> Iterator[list[Tokens]]:
    """Documents in batches of similar length, the shortest first.

    Args:
        documents: number and token ids of each.
        batch_tokens: N * L of a batch, padding included; a longer document goes alone.

    Source: ours; padding costs as much as text. A batch is closed when it is full, or when it is
    worth a run and one more document would make more than `MAX_PADDING` of it padding.
    """
    batch: list[Tokens] = []
    held = 0
    for item in sorted(documents, key=lambda d: len(d[1])):
        length = len(item[1])
        area = (len(batch) + 1) * length
        padding = area - held - length
        worth = held * WORTH_A_RUN >= batch_tokens
        if batch and (area > batch_tokens or (worth and padding > MAX_PADDING * area)):
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += length
    if batch:
        yield batch


class DocumentEncoder:
    """Encodes documents with one model, tokenizer and template.

    Args:
        model: encodes; put into evaluation mode while it does.
        tokenizer: the model's.
        template: text format; the released one by default.
        dtype: of the states; the model's by default.
        packed: precision of the content when it is to be packed ("int8", "fp8", "int4").
        before_batch: called before every batch, by each thread that encodes; it may wait, and what
            it raises ends the encoding.
    """

    def __init__(
        self,
        model: MSAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate | None = None,
        *,
        dtype: torch.dtype | None = None,
        packed: str | None = None,
        before_batch: Callable[[], None] | None = None,
    ) -> None:
        self.model = model
        self._before_batch = before_batch
        self.packed = packed
        self.prompts = PromptEncoder(tokenizer, template)
        self.dtype = dtype or model.dtype

    @property
    def max_tokens(self) -> int:
        """The model's positions: no document can have more tokens."""
        return int(self.model.config.max_position_embeddings)

    def tokens(self, number: int, document: Document) -> list[int]:
        """What is encoded for a document: its content in the template, as token ids."""
        return self.prompts.document(number, document.content)

    def encode(
        self,
        documents: Sequence[tuple[int, Document]],
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
    ) -> Iterator[EncodedBatch]:
        """Latent states of documents, given with their numbers.

        See `encode_tokens`, for which this makes the tokens.
        """
        return self.encode_tokens([(n, self.tokens(n, d)) for n, d in documents], batch_tokens)

    def encode_tokens(
        self,
        documents: Sequence[Tokens],
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
    ) -> Iterator[EncodedBatch]:
        """Latent states of documents, in batches of similar length.

        On a CPU with several threads some batches are encoded side by side, each with its part of
        the threads and of `batch_tokens`: much of a forward is too small for many threads.

        Args:
            documents: number and token ids of each, no more than `max_tokens`.
            batch_tokens: N * L of a batch, padding included; a longer document goes alone.

        Yields:
            Batches on the CPU, in `dtype` (packed content in uint8), shortest documents first;
            every document once.

        Raises:
            InputError: a document has no tokens, or more than the model has positions.
            ModelError: the states are not finite numbers.

        Source: ours; see `length_buckets`.
        """
        for number, ids in documents:
            if not 1 <= len(ids) <= self.max_tokens:
                raise InputError(
                    f"document {number} has {len(ids)} tokens; the model takes 1 to "
                    f"{self.max_tokens}. Split it"
                )
        threads = torch.get_num_threads() if self.model.device.type == "cpu" else 1
        workers = min(threads, MAX_THREADS)
        batches = list(length_buckets(documents, max(1, batch_tokens // workers)))
        training = self.model.training
        self.model.eval()
        try:
            if workers == 1 or len(batches) == 1:
                yield from map(self._encode_batch, batches)
            else:
                yield from self._side_by_side(batches, workers)
        finally:
            self.model.train(training)

    def _side_by_side(
        self, batches: Sequence[Sequence[Tokens]], workers: int
    ) -> Iterator[EncodedBatch]:
        """Encoded in so many Python threads, which share torch's; returned in order."""
        running: deque[Future[EncodedBatch]] = deque()
        waiting = iter(batches)
        pool = _threads_that_share(workers)
        try:
            for batch in islice(waiting, workers + 1):
                running.append(pool.submit(self._encode_batch, batch))
            while running:
                encoded = running.popleft().result()
                for batch in islice(waiting, 1):
                    running.append(pool.submit(self._encode_batch, batch))
                yield encoded
        finally:
            pool.shutdown(cancel_futures=True)

    @torch.no_grad()
    def _encode_batch(self, batch: Sequence[Tokens]) -> EncodedBatch:
        if self._before_batch is not None:
            self._before_batch()
        longest = len(batch[-1][1])
        input_ids = torch.tensor([[*ids, *([0] * (longest - len(ids)))] for _, ids in batch])
        lengths = torch.tensor([len(ids) for _, ids in batch])
        device = self.model.device
        states = self.model.encode_documents(input_ids.to(device), lengths.to(device))
        numbers = tuple(n for n, _ in batch)
        return EncodedBatch(numbers, self._on_cpu(states, numbers))

    def _on_cpu(self, states: LatentStates, numbers: tuple[int, ...]) -> LatentStates:
        layers = {}
        for i, s in states.layers.items():
            content_dtype = None if self.packed else self.dtype  # packed: rounded once
            moved = [
                s.pooled_keys.to("cpu", content_dtype),
                s.pooled_values.to("cpu", content_dtype),
                s.routing_keys.to("cpu", self.dtype),
            ]
            if not all(bool(t.isfinite().all()) for t in moved):
                raise ModelError(
                    f"the model gives infinite or NaN states in layer {i} for documents "
                    f"{numbers[0]} to {numbers[-1]}; its weights are damaged, or {self.dtype} is "
                    "too narrow for them. Load it again, or choose another dtype"
                )
            if self.packed is not None:
                moved[:2] = [pack(t, self.packed) for t in moved[:2]]
            layers[i] = LayerStates(*moved)
        return LatentStates(states.chunk_counts.cpu(), layers)


_STARTING = threading.Lock()


def _take_threads(count: int) -> None:
    """Give this Python thread so many of torch's."""
    torch.set_num_threads(count)
    torch.get_num_threads()  # a thread reads the number at its first use, and keeps it


def _threads_that_share(workers: int) -> ThreadPoolExecutor:
    """So many Python threads, each with its part of torch's threads.

    A thread begins with the number that any thread set last, so that number is set back before the
    pool does any work, and pools are started one after the other.
    """
    ready = threading.Barrier(workers)
    with _STARTING:
        before = torch.get_num_threads()
        share = max(1, before // workers)
        pool = ThreadPoolExecutor(workers, "msa-encode", _take_threads, (share,))
        try:
            for started in [pool.submit(ready.wait) for _ in range(workers)]:
                started.result()
        except BaseException:
            ready.abort()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(before)
    return pool
