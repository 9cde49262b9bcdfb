from __future__ import annotations

import copy

import pytest
import torch
from transformers import get_scheduler

from conftest import make_tiny_model
from msa.training.config import OptimizerSettings
from msa.training.optimizer import Muon, MuonWithAdamW, orthogonalise

SETTINGS = OptimizerSettings(adam_learning_rate=0.25, weight_decay=0.02)


def model_and_optimizer(learning_rate=0.01):
    model = make_tiny_model(
        hidden_size=32, head_dim=8, num_hidden_layers=2, routing_layers=[1], vocab_size=64
    ).train()
    return model, MuonWithAdamW(model, learning_rate, SETTINGS)


def scheduled(optimizer):
    return get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps=2,
        num_training_steps=10,
        scheduler_specific_kwargs={"min_lr_rate": 0.1},
    )


def run(model, optimizer, scheduler, steps, start=0):
    for step in range(start, start + steps):
        torch.manual_seed(step)
        ids = torch.randint(2, 64, (2, 8))
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return loss


def test_matrices_inside_the_layers_go_to_muon_and_the_rest_to_adamw():
    model, optimizer = model_and_optimizer()
    names = {id(p): name for name, p in model.named_parameters()}
    muon = {names[id(p)] for g in optimizer.muon.param_groups for p in g["params"]}
    adam = {names[id(p)] for g in optimizer.adam.param_groups for p in g["params"]}
    assert "model.layers.1.self_attn.q_proj.weight" in muon
    assert "model.layers.1.self_attn.router_q_proj.0.weight" in muon
    assert "model.layers.0.mlp.down_proj.weight" in muon
    assert adam >= {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_norm.weight",
    }
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert muon | adam == trainable  # the temperature is not trained
    assert not muon & adam


def test_every_parameter_is_updated_by_a_step():
    """Weight decay alone does not count: what has a gradient moves by more."""
    model, optimizer = model_and_optimizer()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(2, 64, (2, 8))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert not torch.equal(before[name], parameter), name
    assert torch.equal(before["temperature"], model.temperature)


def test_the_state_continues_bit_for_bit():
    model, optimizer = model_and_optimizer()
    scheduler = scheduled(optimizer)
    run(model, optimizer, scheduler, 3)
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy({"optimizer": optimizer.state_dict(), "lr": scheduler.state_dict()})
    run(model, optimizer, scheduler, 3, start=3)

    other, fresh = model_and_optimizer()
    other.load_state_dict(weights)
    again = scheduled(fresh)
    fresh.load_state_dict(state["optimizer"])
    again.load_state_dict(state["lr"])
    run(other, fresh, again, 3, start=3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert [g["lr"] for g in fresh.param_groups] == [g["lr"] for g in optimizer.param_groups]


def test_the_state_survives_a_file(tmp_path):
    model, optimizer = model_and_optimizer()
    run(model, optimizer, scheduled(optimizer), 2)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    _, fresh = model_and_optimizer()
    fresh.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for part in ("muon", "adam"):
        old, new = optimizer.state_dict()[part]["state"], fresh.state_dict()[part]["state"]
        assert old.keys() == new.keys()
        assert all(torch.equal(old[i][k], new[i][k]) for i in old for k in old[i])


@pytest.mark.parametrize("restored", [False, True], ids=["new", "restored"])
def test_a_scheduler_changes_the_rates_of_both(restored):
    model, optimizer = model_and_optimizer(learning_rate=0.01)
    if restored:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scheduler = scheduled(optimizer)
    for step in range(10):
        run(model, optimizer, scheduler, 1, start=step)
        rate = optimizer.muon.param_groups[0]["lr"]
        assert optimizer.adam.param_groups[0]["lr"] == pytest.approx(0.25 * rate)
        if step == 1:
            assert rate == pytest.approx(0.01)
    assert rate == pytest.approx(0.001)


def test_a_closure_is_run_with_gradients():
    model, optimizer = model_and_optimizer()
    ids = torch.randint(2, 64, (2, 8))
    before = model.lm_head.weight.detach().clone()

    def closure():
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    assert not torch.equal(before, model.lm_head.weight)


def test_gradients_of_both_are_forgotten():
    model, optimizer = model_and_optimizer()
    ids = torch.randint(2, 64, (2, 8))
    model(ids, labels=ids).loss.backward()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_training_lowers_the_loss():
    model, optimizer = model_and_optimizer(learning_rate=0.02)
    ids = torch.randint(2, 64, (2, 8))
    losses = []
    for _ in range(15):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 24, 8), (2, 8, 24)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_sizes(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    made = orthogonalise(matrices)
    sizes = (u.mT @ made @ v.mT).diagonal(dim1=1, dim2=2)
    assert (s.max() / s.min()) > 2
    assert ((sizes > 0.6) & (sizes < 1.3)).all()
    torch.testing.assert_close(u @ torch.diag_embed(sizes) @ v, made, atol=1e-4, rtol=1e-4)


def test_muon_takes_the_steps_of_torchs_own():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(16, 8)), torch.nn.Parameter(torch.randn(16, 8))]
    theirs = copy.deepcopy(ours)
    muon = Muon(ours, lr=0.1, weight_decay=0.02)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(16, 8)
            other.grad = mine.grad.clone()
        muon.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=0.02, rtol=0)  # theirs is in bfloat16
        assert (mine - other).abs().mean() < 0.004
