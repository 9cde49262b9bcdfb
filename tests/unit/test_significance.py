"""Differences between systems, and whether they are more than chance."""

from __future__ import annotations

import random

import pytest

from msa.errors import InputError
from msa.evaluation.significance import degradation, false_discovery, mean_of_means, paired


def scores(values):
    return {f"q{i}": float(value) for i, value in enumerate(values)}


def test_few_differences_are_gone_through_exactly():
    found = paired(scores([1] * 5 + [0]), scores([0] * 6))
    assert (found.better, found.worse, found.questions) == (5, 0, 6)
    assert found.p == pytest.approx(2 / 2**5)  # only all heads and all tails are as far
    assert found.sign_p == pytest.approx(2 / 2**5)
    assert found.by.mean == pytest.approx(5 / 6)


def test_drawn_flips_agree_with_the_sign_test_where_differences_are_of_one_size():
    found = paired(scores([1] * 30 + [0] * 10), scores([0] * 30 + [1] * 10))
    assert found.sign_p == pytest.approx(0.00222, abs=1e-5)
    assert found.p == pytest.approx(found.sign_p, abs=0.0015)
    assert found.by.low > 0


def test_systems_that_agree_differ_by_chance_only():
    found = paired(scores([1, 0, 1]), scores([1, 0, 1]))
    assert (found.p, found.sign_p, found.by.mean) == (1.0, 1.0, 0.0)


def test_only_questions_of_both_count_and_none_is_an_error():
    assert paired({"a": 1.0, "b": 0.0}, {"a": 0.0, "c": 1.0}).questions == 1
    with pytest.raises(InputError, match="share no question"):
        paired({"a": 1.0}, {"b": 1.0})


def test_one_seed_gives_one_result():
    draw = random.Random(3)
    one, other = (scores([draw.random() for _ in range(50)]) for _ in range(2))
    assert paired(one, other, seed=4) == paired(one, other, seed=4)


def test_many_p_values_are_adjusted():
    assert false_discovery([0.01, 0.04, 0.03, 0.5]) == pytest.approx(
        [0.04, 0.16 / 3, 0.16 / 3, 0.5]
    )
    assert false_discovery([]) == []


def test_groups_weigh_the_same():
    found = mean_of_means([[1.0] * 10, [0.0] * 1000])
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


def test_degradation_is_what_the_first_score_has_lost():
    one, other = scores([1, 1, 1, 1]), scores([1, 1, 1, 0])
    found = degradation([one], [other])
    assert found.mean == pytest.approx(25)
    assert found.low < 25 < found.high
    assert degradation([one], [one]).high == 0  # the same questions are resampled together
    assert degradation([scores([0, 0])], [other]) is None
