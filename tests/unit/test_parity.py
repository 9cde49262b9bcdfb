"""Parity with numbers that the released code produced (tests/data/golden), float32, CPU."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from msa import MSAForCausalLM
from msa.memory.latent import LatentMemory
from msa.model.cache import MSACache
from msa.training.losses import language_model_loss, routing_loss

TOLERANCE = 1e-4
VARIANTS = [("", "INFONCE_DECOUPLE"), ("_infonce", "INFONCE")]


@pytest.fixture(params=VARIANTS, ids=["dot", "cosine"])
def variant(request):
    return request.param


def load_model(folder, method):
    from msa import MSAConfig

    config = json.loads((folder / "checkpoint/config.json").read_text())
    config["msa_config"]["aux_loss_method"] = method
    return MSAForCausalLM.from_pretrained(
        folder / "checkpoint", config=MSAConfig.from_dict(config), dtype=torch.float32
    ).eval()


def documents_of(golden):
    """Right-padded documents of the packed stage-1 row (document ids -2 are the prefix)."""
    lengths = golden["doc_num_tokens"]
    flat = golden["input_ids"][0, golden["doc_ids"][0] > 0]
    rows = torch.nn.utils.rnn.pad_sequence(flat.split(lengths.tolist()), batch_first=True)
    return rows, lengths


def make_memory(model, folder, suffix):
    golden = load_file(folder / f"stage1{suffix}.safetensors")
    with torch.no_grad():
        states = model.encode_documents(*documents_of(golden))
    memory = LatentMemory(states, model.config.top_k_documents)
    return memory, golden


def close(a, b, tolerance=TOLERANCE):
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"max abs difference {difference}"


def rows_with_prefix(golden, prefix_ids):
    """Left-padded ids, positions and masks with the prefix in front of each row's true tokens."""
    ids, positions = golden["input_ids"], golden["position_ids"]
    routes = golden.get("layer2.routing_mask")
    batch, length = ids.shape
    true = golden["attention_mask"][:, -length:].bool() if "attention_mask" in golden else None
    if true is None:
        true = torch.ones_like(ids, dtype=torch.bool)
    if routes is None:
        routes = (golden["doc_ids"] == 0) & true
    p = len(prefix_ids)
    out = {
        "input_ids": torch.zeros(batch, length + p, dtype=torch.long),
        "position_ids": torch.zeros(batch, length + p, dtype=torch.long),
        "attention_mask": torch.zeros(batch, length + p, dtype=torch.long),
        "routing_mask": torch.zeros(batch, length + p, dtype=torch.bool),
        "memory_mask": torch.ones(batch, length + p, dtype=torch.bool),
    }
    for row in range(batch):
        start = int((~true[row]).sum())
        out["input_ids"][row, start : start + p] = prefix_ids
        out["input_ids"][row, start + p :] = ids[row, start:]
        out["position_ids"][row, start : start + p] = torch.arange(p)
        out["position_ids"][row, start + p :] = positions[row, start:]
        out["attention_mask"][row, start:] = 1
        out["routing_mask"][row, start + p :] = routes[row, start:]
        out["memory_mask"][row, : start + p] = False
    return out, true


def test_stage1(golden_folder, variant):
    suffix, method = variant
    model = load_model(golden_folder, method)
    memory, golden = make_memory(model, golden_folder, suffix)
    assert memory.states.chunk_counts.tolist() == golden["doc_num_chunks"].tolist()
    for layer in (2, 3):
        states = memory.states.layers[layer]
        close(states.pooled_keys, golden[f"layer{layer}.pooled_k"][0].transpose(0, 1))
        close(states.pooled_values, golden[f"layer{layer}.pooled_v"][0].transpose(0, 1))
        close(states.routing_keys, golden[f"layer{layer}.pooled_router_k"][0].transpose(0, 1))
    cache = MSACache()
    with torch.no_grad():
        model(input_ids=golden["template_prefix_ids"][None], cache=cache)
    for layer in range(4):
        close(cache.layers[layer].keys, golden[f"layer{layer}.template_prefix_k"])
        close(cache.layers[layer].values, golden[f"layer{layer}.template_prefix_v"])


def run_stage2(model, memory, stage1, golden):
    inputs, true = rows_with_prefix(golden, stage1["template_prefix_ids"])
    cache = MSACache()
    with torch.no_grad():
        out = model(**inputs, memory=memory, cache=cache)
    return out, inputs, true, cache


def test_stage2(golden_folder, variant):
    suffix, method = variant
    model = load_model(golden_folder, method)
    memory, stage1 = make_memory(model, golden_folder, suffix)
    golden = load_file(golden_folder / f"stage2{suffix}.safetensors")
    out, _, true, _ = run_stage2(model, memory, stage1, golden)
    for layer in (2, 3):
        close(memory.scores[layer], golden[f"layer{layer}.doc_scores"])
        selection = out.selections[layer]
        assert selection.documents.tolist() == golden[f"layer{layer}.topk_doc_ids"].tolist()
        close(selection.scores, golden[f"layer{layer}.topk_scores"])
        content = memory.content(layer, selection)
        assert content.mask.sum(1).tolist() == golden[f"layer{layer}.num_selected_chunks"].tolist()
    for row in range(len(true)):
        n = int(true[row].sum())
        close(out.logits[row, -n:], golden["logits"][row, -n:])


def test_decode(golden_folder, variant):
    suffix, method = variant
    model = load_model(golden_folder, method)
    memory, stage1 = make_memory(model, golden_folder, suffix)
    out, inputs, _, cache = run_stage2(
        model, memory, stage1, load_file(golden_folder / f"stage2{suffix}.safetensors")
    )
    golden = load_file(golden_folder / f"decode{suffix}.safetensors")
    close(out.logits[:, -1], golden["first_token_logits"])
    mask = inputs["attention_mask"]
    argmax = [out.logits[:, -1].argmax(-1)]
    for t in range(golden["input_ids"].shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        with torch.no_grad():
            step = model(
                input_ids=golden["input_ids"][:, t : t + 1],
                position_ids=golden["position_ids"][:, t : t + 1],
                attention_mask=mask,
                cache=cache,
                memory=memory,
            )
        assert step.selections is None  # nothing is routed while decoding
        close(step.logits[:, 0], golden["logits"][:, t])
        argmax.append(step.logits[:, 0].argmax(-1))
    assert torch.stack(argmax, 1).tolist() == golden["argmax"].tolist()


def test_generate_writes_the_released_tokens(golden_folder, variant):
    suffix, method = variant
    model = load_model(golden_folder, method)
    memory, stage1 = make_memory(model, golden_folder, suffix)
    golden = load_file(golden_folder / f"stage2{suffix}.safetensors")
    inputs, _ = rows_with_prefix(golden, stage1["template_prefix_ids"])
    wanted = load_file(golden_folder / f"decode{suffix}.safetensors")["argmax"]
    out = model.generate(
        inputs.pop("input_ids"),
        **inputs,
        memory=memory,
        do_sample=False,
        max_new_tokens=wanted.shape[1],
        eos_token_id=None,
    )
    assert out[:, -wanted.shape[1] :].tolist() == wanted.tolist()


def test_round_2_prefill(golden_folder):
    model = load_model(golden_folder, "INFONCE_DECOUPLE")
    memory, stage1 = make_memory(model, golden_folder, "")
    golden = load_file(golden_folder / "interleave.safetensors")
    out, _, _, _ = run_stage2(model, memory, stage1, golden)
    for layer in (2, 3):
        close(memory.scores[layer], golden[f"layer{layer}.doc_scores"])
        topk = golden[f"layer{layer}.topk_doc_ids"]
        assert out.selections[layer].documents.tolist() == topk.tolist()
    close(out.logits[:, -golden["logits"].shape[1] :], golden["logits"])


def test_text_injected_in_the_middle_is_causal(golden_folder):
    """The released code lets an injected block see its own future; ours matches token by token."""
    model = load_model(golden_folder, "INFONCE_DECOUPLE")
    memory, stage1 = make_memory(model, golden_folder, "")
    golden = load_file(golden_folder / "inject.safetensors")
    renamed = {k.removeprefix("prefill_"): v for k, v in golden.items() if k.startswith("prefill_")}
    _, _, _, cache = run_stage2(model, memory, stage1, renamed)
    with torch.no_grad():
        model(
            input_ids=golden["decode_input_ids"],
            position_ids=golden["decode_position_ids"],
            cache=cache,
        )
        out = model(
            input_ids=golden["block_input_ids"],
            position_ids=golden["block_position_ids"],
            cache=cache,
        )
    close(out.logits, golden["block_logits_token_by_token"])


def test_training_losses_and_gradients(golden_folder):
    # Training in the released code is by cosine whenever the method's name holds INFONCE.
    model = load_model(golden_folder, "INFONCE").train()
    golden = load_file(golden_folder / "train.safetensors")
    report = json.loads((golden_folder / "train.json").read_text())
    lengths = torch.tensor(report["doc_lengths"])
    ids, document_ids = golden["input_ids"][0], golden["doc_ids"][0]
    documents = ids[document_ids > 0]
    rows = torch.nn.utils.rnn.pad_sequence(documents.split(lengths.tolist()), batch_first=True)
    states = model.encode_documents(rows, lengths)
    memory = LatentMemory(states, report["top_k_docs"])
    local = document_ids <= 0
    labels = golden["labels"][:, local]
    routes = (document_ids == 0)[local][None]
    sees = torch.ones_like(routes)
    sees[:, :3] = False
    out = model(
        input_ids=ids[local][None],
        position_ids=golden["position_ids"][:, local],
        memory=memory,
        routing_mask=routes,
        memory_mask=sees,
        labels=labels,
    )
    aux = torch.stack(
        [
            routing_loss(memory.scores[i], golden["aux_labels"].bool(), model.temperature.detach())
            for i in (2, 3)
        ]
    ).mean()
    for layer in (2, 3):
        close(memory.scores[layer], golden[f"layer{layer}.doc_scores"])
    close(aux, golden["aux_loss"])
    close(out.loss, golden["lm_loss"])
    loss = report["weights"]["lm"] * out.loss + report["weights"]["aux"] * aux
    close(loss, golden["loss"])
    loss.backward()
    close(out.logits[0].detach(), golden["logits"][0, local])
    parameters = dict(model.named_parameters())
    for name, norm in report["grad_norms"].items():
        if norm is not None:
            assert parameters[name].grad.norm().item() == pytest.approx(norm, abs=TOLERANCE)
    for name, gradient in golden.items():
        if name.startswith("grad."):
            close(parameters[name.removeprefix("grad.")].grad, gradient)


def test_language_model_loss_is_the_models_own(golden_folder, tiny_model):
    ids = torch.randint(0, 512, (2, 12))
    labels = ids.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        hidden = tiny_model.model(
            tiny_model.model.embed_tokens(ids), torch.arange(12)[None], step=_step()
        )
        ours = language_model_loss(hidden, labels, tiny_model.lm_head)
        theirs = tiny_model(input_ids=ids, labels=labels).loss
    close(ours, theirs, 1e-6)


def _step():
    from msa.model.modeling_msa import Step

    return Step()
