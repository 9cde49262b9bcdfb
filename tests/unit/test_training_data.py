from __future__ import annotations

import gzip
import json
import random

import pytest
import torch

from msa.errors import TrainingError
from msa.training.config import (
    RealData,
    SampleSettings,
    Stage,
    TokenizerSettings,
    WorldSettings,
)
from msa.training.data import RealWorlds, StepDataset, read_jsonl, tokenizer_texts
from msa.training.samples import SampleBuilder

WORDS = 20


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def long_text(i):
    return " ".join([*["before"] * 40, f"answer-{i} indeed", *["behind"] * 40])


@pytest.fixture
def real_folder(tmp_path):
    """Ten short and ten long documents; questions of one and of two hops; some of no use."""
    short = [{"id": f"s{i}", "title": f"S{i}", "text": f"Short {i}."} for i in range(10)]
    long = [{"id": f"l{i}", "title": None, "text": long_text(i)} for i in range(10)]
    questions = [
        {"question": f"Long {i}?", "answers": [f"answer-{i}", "other"], "gold": [f"l{i}"]}
        for i in range(10)
    ]
    questions += [
        {"question": f"Two {i}?", "answers": [f"Short {i}"], "gold": [f"l{i}", f"s{i}"]}
        for i in range(10)
    ]
    questions += [
        {"question": "Unanswered?", "answers": [], "gold": ["s1"]},
        {"question": "Three?", "answers": ["x"], "gold": ["s1", "s2", "s3"]},
        {"question": "Elsewhere?", "answers": ["x"], "gold": ["zz"]},
        {"question": "Not told?", "answers": ["x"], "gold": ["s2"]},
    ]
    write(tmp_path / "qa/corpus.jsonl.gz", [*short, *long])
    write(tmp_path / "qa/questions.train.jsonl.gz", questions)
    return tmp_path / "qa"


def dataset(encoder, worlds=None, seed=3, name="stage", steps=6, **world):
    settings = WorldSettings(**{"documents": 6, "breadth": (0.0, 1.0), **world})
    stage = Stage(
        name=name,
        steps=steps,
        world=settings,
        samples=SampleSettings(name=3, read=2, hop=2, answer=1),
    )
    return StepDataset(stage, SampleBuilder(encoder, 4), worlds or RealWorlds([]), seed)


def flat(step):
    tensors = {name: step[name] for name in ("documents", "lengths", "digits")}
    for i, group in enumerate(step["groups"]):
        tensors |= {f"{i}.{name}": tensor for name, tensor in group.items()}
    return tensors


def equal(a, b):
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_step_i_depends_on_the_seed_the_stage_and_i_alone(encoder, real_folder, share):
    real = RealWorlds([str(real_folder)])
    one, two = (dataset(encoder, real, real=share) for _ in range(2))
    forward = [one[i] for i in range(6)]
    random.seed(1)
    torch.manual_seed(1)
    backward = [two[i] for i in reversed(range(6))][::-1]
    assert all(equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert equal(one[4], forward[4])
    assert not any(equal(forward[0], step) for step in forward[1:])
    assert not equal(dataset(encoder, real, seed=4, real=share)[0], forward[0])
    assert not equal(dataset(encoder, real, name="other", real=share)[0], forward[0])


def test_a_stage_has_as_many_steps_as_it_says(encoder):
    assert len(dataset(encoder, steps=9)) == 9


def test_breadth_goes_from_the_first_number_to_the_last(encoder, monkeypatch):
    seen = []
    from msa.training import data

    def spy(seed, count, *, breadth):
        seen.append(breadth)
        return original(seed, count, breadth=breadth)

    original = data.generate_world
    monkeypatch.setattr(data, "generate_world", spy)
    steps = dataset(encoder, steps=5, breadth=(0.2, 0.6))
    for i in range(5):
        steps[i]
    assert seen == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])


def test_answers_of_real_questions_stand_in_the_cut_document(real_folder):
    real = RealWorlds([str(real_folder)])
    seen = set()
    for seed in range(40):
        world = real.world(random.Random(seed), 9, WORDS)
        documents = {d.key: d for d in world.documents}
        assert len(documents) == len(world.documents) == 9
        for question in world.questions:
            seen.add(question.question)
            assert question.answer in documents[question.gold[-1]].text
            assert set(question.gold) <= documents.keys()
            assert question.hops == len(question.gold)
        assert all(len(d.text.split()) <= WORDS + 1 for d in world.documents)  # title: one word
    assert {q.split()[0] for q in seen} == {"Long", "Two"}
    assert len(seen) == 20


def test_a_short_document_stands_whole_behind_its_title(real_folder):
    world = RealWorlds([str(real_folder)]).world(random.Random(0), 20, WORDS)
    texts = {d.key: d.text for d in world.documents}
    assert texts["s3"] == "S3. Short 3."
    assert not texts["l3"].startswith("None")


def test_a_corpus_smaller_than_a_world_is_taken_whole(real_folder):
    world = RealWorlds([str(real_folder)]).world(random.Random(0), 50, WORDS)
    assert len(world.documents) == 20


def test_questions_never_bring_more_documents_than_a_world_has(tmp_path):
    """Six questions about one document, each with a first document of its own."""
    write(
        tmp_path / "corpus.jsonl.gz",
        [{"id": f"d{i}", "text": f"Text {i}."} for i in range(40)],
    )
    write(
        tmp_path / "questions.train.jsonl.gz",
        [
            {"question": f"Q{i}?", "answers": ["Text"], "gold": [f"d{i}", f"d{30 + i % 5}"]}
            for i in range(30)
        ],
    )
    real = RealWorlds([str(tmp_path)])
    for seed in range(10):
        world = real.world(random.Random(seed), 9, WORDS)
        assert len(world.documents) == 9
        assert world.questions


def test_real_worlds_come_from_every_folder(real_folder, tmp_path):
    write(tmp_path / "b/corpus.jsonl.gz", [{"id": "only", "text": "Blue sky."}])
    write(
        tmp_path / "b/questions.train.jsonl.gz",
        [{"question": "Q?", "answers": ["Blue"], "gold": ["only"]}],
    )
    real = RealWorlds([str(real_folder), str(tmp_path / "b")])
    sizes = {len(real.world(random.Random(s), 6, WORDS).documents) for s in range(20)}
    assert sizes == {1, 6}


@pytest.mark.parametrize("name", ["corpus.jsonl.gz", "questions.train.jsonl.gz"])
def test_a_missing_file_is_one_clear_line(real_folder, name):
    (real_folder / name).unlink()
    with pytest.raises(TrainingError, match=r"cannot be read .*under real_data") as caught:
        RealWorlds([str(real_folder)])
    assert str(real_folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def truncated():
    return gzip.compress(json.dumps([list(range(999))]).encode())[:-20]


@pytest.mark.parametrize(
    "content",
    [
        b"no gzip",
        truncated(),
        gzip.compress(b"{"),
        gzip.compress(b"[1]"),
        gzip.compress(b'{"id": "a"}'),
        gzip.compress(b"\xff"),
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + b"\xff" * 30,
    ],
    ids=["no gzip", "cut short", "no JSON", "no object", "no text", "no UTF-8", "damaged"],
)
def test_a_damaged_file_is_one_clear_line(tmp_path, content):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match="cannot be read") as caught:
        list(read_jsonl(path, "id", "text"))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_set_without_a_usable_question_is_refused(tmp_path):
    write(tmp_path / "corpus.jsonl.gz", [{"id": "a", "text": "A."}])
    write(tmp_path / "questions.train.jsonl.gz", [{"question": "Q?", "answers": []}])
    with pytest.raises(TrainingError, match="no question has answers"):
        RealWorlds([str(tmp_path)])


def test_a_stage_that_wants_real_data_needs_some(encoder):
    with pytest.raises(TrainingError, match=r"'stage' has world.real=0.25, but .* names no"):
        dataset(encoder, real=0.25)


def test_the_tokenizer_sees_worlds_and_so_much_of_every_real_text(tmp_path, real_folder):
    write(tmp_path / "t.jsonl.gz", [{"text": "x" * 40} for _ in range(10)])
    real = RealData(questions=(str(real_folder),), texts=(str(tmp_path / "t.jsonl.gz"),))
    settings = TokenizerSettings(worlds=1, text_characters=80)
    texts = list(tokenizer_texts(settings, real, 0))
    assert texts.count("x" * 40) == 2
    assert "Short 0." in texts
    assert long_text(0) not in texts  # the eighty characters ended with the short ones
    worlds = list(tokenizer_texts(settings, RealData(), 0))
    assert worlds == texts[: len(worlds)]
    assert len(worlds) > 64
    assert worlds != list(tokenizer_texts(settings, RealData(), 1))
