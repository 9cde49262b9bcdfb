from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from evaluation_tools import DOCUMENTS
from msa.errors import InputError, ModelError
from msa.evaluation.retrieval import (
    BM25Retriever,
    DenseRetriever,
    HybridRetriever,
    SentenceEncoder,
    best_rows,
    gold_ranks,
    z_scores,
)
from msa.types import Document

CORPUS = [Document(d["id"], d["text"], title=d.get("title") or None) for d in DOCUMENTS]
ASKED = ["Which fjord has boats?", "Where is Rome?", "How much sugar and butter?"]


def test_bm25_finds_the_obvious_document_by_title_or_text():
    scores = BM25Retriever(CORPUS).scores(ASKED)
    assert scores.dtype == np.float32
    assert [CORPUS[row[0]].id for row in best_rows(scores, 1)] == ["oslo", "rome", "cake"]


def test_bm25_scores_nothing_for_words_that_are_nowhere():
    assert not BM25Retriever(CORPUS).scores(["the", "xyzzy", ""]).any()


def test_without_bm25s_the_next_step_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(InputError, match=r"pip install 'msa-memory\[evaluate\]'"):
        BM25Retriever(CORPUS)


def test_ranks_count_what_is_above_and_of_equals_what_stands_before():
    scores = np.array([[1.0, 3.0, 3.0, 0.0]], dtype=np.float32)
    assert gold_ranks(scores, [[0, 1, 2, 3]]) == [[2, 0, 1, 3]]
    assert best_rows(scores, 9) == [[1, 2, 0, 3]]
    for rank, row in enumerate(best_rows(scores, 4)[0]):
        assert gold_ranks(scores, [[row]]) == [[rank]]


def test_z_scores_are_the_same_for_any_scale_and_zero_where_all_are_equal():
    scores = np.array([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]], dtype=np.float32)
    found = z_scores(scores)
    assert found[0].mean() == pytest.approx(0, abs=1e-6)
    assert found[0].std() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(z_scores(7 * scores - 3), found, atol=1e-5)
    assert not found[1].any()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A sentence embedding model of one random layer, saved as the real ones are."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({w for d in CORPUS for w in d.content.lower().split()})
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *words])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocab),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    ).save_pretrained(folder)
    return SentenceEncoder(folder, max_tokens=8)


def test_embeddings_have_unit_length_and_do_not_depend_on_the_batch(encoder):
    texts = [d.content for d in CORPUS]
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(encoder.encode(texts, batch_size=2), alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-5)


def test_a_document_is_nearest_to_itself(encoder):
    dense = DenseRetriever(encoder, CORPUS)
    scores = dense.scores([d.content for d in CORPUS])
    assert [row[0] for row in best_rows(scores, 1)] == list(range(len(CORPUS)))
    np.testing.assert_allclose(scores.diagonal(), 1, atol=1e-5)


def test_embeddings_are_cached_by_model_and_texts(encoder, tmp_path, monkeypatch):
    first = DenseRetriever(encoder, CORPUS, tmp_path)
    (held,) = tmp_path.glob("*.npy")
    DenseRetriever(encoder, CORPUS[:2], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    expected = first.scores(ASKED)
    calls = []
    encode = SentenceEncoder.encode

    def counted(self, texts, *args, **kwargs):
        calls.append(len(texts))
        return encode(self, texts, *args, **kwargs)

    monkeypatch.setattr(SentenceEncoder, "encode", counted)
    again = DenseRetriever(encoder, CORPUS, tmp_path)
    np.testing.assert_array_equal(again.scores(ASKED), expected)
    assert calls == [3]  # the questions only
    assert held.is_file()


def test_a_folder_without_a_model_is_one_clear_line(tmp_path):
    with pytest.raises(ModelError, match=r"no config.json; give the folder of a sentence"):
        SentenceEncoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="cannot be loaded as an embedding model") as caught:
        SentenceEncoder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_hybrid_adds_z_scores(encoder):
    bm25, dense = BM25Retriever(CORPUS), DenseRetriever(encoder, CORPUS)
    both = HybridRetriever([bm25, dense], [1.0, 0.5])
    assert both.name == "bm25+minilm"
    expected = z_scores(bm25.scores(ASKED)) + 0.5 * z_scores(dense.scores(ASKED))
    np.testing.assert_allclose(both.scores(ASKED), expected, atol=1e-6)
