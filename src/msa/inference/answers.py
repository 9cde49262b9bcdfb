"""The free text of an answer: from token ids to words, whole or piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from msa.text.prompts import PromptTemplate

Result = TypeVar("Result")


class AnswerText:
    """Turns the tokens of answers into their text: without lead-in, end mark and edge spaces."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
        ends: Sequence[Sequence[int]],
    ) -> None:
        """Read answers of one text format.

        Args:
            tokenizer: decodes.
            template: its `answer` lead-in is dropped.
            ends: token sequences, each of which ends an answer.
        """
        self._tokenizer = tokenizer
        self._lead_in = template.answer.strip()
        self.ends = [list(end) for end in ends]

    def find_end(self, tokens: Sequence[int]) -> tuple[int, int] | None:
        """Where the first end mark begins and stops; `None` if there is none."""
        for stop in range(1, len(tokens) + 1):
            for end in self.ends:
                start = stop - len(end)
                if start >= 0 and list(tokens[start:stop]) == end:
                    return start, stop
        return None

    def text(self, tokens: Sequence[int]) -> str:
        """Text of the tokens before the end mark (all, if there is none)."""
        found = self.find_end(tokens)
        return self._clean(tokens if found is None else tokens[: found[0]])

    def settled(self, tokens: Sequence[int]) -> str:
        """Longest text that no further token can change."""
        if self.find_end(tokens) is None:
            begun = [  # tokens at the end that may be the beginning of an end mark
                size
                for end in self.ends
                for size in range(1, min(len(end), len(tokens) + 1))
                if list(tokens[-size:]) == end[:size]
            ]
            tokens = tokens[: len(tokens) - max(begun, default=0)]
        text = self.text(tokens).rstrip("\ufffd").rstrip()
        return "" if self._lead_in.startswith(text) else text

    def _clean(self, tokens: Sequence[int]) -> str:
        text = str(
            self._tokenizer.decode(
                list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        ).strip()
        return text.removeprefix(self._lead_in).strip() if self._lead_in else text


class AnswerPieces:
    """An answer as it is written; the pieces together are exactly its text."""

    def __init__(self, reader: AnswerText) -> None:
        self._reader = reader
        self._tokens: list[int] = []
        self._given = ""

    def push(self, token: int) -> str:
        """Take one token in; what is now certain to be part of the text ("" if nothing new)."""
        self._tokens.append(token)
        return self._give(self._reader.settled(self._tokens))

    def finish(self) -> str:
        """What was held back until now."""
        return self._give(self._reader.text(self._tokens))

    def _give(self, text: str) -> str:
        if not text.startswith(self._given):
            return ""
        piece = text[len(self._given) :]
        self._given = text
        return piece


class EndsWith(StoppingCriteria):
    """Stops a row when one of some token sequences stands at its end, behind the prompt."""

    def __init__(self, ends: Sequence[Sequence[int]], prompt_length: int) -> None:
        self._ends = [list(end) for end in ends]
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        """[B] bool."""
        written = input_ids[:, self._prompt_length :]
        done = torch.zeros(len(written), dtype=torch.bool, device=written.device)
        for end in self._ends:
            if written.shape[1] >= len(end):
                tail = written[:, -len(end) :]
                done |= (tail == torch.tensor(end, device=written.device)).all(dim=1)
        return done


class _Cancelled(StoppingCriteria):
    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class _Streamer(BaseStreamer):
    """Hands on every token but the prompt's, which transformers puts first."""

    def __init__(self, queue: SimpleQueue[int | None]) -> None:
        self._queue = queue
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            for token in value.flatten().tolist():
                self._queue.put(token)
        self._prompt_seen = True

    def end(self) -> None:
        pass


def stream_tokens(
    generate: Callable[[BaseStreamer, StoppingCriteria], Result],
) -> Generator[int, None, Result]:
    """Tokens while `generate` writes them in a thread of its own; its result is returned.

    An error in the thread is raised here; closing the iterator stops the generation before this
    returns, so that no model runs on unseen.

    Args:
        generate: calls transformers' `generate()` for one row with this streamer and, among
            others, this stopping criterion.
    """
    queue: SimpleQueue[int | None] = SimpleQueue()
    cancelled = _Cancelled()
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(generate(_Streamer(queue), cancelled))
        except BaseException as error:
            errors.append(error)
        finally:
            queue.put(None)

    thread = threading.Thread(target=work, name="msa-answer", daemon=True)
    thread.start()
    try:
        while (token := queue.get()) is not None:
            yield token
    finally:
        cancelled.event.set()
        thread.join()
    if errors:
        raise errors[0]
    return results[0]
