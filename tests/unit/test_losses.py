from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_tiny_model
from msa.memory.latent import LatentMemory
from msa.model.modeling_msa import Step
from msa.training.losses import language_model_loss, routing_loss

few = settings(max_examples=40, deadline=None)


def equation_5(scores, positives, temperature):
    """Eq. 5 in plain Python."""
    rows = []
    for row, right in zip(scores, positives, strict=True):
        if not any(right):
            continue
        negatives = sum(math.exp(s / temperature) for s, r in zip(row, right, strict=True) if not r)
        terms = []
        for s, r in zip(row, right, strict=True):
            if r:
                own = math.exp(s / temperature)
                terms.append(-math.log(own / (own + negatives)))
        rows.append(sum(terms) / len(terms))
    return sum(rows) / len(rows) if rows else 0.0


@given(data=st.data(), temperature=st.sampled_from([0.05, 0.1, 1.0]))
@few
def test_routing_loss_is_equation_5(data, temperature):
    documents = data.draw(st.integers(1, 5))
    number = st.floats(-1, 1, width=32)
    rows = data.draw(st.integers(1, 4))
    shape = {"min_size": documents, "max_size": documents}
    scores = data.draw(st.lists(st.lists(number, **shape), min_size=rows, max_size=rows))
    right = data.draw(st.lists(st.lists(st.booleans(), **shape), min_size=rows, max_size=rows))
    loss = routing_loss(torch.tensor(scores), torch.tensor(right), temperature)
    assert loss.item() == pytest.approx(equation_5(scores, right, temperature), abs=1e-4)


def test_positives_do_not_compete():
    """Raising one positive leaves what the other contributes unchanged."""
    positives = torch.tensor([[True, True, False]])
    scores = torch.tensor([[0.2, 0.1, 0.3]], requires_grad=True)
    alone = routing_loss(scores[:, [0, 2]], positives[:, [0, 2]], 0.1)
    other = routing_loss(scores[:, [1, 2]], positives[:, [1, 2]], 0.1)
    both = routing_loss(scores, positives, 0.1)
    assert both.item() == pytest.approx((alone.item() + other.item()) / 2, abs=1e-6)


def test_rows_without_a_positive_count_nothing():
    scores = torch.randn(3, 4, requires_grad=True)
    positives = torch.zeros(3, 4, dtype=torch.bool)
    positives[1, 2] = True
    loss = routing_loss(scores, positives, 0.1)
    assert loss.item() == pytest.approx(routing_loss(scores[1:2], positives[1:2], 0.1).item())
    loss.backward()
    assert (scores.grad[[0, 2]] == 0).all()
    assert routing_loss(scores, torch.zeros_like(positives), 0.1).item() == 0


def test_a_row_that_routed_by_nothing_spoils_no_gradient():
    """Its scores are -inf; it has no positive, and so it must not turn the others into NaN."""
    scores = torch.randn(2, 3)
    scores[0] = -torch.inf
    scores.requires_grad_()
    positives = torch.tensor([[False] * 3, [True, False, False]])
    loss = routing_loss(scores, positives, 0.1)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[1].any()


def test_nothing_but_positives_costs_nothing_and_has_finite_gradients():
    scores = torch.randn(2, 3, requires_grad=True)
    loss = routing_loss(scores, torch.ones(2, 3, dtype=torch.bool), 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(scores.grad).all()


def router_gradients(model, loss):
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {
        name: parameter.grad is not None and bool(parameter.grad.any())
        for name, parameter in model.named_parameters()
        if ".router_" in name
    }


def test_only_the_routing_loss_teaches_the_router():
    """Selection is a hard top-k: through the content no gradient reaches the router."""
    model = make_tiny_model().train()
    torch.manual_seed(0)
    documents = torch.randint(2, 500, (6, 12))
    states, hidden = model.model.encode(documents, torch.full((6,), 12), with_hidden=True)
    question = torch.randint(2, 500, (2, 8))
    memory = LatentMemory(states, 2)
    step = Step(memory=memory, routing_mask=torch.ones(2, 8, dtype=torch.bool))
    out = model.model(model.model.embed_tokens(question), torch.arange(8)[None], step)
    language = language_model_loss(out, question, model.lm_head)
    language = language + language_model_loss(hidden, documents, model.lm_head)
    gradients = router_gradients(model, language)
    assert len(gradients) == 4  # two routing layers, queries and keys
    assert not any(gradients.values())
    values = model.model.layers[2].self_attn.v_proj.weight
    assert values.grad.any()  # while the selected documents' values are taught
    positives = torch.zeros(2, 6, dtype=torch.bool)
    positives[0, 1] = positives[1, 4] = True
    routing = sum(routing_loss(s, positives, 0.1) for s in memory.scores.values())
    assert all(router_gradients(model, routing).values())


def test_language_model_loss_is_the_weighted_mean_of_the_labelled_tokens():
    torch.manual_seed(0)
    head = torch.nn.Linear(4, 7, bias=False)
    hidden = torch.randn(2, 5, 4)
    labels = torch.tensor([[1, 2, -100, 3, 4], [-100, -100, -100, 6, -100]])
    weights = torch.tensor([[9.0, 1.0, 5.0, 0.5, 0.25], [7.0, 7.0, 7.0, 2.0, 7.0]])
    total = factors = 0.0
    for row in range(2):
        for place in range(1, 5):
            label = int(labels[row, place])
            if label < 0:
                continue
            logp = head(hidden[row, place - 1]).log_softmax(0)[label].item()
            total -= weights[row, place].item() * logp
            factors += weights[row, place].item()
    loss = language_model_loss(hidden, labels, head, weights)
    assert loss.item() == pytest.approx(total / factors, rel=1e-5)
    plain = language_model_loss(hidden, labels, head)
    assert plain.item() == pytest.approx(
        language_model_loss(hidden, labels, head, torch.ones(2, 5)).item()
    )


def test_language_model_loss_without_labels_is_zero_and_differentiable():
    head = torch.nn.Linear(4, 7)
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    loss = language_model_loss(hidden, torch.full((1, 3), -100), head)
    loss.backward()
    assert loss.item() == 0
    assert (hidden.grad == 0).all()


def test_documents_that_were_read_are_no_negatives():
    scores = torch.tensor([[0.9, 0.5, 0.1, 0.3]])
    positives = torch.tensor([[False, True, False, False]])
    read = torch.tensor([[True, False, False, False]])
    without = routing_loss(scores[:, 1:], positives[:, 1:], 0.1)
    assert torch.allclose(routing_loss(scores, positives, 0.1, read), without)
    assert routing_loss(scores, positives, 0.1) > without
