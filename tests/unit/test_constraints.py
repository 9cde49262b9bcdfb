"""Legal tokens of a round, for kind and unkind tokenizers, with and without a prior."""

from __future__ import annotations

import math
import random

import pytest
import torch

from msa.errors import ModelError
from msa.inference.constraints import (
    CheckLogits,
    Grammars,
    RetrievalConstraint,
    RoundComplete,
    RoundGrammar,
    Written,
)

# A tokenizer that splits digits: 0-9 are the digits, "[" is 10, "]" is 11.
OPEN, CLOSE, READ, END, PAD = 10, 11, 12, 13, 14
VOCABULARY = 16


def tokens(number: int) -> list[int]:
    return [OPEN, *(int(d) for d in str(number)), CLOSE]


def grammar(
    numbers: list[int],
    *,
    max_documents: int = 2,
    may_end: bool = False,
    prior: dict[int, float] | None = None,
) -> RoundGrammar:
    return RoundGrammar(
        {n: tokens(n) for n in numbers},
        [READ],
        [END],
        max_documents=max_documents,
        may_end=may_end,
        prior=prior,
    )


def language(rules: RoundGrammar, limit: int = 30) -> dict[tuple[int, ...], Written]:
    """Every complete round that the grammar allows, by trying all legal tokens."""
    found: dict[tuple[int, ...], Written] = {}
    open_rounds: list[tuple[int, ...]] = [()]
    while open_rounds:
        written = open_rounds.pop()
        assert len(written) < limit
        legal = rules.legal(written)
        parsed = rules.parse(written)
        assert (parsed is not None) == (not legal)  # complete, or something may follow
        if parsed is not None:
            found[written] = parsed
        open_rounds += [(*written, token) for token in legal]
    return found


def test_the_language_is_every_choice_of_routed_numbers_in_every_order() -> None:
    rules = grammar([1, 17, 170], max_documents=2)
    rounds = language(rules)
    named = {w.numbers for w in rounds.values()}
    assert named == {
        (1,), (17,), (170,), (1, 17), (1, 170), (17, 1), (17, 170), (170, 1), (170, 17)
    }  # fmt: skip
    assert len(rounds) == 9
    assert not any(w.ended for w in rounds.values())
    for written, parsed in rounds.items():
        assert list(written) == [t for n in parsed.numbers for t in tokens(n)] + [READ]
        assert parsed.length == len(written)


def test_the_end_of_retrieval_stands_only_at_the_start_and_only_when_allowed() -> None:
    assert set(grammar([5]).legal([])) == {OPEN}
    ending = grammar([5, 6], may_end=True)
    assert set(ending.legal([])) == {OPEN, END}
    assert END not in ending.legal(tokens(5))
    assert ending.parse([END]) == Written((), True, 1)


def test_a_number_is_not_written_twice_and_the_last_one_must_be_followed_by_the_end() -> None:
    rules = grammar([5, 57], max_documents=5)
    assert set(rules.legal([*tokens(5), OPEN, 5])) == {7}  # 5 is read: only 57 is left
    assert set(rules.legal([*tokens(5), *tokens(57)])) == {READ}
    assert set(grammar([5, 57], max_documents=1).legal(tokens(5))) == {READ}


def test_without_documents_only_the_end_is_legal() -> None:
    rules = grammar([])
    assert set(rules.legal([])) == {END}
    assert language(rules) == {(END,): Written((), True, 1)}


def test_what_stands_behind_a_complete_round_does_not_count() -> None:
    rules = grammar([5], may_end=True)
    assert rules.parse([*tokens(5), READ, PAD, PAD]) == Written((5,), False, 4)
    assert rules.legal([*tokens(5), READ, PAD]) == {}


def test_marks_and_numbers_of_several_tokens_with_common_beginnings() -> None:
    """An unkind tokenizer: "#1" begins "#12", both marks begin as a number does."""
    rules = RoundGrammar(
        {1: [20, 1], 12: [20, 1, 2], 2: [20, 2]},
        [20, 9, 9],
        [20, 1, 8],
        max_documents=2,
        may_end=True,
    )
    rounds = language(rules)
    by_tokens = {w: p.numbers for w, p in rounds.items()}
    assert by_tokens[(20, 1, 8)] == ()
    assert rounds[(20, 1, 8)].ended
    assert by_tokens[(20, 1, 2, 20, 1, 20, 9, 9)] == (12, 1)
    assert by_tokens[(20, 1, 20, 1, 2, 20, 9, 9)] == (1, 12)
    assert len(rounds) == 1 + 3 + 6


def test_random_walks_always_end_in_a_legal_round() -> None:
    rng = random.Random(0)
    for _ in range(50):
        numbers = rng.sample(range(1, 3000), rng.randint(1, 20))
        rules = grammar(numbers, max_documents=rng.randint(1, 4), may_end=rng.random() < 0.5)
        written: list[int] = []
        while (parsed := rules.parse(written)) is None:
            written.append(rng.choice(sorted(rules.legal(written))))
        assert set(parsed.numbers) <= set(numbers)
        assert len(set(parsed.numbers)) == len(parsed.numbers)
        assert parsed.ended == (not parsed.numbers)


def test_the_prior_of_a_document_is_what_its_number_adds_up_to() -> None:
    prior = {1: 0.5, 17: 0.25, 170: 0.125, 23: 0.125}
    rules = grammar([1, 17, 170, 23], prior=prior)
    for number, own in prior.items():
        total = 0.0
        written: list[int] = []
        for token in tokens(number):
            total += rules.legal(written)[token]
            written.append(token)
        assert math.exp(total) == pytest.approx(own / 0.5)
    assert rules.legal(tokens(1)) == {OPEN: 0.0, READ: 0.0}


def test_the_best_document_wins_against_many_poor_ones_that_share_a_digit() -> None:
    crowd = list(range(20, 30))
    rules = grammar([1, *crowd], prior={1: 0.3, **dict.fromkeys(crowd, 0.07)})
    legal = rules.legal([OPEN])
    assert legal[1] == 0.0
    assert math.exp(legal[2]) == pytest.approx(0.07 / 0.3)


def test_documents_that_are_written_count_no_more() -> None:
    rules = grammar([1, 2, 3], prior={1: 0.8, 2: 0.15, 3: 0.05})
    legal = rules.legal([*tokens(1), OPEN])
    assert legal[2] == 0.0
    assert math.exp(legal[3]) == pytest.approx(1 / 3)


def test_a_prior_that_underflows_leaves_its_document_possible() -> None:
    rules = grammar([1, 2], prior={1: 1.0, 2: 0.0})
    assert set(rules.legal([OPEN])) == {1, 2}
    assert math.isfinite(rules.legal([OPEN])[2])


def test_a_batch_is_constrained_row_by_row_behind_its_padded_prompt() -> None:
    grammars = Grammars(lambda: [grammar([5]), grammar([67], may_end=True)])
    constraint = RetrievalConstraint(grammars, prompt_length=3, pad_token=PAD)
    complete = RoundComplete(grammars, prompt_length=3)
    ids = torch.tensor([[PAD, 1, 2], [3, 1, 2]])
    scores = torch.zeros(2, VOCABULARY)
    first = constraint(ids, scores)
    assert [set(torch.isfinite(row).nonzero().flatten().tolist()) for row in first] == [
        {OPEN},
        {OPEN, END},
    ]
    ids = torch.cat([ids, torch.tensor([[OPEN, 5], [END, PAD]])], dim=1)
    second = constraint(ids, scores)
    assert second.argmax(dim=-1).tolist() == [CLOSE, PAD]
    assert complete(ids, None).tolist() == [False, True]


def test_weight_zero_leaves_the_models_own_probabilities() -> None:
    prior = {1: 0.99, 2: 0.01}
    scores = torch.randn(1, VOCABULARY)
    ids = torch.tensor([[OPEN]])
    for weight in (0.0, 1.0, 3.0):
        grammars = Grammars(lambda: [grammar([1, 2], prior=prior)])
        out = RetrievalConstraint(grammars, 0, PAD, weight)(ids, scores)[0]
        expected = scores[0, 1] - scores[0, 2] + weight * math.log(99)
        torch.testing.assert_close(out[1] - out[2], expected)


def test_illegal_tokens_lose_even_against_legal_ones_that_the_model_holds_impossible() -> None:
    scores = torch.full((1, VOCABULARY), 50.0)
    scores[0, OPEN] = -math.inf
    out = RetrievalConstraint(Grammars(lambda: [grammar([5])]), 0, PAD)(
        torch.empty(1, 0, dtype=torch.long), scores
    )
    assert int(out.argmax()) == OPEN
    assert torch.isfinite(torch.softmax(out, -1)).all()


def test_grammars_are_made_once_and_late() -> None:
    calls: list[int] = []

    def make() -> list[RoundGrammar]:
        calls.append(1)
        return [grammar([1])]

    grammars = Grammars(make)
    assert calls == []
    assert grammars.rows is grammars.rows
    assert calls == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_refused(bad: float) -> None:
    scores = torch.zeros(2, VOCABULARY)
    scores[1, 3] = bad
    ids = torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ModelError, match="not finite"):
        CheckLogits()(ids, scores)
    with pytest.raises(ModelError, match="not finite"):
        RetrievalConstraint(Grammars(list), 1, PAD)(ids, scores)
    with pytest.raises(ModelError, match="not finite"):
        CheckLogits()(ids, torch.full((2, 4), -math.inf))


def test_a_tokenizer_that_drops_numbers_is_refused() -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        RoundGrammar({1: []}, [READ], [END], max_documents=1, may_end=False)
    with pytest.raises(ModelError, match="tokenizer"):
        RoundGrammar({1: [1]}, [], [END], max_documents=1, may_end=False)
