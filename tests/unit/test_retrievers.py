"""Retrievers of LangChain and LlamaIndex over a bank; each needs its framework's core package."""

from __future__ import annotations

import asyncio

import pytest

from msa import Document, MemoryBank, MemoryEngine
from msa.errors import InputError
from msa.integrations.searching import ServedBank, ServiceRequestError

QUESTION = "Where was Ada born?"
DOCUMENTS = [
    Document("ada", "Ada was born in Rome.", title="Ada", metadata={"user": "a"}),
    Document("bob", "Bob is Ada's son, a baker.", metadata={"user": "b"}),
    Document("rome", "Rome lies on the Tiber.", metadata={"user": "a"}),
]


@pytest.fixture
def engine(path, tiny_model, tiny_tokenizer):
    with MemoryBank.create(path, tiny_model, tiny_tokenizer) as bank:
        bank.add(DOCUMENTS)
        with MemoryEngine(bank) as engine:
            yield engine


def test_langchain_gets_what_the_engine_retrieves_in_its_order(engine):
    langchain = pytest.importorskip("msa.integrations.langchain", reason="needs langchain-core")
    hits = engine.retrieve(QUESTION, top_k=2)
    retriever = langchain.MSARetriever(searcher=engine, top_k=2)
    for found in (retriever.invoke(QUESTION), asyncio.run(retriever.ainvoke(QUESTION))):
        assert [(d.id, d.page_content) for d in found] == [(hit.id, hit.text) for hit in hits]
        assert [d.metadata["msa_number"] for d in found] == [hit.number for hit in hits]
        assert [d.metadata["user"] for d in found] == [hit.metadata["user"] for hit in hits]


def test_langchain_filters_inside_the_search(engine):
    langchain = pytest.importorskip("msa.integrations.langchain", reason="needs langchain-core")
    retriever = langchain.MSARetriever(searcher=engine, top_k=1, filter={"user": "b"})
    assert [d.id for d in retriever.invoke(QUESTION)] == ["bob"]


def test_llama_index_gets_what_the_engine_retrieves_with_its_scores(engine):
    llama_index = pytest.importorskip(
        "msa.integrations.llama_index", reason="needs llama-index-core"
    )
    hits = engine.retrieve(QUESTION, top_k=2)
    retriever = llama_index.MSARetriever(engine, top_k=2)
    for found in (retriever.retrieve(QUESTION), asyncio.run(retriever.aretrieve(QUESTION))):
        assert [(n.node_id, n.score) for n in found] == [(hit.id, hit.score) for hit in hits]
        assert [n.text for n in found] == [hit.text for hit in hits]


def test_llama_index_gives_a_model_the_callers_metadata_and_none_of_ours(engine):
    llama_index = pytest.importorskip(
        "msa.integrations.llama_index", reason="needs llama-index-core"
    )
    schema = pytest.importorskip("llama_index.core.schema")
    node = llama_index.MSARetriever(engine, top_k=1, filter={"user": "b"}).retrieve(QUESTION)[0]
    for mode in (schema.MetadataMode.LLM, schema.MetadataMode.EMBED):
        text = node.get_content(metadata_mode=mode)
        assert "user: b" in text
        assert "msa_" not in text


def test_a_served_bank_says_what_address_it_expects():
    with pytest.raises(InputError, match=r"url is 'localhost:8000'; give one as in 'http://"):
        ServedBank("localhost:8000", "notes")


def test_a_service_that_is_not_there_is_named():
    bank = ServedBank("http://127.0.0.1:9", "notes", timeout=2)
    with pytest.raises(
        ServiceRequestError, match=r"127\.0\.0\.1:9/api/banks/notes/search: .*refused"
    ):
        bank.retrieve(QUESTION)
