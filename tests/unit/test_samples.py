from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msa.synthetic_worlds import World, WorldDocument, WorldQuestion, generate_world
from msa.text.prompts import Reading
from msa.training.config import LossSettings, SampleSettings, WorldSettings
from msa.training.samples import (
    BLANK_DIGIT,
    IGNORED,
    MAX_DIGITS,
    SampleBuilder,
    collate,
    digits_of,
    draw_numbers,
)
from msa.types import Document

TOP_K = 4
DOCUMENTS = (  # shortest first, as a step has them
    WorldDocument("ada", "Ada", "Ada was born in Rome. Her son is Bob."),
    WorldDocument("bob", "Bob", "Bob paints in Oslo, on Sundays and by lamplight."),
    WorldDocument(
        "cid", "Cid", "Cid bakes bread for the whole street, early and on every single day."
    ),
)
ONE = WorldQuestion("Where was Ada born?", "Rome", (), ("ada",), "born", 1)
OTHER = WorldQuestion("Who is Ada's son?", "Bob", (), ("ada",), "son", 1)
BOB = WorldQuestion("Where does Bob paint?", "Oslo", (), ("bob",), "paints", 1)
TWO = WorldQuestion("Where does Ada's son paint?", "Oslo", (), ("ada", "bob"), "son>paints", 2)
UNREAD = WorldQuestion("Where was Cid's baker born?", "Rome", (), ("cid", "ada"), "x>born", 2)
WORLD = World(DOCUMENTS, (ONE, TWO))
LOSSES = LossSettings(context=0.25)
WORLD_SETTINGS = WorldSettings(documents=3, min_digits=2, max_digits=4)


def none(**counts):
    return SampleSettings(**{"name": 0, "read": 0, "hop": 0, "answer": 0, **counts})


def make(encoder, samples, world=WORLD, settings=WORLD_SETTINGS, losses=LOSSES, seed=0):
    step = SampleBuilder(encoder, TOP_K).step(world, random.Random(seed), settings, samples, losses)
    numbers = [
        int("".join(str(d) for d in row if d != BLANK_DIGIT)) for row in step["digits"].tolist()
    ]
    return step, numbers


def by_length(documents):
    return sorted(documents, key=lambda document: len(content(document)))


def content(document):
    """What a bank encodes, and hands to the model, of the same document."""
    return Document(document.key, document.text, title=document.title).content


def only_row(step):
    """The single row of the single group, cut to its tokens."""
    (group,) = step["groups"]
    assert len(group["input_ids"]) == 1
    return {name: tensor[0].tolist() for name, tensor in group.items()}


def read(numbers, row):
    return Reading(((numbers[row], DOCUMENTS[row].text),))


def check_begins_as_inference_does(row, context, written):
    """The row is the prompt that `Interleave` would prefill, then what the model has to write."""
    length = len(context.input_ids)
    assert row["input_ids"][:length] == context.input_ids
    assert row["routing_mask"][:length] == context.routes
    assert row["memory_mask"][:length] == context.sees_memory
    assert row["position_ids"][:length] == context.positions(TOP_K)
    assert row["input_ids"][length : length + len(written)] == written
    assert row["labels"][length : length + len(written)] == written
    assert row["weights"][length : length + len(written)] == [1.0] * len(written)
    assert not any(row["routing_mask"][length:])
    assert all(row["memory_mask"][length:])
    assert row["position_ids"] == [
        i if i < context.prefix_length else i + TOP_K for i in range(len(row["input_ids"]))
    ]
    return length


def test_a_name_sample_is_round_1_and_the_first_documents_number(encoder):
    world = World(DOCUMENTS, (TWO,))
    step, numbers = make(encoder, none(name=1), world)
    row = only_row(step)
    written = encoder.written([numbers[0]])
    length = check_begins_as_inference_does(row, encoder.context(TWO.question), written)
    assert row["labels"][:length] == [IGNORED] * length
    assert row["weights"][:length] == [0.0] * length
    assert len(row["input_ids"]) == length + len(written)
    assert row["positives"] == [True, False, False]


def test_a_hop_sample_is_round_2_and_the_second_documents_number(encoder):
    step, numbers = make(encoder, none(hop=1))
    row = only_row(step)
    written = encoder.written([numbers[1]])
    context = encoder.context(TWO.question, [read(numbers, 0)])
    length = check_begins_as_inference_does(row, context, written)
    start = len(encoder.context(TWO.question).input_ids)
    assert row["labels"][:start] == [IGNORED] * start
    # what stands between, round 1's number and the text, is predicted with the context's weight
    assert row["labels"][start:length] == context.input_ids[start:]
    assert row["weights"][start:length] == [0.25] * (length - start)
    assert row["positives"] == [False, True, False]


@pytest.mark.parametrize("question", [ONE, TWO], ids=["read", "answer"])
def test_the_last_sample_is_the_last_round_then_the_answer(encoder, question):
    hops = len(question.gold)
    kind = none(**{"read" if hops == 1 else "answer": 1}, more_questions=0)
    step, numbers = make(encoder, kind)
    row = only_row(step)
    readings = [read(numbers, i) for i in range(hops)]
    written = encoder.retrieval_end()
    length = check_begins_as_inference_does(
        row, encoder.context(question.question, readings), written
    )
    handed = encoder.restatement(question.question)
    answer = encoder.answer(question.answer)
    assert row["input_ids"][length + len(written) :] == handed + answer
    assert row["labels"][-len(answer) :] == answer
    assert row["weights"][-len(answer) :] == [1.0] * len(answer)
    assert row["weights"][-len(answer) - len(handed) : -len(answer)] == [0.25] * len(handed)
    assert not any(row["positives"])  # nothing is left to be found
    assert row["read"] == [i < hops for i in range(3)]


def test_more_questions_ask_only_what_the_read_texts_answer(encoder):
    world = World(DOCUMENTS, (ONE, OTHER, BOB, TWO, UNREAD))
    for question, expected in ((ONE, {OTHER}), (TWO, {ONE, OTHER, BOB})):
        kind = "read" if len(question.gold) == 1 else "answer"
        for seed in range(40):  # until the draw begins with the question wanted
            step, _ = make(encoder, none(**{kind: 1}, more_questions=9), world, seed=seed)
            row = only_row(step)
            text = encoder.tokenizer.decode(row["input_ids"])
            first, *more = text.split("The user's question is: ")[1:]
            if first.startswith(question.question):
                asked = {q for q in world.questions if any(q.question in m for m in more)}
                assert asked == expected
                assert all(q.answer in text for q in asked)
                break
        else:
            pytest.fail("never drawn")


def test_the_number_written_is_that_of_the_document_encoded(encoder):
    """In every sample of a generated world: the number leads to the document that is right."""
    samples = SampleSettings(name=8, read=3, hop=4, answer=3)
    world = generate_world(5, 12, breadth=1.0)
    wide = WorldSettings(documents=12, max_digits=5, max_document_tokens=2000)
    step, numbers = make(encoder, samples, world, wide)
    rows = zip(step["documents"].tolist(), step["lengths"].tolist(), strict=True)
    decode = encoder.tokenizer.decode
    encoded = [decode(ids[:length]) for ids, length in rows]
    for number, text, document in zip(numbers, encoded, by_length(world.documents), strict=True):
        assert text == f"<|im_start|>[{number}]. {content(document)}[{number}]<|im_end|>"
    groups = step["groups"]  # a kind may be in several
    ordered = by_length(world.documents)
    for group in (g for g in groups if g["positives"].any()):
        for labels, weights, positives in zip(
            group["labels"], group["weights"], group["positives"], strict=True
        ):
            (document,) = positives.nonzero().flatten().tolist()
            assert decode(labels[weights == 1.0]) == f"[{numbers[document]}]<|object_ref_end|>"
    last_rounds = [g for g in groups if g["read"].any() and not g["positives"].any()]
    assert len(last_rounds) >= 2
    for group in last_rounds:
        for ids, were_read in zip(group["input_ids"], group["read"], strict=True):
            text = decode(ids)
            for document in were_read.nonzero().flatten().tolist():
                assert f"[{numbers[document]}]. {content(ordered[document])}\n" in text


def test_a_question_whose_answer_was_cut_off_is_not_asked(encoder):
    step, _ = make(
        encoder,
        none(name=4, read=4, hop=4, answer=4),
        settings=WorldSettings(documents=3, max_document_tokens=15),  # "Bob paints in O"
    )
    assert step["groups"] == []
    step, _ = make(
        encoder,
        none(name=4, read=4, hop=4, answer=4),
        settings=WorldSettings(documents=3, max_document_tokens=21),  # "... born in Rome."
    )
    assert len(step["groups"]) == 4
    assert step["lengths"].max() <= 21 + len(encoder.document(1000, ""))


@pytest.mark.parametrize("digits", [1, 4, 8])
def test_a_cut_document_still_ends_with_its_number_and_its_end(encoder, digits):
    settings = WorldSettings(
        documents=3, min_digits=digits, max_digits=digits, max_document_tokens=10
    )
    step, numbers = make(encoder, none(), settings=settings)
    for ids, length, number in zip(step["documents"], step["lengths"], numbers, strict=True):
        text = encoder.tokenizer.decode(ids[:length])
        assert text.endswith(f"[{number}]<|im_end|>")


def test_text_cut_inside_a_letter_loses_the_letter(encoder):
    builder = SampleBuilder(encoder, TOP_K)
    assert builder._cut("abé", 3) == "ab"  # é is two bytes, two tokens here
    assert builder._cut("abé", 4) == "abé"


def test_a_copy_sample_writes_again_what_stands_in_front_of_it(encoder):
    prefix = encoder.tokenize(encoder.template.prefix)
    group = make(encoder, none(copy=30))[0]["groups"][0]
    assert not group["routing_mask"].any()
    assert not group["memory_mask"].any()
    assert not group["positives"].any()
    shuffled = 0
    for ids, labels, weights in zip(
        group["input_ids"].tolist(),
        group["labels"].tolist(),
        group["weights"].tolist(),
        strict=True,
    ):
        taught = [i for i, weight in enumerate(weights) if weight]
        first, end = taught[0] - 1, taught[-1] + 1  # where the piece comes again cannot be known
        assert taught == list(range(first + 1, end))
        assert [i for i, label in enumerate(labels) if label != IGNORED] == taught
        assert all((labels[i], weights[i]) == (ids[i], 1.0) for i in taught)
        assert ids[: len(prefix)] == prefix
        piece, between = ids[first:end], ids[len(prefix) : first][end - first :]
        assert ids[len(prefix) :][: len(piece)] == piece
        assert 8 <= len(piece) <= 24
        assert 1 <= len(between) <= 8
        text = encoder.tokenizer.decode(piece)
        shuffled += not any(text in d.text for d in DOCUMENTS)
    assert 0 < shuffled < 30


def test_collate_pads_on_the_right_with_what_teaches_nothing(encoder):
    step, _ = make(encoder, SampleSettings(name=4, read=2, hop=2, answer=2))
    assert len(step["groups"]) == 4
    for group in step["groups"]:
        batch, width = group["input_ids"].shape
        for name in ("position_ids", "labels", "weights", "routing_mask", "memory_mask"):
            assert group[name].shape == (batch, width)
        assert group["routing_mask"].dtype == group["memory_mask"].dtype == torch.bool
        assert group["weights"].dtype == torch.float32
        assert group["positives"].shape == (batch, 3)
        lengths = (group["weights"] > 0).int().argmax(1) * 0
        for row in range(batch):
            lengths[row] = (group["labels"][row] != IGNORED).nonzero().max() + 1
            behind = slice(int(lengths[row]), None)
            assert not group["routing_mask"][row, behind].any()
            assert not group["memory_mask"][row, behind].any()
            assert (group["labels"][row, behind] == IGNORED).all()
            assert (group["weights"][row, behind] == 0).all()
        assert int(lengths.max()) == width


def test_collate_marks_every_positive():
    from msa.text.prompts import LocalContext
    from msa.training.samples import Sample

    context = LocalContext([5, 6], [True, False], [False, True], 1)
    group = collate([Sample(context, [IGNORED, 6], [0.0, 1.0], [0, 2])], 4, TOP_K)
    assert group["positives"].tolist() == [[True, False, True, False]]
    assert group["position_ids"].tolist() == [[0, 1 + TOP_K]]


@given(st.integers(0, 10**MAX_DIGITS - 1))
@settings(max_examples=30, deadline=None)
def test_digits_stand_from_the_left_then_blanks(number):
    digits = digits_of(number)
    text = str(number)
    assert len(digits) == MAX_DIGITS
    assert digits[: len(text)] == [int(c) for c in text]
    assert digits[len(text) :] == [BLANK_DIGIT] * (MAX_DIGITS - len(text))


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_drawn_numbers_differ_and_have_the_lengths_asked_for(data):
    low = data.draw(st.integers(1, 4))
    high = data.draw(st.integers(low, 6))
    count = data.draw(st.integers(1, 9))
    seed = data.draw(st.integers(0, 99))
    numbers = draw_numbers(random.Random(seed), count, low, high)
    assert len(set(numbers)) == count
    assert all(low <= len(str(n)) <= high for n in numbers)
    assert numbers == draw_numbers(random.Random(seed), count, low, high)


def test_every_length_of_number_is_drawn_about_as_often():
    numbers = draw_numbers(random.Random(0), 300, 3, 5)
    counts = [sum(len(str(n)) == d for n in numbers) for d in (3, 4, 5)]
    assert min(counts) > 70
    assert numbers != sorted(numbers)


def test_samples_of_like_length_stand_together(encoder, monkeypatch):
    """Splitting a kind into groups loses no sample and saves padding."""
    samples = SampleSettings(name=0, read=12, more_questions=0)
    world = generate_world(5, 12, breadth=1.0)
    wide = WorldSettings(documents=12, max_digits=5, max_document_tokens=2000)
    monkeypatch.setattr("msa.training.samples.GROUP_TOKENS", 100_000)
    (whole,) = make(encoder, samples, world, wide)[0]["groups"]
    monkeypatch.setattr("msa.training.samples.GROUP_TOKENS", 600)
    parts = make(encoder, samples, world, wide)[0]["groups"]
    assert len(parts) > 1
    tokens = [len(row[row > 0]) for part in parts for row in part["input_ids"]]
    assert tokens == sorted(tokens)
    assert sorted(tokens) == sorted(len(row[row > 0]) for row in whole["input_ids"])
    assert sum(p["input_ids"].numel() for p in parts) < whole["input_ids"].numel()
