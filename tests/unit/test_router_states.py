"""Cached router inputs: projecting them gives what the model itself computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import make_tiny_model
from msa.errors import ConfigError, InputError, TrainingError
from msa.memory.ingest.encoder import DocumentEncoder
from msa.memory.latent import LatentMemory
from msa.ops.routing import document_scores
from msa.text.prompts import PromptEncoder
from msa.training import router_states
from msa.training.question_sets import QuestionSet, TrainingQuestion
from msa.training.router_pretraining import RouterHeads
from msa.training.router_settings import StateSettings
from msa.training.router_states import make_queries, set_states
from msa.types import Document

TEXTS = ["Halden lies in Norway.", "Erik built it.", "A longer text about timber and trade."]


@pytest.fixture
def prompts(tiny_tokenizer):
    return PromptEncoder(tiny_tokenizer)


@pytest.fixture
def questions() -> QuestionSet:
    documents = {f"d{i}": Document(f"d{i}", text, "T") for i, text in enumerate(TEXTS)}
    asked = (
        TrainingQuestion("a", "Where is Halden?", ("Norway",), ("d0",)),
        TrainingQuestion("b", "Who built it?", ("Erik",), ("d1", "d0"), hops=2),
        TrainingQuestion("c", "Who was it?", (), (), unanswerable=True),
        TrainingQuestion("d", "And there?", ("timber",), ("d2",), rewrite="What of timber?"),
    )
    return QuestionSet("set", documents, asked)


def whole_model_scores(model, prompts, questions, context):
    """Document scores of every layer, through the forward pass of inference."""
    encoder = DocumentEncoder(model, prompts.tokenizer, prompts.template)
    numbered = [(i + 1, d) for i, d in enumerate(questions.documents.values())]
    scores = []
    for numbered_document in numbered:
        (batch,) = encoder.encode([numbered_document])
        memory = LatentMemory(batch.states, 1)
        ids = torch.tensor([context.input_ids])
        positions = torch.tensor([context.positions(model.config.top_k_documents)])
        mask = torch.tensor([context.routes])
        sees = torch.zeros_like(mask)  # routers alone: what is selected changes nothing
        model(ids, position_ids=positions, memory=memory, routing_mask=mask, memory_mask=sees)
        scores.append({layer: float(s) for layer, s in memory.scores.items()})
    return {layer: [s[layer] for s in scores] for layer in model.config.routing_layers}


@pytest.mark.parametrize(
    ("reduction", "token_states"),
    [("pooled", False), ("pooled", True), ("last", False), ("mean", False), ("max", False)],
)
@torch.no_grad()
def test_scores_from_cached_states_are_those_of_inference(
    prompts, questions, tmp_path, reduction, token_states
):
    model = make_tiny_model(query_reduction=reduction)
    if reduction == "pooled":
        for layer in model.config.routing_layers:
            torch.nn.init.normal_(model.model.layers[layer].self_attn.router_token_weight.weight)
    settings = StateSettings(token_states=token_states, dtype="float32")
    states = set_states(model, prompts, questions, tmp_path, settings)
    heads = RouterHeads(model)
    texts = [d.content for d in questions.documents.values()]
    first = 0
    for query, count in zip(states.queries, states.query_counts.tolist(), strict=True):
        context = router_states.context_of(prompts, query, texts)
        expected = whole_model_scores(model, prompts, questions, context)
        for layer in heads.layers:
            asked = states.query_states[layer][None, first : first + count]
            vectors, mask = heads.vectors(layer, asked, torch.ones(1, count, dtype=torch.bool))
            keys = heads.keys(layer, states.documents[layer])
            found = document_scores(vectors, mask, keys, states.chunk_counts)[0]
            torch.testing.assert_close(found, torch.tensor(expected[layer]), atol=1e-4, rtol=1e-4)
        first += count


def test_every_question_with_gold_asks_once_and_again_after_reading(questions):
    queries = make_queries(questions, StateSettings())
    assert [q.text for q in queries] == [
        "Where is Halden?",
        "Who built it?",
        "Who built it?",
        "What of timber?",
    ]
    assert queries[1].positives == (1, 0)
    assert set(queries[2].positives + queries[2].read) == {0, 1}
    assert len(queries[2].read) == 1
    assert len(make_queries(questions, StateSettings(later_rounds=False))) == 3


def test_what_was_computed_is_not_computed_again(prompts, questions, tmp_path, monkeypatch):
    model = make_tiny_model(query_reduction="pooled")
    first = set_states(model, prompts, questions, tmp_path)
    calls = []
    real = router_states.router_inputs
    monkeypatch.setattr(router_states, "router_inputs", lambda *a: calls.append(a) or real(*a))
    again = set_states(model, prompts, questions, tmp_path)
    assert calls == []
    for layer in model.config.routing_layers:
        assert torch.equal(first.documents[layer], again.documents[layer])
    queries = next(tmp_path.rglob("queries-*"))
    queries.write_bytes(queries.read_bytes()[:100])
    again = set_states(model, prompts, questions, tmp_path)
    assert calls
    for layer in model.config.routing_layers:
        assert torch.equal(first.query_states[layer], again.query_states[layer])


def test_other_data_or_another_model_has_states_of_its_own(prompts, questions, tmp_path):
    model = make_tiny_model(query_reduction="pooled")
    set_states(model, prompts, questions, tmp_path)
    set_states(make_tiny_model(seed=1, query_reduction="pooled"), prompts, questions, tmp_path)
    set_states(model, prompts, replace(questions, questions=questions.questions[:1]), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    template = replace(prompts.template, refusal="none", answer="A:")  # stands in no state
    set_states(model, PromptEncoder(prompts.tokenizer, template), questions, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    with torch.no_grad():  # routers may change, and are what changes
        model.model.layers[2].self_attn.router_q_proj[0].weight.zero_()
    set_states(model, prompts, questions, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_files_hold_a_part_each_and_add_up(prompts, questions, tmp_path, monkeypatch):
    model = make_tiny_model(query_reduction="pooled")
    whole = set_states(model, prompts, questions, tmp_path / "a")
    monkeypatch.setattr(router_states, "SHARD", 2)
    said = []
    parts = set_states(
        model, prompts, questions, tmp_path / "b", progress=lambda *values: said.append(values)
    )
    assert len(list((tmp_path / "b").rglob("*.safetensors"))) == 4
    assert torch.equal(whole.chunk_counts, parts.chunk_counts)
    for layer in model.config.routing_layers:
        torch.testing.assert_close(whole.documents[layer], parts.documents[layer])
    assert said[-1] == ("queries of set", 4, 4)


def test_long_documents_are_cut_and_counted(prompts, questions, tmp_path):
    model = make_tiny_model(query_reduction="pooled")
    states = set_states(model, prompts, questions, tmp_path, StateSettings(max_document_tokens=24))
    assert states.cut == 3
    assert states.chunk_counts.tolist() == [3, 3, 3]  # chunks of 8


def test_documents_of_the_same_words_are_twins(prompts, questions, tmp_path):
    copy = Document("d9", " ERIK  built it", "T")
    documents = {**questions.documents, "d9": copy}
    states = set_states(
        make_tiny_model(query_reduction="pooled"),
        prompts,
        replace(questions, documents=documents),
        tmp_path,
    )
    assert states.twins.tolist() == [0, 1, 2, 1]


def test_what_cannot_be_used_is_said_in_one_line(prompts, questions, tmp_path):
    model = make_tiny_model(query_reduction="pooled")
    nothing = replace(questions, questions=questions.questions[2:3])
    with pytest.raises(InputError, match="no question names a gold document"):
        set_states(model, prompts, nothing, tmp_path)
    with pytest.raises(ConfigError, match=r"dtype: expected .*, got 'float8'"):
        StateSettings(dtype="float8")
    with pytest.raises(ConfigError, match="max_document_tokens: expected 1 or more"):
        StateSettings(max_document_tokens=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        set_states(model, prompts, questions, tmp_path / "file")
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match="router inputs are NaN"):
        set_states(model, prompts, questions, tmp_path / "nan")
