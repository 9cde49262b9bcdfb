"""Routers trained on cached states: they learn, the best are kept, and NaN is counted."""

from __future__ import annotations

import random

import pytest
import torch

from conftest import make_tiny_model
from msa.errors import ConfigError, InputError, TrainingError
from msa.text.prompts import PromptEncoder
from msa.training import router_pretraining
from msa.training.question_sets import QuestionSet, TrainingQuestion
from msa.training.router_pretraining import RouterHeads, pretrain_routers
from msa.training.router_settings import RouterSettings
from msa.training.router_states import Query, SetStates
from msa.types import Document

pytest.importorskip("bm25s")
LAYERS = [1, 2]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "head_dim": 8,
    "routing_layers": LAYERS,
}
WIDTH = 32


def make_states(count: int = 60, seed: int = 0, reduction: str = "pooled") -> SetStates:
    """Questions whose states are a fixed rotation of their documents': routers can learn it."""
    torch.manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    counts = torch.randint(1, 4, (count,))
    first = counts.cumsum(0) - counts
    documents = {layer: torch.randn(int(counts.sum()), WIDTH) for layer in LAYERS}
    queries = tuple(make_query(i, count) for i in range(count))
    per_query = 1 if reduction in ("pooled", "last") else 3
    states = {
        layer: (d[first] @ rotation + 0.1 * torch.randn(count, WIDTH)).repeat_interleave(
            per_query, 0
        )
        for layer, d in documents.items()
    }
    return SetStates(
        name="set",
        chunk_counts=counts,
        documents=documents,
        queries=queries,
        query_counts=torch.full((count,), per_query),
        query_states=states,
        twins=torch.arange(count),
        groups=tuple(f"article {i}" for i in range(count)),
        cut=0,
    )


def make_query(index: int, count: int) -> Query:
    read = ((index + 1) % count,) if index % 7 == 0 else ()
    return Query(index, f"question {index}", (index,), read)


def make_set(count: int = 60) -> QuestionSet:
    documents = {
        f"d{i}": Document(f"d{i}", f"Text number {i}.", f"article {i}") for i in range(count)
    }
    questions = (TrainingQuestion(f"q{i}", f"question {i}", (), (f"d{i}",)) for i in range(count))
    return QuestionSet("set", documents, tuple(questions))


@pytest.fixture
def prompts(tiny_tokenizer):
    return PromptEncoder(tiny_tokenizer)


@pytest.fixture
def train(prompts, tmp_path, monkeypatch):
    """Train on made-up states; no model is run."""

    def run(model, states=None, **settings):
        made = states or make_states()
        monkeypatch.setattr(router_pretraining, "set_states", lambda *_: made)
        values = {
            "held_out": 0.3,
            "epochs": 12,
            "patience": 12,
            "queries": 16,
            "learning_rate": 0.02,
        }
        values |= {"warmup_steps": 2, "negatives": 2, **settings}
        questions = make_set(len(made.groups))
        return pretrain_routers(
            model, prompts, [questions], tmp_path, settings=RouterSettings(**values)
        )

    return run


@pytest.mark.parametrize("reduction", ["pooled", "max"])
def test_routers_learn_what_questions_have_in_common_with_their_documents(train, reduction):
    model = make_tiny_model(query_reduction=reduction, **SMALL)
    states = make_states(240, reduction=reduction)
    report = train(model, states)
    assert report.best_epoch > 0
    assert report.after["all"][1] > report.before["all"][1] + 0.2
    assert report.after["set"] == report.after["all"]
    assert set(report.layers_after) == set(LAYERS)
    assert report.train_queries + report.held_out_queries + report.left_out == 240


def test_only_routers_change_and_the_best_are_kept(train):
    model = make_tiny_model(query_reduction="pooled", **SMALL)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = train(model, epochs=2, patience=1, learning_rate=0.9)  # far too much
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert all("router_" in name for name in changed)
    if report.best_epoch == 0:
        assert not changed
    assert sum(report.after["all"].values()) >= sum(report.before["all"].values())


def test_the_seed_decides_the_result(train):
    models = [make_tiny_model(query_reduction="pooled", **SMALL) for _ in range(2)]
    reports = [train(model, epochs=2) for model in models]
    assert reports[0].after == reports[1].after
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_held_out_articles_are_never_trained_on(train, monkeypatch):
    seen = set()
    real = router_pretraining._RouterTrainer._step

    def step(self, data, queries, *others):
        seen.update(queries)
        real(self, data, queries, *others)

    monkeypatch.setattr(router_pretraining._RouterTrainer, "_step", step)
    made = []
    real_data = router_pretraining._Data
    monkeypatch.setattr(
        router_pretraining, "_Data", lambda *a: made.append(real_data(*a)) or made[-1]
    )
    train(make_tiny_model(query_reduction="pooled", **SMALL), epochs=1)
    (data,) = made
    assert seen == set(data.train)
    assert data.held_out
    held = {data.states.groups[d] for i in data.held_out for d in data.states.queries[i].positives}
    for index in data.train:
        query = data.states.queries[index]
        assert not held & {data.states.groups[d] for d in (*query.positives, *query.read)}


def test_read_documents_and_twins_are_neither_right_nor_wrong():
    states = make_states(10)
    states.twins[4] = 0
    data = router_pretraining._Data(make_set(10), states, None, RouterSettings())
    positives, ignored = data.targets([0, 3], torch.arange(10))
    assert positives.nonzero().tolist() == [[0, 0], [1, 3]]
    assert ignored.nonzero().tolist() == [[0, 1], [0, 4]]  # read before; words of document 0


def test_a_step_holds_gold_documents_hard_negatives_and_others():
    settings = RouterSettings(documents=12, held_out=0.3)
    data = router_pretraining._Data(make_set(40), make_states(40), None, settings)
    data.negatives = [((i + 5) % 40,) for i in range(40)]
    heads = RouterHeads(make_tiny_model(query_reduction="pooled", **SMALL))
    trainer = router_pretraining._RouterTrainer(heads, [data], settings, 0.1)
    trainer._rng = random.Random(0)
    found = trainer._documents(data, [1, 2, 3]).tolist()
    assert {1, 2, 3, 6, 7, 8} <= set(found)
    assert len(found) == len(set(found)) == 12


def test_losses_that_are_no_numbers_are_skipped_and_stop_the_training_when_they_go_on(train):
    states = make_states()
    states.query_states[1][::20] = torch.nan
    model = make_tiny_model(query_reduction="pooled", **SMALL)
    report = train(model, states, queries=4, epochs=1)
    assert 0 < report.skipped_losses <= 3
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    states.query_states[1][:] = torch.nan
    with pytest.raises(TrainingError, match="not a number 8 times in a row"):
        train(model, states, queries=4, epochs=4)


def test_too_little_and_out_of_range_is_said_in_one_line(train):
    model = make_tiny_model(query_reduction="pooled", **SMALL)
    with pytest.raises(InputError, match="2 questions are too few"):
        train(model, make_states(2))
    for bad in ({"epochs": 0}, {"held_out": 0.0}, {"temperature": -1.0}, {"learning_rate": 2.0}):
        (name,) = bad
        with pytest.raises(ConfigError, match=name):
            RouterSettings(**bad)


def test_from_texts_to_routers(prompts, tmp_path):
    """The whole way on a model that is run."""
    model = make_tiny_model(query_reduction="pooled", routing_layers=[1])
    questions = make_set(12)
    settings = RouterSettings(held_out=0.3, epochs=1, queries=4, documents=8)
    said = []
    report = pretrain_routers(
        model,
        prompts,
        [questions],
        tmp_path,
        settings=settings,
        progress=lambda *values: said.append(values),
    )
    assert report.epochs == 1
    assert ("epoch", 1, 1) in said
    assert {p.name.split("-")[0] for p in tmp_path.iterdir()} == {"states", "negatives"}
