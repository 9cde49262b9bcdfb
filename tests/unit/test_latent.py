from __future__ import annotations

import torch

from conftest import make_tiny_model, routing_vectors_of
from msa.memory.latent import LatentMemory
from msa.types import MemoryReader


def encoded(lengths=(20, 9, 30, 4), seed=0):
    model = make_tiny_model()
    torch.manual_seed(seed)
    ids = torch.randint(2, 500, (len(lengths), max(lengths)))
    return model, model.encode_documents(ids, torch.tensor(lengths))


def queries(batch=2, tokens=3, seed=1):
    return routing_vectors_of(batch, tokens, seed)


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


def test_the_last_routing_token_is_scored_alone_when_wished():
    _, states = encoded()
    vectors, mask = queries(tokens=4)
    mask[0, 0] = mask[1, 2:] = False  # routing tokens 1 to 3, and 0 to 1
    memory = LatentMemory(states, 1, with_last_token=True)
    selection = memory.route(2, vectors, mask)
    for row, last in enumerate((3, 1)):
        alone = LatentMemory(states, 1)
        alone.route(2, vectors[row : row + 1, last : last + 1], torch.ones(1, 1, dtype=torch.bool))
        torch.testing.assert_close(memory.last_token_scores[2][row], alone.scores[2][0])
    assert (memory.last_token_scores[2] <= memory.scores[2]).all()
    plain = LatentMemory(states, 1)
    assert torch.equal(plain.route(2, vectors, mask).documents, selection.documents)
    assert not plain.last_token_scores


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
