from __future__ import annotations

import threading

import pytest
import torch

from bank_tools import LAYERS, make_document, make_documents
from msa import Document
from msa.errors import BankCorruptError, BudgetError, EmptyBankError, InputError
from msa.memory.bank import MemoryBank
from msa.memory.encoder import DocumentEncoder
from msa.memory.latent import LatentMemory
from msa.memory.resident import ResidentBank
from msa.types import LatentStates, LayerStates, MemoryReader, Selection


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bank"


@pytest.fixture
def bank(path, tiny_model, tiny_tokenizer):
    with MemoryBank.create(path, tiny_model, tiny_tokenizer) as bank:
        yield bank


def routed(reader, queries, layer=2):
    """Numbers and scores that a reader selects, best first."""
    selection = reader.route(layer, *queries)
    return reader.rows_to_numbers(selection.documents), selection.scores


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
    resident = ResidentBank(bank)
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
    resident = ResidentBank(bank)
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
    from msa.memory.segments import Segment

    bank.add(make_documents(5))
    resident = ResidentBank(bank)
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
    resident = ResidentBank(bank)
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
    resident = ResidentBank(bank)
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
    resident = ResidentBank(bank)
    assert_same_as_plain(resident, tiny_model, tiny_tokenizer, [(1, documents[0])], queries)
    bank.add(documents[1:])
    resident.refresh()
    numbers, _ = routed(resident, queries)
    assert numbers.shape == (3, 3)
    assert numbers.sort().values.tolist() == [[1, 2, 3]] * 3


def test_an_empty_bank_says_what_to_do(bank, queries):
    resident = ResidentBank(bank)
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
    resident = ResidentBank(bank)
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
    resident = ResidentBank(bank)
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
    resident = ResidentBank(bank)
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
    assert routed(ResidentBank(bank, top_k=2), queries)[0].shape == (3, 2)
    resident = ResidentBank(bank)
    assert routed(resident.view(top_k=7), queries)[0].shape == (3, 7)
    assert routed(resident, queries)[0].shape == (3, 4)
    for wrong in (lambda: resident.view(top_k=0), lambda: ResidentBank(bank, top_k=0)):
        with pytest.raises(InputError, match="top_k=0"):
            wrong()


def test_routing_keys_in_bfloat16_take_half_and_content_stays_exact(bank, queries):
    bank.add(make_documents(20))
    exact, half = ResidentBank(bank), ResidentBank(bank, dtype=torch.bfloat16)
    assert half.num_bytes * 2 == exact.num_bytes
    _, scores = routed(exact, queries)
    _, rough = routed(half, queries)
    torch.testing.assert_close(rough, scores, atol=0.02, rtol=0)
    selection = exact.route(2, *queries)
    assert torch.equal(half.content(2, selection).keys, exact.content(2, selection).keys)
    other = ResidentBank(bank, content_dtype=torch.bfloat16)
    assert other.content(2, selection).keys.dtype == torch.bfloat16


def test_the_model_generates_with_a_bank(bank, tiny_model):
    bank.add(make_documents(10))
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        with_bank = tiny_model(ids, memory=ResidentBank(bank).view())
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
        ResidentBank(bank)
    bank.repair()
    assert len(ResidentBank(bank)) == 4


def test_a_truncated_segment_does_not_load(bank, path):
    bank.add(make_documents(4))
    segment = path / "segments" / "000001.safetensors"
    segment.write_bytes(segment.read_bytes()[:-8])
    with pytest.raises(BankCorruptError, match=r"000001.safetensors.*bytes"):
        ResidentBank(bank)


def test_damaged_content_is_never_answered_from(bank, path, queries):
    bank.add(make_documents(4))
    corrupt(path, -1)  # values of the last document written, in layer 3
    resident = ResidentBank(bank)
    resident.content(2, resident.route(2, *queries))
    with pytest.raises(BankCorruptError, match=r"000001.safetensors.*checksum"):
        resident.content(3, resident.route(3, *queries))


def test_a_damaged_new_segment_leaves_the_old_state_in_use(bank, path, queries):
    bank.add(make_documents(4))
    resident = ResidentBank(bank)
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
    resident = ResidentBank(bank)
    assert set(routed(resident, queries)[0].flatten().tolist()) == {4, 5, 6}


@pytest.mark.parametrize("moment", ["snapshot", "open"])
def test_a_compact_in_the_middle_of_a_refresh_is_followed(bank, monkeypatch, moment):
    """After the catalog was read, and after a segment was opened but before it was read."""
    from msa.memory.segments import Segment

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
    resident = ResidentBank(bank)
    assert len(resident) == 8
    assert resident.generation == bank.generation


def test_a_missing_segment_without_a_compact_is_an_error(bank, path):
    bank.add(make_documents(4))
    (path / "segments" / "000001.safetensors").unlink()
    with pytest.raises(BankCorruptError, match="missing"):
        ResidentBank(bank)


def test_threads_ask_while_another_refreshes_and_the_bank_changes(bank, queries):
    """Whatever happens in between, a view's content is that of the documents it selected."""
    bank.add([make_document(f"d{i}", 0) for i in range(8)])
    resident = ResidentBank(bank)
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


# ---- a share of a bank


def shares(bank, world, **options):
    return [ResidentBank(bank, shard=(rank, world), **options) for rank in range(world)]


def assert_shares_are_the_whole(readers, whole, queries):
    """Consecutive rows, none twice, none missing; the best of all shares are the best of all."""
    views = [reader.view() for reader in readers]
    numbers = torch.cat([view._rows.numbers for view in views])
    assert torch.equal(numbers, whole.view()._rows.numbers)
    first = 0
    for view in views:
        assert view.first_row == first
        assert view.total_documents == len(whole)
        assert view.total_rows == len(numbers)
        first += len(view._rows.numbers)
    assert sum(len(view) for view in views) == len(whole)
    for layer in LAYERS:
        wanted = whole.route(layer, *queries)
        found = [view.route(layer, *queries) for view in views]
        scores = torch.cat([s.scores for s in found], dim=1)
        rows = torch.cat(
            [s.documents + view.first_row for s, view in zip(found, views, strict=True)], dim=1
        )
        best, places = scores.sort(dim=1, descending=True, stable=True)
        best, places = best[:, : wanted.scores.shape[1]], places[:, : wanted.scores.shape[1]]
        torch.testing.assert_close(best, wanted.scores, atol=1e-6, rtol=1e-6)
        assert torch.equal(rows.gather(1, places), wanted.documents)
        for view, selection in zip(views, found, strict=True):
            content = view.content(layer, selection)
            here = selection.documents.flatten()
            here = here[here >= 0]
            assert int(content.mask.sum()) == int(view._rows.chunk_counts[here].sum())


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("segments", [1, 4])
def test_shares_together_are_the_whole(bank, queries, world, segments):
    documents = make_documents(24)
    for start in range(0, 24, 24 // segments):
        bank.add(documents[start : start + 24 // segments])
    bank.delete(["doc3", "doc17"])
    readers = shares(bank, world)
    assert_shares_are_the_whole(readers, ResidentBank(bank), queries)
    counts = torch.cat([r.view()._rows.chunk_counts for r in readers])
    for reader in readers:
        size = int(reader.view()._rows.chunk_counts.sum())
        assert abs(size - counts.sum() / world) <= counts.max()


def test_shares_follow_the_bank(bank, queries):
    bank.add(make_documents(10))
    readers = shares(bank, 3)
    for step in range(3):
        bank.add(make_documents(6, f"more{step}-"))
        bank.delete([f"doc{step}", f"more{step}-1"])
        if step == 2:
            bank.compact()
        old = readers[1].view()
        numbers, scores = routed(old, queries)
        assert all(reader.refresh() for reader in readers)
        assert not any(reader.refresh() for reader in readers)
        whole = ResidentBank(bank)
        assert_shares_are_the_whole(readers, whole, queries)
        assert_shares_are_the_whole(shares(bank, 3), whole, queries)
        assert torch.equal(routed(old, queries)[0], numbers)
        assert torch.equal(routed(old, queries)[1], scores)
    bank.delete("doc5")  # deletions alone: nothing is read again
    buffers = [reader._buffers for reader in readers]
    for reader in readers:
        reader.refresh()
    assert all(a is r._buffers for a, r in zip(buffers, readers, strict=True))
    assert_shares_are_the_whole(readers, ResidentBank(bank), queries)


def test_more_shares_than_documents_leaves_some_empty(bank, queries):
    for reader in shares(bank, 3):  # a bank without documents
        assert reader.route(2, *queries).documents.shape == (3, 0)
    bank.add(make_documents(2))
    readers = shares(bank, 5)
    assert sorted(len(r) for r in readers) == [0, 0, 0, 1, 1]
    assert_shares_are_the_whole(readers, ResidentBank(bank), queries)
    empty = next(r for r in readers if not len(r))
    selection = empty.route(2, *queries)
    assert selection.documents.shape == selection.scores.shape == (3, 0)
    assert empty.content(2, selection).mask.shape == (3, 0)
    assert empty.rows_to_numbers(selection.documents).shape == (3, 0)


def test_a_filter_knows_how_many_pass_in_all_shares(bank, queries):
    documents = make_documents(20)
    bank.add([Document(d.id, d.text, metadata={"u": i % 4}) for i, d in enumerate(documents)])
    views = [r.view(lambda m: m["u"] == 1) for r in shares(bank, 3)]
    assert [v.total_documents for v in views] == [5, 5, 5]
    assert sum(len(v) for v in views) == 5
    nothing = shares(bank, 3)[0].view(lambda m: False)
    assert nothing.total_documents == 0
    assert nothing.route(2, *queries).documents.shape == (3, 0)


@pytest.mark.parametrize("shard", [(0, 0), (2, 2), (-1, 3)])
def test_a_share_that_is_none_is_refused(bank, shard):
    with pytest.raises(InputError, match=r"expected \(rank, world\)"):
        ResidentBank(bank, shard=shard)


# ---- keys in int8


def assert_same_route(one, other, queries):
    for layer in LAYERS:
        mine, wanted = one.route(layer, *queries), other.route(layer, *queries)
        assert torch.equal(mine.documents, wanted.documents)
        assert torch.equal(mine.scores, wanted.scores)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_int8_keys_give_exact_scores(tmp_path, tiny_model, tiny_tokenizer, queries, stored):
    path = tmp_path / "stored"
    with MemoryBank.create(path, tiny_model, tiny_tokenizer, dtype=stored) as bank:
        for start in range(0, 60, 20):
            bank.add(make_documents(60)[start : start + 20])
        exact, small = ResidentBank(bank, dtype=stored), ResidentBank(bank, dtype=torch.int8)
        assert small.num_bytes * 1.5 < exact.num_bytes
        assert_same_route(small, exact, queries)
        vectors, mask = queries
        mask = mask.clone()
        mask[1] = False
        assert_same_route(small, exact, (vectors, mask))
        kept = [r.view(lambda m: m["seed"] is None, top_k=70) for r in (small, exact)]
        assert_same_route(*kept, queries)


def test_int8_keys_follow_the_bank(bank, queries):
    bank.add(make_documents(10))
    small = ResidentBank(bank, dtype=torch.int8)
    for step in range(4):
        old = small.view()
        numbers, _ = routed(old, queries)
        bank.add(make_documents(9, f"more{step}-"))
        bank.delete([f"doc{step}", f"more{step}-3"])
        if step == 2:
            bank.compact()
        assert small.refresh()
        assert_same_route(small, ResidentBank(bank, dtype=torch.float32), queries)
        assert torch.equal(routed(old, queries)[0], numbers)


def test_shares_of_int8_keys_are_the_whole(bank, queries):
    bank.add(make_documents(40))
    bank.delete("doc7")
    assert_shares_are_the_whole(shares(bank, 3, dtype=torch.int8), ResidentBank(bank), queries)


def test_keys_that_change_on_disk_after_loading_are_noticed(bank, path, queries):
    bank.add(make_documents(6))
    small = ResidentBank(bank, dtype=torch.int8)
    small.route(3, *queries)
    segment = path / "segments" / "000001.safetensors"
    with segment.open("r+b") as file:  # in place: the map sees it
        file.seek(bank.catalog.segments()[0].routing_bytes - 1)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x40]))
    with pytest.raises(BankCorruptError, match=r"000001.safetensors.*changed since it was loaded"):
        small.view(top_k=6).route(3, *queries)


# ---- a device without memory


def allocations_that_fail(monkeypatch, fails):
    """Let the memory for routing keys run out where `fails(dtype, device)` says so."""
    from msa.memory import keys

    real = keys._allocated

    def allocated(shape, dtype, device):
        if fails(dtype, device):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
        return real(shape, dtype, device)

    monkeypatch.setattr(keys, "_allocated", allocated)


def test_without_memory_for_the_plan_the_next_tier_is_taken(bank, queries, monkeypatch, caplog):
    bank.add(make_documents(40))
    exact = ResidentBank(bank)
    assert exact.dtype == torch.float32
    sizes = []

    def fails(dtype, device):  # in the middle: the first layer still fits; scales are float32 too
        sizes.append(dtype)
        return sizes == [torch.float32, torch.float32]

    allocations_that_fail(monkeypatch, fails)
    small = ResidentBank(bank, plan=exact.plan)
    assert small.plan.keys_dtype == "int8"
    assert_same_route(small, exact, queries)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "in float32; they are held on 'cpu' in int8" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_without_memory_for_any_tier_there_is_one_error(bank, queries, monkeypatch):
    bank.add(make_documents(10))
    resident = ResidentBank(bank)
    numbers, _ = routed(resident, queries)
    bank.add(make_documents(90, "more"))
    allocations_that_fail(monkeypatch, lambda dtype, device: True)
    for attempt in (lambda: ResidentBank(bank), resident.refresh):
        with pytest.raises(BudgetError, match=r"no memory on 'cpu' .* in int8; free") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    with pytest.raises(BudgetError, match=r"in bfloat16; free"):
        ResidentBank(bank, dtype=torch.bfloat16)  # what was asked for is not changed
    assert torch.equal(routed(resident, queries)[0], numbers)  # the old state stays in use
    monkeypatch.undo()
    assert bank.verify().ok
    assert resident.refresh()
    assert resident.dtype == torch.float32
    assert len(resident) == 100


def test_a_bank_that_outgrows_its_plan_changes_its_tiers(bank, queries, monkeypatch):
    from msa.memory import budget

    bank.add(make_documents(10))
    resident, old = ResidentBank(bank), None
    assert resident.plan.content == "held"
    old = resident.view()
    numbers, _ = routed(old, queries)
    monkeypatch.setattr(budget, "HELD_BYTES", 0)
    bank.add(make_documents(1, "one"))
    resident.refresh()
    assert resident.plan.content == "held"  # little has changed
    bank.add(make_documents(20, "more"))
    resident.refresh()
    assert resident.plan.content == "mapped"
    assert resident.plan.num_documents == 31
    assert_same_route(resident, ResidentBank(bank), queries)
    assert torch.equal(routed(old, queries)[0], numbers)
