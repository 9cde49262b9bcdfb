from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bank_tools import LAYERS, make_document, make_documents
from msa.errors import InputError, ModelError
from msa.memory.ingest.encoder import MAX_PADDING, WORTH_A_RUN, DocumentEncoder, length_buckets


@pytest.fixture
def encoder(tiny_model, tiny_tokenizer):
    return DocumentEncoder(tiny_model, tiny_tokenizer)


def test_batches_hold_every_document_once_and_respect_the_budget(encoder):
    documents = list(enumerate(make_documents(30), start=1))
    lengths = {n: len(encoder.tokens(n, d)) for n, d in documents}
    batches = list(encoder.encode(documents, batch_tokens=400))
    assert sorted(n for b in batches for n in b.numbers) == list(range(1, 31))
    assert len(batches) > 3
    for batch in batches:
        longest = max(lengths[n] for n in batch.numbers)
        assert len(batch.numbers) == 1 or len(batch.numbers) * longest <= 400


def test_a_batch_that_is_worth_a_run_is_not_padded_much():
    lengths = torch.randint(8, 256, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(length_buckets([(i, [1] * n) for i, n in enumerate(lengths)], 2048))
    assert sorted(i for batch in batches for i, _ in batch) == list(range(300))
    for batch in batches[:-1]:
        sizes = [len(ids) for _, ids in batch]
        area = len(sizes) * max(sizes)
        assert area <= 2048
        before = sum(sizes[:-1])  # what it held when its last document came
        assert before * WORTH_A_RUN < 2048 or area - sum(sizes) <= MAX_PADDING * area
    held = [sum(len(ids) for _, ids in batch) for batch in batches[:-1]]
    assert min(held) * WORTH_A_RUN >= 2048
    assert len(batches) < 2 * sum(lengths) / 2048 + 8


def test_a_document_longer_than_the_budget_goes_alone(encoder):
    batches = list(encoder.encode([(1, make_document("long", words=40))], batch_tokens=10))
    assert [b.numbers for b in batches] == [(1,)]


def test_states_do_not_depend_on_the_batch(encoder):
    documents = list(enumerate(make_documents(12), start=1))
    alone = {n: next(encoder.encode([(n, d)])) for n, d in documents}
    for batch in encoder.encode(documents):
        starts = batch.states.chunk_counts.cumsum(0) - batch.states.chunk_counts
        for i, number in enumerate(batch.numbers):
            start, count = int(starts[i]), int(batch.states.chunk_counts[i])
            for layer in LAYERS:
                for name in ("routing_keys", "pooled_keys", "pooled_values"):
                    together = getattr(batch.states.layers[layer], name)[start : start + count]
                    single = getattr(alone[number].states.layers[layer], name)
                    torch.testing.assert_close(together, single, atol=1e-5, rtol=1e-4)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_batches_side_by_side_are_those_of_one_thread(encoder, three_threads, monkeypatch):
    documents = list(enumerate(make_documents(60), start=1))
    seen = set()
    inner = encoder.model.encode_documents

    def watched(*arguments):
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return inner(*arguments)

    monkeypatch.setattr(encoder.model, "encode_documents", watched)
    together = list(encoder.encode(documents, batch_tokens=1200))
    assert len(seen) == 3
    assert {threads for _, threads in seen} == {1}
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
    torch.set_num_threads(1)
    alone = list(encoder.encode(documents, batch_tokens=400))
    assert [b.numbers for b in together] == [b.numbers for b in alone]
    for ours, theirs in zip(together, alone, strict=True):
        for layer in LAYERS:
            for one, other in zip(
                vars_of(ours.states.layers[layer]),
                vars_of(theirs.states.layers[layer]),
                strict=True,
            ):
                torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def vars_of(states):
    return states.pooled_keys, states.pooled_values, states.routing_keys


def test_an_error_side_by_side_ends_all(encoder, three_threads, monkeypatch):
    ran = []

    def broken(*arguments):
        ran.append(1)
        raise RuntimeError("no")

    monkeypatch.setattr(encoder.model, "encode_documents", broken)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no"):
        list(encoder.encode(list(enumerate(make_documents(60), start=1)), batch_tokens=300))
    assert len(ran) <= 5
    assert threading.active_count() == before


def test_states_have_the_dtype_asked_for_and_no_gradient(tiny_model, tiny_tokenizer):
    encoder = DocumentEncoder(tiny_model, tiny_tokenizer, dtype=torch.bfloat16)
    (batch,) = encoder.encode([(1, make_document("a"))])
    for states in batch.states.layers.values():
        assert states.pooled_keys.dtype == torch.bfloat16
        assert not states.pooled_keys.requires_grad


def test_the_number_is_part_of_what_is_encoded(encoder):
    document = make_document("a")
    assert encoder.tokens(1, document) != encoder.tokens(2, document)
    text = encoder.prompts.tokenizer.decode(encoder.tokens(12, document))
    assert text == f"<|im_start|>[12]. {document.text}[12]<|im_end|>"


def test_the_model_is_left_in_the_mode_it_was_in(encoder, tiny_model):
    tiny_model.train()
    try:
        list(encoder.encode([(1, make_document("a"))]))
        assert tiny_model.training
    finally:
        tiny_model.eval()


def test_more_tokens_than_positions_are_refused(encoder):
    with pytest.raises(InputError, match=r"document 3 has .* the model takes 1 to 2048"):
        list(encoder.encode([(3, make_document("a", words=1000))]))


def test_states_that_are_not_finite_are_refused(tiny_tokenizer):
    from conftest import make_tiny_model

    model = make_tiny_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = torch.nan
    encoder = DocumentEncoder(model, tiny_tokenizer)
    with pytest.raises(ModelError, match="NaN"):
        list(encoder.encode([(1, make_document("a"))]))
