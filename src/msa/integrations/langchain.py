"""A retriever for LangChain; needs the package `langchain-core`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from msa.integrations.searching import described


class MSARetriever(BaseRetriever):
    """Documents that the model routes to, as LangChain's.

    Example::

        retriever = MSARetriever(searcher=ServedBank("http://127.0.0.1:8000", "notes"))
        documents = retriever.invoke("Who designed the harbor?")

    Attributes:
        searcher: a `MemoryEngine`, or a `ServedBank`; any `msa.integrations.searching.Searcher`.
        top_k: documents to return, at most.
        filter: metadata that they must have, see `msa.memory.store.filters`; None for any.
    """

    searcher: Any
    top_k: int = 4
    filter: Mapping[str, Any] | None = None

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        hits = self.searcher.retrieve(query, top_k=self.top_k, filter=self.filter)
        return [Document(id=hit.id, page_content=hit.text, metadata=described(hit)) for hit in hits]
