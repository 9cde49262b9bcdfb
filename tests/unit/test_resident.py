from __future__ import annotations

import threading

import pytest
import torch

from bank_tools import LAYERS, make_document, make_documents, routed
from msa import Document
from msa.errors import BankCorruptError, EmptyBankError, InputError
from msa.memory.ingest.encoder import DocumentEncoder
from msa.memory.latent import LatentMemory
from msa.memory.loaded.loaded_bank import LoadedBank
from msa.types import LatentStates, LayerStates, MemoryReader, Selection


def plain_memory(model, tokenizer, documents):
    """The same documents in plain tensors: the reference. Also the numbers of its rows."""
    encoder = DocumentEncoder(model, tokenizer)
    batches = list(encoder.encode(documents))
    layers = {
        i: LayerStates(
            *(
                torch.cat([getattr(b.states.layers[i], name) for b in batches])
                for name in ("pooled_keys", "pooled_values", "routing_keys")
            )
        )
        for i in LAYERS
    }
    counts = torch.cat([b.states.chunk_counts for b in batches])
    memory = LatentMemory(LatentStates(counts, layers), model.config.top_k_documents)
    return memory, torch.tensor([n for b in batches for n in b.numbers])


def assert_same_as_plain(reader, model, tokenizer, documents, queries):
    memory, numbers = plain_memory(model, tokenizer, documents)
    for layer in LAYERS:
        mine, plain = reader.route(layer, *queries), memory.route(layer, *queries)
        assert torch.equal(reader.rows_to_numbers(mine.documents), numbers[plain.documents])
        torch.testing.assert_close(mine.scores, plain.scores, atol=1e-5, rtol=1e-4)
        got, wanted = reader.content(layer, mine), memory.content(layer, plain)
        assert torch.equal(got.mask, wanted.mask)
        mask = got.mask
        torch.testing.assert_close(got.keys[mask], wanted.keys[mask], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got.values[mask], wanted.values[mask], atol=1e-5, rtol=1e-4)


def test_it_answers_as_the_same_states_in_memory_do(bank, tiny_model, tiny_tokenizer, queries):
    documents = make_documents(50)
    for start in range(0, 50, 10):  # five segments
        bank.add(documents[start : start + 10])
    resident = LoadedBank(bank)
    assert isinstance(resident, MemoryReader)
    assert isinstance(resident.view(), MemoryReader)
    numbered = list(enumerate(documents, start=1))
    assert_same_as_plain(resident, tiny_model, tiny_tokenizer, numbered, queries)


@pytest.mark.parametrize("changes", ["grow", "delete", "compact"])
def test_after_every_change_a_refresh_gives_what_a_fresh_load_gives(
    bank, tiny_model, tiny_tokenizer, queries, changes
):
    documents = dict(enumerate(make_documents(12), start=1))
    bank.add(documents.values())
    resident = LoadedBank(bank)
    assert not resident.refresh()
    for step in range(4):
        more = make_documents(5, f"more{step}-")
        number = bank.catalog.counter("next_number")
        bank.add(more)
        documents |= dict(enumerate(more, start=number))
        if changes != "grow":
            gone = sorted(documents)[step::6]
            bank.delete([documents.pop(n).id for n in gone])
        if changes == "compact":
            bank.compact()
        assert resident.refresh()
        assert not resident.refresh()
        assert len(resident) == len(documents)
        numbered = sorted(documents.items())
        assert_same_as_plain(resident, tiny_model, tiny_tokenizer, numbered, queries)


def test_a_refresh_reads_new_segments_only(bank, monkeypatch):
    from msa.memory.store.segments import Segment

    bank.add(make_documents(5))
    resident = LoadedBank(bank)
    bank.add(make_documents(5, "more"))
    read = []
    real = Segment.routing_part
    monkeypatch.setattr(
        Segment, "routing_part", lambda s, b: (read.append(s.path.name), real(s, b))[1]
    )
    resident.refresh()
    assert read == ["000002.safetensors"]
    bank.delete("doc1")
    resident.refresh()
    assert read == ["000002.safetensors"]
    assert len(resident) == 9


def test_growing_leaves_earlier_views_as_they_are(bank, queries):
    bank.add(make_documents(8))
    resident = LoadedBank(bank)
    old = resident.view()
    numbers, scores = routed(old, queries)
    content = old.content(2, old.route(2, *queries))
    for step in range(6):
        bank.add(make_documents(8, f"more{step}-"))
        bank.delete(f"more{step}-0" if step else "doc0")
        if step == 3:
            bank.compact()
        resident.refresh()
    assert torch.equal(routed(old, queries)[0], numbers)
    assert torch.equal(routed(old, queries)[1], scores)
    again = old.content(2, old.route(2, *queries))  # its segment was removed by compact
    assert torch.equal(again.keys, content.keys)
    assert len(old) == 8
    assert len(resident) == 50


def test_a_deleted_document_is_never_routed(bank, queries):
    bank.add(make_documents(10))
    resident = LoadedBank(bank)
    for left in range(9, 0, -1):
        best = int(routed(resident, queries)[0][0, 0])
        bank.delete(bank.get_number(best).document.id)
        resident.refresh()
        numbers, _ = routed(resident, queries)
        assert best not in numbers
        assert len(resident) == left
        assert (numbers >= 0).sum(1).tolist() == [min(left, 4)] * 3


def test_fewer_documents_than_k_and_a_single_one(bank, tiny_model, tiny_tokenizer, queries):
    documents = make_documents(3)
    bank.add(documents[:1])
    resident = LoadedBank(bank)
    assert_same_as_plain(resident, tiny_model, tiny_tokenizer, [(1, documents[0])], queries)
    bank.add(documents[1:])
    resident.refresh()
    numbers, _ = routed(resident, queries)
    assert numbers.shape == (3, 3)
    assert numbers.sort().values.tolist() == [[1, 2, 3]] * 3


def test_an_empty_bank_says_what_to_do(bank, queries):
    resident = LoadedBank(bank)
    assert len(resident) == 0
    for reader in (resident, resident.view()):
        with pytest.raises(EmptyBankError, match=r"holds no documents.*msa index"):
            reader.route(2, *queries)
    bank.add(make_documents(1))
    resident.refresh()
    resident.route(2, *queries)
    bank.delete("doc0")
    resident.refresh()
    with pytest.raises(EmptyBankError):
        resident.route(2, *queries)
    assert resident.rows_to_numbers(torch.tensor([-1])).tolist() == [-1]


def test_a_row_without_routing_tokens_gets_no_documents_and_no_content(bank, queries):
    bank.add(make_documents(6))
    resident = LoadedBank(bank)
    vectors, mask = queries
    mask = mask.clone()
    mask[1] = False
    selection = resident.route(2, vectors, mask)
    assert selection.documents[1].tolist() == [-1] * 4
    content = resident.content(2, selection)
    assert content.mask.any(1).tolist() == [True, False, True]
    assert resident.rows_to_numbers(selection.documents)[1].tolist() == [-1] * 4
    nothing = Selection(torch.full((2, 4), -1), torch.full((2, 4), -torch.inf))
    assert resident.content(2, nothing).keys.shape == (2, 0, 2, 16)


def test_a_batch_gives_what_its_rows_give_alone(bank, queries):
    bank.add(make_documents(30))
    resident = LoadedBank(bank)
    vectors, mask = queries
    numbers, scores = routed(resident, queries)
    for i in range(3):
        one_numbers, one_scores = routed(resident, (vectors[i : i + 1], mask[i : i + 1]))
        assert torch.equal(one_numbers[0], numbers[i])
        torch.testing.assert_close(one_scores[0], scores[i])


def test_a_filter_on_metadata_limits_what_is_routed(bank, queries):
    bank.add(
        [
            Document(d.id, d.text, metadata={"user": "ab"[i % 2]})
            for i, d in enumerate(make_documents(20))
        ]
    )
    bank.delete("doc1")
    resident = LoadedBank(bank)
    calls = []

    def only_b(metadata):
        calls.append(metadata)
        return metadata["user"] == "b"

    view = resident.view(only_b, top_k=20)
    assert len(calls) == 2
    assert len(view) == 9
    numbers, _ = routed(view, queries)
    assert set(numbers.flatten().tolist()) == {-1, *range(4, 21, 2)}
    with pytest.raises(EmptyBankError, match="pass the filter"):
        resident.view(lambda m: False).route(2, *queries)
    assert len(resident) == 19


def test_top_k_is_a_setting(bank, queries):
    bank.add(make_documents(10))
    assert routed(LoadedBank(bank, top_k=2), queries)[0].shape == (3, 2)
    resident = LoadedBank(bank)
    assert routed(resident.view(top_k=7), queries)[0].shape == (3, 7)
    assert routed(resident, queries)[0].shape == (3, 4)
    for wrong in (lambda: resident.view(top_k=0), lambda: LoadedBank(bank, top_k=0)):
        with pytest.raises(InputError, match="top_k=0"):
            wrong()


def test_routing_keys_in_bfloat16_take_half_and_content_stays_exact(bank, queries):
    bank.add(make_documents(20))
    exact, half = LoadedBank(bank), LoadedBank(bank, dtype=torch.bfloat16)
    assert half.num_bytes * 2 == exact.num_bytes
    _, scores = routed(exact, queries)
    _, rough = routed(half, queries)
    torch.testing.assert_close(rough, scores, atol=0.02, rtol=0)
    selection = exact.route(2, *queries)
    assert torch.equal(half.content(2, selection).keys, exact.content(2, selection).keys)
    other = LoadedBank(bank, content_dtype=torch.bfloat16)
    assert other.content(2, selection).keys.dtype == torch.bfloat16


def test_the_model_generates_with_a_bank(bank, tiny_model):
    bank.add(make_documents(10))
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        with_bank = tiny_model(ids, memory=LoadedBank(bank).view())
        without = tiny_model(ids)
    assert set(with_bank.selections) == set(LAYERS)
    assert not torch.allclose(with_bank.logits, without.logits)


def corrupt(path, where, name=None):
    segment = sorted((path / "segments").iterdir())[0]
    data = bytearray(segment.read_bytes())
    data[where if where >= 0 else len(data) + where] ^= 1
    segment.write_bytes(data)


def test_a_bank_with_damaged_routing_keys_does_not_load(bank, path):
    bank.add(make_documents(4))
    corrupt(path, bank.catalog.segments()[0].routing_bytes - 1)
    with pytest.raises(BankCorruptError, match=r"000001.safetensors.*msa bank verify"):
        LoadedBank(bank)
    bank.repair()
    assert len(LoadedBank(bank)) == 4


def test_a_truncated_segment_does_not_load(bank, path):
    bank.add(make_documents(4))
    segment = path / "segments" / "000001.safetensors"
    segment.write_bytes(segment.read_bytes()[:-8])
    with pytest.raises(BankCorruptError, match=r"000001.safetensors.*bytes"):
        LoadedBank(bank)


def test_damaged_content_is_never_answered_from(bank, path, queries):
    bank.add(make_documents(4))
    corrupt(path, -1)  # values of the last document written, in layer 3
    resident = LoadedBank(bank)
    resident.content(2, resident.route(2, *queries))
    with pytest.raises(BankCorruptError, match=r"000001.safetensors.*checksum"):
        resident.content(3, resident.route(3, *queries))


def test_a_damaged_new_segment_leaves_the_old_state_in_use(bank, path, queries):
    bank.add(make_documents(4))
    resident = LoadedBank(bank)
    numbers, _ = routed(resident, queries)
    bank.add(make_documents(4, "more"))
    new = path / "segments" / "000002.safetensors"
    data = new.read_bytes()
    new.write_bytes(data[:-1])
    with pytest.raises(BankCorruptError, match=r"000002.safetensors"):
        resident.refresh()
    assert torch.equal(routed(resident, queries)[0], numbers)
    new.write_bytes(data)
    assert resident.refresh()
    assert len(resident) == 8


def test_damage_to_documents_that_are_all_deleted_does_not_matter(bank, path, queries):
    bank.add(make_documents(3))
    bank.add(make_documents(3, "more"))
    bank.delete(["doc0", "doc1", "doc2"])
    (path / "segments" / "000001.safetensors").write_bytes(b"gone")
    resident = LoadedBank(bank)
    assert set(routed(resident, queries)[0].flatten().tolist()) == {4, 5, 6}


@pytest.mark.parametrize("moment", ["snapshot", "open"])
def test_a_compact_in_the_middle_of_a_refresh_is_followed(bank, monkeypatch, moment):
    """After the catalog was read, and after a segment was opened but before it was read."""
    from msa.memory.store.segments import Segment

    bank.add(make_documents(4))
    bank.add(make_documents(4, "more"))
    target, name = (bank.catalog, "snapshot") if moment == "snapshot" else (Segment, "__init__")
    real = getattr(target, name)

    def late(*args):
        result = real(*args)
        monkeypatch.setattr(target, name, real)
        bank.compact()
        return result

    monkeypatch.setattr(target, name, late)
    resident = LoadedBank(bank)
    assert len(resident) == 8
    assert resident.generation == bank.generation


def test_a_missing_segment_without_a_compact_is_an_error(bank, path):
    bank.add(make_documents(4))
    (path / "segments" / "000001.safetensors").unlink()
    with pytest.raises(BankCorruptError, match="missing"):
        LoadedBank(bank)


def test_threads_ask_while_another_refreshes_and_the_bank_changes(bank, queries):
    """Whatever happens in between, a view's content is that of the documents it selected."""
    bank.add([make_document(f"d{i}", 0) for i in range(8)])
    resident = LoadedBank(bank)
    stop, errors = threading.Event(), []

    def ask():
        try:
            while not stop.is_set():
                view = resident.view()
                selection = view.route(3, *queries)
                content = view.content(3, selection)
                counts = view._rows.chunk_counts[selection.documents.clamp(min=0)]
                counts = counts.masked_fill(selection.documents < 0, 0)
                assert torch.equal(content.mask.sum(1), counts.sum(1))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for step in range(12):
        bank.add([make_document(f"d{i}", step) for i in range(0, 8, 2)], on_duplicate="update")
        resident.refresh()
        if step % 4 == 3:
            bank.compact()
            resident.refresh()
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(resident) == 8
