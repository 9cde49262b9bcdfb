from __future__ import annotations

import torch

from conftest import make_tiny_model
from msa.memory.latent import LatentMemory
from msa.types import MemoryReader


def encoded(lengths=(20, 9, 30, 4), seed=0):
    model = make_tiny_model()
    torch.manual_seed(seed)
    ids = torch.randint(2, 500, (len(lengths), max(lengths)))
    return model, model.encode_documents(ids, torch.tensor(lengths))


def queries(batch=2, tokens=3, seed=1):
    torch.manual_seed(seed)
    return torch.randn(batch, tokens, 4, 16), torch.ones(batch, tokens, dtype=torch.bool)


def test_latent_memory_is_a_memory_reader():
    _, states = encoded()
    assert isinstance(LatentMemory(states, 2), MemoryReader)


def test_content_holds_the_selected_documents_own_chunks():
    _, states = encoded()
    memory = LatentMemory(states, 2)
    selection = memory.route(3, *queries())
    content = memory.content(3, selection)
    ends = states.chunk_counts.cumsum(0)
    for row, documents in enumerate(selection.documents.tolist()):
        expected = torch.cat(
            [
                states.layers[3].pooled_values[ends[d] - states.chunk_counts[d] : ends[d]]
                for d in documents
            ]
        )
        assert torch.equal(content.values[row, content.mask[row]], expected)


def test_required_documents_are_selected_whatever_their_score():
    _, states = encoded()
    free = LatentMemory(states, 1).route(2, *queries())
    worst = LatentMemory(states, 4).route(2, *queries()).documents[:, -1]
    required = torch.zeros(2, 4, dtype=torch.bool)
    required[1, worst[1]] = True
    memory = LatentMemory(states, 1, required=required)
    selection = memory.route(2, *queries())
    assert selection.documents[0].tolist() == free.documents[0].tolist()
    assert selection.documents[1].tolist() == [worst[1].item()]
    assert memory.scores[2].max() <= 1.0  # what the router is taught by stays the cosine


def test_scores_of_every_layer_are_kept_with_their_gradients():
    model, states = encoded()
    memory = LatentMemory(states, 2)
    for layer in (2, 3):
        memory.route(layer, *queries())
    assert sorted(memory.scores) == [2, 3]
    memory.scores[2].sum().backward()
    attention = model.model.layers[2].self_attn
    assert attention.router_k_proj[0].weight.grad.any()
    assert model.model.layers[3].self_attn.router_k_proj[0].weight.grad is None
