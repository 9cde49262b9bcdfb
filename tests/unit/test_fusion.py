"""The fused ranking: what every layer and the words say, as one list."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa.inference.fusion import NOISE_RANK, close_to_best, fuse, lead, rank_judged

candidates = st.dictionaries(
    st.integers(0, 5),
    st.lists(
        st.tuples(st.integers(0, 20), st.floats(-1, 1)), unique_by=lambda pair: pair[0], max_size=6
    ),
    max_size=4,
)
words = st.dictionaries(st.integers(0, 25), st.floats(0, 1), max_size=5)


@settings(deadline=None)
@given(candidates, words, st.floats(0.01, 2), st.floats(0, 3))
def test_every_candidate_is_ranked_once_and_the_priors_are_a_distribution(
    layers: dict[int, list[tuple[int, float]]],
    lexical: dict[int, float],
    temperature: float,
    weight: float,
) -> None:
    fused = fuse(layers, temperature=temperature, lexical=lexical, lexical_weight=weight)
    everything = {d for found in layers.values() for d, _ in found}
    if weight > 0:
        everything |= set(lexical)
    assert set(fused) == everything
    scores = [f.score for f in fused.values()]
    assert scores == sorted(scores, reverse=True)
    if fused:
        assert sum(f.prior for f in fused.values()) == pytest.approx(1)
    for document, f in fused.items():
        assert f.layers == tuple(
            sorted(i for i, found in layers.items() if document in dict(found))
        )


def test_the_score_is_the_mean_over_layers_with_the_lowest_score_where_one_is_missing() -> None:
    layers = {2: [(7, 0.5), (8, 0.3)], 3: [(8, 0.9), (9, 0.1)], 4: []}
    fused = fuse(layers, temperature=0.1)
    assert {d: f.score for d, f in fused.items()} == pytest.approx(
        {8: (0.3 + 0.9) / 2, 7: (0.5 + 0.1) / 2, 9: (0.3 + 0.1) / 2}
    )
    assert [(d, f.layers) for d, f in fused.items()] == [(8, (2, 3)), (7, (2,)), (9, (3,))]
    assert fused[7].prior / fused[9].prior == pytest.approx(math.exp((0.3 - 0.2) / 0.1))


def test_layers_have_their_weights_and_none_without_a_name() -> None:
    layers = {2: [(7, 0.5), (8, 0.3)], 3: [(8, 0.9), (7, 0.1)], 6: [(5, 9.0)]}
    fused = fuse(layers, temperature=0.1, layer_weights={2: 3.0, 3: 0.5})
    assert fused[7].score == pytest.approx(3 * 0.5 + 0.5 * 0.1)
    assert fused[5].score == pytest.approx(3 * 0.3 + 0.5 * 0.1)  # a candidate all the same
    assert fused[5].layers == (6,)


def test_words_add_candidates_and_their_score() -> None:
    layers = {2: [(7, 0.5), (8, 0.3)]}
    fused = fuse(layers, temperature=0.1, lexical={8: 0.25, 9: 1.0}, lexical_weight=0.4)
    assert {d: f.score for d, f in fused.items()} == pytest.approx(
        {7: 0.5, 8: 0.3 + 0.4 * 0.25, 9: 0.3 + 0.4}
    )
    assert [(d, f.layers, f.lexical) for d, f in fused.items()] == [
        (9, (), 1.0),
        (7, (2,), None),
        (8, (2,), 0.25),
    ]
    off = fuse(layers, temperature=0.1, lexical={9: 1.0}, lexical_weight=0.0)
    assert list(off) == [7, 8]
    assert list(fuse({}, temperature=0.1, lexical={9: 0.5}, lexical_weight=1.0)) == [9]


def test_the_best_unread_document_leads_by_what_it_has_more_than_the_eighth() -> None:
    fused = fuse({2: [(d, 1.0 - d / 100) for d in range(20)]}, temperature=0.1)
    assert lead(fused, ()) == pytest.approx((NOISE_RANK - 1) / 100)
    assert lead(fused, {0, 1, 5}) == pytest.approx((9 + 1 - 2) / 100)  # 2 3 4 6 7 8 9 10
    assert lead(fused, set(range(17))) == pytest.approx(0.02)
    assert lead(fused, set(range(19))) == lead(fused, set(range(20))) == lead({}, ()) == 0


def test_equal_scores_are_ordered_by_document() -> None:
    assert list(fuse({0: [(9, 0.1), (4, 0.1), (6, 0.1)]}, temperature=0.1)) == [4, 6, 9]
    assert fuse({}, temperature=0.1) == {}


def test_what_was_tried_loses_what_it_is_behind_the_best_of_it() -> None:
    fused = fuse({2: [(7, 0.9), (8, 0.8), (9, 0.7), (5, 0.1)]}, temperature=0.1)
    tried = rank_judged(fused, {7: 0.001, 8: 0.5, 9: 0.4}, weight=0.2, temperature=0.1)
    assert [(d, f.judged) for d, f in tried.items()] == [(8, 0.5), (9, 0.4), (5, None), (7, 0.001)]
    assert {d: f.score for d, f in tried.items()} == pytest.approx(
        {
            8: 0.8,
            9: 0.7 + 0.2 * math.log(0.8),
            5: 0.1,
            7: 0.9 + 0.2 * math.log(0.002),
        }
    )
    assert rank_judged(fused, {7: 0.0, 8: 1.0}, weight=1.0, temperature=0.1)[7].score > -100
    assert sum(f.prior for f in tried.values()) == pytest.approx(1)
    assert rank_judged(fused, {}, weight=0.1, temperature=0.1) == fused
    assert rank_judged({}, {}, weight=0.1, temperature=0.1) == {}


def test_only_documents_close_to_the_best_are_worth_a_trial() -> None:
    fused = fuse({2: [(7, 0.9), (8, 0.85), (9, 0.84), (5, 0.1)]}, temperature=0.1)
    assert close_to_best(fused, 0.1, 4) == [7, 8, 9]
    assert close_to_best(fused, 0.1, 2) == [7, 8]
    assert close_to_best(fused, 0.01, 4) == []
    assert close_to_best({}, 1.0, 4) == []
