"""Steps from question sets: every kind of sample asks for what it should, of what it has read."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from msa.errors import TrainingError
from msa.text.prompts import PromptEncoder, PromptTemplate
from msa.training.config import QuestionSettings, QuestionStage
from msa.training.question_steps import QuestionSteps, load_sources
from msa.training.samples import IGNORED
from training_tools import PERSONS, write_question_set

TOP_K = 2
STEPS = 6
REFUSAL = PromptTemplate().refusal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_question_set(tmp_path_factory.mktemp("sets") / "persons")


@pytest.fixture(scope="module")
def sources(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("negatives")

    def load(**settings):
        return load_sources([QuestionSettings(path=str(folder), **settings)], cache)

    return load


def make(sources, tokenizer, seed=3, name="a", steps=STEPS, **plans):
    values = {"route": 0, "documents": 10, "negatives": 2, "foreign": 0.0, "more_questions": 0}
    stage = QuestionStage(kind="questions", name=name, steps=steps, **{**values, **plans})
    return QuestionSteps(stage, sources, PromptEncoder(tokenizer), TOP_K, seed)


class Row:
    """A sample as text: what it shows, asks and teaches, with the documents by name."""

    def __init__(self, step, group, row, tokenizer):
        self.route_only = bool(group["route_only"])
        names = names_of(step, tokenizer)
        self.numbers = {names[i]: number for i, number in enumerate(numbers_of(step, tokenizer))}
        shown = [int(t) for t in group["input_ids"][row] if t]
        self.text = tokenizer.decode(shown)
        kept = group["labels"][row] != IGNORED
        assert torch.equal(group["labels"][row][kept], group["input_ids"][row][kept])
        assert torch.equal(kept, group["weights"][row] > 0)
        self.taught = tokenizer.decode([int(t) for t in group["labels"][row][kept]])
        self.positives = {names[i] for i in group["positives"][row].nonzero().flatten().tolist()}
        self.read = {names[i] for i in group["read"][row].nonzero().flatten().tolist()}
        self.routes = tokenizer.decode(
            [int(t) for t in group["input_ids"][row][group["routing_mask"][row]]]
        )
        asked = re.search(r"lamp of (the friend of )?person (\d+) made\?", self.text)
        person = int(asked[2])
        self.gold = [f"p{person}"] + [f"p{(person + 1) % PERSONS}"] * bool(asked[1])
        self.answer = str(1800 + int(self.gold[-1][1:]))


def names_of(step, tokenizer):
    names = []
    for ids, length in zip(step["documents"], step["lengths"], strict=True):
        text = tokenizer.decode(ids[:length].tolist())
        person = re.search(r"Person (\d+) has", text)
        names.append(f"p{person[1]}" if person else "s" + re.search(r"number (\d+)", text)[1])
    return names


def numbers_of(step, tokenizer):
    texts = [tokenizer.decode(ids.tolist()) for ids in step["documents"]]
    return [int(re.search(r"\[(\d+)\]", text)[1]) for text in texts]


def rows_of(dataset, tokenizer):
    found = [
        Row(step, group, row, tokenizer)
        for step in (dataset[i] for i in range(len(dataset)))
        for group in step["groups"]
        for row in range(len(group["labels"]))
    ]
    assert found
    return found


def test_a_routing_sample_asks_for_all_gold_documents_and_teaches_no_words(sources, tiny_tokenizer):
    for row in rows_of(make(sources(), tiny_tokenizer, route=3), tiny_tokenizer):
        assert row.route_only
        assert row.taught == ""
        assert row.positives == set(row.gold)
        assert not row.read
        assert "lamp of" in row.routes


def test_a_round_names_all_gold_documents_and_no_other(sources, tiny_tokenizer):
    rows = rows_of(make(sources(), tiny_tokenizer, name_documents=4), tiny_tokenizer)
    encoder = PromptEncoder(tiny_tokenizer)
    for row in rows:
        assert not row.route_only
        assert not row.read
        assert row.positives == set(row.gold)
        numbers = [row.numbers[name] for name in row.gold]
        assert row.taught == tiny_tokenizer.decode(encoder.written(numbers))
    assert {len(row.gold) for row in rows} == {1, 2}


def test_a_set_that_does_not_route_names_nothing(sources, tiny_tokenizer):
    steps = make(sources(routes=False), tiny_tokenizer, name_documents=4)
    assert not any(steps[i]["groups"] for i in range(len(steps)))


def test_a_later_routing_sample_asks_for_what_is_left_behind_a_text(sources, tiny_tokenizer):
    rows = rows_of(make(sources(), tiny_tokenizer, route_again=4), tiny_tokenizer)
    for row in rows:
        assert row.route_only
        assert row.taught == ""
        assert row.read
        assert not row.read & row.positives
        assert row.positives == set(row.gold) - row.read == {row.gold[-1]}
        assert "lamp" in row.routes.split("made")[1]  # the text read last routes too
    assert {len(row.gold) for row in rows} == {1, 2}


def test_a_reading_sample_ends_the_retrieval_and_answers(sources, tiny_tokenizer):
    template = PromptEncoder(tiny_tokenizer).template
    rows = rows_of(make(sources(), tiny_tokenizer, read=4), tiny_tokenizer)
    for row in rows:
        assert not row.route_only
        assert set(row.gold) <= row.read
        assert not row.positives
        assert row.taught == f"{template.end_of_retrieve} {row.answer}{template.end}"
    assert max(len(row.read) for row in rows) > 2  # documents that do not help are read too


def test_documents_side_by_side_are_mostly_read_together_and_hops_mostly_one_by_one(
    sources, tiny_tokenizer
):
    dataset = make(sources(), tiny_tokenizer, steps=20, read=4)
    (source,) = dataset.sources
    template = PromptEncoder(tiny_tokenizer).template

    def together():
        rows = [row for row in rows_of(dataset, tiny_tokenizer) if len(row.gold) == 2]
        assert len(rows) > 20
        rounds = [row.text.count(f"]{template.end_of_read}") for row in rows]
        return sum(count == 1 for count in rounds) / len(rounds)

    hops = together()
    aside = [replace(question, hops=1) for question in source.questions.questions]
    dataset.sources = [replace(source, questions=replace(source.questions, questions=aside))]
    assert hops < 0.6 < 0.7 < together()


def test_more_questions_are_answered_or_refused_by_what_was_read(sources, tiny_tokenizer):
    template = PromptEncoder(tiny_tokenizer).template
    dataset = make(sources(), tiny_tokenizer, read=3, more_questions=3, foreign=1.0)
    (source,) = dataset.sources
    refused = misled = 0
    for row in rows_of(dataset, tiny_tokenizer):
        shown = row.text.split(template.end_of_retrieve)[1]
        asked = re.findall(r"lamp of (the friend of )?person (\d+) made\?", shown)
        answers = [
            part.strip() for part in row.taught.split(template.end_of_retrieve)[1].split("<|")
        ]
        answers = [re.sub(r"^im_end\|>\s*", "", part) for part in answers if part]
        answers = [part for part in answers if part]
        assert len(answers) == len(asked) > 1
        for (friend, person), answer in zip(asked, answers, strict=True):
            gold = [int(person)] + [(int(person) + 1) % PERSONS] * bool(friend)
            known = {f"p{i}" for i in gold} <= row.read
            assert answer == (str(1800 + gold[-1]) if known else REFUSAL)
            refused += not known
            alike = {i for name in row.read for i in source.mistaken.get(name, ())}
            misled += not known and any(
                f"lamp of {friend}person {person} made?" in source.questions.questions[i].question
                for i in alike
            )
    assert refused > misled > 0  # by texts that look right, and by texts of other questions


def test_samples_may_do_without_the_memory_and_route_all_the_same(sources, tiny_tokenizer):
    plans = {"route": 2, "name_documents": 2, "read": 2}
    for share, sees in ((0.0, True), (1.0, False)):
        dataset = make(sources(), tiny_tokenizer, without_memory=share, **plans)
        for index in range(len(dataset)):
            for group in dataset[index]["groups"]:
                assert bool(group["memory_mask"].any()) == (sees or bool(group["route_only"]))
                assert group["routing_mask"].any(1).all()


def test_of_a_fraction_of_a_sample_a_step_has_one_now_and_then(sources, tiny_tokenizer):
    dataset = make(sources(), tiny_tokenizer, steps=30, read=1.5)
    counts = [sum(len(g["labels"]) for g in dataset[i]["groups"]) for i in range(len(dataset))]
    assert set(counts) == {1, 2}
    assert 5 < counts.count(2) < 25


def test_a_hop_names_the_second_document_behind_the_first(sources, tiny_tokenizer):
    template = PromptEncoder(tiny_tokenizer).template
    for row in rows_of(make(sources(), tiny_tokenizer, hop=3), tiny_tokenizer):
        first, second = row.gold
        assert first in row.read
        assert second not in row.read
        assert row.positives == {second}
        assert row.taught == f"[{row.numbers[second]}]{template.end_of_read}"


def test_a_sample_of_again_reads_on_behind_what_does_not_help(sources, tiny_tokenizer):
    template = PromptEncoder(tiny_tokenizer).template
    for row in rows_of(make(sources(), tiny_tokenizer, again=3), tiny_tokenizer):
        assert row.read
        assert not row.read & set(row.gold)
        assert row.positives == {row.gold[0]}
        assert row.taught == f"[{row.numbers[row.gold[0]]}]{template.end_of_read}"


def test_a_refusal_follows_what_does_not_help(sources, tiny_tokenizer):
    template = PromptEncoder(tiny_tokenizer).template
    for row in rows_of(make(sources(), tiny_tokenizer, refuse=3), tiny_tokenizer):
        assert len(row.read) >= 2
        assert not row.read & set(row.gold)
        assert not row.positives
        assert row.taught == f" {template.refusal}{template.end}"


ALL = {"route": 3, "route_again": 2, "read": 2, "hop": 2, "again": 1, "refuse": 1}


def flat(value):
    if isinstance(value, dict):
        return [item for key in sorted(value) for item in flat(value[key])]
    if isinstance(value, list):
        return [item for part in value for item in flat(part)]
    return [value]


def same(one, two):
    one, two = flat(one), flat(two)
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_step_is_made_from_the_seed_the_stage_and_its_index_alone(sources, tiny_tokenizer):
    whole = make(sources(), tiny_tokenizer, **ALL)
    steps = [whole[i] for i in range(4)]
    resumed = make(sources(), tiny_tokenizer, steps=50, **ALL)
    assert all(same(resumed[i], steps[i]) for i in (3, 1))
    assert not same(steps[0], steps[1])
    assert not same(make(sources(), tiny_tokenizer, seed=4, **ALL)[0], steps[0])
    assert not same(make(sources(), tiny_tokenizer, name="b", **ALL)[0], steps[0])


def test_documents_have_numbers_of_their_own_and_are_no_more_than_asked(sources, tiny_tokenizer):
    dataset = make(sources(), tiny_tokenizer, max_digits=2, **ALL)
    seen = set()
    for step in (dataset[i] for i in range(STEPS)):
        numbers = numbers_of(step, tiny_tokenizer)
        assert len(set(numbers)) == len(numbers) <= 10
        assert all(1 <= number <= 99 for number in numbers)
        seen.add(tuple(numbers))
    assert len(seen) == STEPS  # another number in every step


def test_long_documents_are_cut(sources, tiny_tokenizer):
    step = make(sources(), tiny_tokenizer, route=2, max_document_tokens=20)[0]
    assert int(step["lengths"].max()) <= 20 + 8 + 2 * 8
    whole = make(sources(), tiny_tokenizer, route=2)[0]
    assert int(whole["lengths"].max()) > 60


def test_gold_only_leaves_out_documents_that_no_question_needs(sources, tiny_tokenizer):
    def names(**settings):
        dataset = make(sources(**settings), tiny_tokenizer, steps=20, negatives=6, **ALL)
        return {n for i in range(20) for n in names_of(dataset[i], tiny_tokenizer)}

    assert any(name.startswith("s") for name in names())
    assert not any(name.startswith("s") for name in names(gold_only=True))


def test_a_set_that_does_not_route_teaches_no_routing(sources, tiny_tokenizer):
    rows = rows_of(make(sources(routes=False), tiny_tokenizer, **ALL), tiny_tokenizer)
    assert not any(row.route_only or row.positives for row in rows)


def test_steps_with_reading_are_drawn_from_sets_that_read(folder, tiny_tokenizer, tmp_path):
    both = load_sources(
        [
            QuestionSettings(path=str(folder), reads=False),
            QuestionSettings(path=str(folder), routes=False),
        ],
        tmp_path,
    )
    reading = make(both, tiny_tokenizer, steps=12, **ALL)
    routing = make(both, tiny_tokenizer, steps=12, route=3)
    assert not any(row.route_only for row in rows_of(reading, tiny_tokenizer))
    assert all(row.route_only for row in rows_of(routing, tiny_tokenizer))


def test_a_set_without_gold_documents_is_refused_by_name(folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "corpus.jsonl").write_text('{"id": "a", "text": "Nothing."}\n')
    row = '{"question": "Who?", "answers": [], "gold": [], "unanswerable": true}\n'
    (bare / "questions.train.jsonl").write_text(row)
    with pytest.raises(TrainingError, match=r"bare: no question has a gold document") as caught:
        load_sources([QuestionSettings(path=str(bare))], tmp_path)
    assert "\n" not in str(caught.value)
