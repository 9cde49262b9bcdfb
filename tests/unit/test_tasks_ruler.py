"""RULER's tasks are solved from their documents alone, by solvers that know no generator."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter

import pytest

from msa.errors import InputError
from msa.evaluation.tasks import TASKS
from msa.evaluation.tasks.words import words
from task_tools import count_words, outcome, request, seen, write_texts

NEEDLES = sorted(name for name in TASKS if name.startswith("ruler/niah"))
RULER = sorted(name for name in TASKS if name.startswith("ruler/"))
NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")
VALUES = {"number": r"\d{7}", "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f-]{17}"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


def asked_keys(text):
    listed = re.search(r"for (.+) mentioned in the provided text\?$", text)[1]
    return re.split(r", and |, ", listed)


def test_all_eleven_are_there():
    names = ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3")
    needles = {f"ruler/niah_{name}" for name in (*names, "multivalue", "multiquery")}
    assert set(RULER) == needles | {"ruler/vt", "ruler/cwe", "ruler/fwe"}
    assert all(TASKS[name].grows and TASKS[name].metric == "string_match_all" for name in RULER)


@pytest.mark.parametrize("name", NEEDLES)
def test_the_values_of_a_key_are_the_answers_and_stand_in_the_gold_documents(name, texts):
    found = TASKS[name].load(request(texts, size=2000))
    for question in found.questions:
        told = [
            (document.id, *match.groups())
            for document in seen(found)(question)
            for match in NEEDLE.finditer(document.text)
        ]
        wanted = [
            (i, value) for key in asked_keys(question.text) for i, _, k, value in told if k == key
        ]
        assert {value for _, value in wanted} == set(question.answers)
        assert {i for i, _ in wanted} == set(question.gold) <= set(question.own)
        kind = "uuid" if "uuid" in question.text else "number"
        assert all(re.fullmatch(VALUES[kind], answer) for answer in question.answers)


@pytest.mark.parametrize("name", NEEDLES)
def test_a_key_occurs_in_no_other_document(name, texts):
    found = TASKS[name].load(request(texts, size=2000))
    for question in found.questions:
        for key in asked_keys(question.text):
            with_key = {d.id for d in found.documents if key in d.text}
            assert with_key <= set(question.gold)


@pytest.mark.parametrize(
    ("name", "needles", "answers"),
    [
        ("niah_single_1", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multikey_2", 1, 1),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_needles_and_answers_are_as_many_as_the_benchmark_says(name, needles, answers, texts):
    for question in TASKS[f"ruler/{name}"].load(request(texts, size=500)).questions:
        assert (len(question.own), len(question.answers)) == (needles, answers)
        plural = answers > 1
        assert question.text.startswith("What are all the" if plural else "What is the")
        assert question.max_new_tokens == 128


def test_what_is_assigned_a_value_follows_from_the_statements(texts):
    found = TASKS["ruler/vt"].load(request(size=600))
    for question in found.questions:
        said = [d.text for d in seen(found)(question) if d.text.startswith("VAR")]
        values = dict(re.fullmatch(r"VAR (\w+) = (?:VAR )?(\w+)", text).groups() for text in said)

        def value(name, values=values):
            return value(values[name]) if name in values else name

        wanted = re.search(r"the value (\d{5}) ", question.text)[1]
        holding = {name for name in values if value(name) == wanted}
        assert holding == set(question.answers)
        assert len(holding) == 5
        by_id = {d.id: d.text for d in found.documents}
        chain = [by_id[i] for i in question.gold]  # in reading order
        assert chain[0] == f"VAR {question.answers[0]} = {wanted}"
        assert all(
            text.endswith(f"VAR {a}")
            for text, a in zip(chain[1:], question.answers[:-1], strict=True)
        )


@pytest.mark.parametrize(("size", "often", "seldom"), [(1200, 6, 1), (6000, 30, 3)])
def test_the_common_words_are_those_that_the_list_repeats(size, often, seldom):
    found = TASKS["ruler/cwe"].load(request(size=size, count=2))
    for question in found.questions:
        entries = [
            entry
            for d in seen(found)(question)
            if d.id in question.own
            for entry in re.findall(r"(\d+)\. ([a-z]+)", d.text.partition(". ")[2])
        ]
        assert [int(n) for n, _ in entries] == list(range(1, len(entries) + 1))
        counts = Counter(word for _, word in entries)
        assert {word for word, times in counts.items() if times == often} == set(question.answers)
        assert set(counts.values()) == {often, seldom}
        assert len(question.answers) == 10
        assert size * 0.8 < count_words(" ".join(f"{n}. {w}" for n, w in entries)) <= size
        assert question.gold == question.own


def test_the_frequent_coded_words_follow_zipfs_law():
    found = TASKS["ruler/fwe"].load(request(size=5000, count=3))
    for question in found.questions:
        own = [d.text for d in seen(found)(question) if d.id in question.own]
        coded = [word for text in own for word in text.partition(": ")[2].split()]
        counts = Counter(coded)
        assert counts.most_common(1)[0][0] == "..."
        del counts["..."]
        (a, x), (b, y), (c, z), (_, rest) = counts.most_common(4)
        assert [a, b, c] == list(question.answers)
        assert x > y > z > rest
        assert x / y == pytest.approx(9 / 4, rel=0.05)
        assert 4800 < len(coded) <= 5000


def test_lists_stop_growing_and_noise_fills_what_is_left():
    found = TASKS["ruler/fwe"].load(request(size=20_000, count=1))
    own = [d for d in found.documents if d.id in found.questions[0].own]
    noise = [d for d in found.documents if d.id not in found.questions[0].own]
    coded = sum(count_words(d.text.partition(": ")[2]) for d in own)
    assert 16_000 < coded <= 16_384
    assert 3000 < sum(count_words(d.text) for d in noise) <= 20_000 - 16_384


@pytest.mark.parametrize("name", [n for n in NEEDLES if n != "ruler/niah_single_1"])
def test_a_haystack_has_the_size_and_begins_with_the_smaller_one(name, texts):
    small, large = (
        [
            d
            for d in TASKS[name].load(request(texts, size=size, seed=seed)).documents
            if d.id.startswith("hay")
        ]
        for size, seed in ((1000, 0), (3000, 1))
    )
    assert large[: len(small)] == small
    for documents, size in ((small, 1000), (large, 3000)):
        assert size - 256 < sum(count_words(d.text) for d in documents) <= size


def test_noise_is_the_benchmarks_five_sentences():
    found = TASKS["ruler/niah_single_1"].load(request(size=5000, count=1))
    noise = [d.text for d in found.documents if d.id.startswith("hay")]
    assert set(" ".join(noise).replace("\n", " ").split(". ")) >= {"The grass is green"}
    assert len(set(noise)) == 1
    assert 4700 < sum(map(count_words, noise)) <= 5000


@pytest.mark.parametrize("name", RULER)
def test_one_seed_gives_one_set(name, texts):
    one, same, other = (
        TASKS[name].load(request(texts, size=500, seed=seed, count=3)) for seed in (3, 3, 4)
    )
    assert one == same
    assert one.data_hash != other.data_hash
    assert not {q.answers for q in one.questions} & {q.answers for q in other.questions}
    assert len({d.id for d in one.documents}) == len(one.documents)
    training = TASKS[name].load(request(texts, size=500, seed=3, count=3, split="train"))
    assert training.data_hash != one.data_hash


@pytest.mark.parametrize(
    ("answer", "score"),
    [("Both ABC-1 and 77.", 1.0), ("abc-1", 0.5), ("I do not know", 0.0), ("77, 770", 0.5)],
)
def test_the_metric_is_the_share_of_the_answers_that_occur(answer, score):
    task = TASKS["ruler/niah_multivalue"]
    (question, *_) = task.load(request(count=1)).questions
    question = type(question)(question.text, ("abc-1", "77"), ())
    assert task.score(question, outcome(answer)) == {"score": score, "string_match_all": score}


def test_text_is_taken_from_the_files_by_turns(tmp_path):
    write_texts(tmp_path)
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        for i in range(50):
            file.write(json.dumps({"id": i, "text": f"Row {i} of d has these seven words."}) + "\n")
    found = TASKS["ruler/niah_single_2"].load(request(tmp_path, size=2000, count=1))
    shown = " ".join(d.text for d in found.documents[:12])
    assert "of a says" in shown
    assert "Row 0 of d" in shown


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no text; expected files .txt, .md"),
        ({"a.txt": "Too short."}, "holds 2 tokens, and 2,000 were asked for"),
        ({"a.jsonl": '{"id": 1}\n'}, "a.jsonl:1: expected an object with a text"),
        ({"a.jsonl": "{\n"}, "a.jsonl: cannot be read as text"),
    ],
)
def test_texts_that_cannot_be_used_are_one_clear_line(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        TASKS["ruler/niah_single_2"].load(request(tmp_path, size=2000))
    with pytest.raises(InputError, match="give --texts FOLDER"):
        TASKS["ruler/niah_single_2"].load(request(size=2000))
    with pytest.raises(InputError, match="no such folder"):
        TASKS["ruler/niah_single_2"].load(request(tmp_path / "none", size=2000))


def test_words_are_plain_and_many():
    for name in ("adjectives", "nouns", "verbs"):
        assert len(words(name)) > 200
        assert all(re.fullmatch("[a-z]+", word) for word in words(name))
