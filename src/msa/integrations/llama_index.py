"""A retriever for LlamaIndex; needs the package `llama-index-core`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from msa.integrations.searching import OURS, Searcher, described
from msa.types import JSON, Hit


class MSARetriever(BaseRetriever):
    """Documents that the model routes to, as LlamaIndex' nodes with their fused scores.

    Example::

        retriever = MSARetriever(ServedBank("http://127.0.0.1:8000", "notes"), top_k=4)
        nodes = retriever.retrieve("Who designed the harbor?")
    """

    def __init__(
        self, searcher: Searcher, *, top_k: int = 4, filter: Mapping[str, JSON] | None = None
    ) -> None:
        """Search with an engine or a served bank.

        Args:
            searcher: a `MemoryEngine`, or a `ServedBank`.
            top_k: nodes to return, at most.
            filter: metadata that documents must have, see `msa.memory.store.filters`.
        """
        super().__init__()
        self._searcher = searcher
        self._top_k = top_k
        self._filter = filter

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        hits = self._searcher.retrieve(
            query_bundle.query_str, top_k=self._top_k, filter=self._filter
        )
        return [NodeWithScore(node=_node(hit), score=hit.score) for hit in hits]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def _node(hit: Hit) -> TextNode:
    return TextNode(
        id_=hit.id,
        text=hit.text,
        metadata=described(hit),
        excluded_llm_metadata_keys=list(OURS),
        excluded_embed_metadata_keys=list(OURS),
    )
