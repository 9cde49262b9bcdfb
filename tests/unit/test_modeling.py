from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from conftest import SMALL, make_tiny_model
from msa import MSAConfig, MSAForCausalLM
from msa.errors import ConfigError, InputError
from msa.memory.latent import LatentMemory
from msa.model.cache import MSACache
from msa.model.convert import convert_backbone


def encode(model, lengths, seed=0):
    torch.manual_seed(seed)
    lengths = torch.tensor(lengths)
    ids = torch.randint(2, model.config.vocab_size, (len(lengths), int(lengths.max())))
    with torch.no_grad():
        return model.encode_documents(ids, lengths), ids


@pytest.mark.parametrize(
    ("config", "model"),
    [(Qwen3Config, Qwen3ForCausalLM), (LlamaConfig, LlamaForCausalLM)],
    ids=["qwen3", "llama"],
)
def test_without_memory_the_model_is_its_backbone(config, model):
    torch.manual_seed(0)
    plain = model(config(**SMALL)).eval()
    ours = convert_backbone(plain, chunk_size=4).eval()
    ids = torch.randint(0, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = plain(ids, attention_mask=mask).logits
        got = ours(ids, attention_mask=mask).logits
    assert torch.allclose(got[mask.bool()], expected[mask.bool()], atol=1e-5)


def test_unknown_backbone_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"backbone='gpt9'.*llama.*qwen3"):
        MSAForCausalLM(MSAConfig(**SMALL, backbone="gpt9"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("routing_layers", [7]),
        ("routing_layers", [1, 1]),
        ("chunk_size", 0),
        ("top_k_documents", 0),
        ("routing_score", "euclid"),
    ],
)
def test_config_refuses_what_cannot_be(field, value):
    with pytest.raises(ConfigError, match=field):
        MSAConfig(**SMALL, **{field: value})


def test_released_config_is_read(golden_folder):
    values = json.loads((golden_folder / "checkpoint/config.json").read_text())
    config = MSAConfig.from_dict(values)
    assert (config.chunk_size, config.top_k_documents, config.routing_layers) == (8, 3, [2, 3])
    assert config.routing_score == "dot"
    assert config.rope_parameters["rope_theta"] == 5000000
    values["msa_config"]["router_layer_idx"] = "all"
    assert MSAConfig.from_dict(values).routing_layers == [0, 1, 2, 3]
    values["msa_config"]["chunk_reduce_method"] = "mean"
    with pytest.raises(ConfigError, match="chunk_reduce_method='mean'"):
        MSAConfig.from_dict(values)


def test_save_and_load_is_bit_exact(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path)
    again = MSAForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.config.routing_layers == tiny_model.config.routing_layers
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_documents_encode_alike_alone_and_in_a_batch(tiny_model):
    lengths = [5, 8, 17, 1]
    states, ids = encode(tiny_model, lengths)
    assert states.chunk_counts.tolist() == [1, 1, 3, 1]
    start = 0
    for i, length in enumerate(lengths):
        with torch.no_grad():
            alone = tiny_model.encode_documents(ids[i : i + 1, :length], torch.tensor([length]))
        count = int(states.chunk_counts[i])
        for layer, expected in alone.layers.items():
            part = states.layers[layer].pooled_values[start : start + count]
            assert torch.allclose(part, expected.pooled_values, atol=1e-5)
            part = states.layers[layer].routing_keys[start : start + count]
            assert torch.allclose(part, expected.routing_keys, atol=1e-5)
        start += count


def test_stopping_early_gives_the_same_states(tiny_model):
    lengths = torch.tensor([9, 4])
    ids = torch.randint(2, 400, (2, 9))
    with torch.no_grad():
        short, hidden = tiny_model.model.encode(ids, lengths)
        whole, full = tiny_model.model.encode(ids, lengths, with_hidden=True)
    assert hidden is None
    assert full.shape == (2, 9, 64)
    for layer in short.layers:
        assert torch.equal(short.layers[layer].pooled_keys, whole.layers[layer].pooled_keys)


def test_selecting_every_document_is_attention_to_the_whole_bank(tiny_model):
    """k >= N: the order of the documents in the bank does not change the logits."""
    lengths = [5, 8, 17]
    states, ids = encode(tiny_model, lengths)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        other = tiny_model.encode_documents(ids[order], torch.tensor(lengths)[order])
    question = torch.randint(2, 400, (1, 7))
    with torch.no_grad():
        a = tiny_model(question, memory=LatentMemory(states, 99)).logits
        b = tiny_model(question, memory=LatentMemory(other, 99)).logits
    assert torch.allclose(a, b, atol=1e-5)


def test_the_prefix_sees_no_memory(tiny_model):
    states, _ = encode(tiny_model, [20, 9])
    question = torch.randint(2, 400, (1, 7))
    sees = torch.tensor([[False, False, True, True, True, True, True]])
    with torch.no_grad():
        plain = tiny_model(question).logits
        with_memory = tiny_model(question, memory=LatentMemory(states, 4), memory_mask=sees).logits
    assert torch.allclose(plain[:, :2], with_memory[:, :2], atol=1e-6)
    assert not torch.allclose(plain[:, 2:], with_memory[:, 2:], atol=1e-3)


def test_generation_equals_stepwise_prefill(tiny_model):
    """Decoding with the cache writes what prefilling the grown context would write."""
    states, _ = encode(tiny_model, [20, 9, 30, 4, 12])
    memory = LatentMemory(states, 2)
    question = torch.randint(2, 400, (2, 7))
    routes = torch.ones_like(question, dtype=torch.bool)
    out = tiny_model.generate(
        question, memory=memory, routing_mask=routes, do_sample=False, max_new_tokens=5
    )
    ids = question
    for _ in range(out.shape[1] - question.shape[1]):
        mask = torch.cat([routes, torch.zeros(2, ids.shape[1] - 7, dtype=torch.bool)], 1)
        with torch.no_grad():
            logits = tiny_model(ids, memory=memory, routing_mask=mask).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    ended = (out == tiny_model.config.eos_token_id).cumsum(1) > 0
    assert torch.equal(out[~ended], ids[~ended])


def test_left_padding_changes_nothing(tiny_model):
    states, _ = encode(tiny_model, [20, 9, 30])
    question = torch.randint(2, 400, (1, 6))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), question], 1)
    mask = (torch.arange(10) >= 4).long()[None]
    positions = (torch.arange(10) - 4).clamp(min=0)[None]
    with torch.no_grad():
        a = tiny_model(question, memory=LatentMemory(states, 2)).logits
        b = tiny_model(
            padded,
            attention_mask=mask,
            position_ids=positions,
            memory=LatentMemory(states, 2),
        ).logits
    assert torch.allclose(a, b[:, 4:], atol=1e-5)
    assert torch.isfinite(b).all()


def test_cache_rows_move_together_with_their_memory(tiny_model):
    states, _ = encode(tiny_model, [20, 9, 30])
    question = torch.randint(2, 400, (3, 6))
    cache = MSACache()
    with torch.no_grad():
        whole = tiny_model(question, memory=LatentMemory(states, 1), cache=cache).logits
        cache.truncate(4)
        cache.batch_select_indices(torch.tensor([2, 0]))
        tail = tiny_model(
            question[[2, 0], 4:], cache=cache, position_ids=torch.tensor([[4, 5]])
        ).logits
    assert torch.allclose(tail, whole[[2, 0], 4:], atol=1e-5)
    cache.batch_repeat_interleave(2)
    assert cache.contents[2].mask.shape[0] == 4
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    assert cache.get_seq_length() == 6


def test_a_cache_that_cannot_hold_memory_is_refused(tiny_model):
    from transformers import DynamicCache

    with pytest.raises(InputError, match="expected MSACache"):
        tiny_model(torch.tensor([[3, 4]]), cache=DynamicCache())


def test_transformers_sampling_streaming_and_stopping(tiny_model):
    from transformers import StoppingCriteria
    from transformers.generation.streamers import BaseStreamer

    class Collect(BaseStreamer):
        def __init__(self):
            self.ids, self.ended = [], False

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ended = True

    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 8)

    states, _ = encode(tiny_model, [20, 9])
    streamer = Collect()
    torch.manual_seed(3)
    out = tiny_model.generate(
        torch.randint(2, 400, (1, 5)),
        memory=LatentMemory(states, 2),
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        max_new_tokens=20,
        eos_token_id=None,
        streamer=streamer,
        stopping_criteria=[AfterThree()],
    )
    assert out.shape == (1, 8)
    assert streamer.ended
    assert streamer.ids == out[0].tolist()
    torch.manual_seed(3)
    beams = tiny_model.generate(
        torch.randint(2, 400, (2, 5)),
        memory=LatentMemory(states, 2),
        num_beams=3,
        do_sample=False,
        max_new_tokens=4,
    )
    assert beams.shape[0] == 2


def test_tiny_model_is_reproducible():
    a, b = make_tiny_model(5), make_tiny_model(5)
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
