"""Documents to pieces that are encoded: long ones are split into linked parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from msa.errors import InputError
from msa.memory.ingest.encoder import DocumentEncoder
from msa.memory.store.reports import part_id
from msa.types import Document

# Tokens of a split text may join differently at the edges of the template.
_SPLIT_MARGIN = 4
# Of a token, on average: a longer text is split without being tokenized as a whole.
_MOST_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class TokenizedDocument:
    """A document or part with its tokens, ready to be encoded."""

    number: int
    document: Document
    tokens: Sequence[int]


class RejectedError(Exception):
    """Why a document cannot be stored; the others go on."""


class DocumentSplitter:
    """Makes of a document the pieces that are encoded: itself, or its parts.

    Args:
        encoder: counts the tokens.
        max_document_tokens: a document with more is split.
    """

    def __init__(self, encoder: DocumentEncoder, max_document_tokens: int) -> None:
        self._encoder = encoder
        self._max_tokens = max_document_tokens

    def cut(self, document: Document, number: int) -> tuple[TokenizedDocument, ...]:
        """The document in one piece, or in parts with numbers from `number` on.

        Raises:
            RejectedError: it cannot be cut.
        """
        if len(document.text) <= _MOST_CHARACTERS * self._max_tokens:
            tokens = self._encoder.tokens(number, document)
            if len(tokens) <= self._max_tokens:
                return (TokenizedDocument(number, document, tokens),)
        texts = self._split(document, number)
        if len(texts) == 1:  # white space at its ends was what made it too long
            return self.number([replace(document, text=texts[0])], number)
        parts = [
            replace(document, id=part_id(document.id, i + 1), text=text)
            for i, text in enumerate(texts)
        ]
        return self.number(parts, number)

    def number(self, documents: Sequence[Document], first: int) -> tuple[TokenizedDocument, ...]:
        """Pieces of these documents or parts, with numbers from `first` on.

        Raises:
            RejectedError: one has more tokens than the model has positions.
        """
        pieces = tuple(
            TokenizedDocument(first + i, d, self._encoder.tokens(first + i, d))
            for i, d in enumerate(documents)
        )
        longest = max(len(p.tokens) for p in pieces)
        if longest > self._encoder.max_tokens:
            raise RejectedError(
                f"a part of it has {longest} tokens, more than the model's positions"
            )
        return pieces

    def _split(self, document: Document, number: int) -> list[str]:
        from msa.text.splitting import split_text

        # The frame: template, number (a part's may be one digit longer) and title.
        frame = len(self._encoder.tokens(10 * number, replace(document, text="")))
        room = self._max_tokens - frame - _SPLIT_MARGIN
        if room < self._max_tokens // 4:
            raise RejectedError(
                f"its title leaves no room for text: {frame} of {self._max_tokens} tokens"
            )
        try:
            return split_text(document.text, room, lambda s: len(self._encoder.prompts.plain(s)))
        except InputError as error:
            raise RejectedError(f"it cannot be split: {error}") from error
