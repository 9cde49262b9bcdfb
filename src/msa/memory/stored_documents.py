"""The half of a bank that reads: its documents as they are stored, by id, number, page or words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from msa.errors import DocumentNotFoundError
from msa.memory.store.catalog import CATALOG_FILE, Catalog
from msa.memory.store.filters import Filter
from msa.memory.store.manifest import Manifest
from msa.memory.store.reports import BankInfo, StoredDocument
from msa.memory.store.word_index import LexicalIndex, LexicalQuery
from msa.text.prompts import PromptTemplate
from msa.types import whole_number

SEGMENTS_FOLDER = "segments"


class StoredDocuments:
    """The documents of a bank. `msa.MemoryBank` is one, which also writes.

    Attributes:
        path: the bank's folder, absolute.
        manifest: what the bank was made with.
        catalog: open.
    """

    def __init__(self, path: Path, manifest: Manifest, catalog: Catalog) -> None:
        self.path = path
        self.manifest = manifest
        self.catalog = catalog
        self._lexical = LexicalIndex(path / CATALOG_FILE)

    @property
    def segments_folder(self) -> Path:
        """Where the latent states lie."""
        return self.path / SEGMENTS_FOLDER

    @property
    def template(self) -> PromptTemplate:
        """Text format of the documents."""
        return self.manifest.prompt_template

    @property
    def generation(self) -> int:
        """Grows with every commit, of any process; equal means that nothing has changed."""
        return self.catalog.counter("generation")

    def __len__(self) -> int:
        """Number of documents that the model knows, parts of split ones counted each."""
        return self.catalog.count()

    def __contains__(self, document_id: object) -> bool:
        if not isinstance(document_id, str):
            return False
        known = self.catalog.known(document_id)
        return bool(known.numbers) or known.part_of is not None

    def _not_found(self, document_id: str) -> DocumentNotFoundError:
        return DocumentNotFoundError(
            f"bank '{self.path}' holds no document '{document_id}'; 'msa bank list {self.path}' "
            "names those it holds"
        )

    def get(self, document_id: str) -> StoredDocument:
        """The document with this id; or a part, by its own id ("book#2").

        Raises:
            DocumentNotFoundError: there is none; for a split document the message names its parts.
            InputError: the id is no text.
        """
        stored = self.catalog.by_id(document_id)
        if stored is not None:
            return stored
        parts = self.catalog.by_source(document_id)
        if parts:
            raise DocumentNotFoundError(
                f"'{document_id}' was too long and is stored as {len(parts)} parts, "
                f"'{parts[0].document.id}' to '{parts[-1].document.id}'; get those, or all with "
                "parts()"
            )
        raise self._not_found(document_id)

    def parts(self, document_id: str) -> list[StoredDocument]:
        """The document given under this id: itself, or all its parts in order.

        Raises:
            DocumentNotFoundError: the bank does not hold it.
        """
        stored = self.catalog.by_source(document_id)
        if not stored:
            raise self._not_found(document_id)
        return stored

    def get_number(self, number: int) -> StoredDocument:
        """The document with this number.

        Raises:
            DocumentNotFoundError: there is none, or none any more.
            InputError: it is no whole number.
        """
        number = whole_number(number, "document number")
        stored = self.catalog.by_numbers([number]).get(number)
        if stored is None:
            raise DocumentNotFoundError(
                f"bank '{self.path}' holds no document number {number} (any more)"
            )
        return stored

    def get_many(self, numbers: Iterable[int]) -> dict[int, StoredDocument]:
        """Number -> document, for those that exist; one that was deleted meanwhile is left out.

        Raises:
            InputError: what was given are no whole numbers.
        """
        return self.catalog.by_numbers(numbers)

    def ids(self, numbers: Iterable[int]) -> dict[int, str]:
        """Number -> id, for those that exist; cheaper than `get_many`, which reads the texts.

        Raises:
            InputError: what was given are no whole numbers.
        """
        return self.catalog.ids(numbers)

    def documents(
        self, limit: int | None = None, offset: int = 0, *, after: int = 0
    ) -> list[StoredDocument]:
        """Documents in the order in which they were added, parts of split ones each.

        Args:
            limit: documents at most; all by default.
            offset: documents to leave out.
            after: only documents with a higher number, so that pages stay consistent with a bank
                that changes.

        Raises:
            InputError: a limit, offset or number that is no whole number from 0.
        """
        most = -1 if limit is None else whole_number(limit, "limit", 0)
        return self.catalog.page(
            most, whole_number(offset, "offset", 0), whole_number(after, "after", 0)
        )

    # ---- lexical search

    def lexical_missing(self) -> str | None:
        """Why the bank cannot be searched by words, in one line; None when it can."""
        return self._lexical.missing()

    def lexical_search(
        self,
        queries: Sequence[str | LexicalQuery],
        top_k: int,
        *,
        filter: Filter | None = None,
        title_weight: float = 1.0,
    ) -> list[list[tuple[int, float]]]:
        """The documents that share the rarest words with each query, by BM25 (k1 1.2, b 0.75).

        A query is plain text; nothing in it is an operator. It answers from the latest commit:
        a caller that asks an older state has to drop numbers that this state does not hold.

        Args:
            queries: questions; or a `LexicalQuery`, with texts that were read, for a second hop
                (those texts themselves are found too).
            top_k: documents per query, at most.
            filter: which documents may be found, see `msa.memory.store.filters`.
            title_weight: how often a word of the title counts.

        Returns:
            For each query (document number, score), best first, equal scores by number; scores are
            positive and grow with relevance. Fewer than `top_k` where no more documents share a
            word.

        Raises:
            LexicalIndexError: there is no word index; the message says why and what to type.
            InputError: a top_k, weight or filter that cannot be used.
            BankCorruptError: the index is damaged.
        """
        return self._lexical.search(queries, top_k, filter=filter, title_weight=title_weight)

    def lexical_ranking(
        self,
        queries: Sequence[str | LexicalQuery],
        top_k: int,
        *,
        filter: Filter | None = None,
    ) -> list[list[tuple[int, float]]]:
        """What `lexical_search` finds, ranked by how well it fits word by word (`word_match`).

        A document's score is the mean of its BM25 score over that of the best, of the overlap of
        its words and pairs of words with the question, and of whether its title stands in the
        question or in a text that was read. Documents with a text that was read are left out.

        Args:
            queries, top_k, filter: see `lexical_search`.

        Returns:
            For each query (document number, score in [0, 1]), best first, equal scores by number.

        Raises:
            LexicalIndexError, InputError, BankCorruptError: see `lexical_search`.
        """
        return self._lexical.rank(queries, top_k, filter=filter)

    def lexical_scores(
        self, query: str | LexicalQuery, numbers: Sequence[int], *, title_weight: float = 1.0
    ) -> list[float]:
        """The scores that `lexical_search` gives to some documents, however many are better.

        Returns:
            One score per number; 0.0 for a document that shares no word or does not exist.

        Raises:
            LexicalIndexError, InputError, BankCorruptError: see `lexical_search`.
        """
        return self._lexical.scores(query, numbers, title_weight=title_weight)

    def lexical_coverage(self, question: str, texts: Sequence[str]) -> list[float]:
        """How much of a question each of some texts holds: in [0, 1], 1 if it has no words.

        The share of its words that stand in the text (endings removed, as the index has them),
        each weighed by how rare it is in the bank: log(1 + (N - n + 0.5) / (n + 0.5)) for a word
        of n of N documents, as BM25 does. A word that no document holds counts most.

        Raises:
            LexicalIndexError, BankCorruptError: see `lexical_search`.
        """
        return self._lexical.coverage(question, texts)

    def info(self) -> BankInfo:
        """Figures of the bank."""
        totals = self.catalog.totals()
        segments = self.catalog.segments()
        manifest = self.manifest
        catalog_bytes = 0
        for end in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                catalog_bytes += (self.path / (CATALOG_FILE + end)).stat().st_size
        return BankInfo(
            path=self.path,
            num_documents=totals.num_documents,
            num_ids=totals.num_ids,
            num_tokens=totals.num_tokens,
            num_chunks=totals.num_chunks,
            num_deleted=totals.num_deleted,
            num_segments=len(segments),
            segment_bytes=sum(e.size_bytes for e in segments),
            catalog_bytes=catalog_bytes,
            generation=self.generation,
            model=manifest.model,
            chunk_size=manifest.chunk_size,
            routing_layers=manifest.routing_layers,
            dtype=manifest.dtype,
            content_dtype=manifest.content_dtype,
            max_document_tokens=manifest.max_document_tokens,
            created=manifest.created,
        )
