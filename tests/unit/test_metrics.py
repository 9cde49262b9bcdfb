from __future__ import annotations

import pytest

from msa.evaluation.metrics import (
    all_within,
    bootstrap,
    exact_match,
    mean,
    normalize_answer,
    recall,
    recall_at,
    token_f1,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel-Tower.", "eiffeltower"),
        ("a cat, an owl; the end", "cat owl end"),
        ("another theme", "another theme"),  # articles are whole words
        ("  \t\n", ""),
        ("the", ""),
        ("Ünïcode’s", "ünïcode’s"),  # only ASCII signs are dropped, as SQuAD does
    ],
)
def test_answers_are_normalized_as_squad_does(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("answer", "accepted", "expected"),
    [
        ("Rome", ["Rome"], 1.0),
        ("the rome!", ["Rome"], 1.0),
        ("Rome, Italy", ["Rome"], 0.0),
        ("Oslo", ["Rome", "oslo"], 1.0),
        ("", ["Rome"], 0.0),
        ("Rome", [], 0.0),
    ],
)
def test_exact_match_wants_one_accepted_answer(answer, accepted, expected):
    assert exact_match(answer, accepted) == expected


@pytest.mark.parametrize(
    ("answer", "accepted", "expected"),
    [
        ("Rome", ["Rome"], 1.0),
        ("Rome Italy", ["Rome"], 2 / 3),
        ("the city of Rome", ["Rome in Italy"], 1 / 3),
        ("Rome Rome", ["Rome"], 2 / 3),  # a word counts as often as it stands in both
        ("Oslo", ["Rome"], 0.0),
        ("Rome Italy", ["Oslo", "Rome Italy Europe"], 0.8),
        ("", ["Rome"], 0.0),
        ("", ["the"], 1.0),
        ("Rome", [], 0.0),
    ],
)
def test_f1_is_the_best_over_the_accepted_answers(answer, accepted, expected):
    assert token_f1(answer, accepted) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("found", "gold", "expected"),
    [
        (["a", "b"], ["a"], 1.0),
        (["a", "a"], ["a", "b"], 0.5),
        ([], ["a"], 0.0),
        (["a"], [], 0.0),
    ],
)
def test_recall_is_the_share_of_gold_found(found, gold, expected):
    assert recall(found, gold) == expected


def test_mean_of_nothing_is_zero():
    assert mean([]) == 0.0
    assert mean([1.0, 2.0, 6.0]) == 3.0


@pytest.mark.parametrize(
    ("ranks", "k", "share", "whole"),
    [
        ([0], 1, 1.0, 1.0),
        ([1], 1, 0.0, 0.0),
        ([4], 5, 1.0, 1.0),
        ([0, 5], 5, 0.5, 0.0),
        ([0, 4], 5, 1.0, 1.0),
        ([], 5, 0.0, 0.0),
    ],
)
def test_of_several_gold_documents_all_must_be_within_k(ranks, k, share, whole):
    assert recall_at(ranks, k) == share
    assert all_within(ranks, k) == whole


def test_the_bootstrap_interval_holds_the_mean_and_repeats_with_its_seed():
    values = [0.0, 1.0] * 50
    found = bootstrap(values, seed=3)
    assert found.mean == 0.5
    assert 0.35 < found.low < 0.45
    assert 0.55 < found.high < 0.65
    assert bootstrap(values, seed=3) == found
    assert bootstrap([0.7] * 9).low == pytest.approx(0.7)


def test_more_questions_narrow_the_interval():
    few, many = bootstrap([0.0, 1.0] * 10), bootstrap([0.0, 1.0] * 1000)
    assert many.high - many.low < (few.high - few.low) / 5
