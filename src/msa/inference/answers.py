"""The free text of an answer: from token ids to words, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msa.text.prompts import PromptTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
