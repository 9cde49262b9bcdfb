from __future__ import annotations

import itertools
import random
import re
import threading

import pytest
import torch

from bank_tools import folder_state, ids_of, make_document, make_documents, same_states, states_of
from conftest import make_tiny_model
from msa import Document
from msa.errors import (
    ConfigError,
    DocumentNotFoundError,
    DuplicateDocumentError,
    InputError,
    ModelError,
)
from msa.memory.bank import MemoryBank
from msa.memory.ingest import pipeline
from msa.memory.ingest.encoder import DocumentEncoder
from msa.memory.ingest.pipeline import content_hash
from msa.memory.store.origins import Origin


@pytest.fixture
def split_by_words(monkeypatch):
    """A splitter without surprises: as many words as fit."""

    def split_text(text, max_tokens, count_tokens):
        parts = [""]
        for word in text.split():
            longer = f"{parts[-1]} {word}".strip()
            if count_tokens(longer) <= max_tokens:
                parts[-1] = longer
            else:
                parts.append(word)
        return parts

    monkeypatch.setattr("msa.text.splitting.split_text", split_text)


# ---- add


def test_documents_come_back_as_given_with_numbers_from_one(bank):
    documents = [
        Document("a", "one text", "Title", {"user": "x", "n": [1, None]}),
        *make_documents(5),
    ]
    report = bank.add(documents)
    assert (report.added, report.parts, report.failed) == (6, 6, ())
    assert len(bank) == 6
    assert [s.document for s in bank.documents()] == documents
    assert [s.number for s in bank.documents()] == [1, 2, 3, 4, 5, 6]
    assert bank.get("a").document == documents[0]
    assert bank.get_number(2).document == documents[1]
    assert list(bank.get_many([3, 99, 1])) == [1, 3]
    assert [s.number for s in bank.documents(limit=2, offset=3)] == [4, 5]
    assert "a" in bank
    assert "z" not in bank


def test_states_are_those_of_the_encoder_bit_for_bit_after_reopening(
    bank, path, tiny_model, tiny_tokenizer
):
    documents = make_documents(40)
    bank.add(documents, batch_tokens=1000)
    bank.close()
    encoder = DocumentEncoder(tiny_model, tiny_tokenizer)
    expected = {}
    for batch in encoder.encode(list(enumerate(documents, start=1)), 1000):
        counts = batch.states.chunk_counts.tolist()
        split = {
            layer: [
                torch.split(t, counts) for t in (s.routing_keys, s.pooled_keys, s.pooled_values)
            ]
            for layer, s in batch.states.layers.items()
        }
        for i, number in enumerate(batch.numbers):
            expected[number] = {k: tuple(t[i] for t in v) for k, v in split.items()}
    with MemoryBank.open(path, tiny_model, tiny_tokenizer, read_only=True) as reader:
        assert same_states(states_of(reader), expected)
        stored = reader.get_number(7)
        assert stored.num_chunks == len(expected[7][2][0])
        assert stored.num_tokens == len(encoder.tokens(7, documents[6]))


def test_the_same_documents_again_are_unchanged_and_nothing_is_written(bank, path):
    documents = make_documents(8)
    bank.add(documents)
    before, generation = folder_state(path), bank.generation
    for mode in ("error", "skip", "update"):
        report = bank.add(documents, on_duplicate=mode)
        assert (report.added, report.updated, report.unchanged) == (0, 0, 8)
    assert folder_state(path) == before
    assert bank.generation == generation


def test_other_text_under_a_known_id_raises_is_reported_or_replaces(bank):
    bank.add([make_document("a", 1), make_document("b", 1)])
    new = make_document("a", 2)
    with pytest.raises(DuplicateDocumentError, match="'a' is in the bank with other content"):
        bank.add([new])
    report = bank.add([new], on_duplicate="skip")
    assert report.failed[0][0] == "a"
    assert "on_duplicate='update'" in report.failed[0][1]
    assert bank.get("a").document == make_document("a", 1)
    report = bank.add([new], on_duplicate="update")
    assert report.updated == 1
    assert bank.get("a").document == new
    assert bank.get("a").number == 3
    assert len(bank) == 2


def test_new_metadata_alone_keeps_number_and_states(bank, path):
    bank.add([Document("a", "text", metadata={"v": 1})])
    before = folder_state(path)
    report = bank.add([Document("a", "text", metadata={"v": 2})], on_duplicate="update")
    assert report.updated == 1
    assert bank.get("a").document.metadata == {"v": 2}
    assert bank.get("a").number == 1
    assert folder_state(path) == before
    with pytest.raises(DuplicateDocumentError):
        bank.add([Document("a", "text", metadata={"v": 3})])


@pytest.mark.parametrize("commit_tokens", [1, 10_000])
def test_an_id_given_twice_in_one_call(bank, commit_tokens):
    """Whether or not a commit came between."""
    one, two, other = make_document("a", 1), make_document("a", 2), make_document("b")
    for mode in ("skip", "update"):
        report = bank.add([one, other, one, two], on_duplicate=mode, commit_tokens=commit_tokens)
        assert report.failed == (
            ("a", "its id was given twice in this call with different content"),
        )
        assert bank.get("a").document == one
        bank.delete(["a", "b"])
    with pytest.raises(DuplicateDocumentError, match="'a' was given twice in this call"):
        bank.add([one, two], commit_tokens=commit_tokens)


def test_a_call_that_raises_before_its_first_commit_changes_nothing(bank, path):
    bank.add([make_document("a", 1)])
    before = folder_state(path)
    with pytest.raises(DuplicateDocumentError, match="0 documents of this call"):
        bank.add([make_document("x"), make_document("a", 2)])
    assert ids_of(bank) == ["a"]
    assert folder_state(path) == before


def test_progress_tells_what_is_durable_and_an_interrupted_add_goes_on(
    bank, path, tiny_model, tiny_tokenizer
):
    documents = make_documents(30)
    seen = []

    def interrupted():
        yield from documents[:22]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bank.add(interrupted(), commit_tokens=300, progress=seen.append)
    assert len(seen) > 2  # of four windows the last was under way
    assert [p.added for p in seen] == sorted(p.added for p in seen)
    assert ids_of(bank) == [d.id for d in documents[: seen[-1].added]]
    bank.close()
    with MemoryBank.open(path, tiny_model, tiny_tokenizer) as again:
        report = again.add(documents, on_duplicate="skip", commit_tokens=500, progress=seen.append)
        assert report.unchanged == seen[-1].unchanged == len(documents) - report.added
        assert report.failed == ()
        assert ids_of(again) == [d.id for d in documents]


def test_documents_are_taken_as_they_are_stored_not_all_at_once(bank):
    taken = itertools.count()
    ahead = []

    def stream():
        for i in range(200):
            next(taken)
            yield make_document(f"d{i}", words=3)

    def progress(p):
        ahead.append(p.documents - p.added)

    bank.add(stream(), commit_tokens=400, progress=progress)
    assert set(ahead) == {0}
    assert len(ahead) > 10


def test_many_unchanged_documents_still_report_progress(bank, monkeypatch):
    monkeypatch.setattr(pipeline, "COMMIT_DOCUMENTS", 10)
    documents = [make_document(f"d{i}", words=1) for i in range(35)]
    bank.add(documents)
    seen = []
    bank.add(documents, progress=seen.append)
    assert [p.unchanged for p in seen] == [10, 20, 30, 35]


# ---- bad input


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (Document("x", ""), "its text is empty"),
        (Document("x", " \n\t "), "its text is empty"),
        (Document("", "text"), "its id is empty"),
        (Document("i" * 513, "text"), "its id has 513 characters; at most 512"),
        (
            Document("x", "bad \ud800 text"),
            r"not valid Unicode: lone surrogate U\+D800",
        ),
        (Document("x\udfff", "text"), r"its id is not valid Unicode: lone surrogate U\+DFFF"),
        (Document("x", "text", "t\ud801"), "its title is not valid Unicode"),
        (Document(7, "text"), "its id is int; expected text"),
        (Document("x", None), "its text is NoneType; expected text"),
        (Document("x", "text", metadata={"a": {1, 2}}), "its metadata cannot be written as JSON"),
        (Document("x", "text", metadata={"a": float("nan")}), "cannot be written as JSON"),
        (Document("x", "text", "title " * 200), "its title leaves no room"),
    ],
)
def test_a_bad_document_is_reported_and_the_others_are_stored(bank, document, reason):
    report = bank.add([make_document("a"), document, make_document("b")])
    assert report.added == 2
    ((failed_id, why),) = report.failed
    assert len(failed_id) <= 80
    failed_id.encode()
    assert re.search(reason, why), why
    assert ids_of(bank) == ["a", "b"]


def test_a_text_of_absurd_length_is_reported(bank, monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_TEXT_CHARACTERS", 100)
    report = bank.add([Document("x", "y" * 101)])
    assert "its text has 101 characters; at most 100" in report.failed[0][1]


def test_what_is_no_document_is_refused(bank):
    with pytest.raises(InputError, match=r"given a str: expected msa.Document"):
        bank.add(["text"])
    with pytest.raises(InputError, match="on_duplicate='replace'"):
        bank.add([], on_duplicate="replace")
    with pytest.raises(InputError, match="batch_tokens=0"):
        bank.add([], batch_tokens=0)


def test_unusual_but_valid_text_is_kept_to_the_character(bank):
    text = "nul \0 emoji \U0001f642 \u200b combining e\u0301 \r\n tab\t <|im_end|> [17]"
    bank.add([Document("ünï/çødé #1 \U0001f642", text)])
    assert bank.documents()[0].document.text == text.replace("e\u0301", "é")  # NFC
    assert bank.verify().ok


def test_a_document_is_found_however_its_accents_are_composed(bank):
    composed, decomposed = "café", "cafe\u0301"
    bank.add([Document(decomposed, f"{decomposed} au lait", decomposed, {"of": decomposed})])
    stored = bank.get(composed)
    assert stored.document.id == composed
    assert stored.document.content == f"{composed} au lait"
    assert bank.get(decomposed).number == bank.parts(decomposed)[0].number == stored.number
    assert decomposed in bank
    assert bank.add([Document(composed, f"{composed} au lait", composed)], on_duplicate="skip")
    for word in (composed, decomposed):
        assert bank.catalog.passing({"of": word}) == [stored.number]
        assert bank.catalog.passing({"of": {"in": [word]}}) == [stored.number]
    bank.delete(decomposed)
    assert len(bank) == 0


@pytest.mark.parametrize(
    ("title", "text", "content"),
    [
        ("Anna", "Anna was born.", "Anna was born."),
        ("Anna", "Anna: a life", "Anna: a life"),
        ("Anna", "Annapolis is a city.", "Anna. Annapolis is a city."),
        ("C", "C# is a language.", "C. C# is a language."),
        ("Node", "Node.js runs.", "Node. Node.js runs."),
        ("Anna", "Anna", "Anna"),
        (None, "Anna", "Anna"),
    ],
)
def test_the_title_is_left_out_where_the_text_begins_with_its_words(title, text, content):
    assert Document("x", text, title).content == content


def test_a_model_with_nan_weights_stores_nothing(path, tiny_tokenizer):
    model = make_tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(torch.nan)
    with MemoryBank.create(path, model, tiny_tokenizer) as bank:
        with pytest.raises(ModelError, match="NaN"):
            bank.add(make_documents(3))
        assert len(bank) == 0
        assert folder_state(path) == {}


# ---- long documents


def test_a_long_document_is_split_into_linked_parts(bank, split_by_words):
    long = make_document("book", words=300)
    report = bank.add([make_document("a"), long, make_document("b")])
    parts = bank.parts("book")
    assert report.added == 3
    assert report.parts == len(parts) + 2 == len(bank)
    assert len(parts) > 3
    assert [p.document.id for p in parts] == [f"book#{i + 1}" for i in range(len(parts))]
    assert " ".join(p.document.text for p in parts) == long.text
    for i, part in enumerate(parts, start=1):
        assert (part.part_of, part.part, part.num_parts) == ("book", i, len(parts))
        assert part.num_tokens <= bank.manifest.max_document_tokens
        assert part.document.metadata == long.metadata
        assert part.part_ids == parts[0].part_ids
    assert bank.get("book#2") == parts[1]
    with pytest.raises(DocumentNotFoundError, match=rf"{len(parts)} parts, 'book#1' to"):
        bank.get("book")
    assert bank.info().num_ids == 3


def test_the_real_splitter_serves_the_bank(bank):
    bank.add([Document("book", "A sentence about a river. " * 100, "The Book")])
    parts = bank.parts("book")
    assert len(parts) > 4
    assert all(p.document.title == "The Book" for p in parts)
    assert all(p.num_tokens <= 512 for p in parts)
    assert bank.verify().ok


def test_a_split_document_is_updated_and_deleted_as_a_whole(bank, split_by_words):
    bank.add([make_document("book", 1, words=300), make_document("a")])
    old = [p.number for p in bank.parts("book")]
    with pytest.raises(InputError, match="'book#2' is a part of 'book'"):
        bank.delete("book#2")
    assert bank.add([make_document("book", 1, words=300)]).unchanged == 1
    bank.update(make_document("book", 2, words=200))
    assert len(bank.parts("book")) < len(old)
    assert bank.get_many(old) == {}
    assert bank.delete("book") == 1
    assert ids_of(bank) == ["a"]
    assert bank.verify().ok


def test_ids_of_parts_and_of_documents_cannot_collide(bank, split_by_words):
    bank.add([make_document("book", words=300)])
    report = bank.add([make_document("book#1")], on_duplicate="update")
    assert "names a part of a document" in report.failed[0][1]
    for order in (1, -1):
        name = f"other{order}"
        documents = [make_document(f"{name}#2"), make_document(name, words=300)][::order]
        report = bank.add(documents)
        assert report.added == 1
        assert len(report.failed) == 1
    assert bank.verify().ok


def test_white_space_at_the_ends_does_not_make_parts(bank):
    bank.add([Document("a", "word" + " " * 600)])
    assert bank.get("a").part_of is None
    assert bank.get("a").document.text == "word"


def test_the_length_limit_is_a_setting_of_the_bank(
    path, tiny_model, tiny_tokenizer, split_by_words
):
    with MemoryBank.create(path, tiny_model, tiny_tokenizer, max_document_tokens=100) as bank:
        bank.add([make_document("book", words=100)])
        assert all(p.num_tokens <= 100 for p in bank.parts("book"))
    for wrong in (31, 2049):
        with pytest.raises(ConfigError, match=f"max_document_tokens={wrong}: expected 32 to 2048"):
            MemoryBank.create(path / "x", tiny_model, tiny_tokenizer, max_document_tokens=wrong)


# ---- update, delete, compact


def test_numbers_are_never_used_twice(bank, path, tiny_model, tiny_tokenizer):
    used = set()
    rng = random.Random(0)
    for step in range(12):
        bank.add([make_document(f"d{i}", step) for i in range(3)], on_duplicate="update")
        new = {s.number for s in bank.documents()} - used
        assert all(n > max(used, default=0) for n in new)
        used |= new
        if step % 3 == 0:
            bank.delete(rng.choice(ids_of(bank)))
        if step % 4 == 0:
            bank.delete(ids_of(bank))
            bank.compact()
            bank.close()
            bank = MemoryBank.open(path, tiny_model, tiny_tokenizer)
    bank.close()


def test_update_replaces_a_known_document_only(bank):
    bank.add([make_document("a", 1)])
    bank.update(make_document("a", 2))
    assert bank.get("a").document == make_document("a", 2)
    with pytest.raises(DocumentNotFoundError, match="holds no document 'b'"):
        bank.update(make_document("b"))
    with pytest.raises(InputError, match="its text is empty"):
        bank.update(Document("a", ""))
    assert bank.get("a").document == make_document("a", 2)


def test_delete_is_all_or_none(bank):
    bank.add(make_documents(4))
    with pytest.raises(DocumentNotFoundError, match="'nope'"):
        bank.delete(["doc0", "nope"])
    assert len(bank) == 4
    assert bank.delete(["doc0", "doc2", "doc0"]) == 2
    assert ids_of(bank) == ["doc1", "doc3"]
    with pytest.raises(DocumentNotFoundError):
        bank.get("doc0")
    with pytest.raises(DocumentNotFoundError, match="number 1"):
        bank.get_number(1)
    with pytest.raises(DocumentNotFoundError):
        bank.get("bad \ud800")


def test_a_deleted_document_can_be_added_again_under_a_new_number(bank):
    bank.add([make_document("a")])
    bank.delete("a")
    assert bank.add([make_document("a")]).added == 1
    assert bank.get("a").number == 2


def test_compact_keeps_live_states_bit_for_bit_and_drops_the_rest(bank, path):
    for i in range(4):
        bank.add(make_documents(6, f"batch{i}-"))
    bank.delete([f"batch{i}-{j}" for i in range(3) for j in range(0, 6, 2)])
    before = states_of(bank)
    info = bank.info()
    assert (info.num_segments, info.num_deleted) == (4, 9)
    report = bank.compact()
    assert (report.segments_before, report.segments_after, report.dropped) == (4, 1, 9)
    assert report.bytes_after < report.bytes_before
    assert len(folder_state(path)) == 1
    assert same_states(states_of(bank), before)
    assert bank.verify().ok
    assert bank.info().num_deleted == 0
    again = bank.compact()
    assert again.segments_after == 1
    assert again.dropped == 0


def test_compact_rewrites_group_by_group(bank, path, monkeypatch):
    for i in range(6):
        bank.add(make_documents(3, f"batch{i}-"))
    bank.delete([f"batch{i}-0" for i in range(6)])
    size = bank.info().segment_bytes // 6
    monkeypatch.setattr("msa.memory.maintenance.SEGMENT_BYTES", size)
    before = states_of(bank)
    most = []
    real = bank.catalog.replace_segments

    def spy(removed, added):
        most.append(len(folder_state(path)))
        real(removed, added)

    monkeypatch.setattr(bank.catalog, "replace_segments", spy)
    bank.compact()
    assert len(most) == 3
    assert max(most) <= 7  # never two whole copies
    assert same_states(states_of(bank), before)


def test_compact_of_an_empty_bank_leaves_no_segment(bank, path):
    bank.add(make_documents(3))
    bank.delete(ids_of(bank))
    assert bank.compact().segments_after == 0
    assert folder_state(path) == {}
    assert bank.verify().ok


def test_the_next_documents_are_read_while_a_window_is_encoded(bank, monkeypatch):
    further = threading.Event()
    inner = bank.model.encode_documents
    waited = []

    def slow(*arguments):
        waited.append(further.wait(20))
        return inner(*arguments)

    def documents():
        for i, document in enumerate(make_documents(12)):
            if i == 8:  # the first window is full by then
                further.set()
            yield document

    monkeypatch.setattr(bank.model, "encode_documents", slow)
    assert bank.add(documents(), commit_tokens=300).added == 12
    assert waited
    assert all(waited)
    assert ids_of(bank) == [d.id for d in make_documents(12)]


def test_an_error_while_a_window_is_encoded_ends_the_call_and_leaves_what_was_stored(
    bank, monkeypatch
):
    seen = []
    inner = bank.model.encode_documents

    def broken(*arguments):
        if len(seen) == 2:
            raise RuntimeError("no more")
        return inner(*arguments)

    monkeypatch.setattr(bank.model, "encode_documents", broken)
    with pytest.raises(RuntimeError, match="no more"):
        bank.add(make_documents(40), commit_tokens=300, progress=seen.append)
    assert len(seen) == 2
    assert len(ids_of(bank)) == seen[-1].added
    assert bank.verify().ok
    monkeypatch.undo()
    assert bank.add(make_documents(40), on_duplicate="skip").unchanged == seen[-1].added


def test_what_was_taken_before_the_caller_failed_is_stored(bank):
    def documents():
        yield from make_documents(8)
        raise ValueError("the file ends")

    with pytest.raises(ValueError, match="the file ends") as caught:
        bank.add(documents(), commit_tokens=300)
    assert len(ids_of(bank)) == 8
    assert any("has stored 8 of them" in note for note in caught.value.__notes__)
    with pytest.raises(InputError, match="given a str"):
        bank.add([Document("new", "text"), "no document"])
    assert len(ids_of(bank)) == 9


def test_copies_are_told_by_their_text(bank):
    bank.add([Document("a", "x y", "t"), Document("b", "x y"), Document("c", "z")])
    asked = [([1, 2, 3], [1]), ([3], [1, 2]), ([1, 2, 3], []), ([1], [2])]
    statements: list[str] = []
    bank.catalog._db.connection.set_trace_callback(statements.append)
    assert bank.catalog.copies(asked) == [{2}, set(), set(), {1}]
    assert sum("FROM texts" in s for s in statements) == 1


def test_origins_are_kept_until_the_document_is_deleted(bank):
    origins = bank.catalog.origins
    assert origins.root() is None
    assert origins.below(".") == []
    bank.add(
        [Document("old.txt", "old"), Document("rows.jsonl:3", "r"), Document("rows.jsonl", "x")]
    )
    assert origins.has_old()
    assert origins.held_as("a/old.txt", "old.txt", None)
    origins.remember_root("/files")
    bank.add([Document(name, name) for name in ("x", "../y", "../../z", "d/x", "dd/x")])
    origins.record(
        {
            Origin(s.document.id, s.document.id): content_hash(s.document)
            for s in bank.documents(offset=3)
        }
    )
    assert origins.root() == "/files"

    def below(path):
        return [origin.document for origin in origins.below(path)]

    assert below(".") == ["d/x", "dd/x", "x"]
    assert below("..") == ["../y", "d/x", "dd/x", "x"]
    assert below("../..") == ["../../z", "../y", "d/x", "dd/x", "x"]
    assert below("d") == ["d/x"]
    assert below("x") == ["x"]
    assert below("../y") == ["../y"]
    assert below("nothing") == []
    assert origins.held_as("a/old.txt", "old.txt", None)
    assert not origins.held_as("a/x", "x", None)  # newer than the root
    text = bank.get("old.txt").document
    origins.record({Origin("old.txt", "a/old.txt"): content_hash(text)})
    assert origins.held_as("a/old.txt", "old.txt", None)
    assert not origins.held_as("b/old.txt", "old.txt", None)
    origins.adopt_records("b/rows.jsonl", "rows.jsonl")
    assert below("b") == ["rows.jsonl:3"]
    bank.delete("x")
    bank.add([Document("x", "of somebody else")])
    assert below("x") == []


def test_before_each_batch_the_caller_may_wait_or_stop(bank):
    calls = []
    documents = [make_document(f"d{i}", words=12) for i in range(6)]
    bank.add(documents[:3], before_batch=lambda: calls.append(1), batch_tokens=1)
    assert len(calls) == 3

    class StoppedError(Exception):
        pass

    def stop():
        raise StoppedError

    with pytest.raises(StoppedError):
        bank.add(documents[3:], before_batch=stop)
    assert ids_of(bank) == ["d0", "d1", "d2"]
    bank.add(documents[3:])
    assert ids_of(bank) == [f"d{i}" for i in range(6)]


def test_metadata_is_changed_in_one_commit_without_encoding(bank):
    bank.add([make_document("a"), make_document("b")])
    numbers = {s.document.id: s.number for s in bank.documents()}
    generation = bank.generation
    bank.set_metadata({"a": {"user": "x"}, "b": {"user": "y"}})
    assert bank.generation == generation + 1
    assert {s.document.id: s.number for s in bank.documents()} == numbers
    assert bank.get("b").document.metadata == {"user": "y"}
    assert bank.catalog.passing({"user": "x"}) == [numbers["a"]]
    with pytest.raises(DocumentNotFoundError):
        bank.set_metadata({"a": {}, "none": {}})
    with pytest.raises(InputError, match="metadata cannot be written as JSON"):
        bank.set_metadata({"a": {"n": float("nan")}})
    assert bank.get("a").document.metadata == {"user": "x"}


def test_pages_behind_a_number_do_not_shift(bank):
    bank.add([make_document(name) for name in "abcd"])
    first = bank.documents(2)
    bank.delete("a")
    assert [s.document.id for s in bank.documents(2, after=first[-1].number)] == ["c", "d"]
    with pytest.raises(InputError, match="after"):
        bank.documents(after=-1)


def test_ids_are_found_by_how_they_begin(bank):
    bank.add([make_document(name) for name in ("f1/a", "f1/b", "f1", "f10/a", "f1\U0010fffe")])
    assert bank.catalog.sources("f1/") == ["f1/a", "f1/b"]
    assert bank.catalog.sources("f2") == []
    assert bank.catalog.sources("\ud800") == []
