"""Legal tokens of a round, for kind and unkind tokenizers, with and without a prior."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from msa.errors import ModelError
from msa.inference.constraints import RoundGrammar, RoundWriter, Written

# A tokenizer that splits digits: 0-9 are the digits, "[" is 10, "]" is 11.
OPEN, CLOSE, READ, END, PAD = 10, 11, 12, 13, 14


def tokens(number: int) -> list[int]:
    return [OPEN, *(int(d) for d in str(number)), CLOSE]


def grammar(
    numbers: list[int],
    *,
    max_documents: int = 2,
    min_documents: int = 1,
    may_end: bool = False,
    prior: dict[int, float] | None = None,
) -> RoundGrammar:
    return RoundGrammar(
        {n: tokens(n) for n in numbers},
        [READ],
        [END],
        max_documents=max_documents,
        min_documents=min_documents,
        may_end=may_end,
        prior=prior,
    )


def write(rules: RoundGrammar, written: Sequence[int]) -> RoundWriter:
    writer = rules.begin()
    for token in written:
        writer.push(token)
    return writer


def legal(rules: RoundGrammar, written: Sequence[int] = ()) -> dict[int, float]:
    return write(rules, written).legal()


def language(rules: RoundGrammar, limit: int = 30) -> dict[tuple[int, ...], Written]:
    """Every complete round that the grammar allows, by trying all legal tokens."""
    found: dict[tuple[int, ...], Written] = {}
    open_rounds: list[tuple[int, ...]] = [()]
    while open_rounds:
        written = open_rounds.pop()
        assert len(written) < limit
        writer = write(rules, written)
        parsed = writer.complete
        assert (parsed is not None) == (not writer.legal())  # complete, or something may follow
        if parsed is not None:
            found[written] = parsed
        open_rounds += [(*written, token) for token in writer.legal()]
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
    assert set(legal(grammar([5]))) == {OPEN}
    ending = grammar([5, 6], may_end=True)
    assert set(legal(ending)) == {OPEN, END}
    assert END not in legal(ending, tokens(5))
    assert write(ending, [END]).complete == Written((), True, 1)


def test_a_number_is_not_written_twice_and_the_last_one_must_be_followed_by_the_end() -> None:
    rules = grammar([5, 57], max_documents=5)
    assert set(legal(rules, [*tokens(5), OPEN, 5])) == {7}  # 5 is read: only 57 is left
    assert set(legal(rules, [*tokens(5), *tokens(57)])) == {READ}
    assert set(legal(grammar([5, 57], max_documents=1), tokens(5))) == {READ}


def test_without_documents_only_the_end_is_legal() -> None:
    rules = grammar([])
    assert set(legal(rules)) == {END}
    assert language(rules) == {(END,): Written((), True, 1)}


def test_nothing_follows_a_complete_round_and_nothing_illegal_is_written() -> None:
    writer = write(grammar([5], may_end=True), [*tokens(5), READ])
    assert writer.complete == Written((5,), False, 4)
    assert writer.legal() == {}
    assert writer.push_forced() == []
    with pytest.raises(ValueError, match="not legal"):
        writer.push(READ)
    with pytest.raises(ValueError, match="not legal"):
        write(grammar([5]), [OPEN, 7])


@pytest.mark.parametrize(("numbers", "least"), [([1, 17, 170], 2), ([1, 17, 170], 3), ([4], 3)])
def test_a_round_names_as_many_documents_as_it_must_if_there_are_so_many(
    numbers: list[int], least: int
) -> None:
    rules = grammar(numbers, max_documents=3, min_documents=least, may_end=True)
    rounds = language(rules).values()
    lengths = {len(w.numbers) for w in rounds if not w.ended}
    assert lengths == set(range(min(least, len(numbers)), min(3, len(numbers)) + 1))
    assert any(w.ended for w in rounds)  # the retrieval may end all the same


def test_tokens_that_alone_are_legal_are_written_in_one_go() -> None:
    writer = grammar([170, 173], max_documents=1).begin()
    assert writer.push_forced() == [OPEN, 1, 7]
    writer.push(0)
    assert writer.push_forced() == [CLOSE, READ]
    assert writer.complete == Written((170,), False, 6)
    assert grammar([]).begin().push_forced() == [END]


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
        writer = rules.begin()
        while (parsed := writer.complete) is None:
            writer.push(rng.choice(sorted(writer.legal())))
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
            total += legal(rules, written)[token]
            written.append(token)
        assert math.exp(total) == pytest.approx(own / 0.5)
    assert legal(rules, tokens(1)) == {OPEN: 0.0, READ: 0.0}


def test_the_best_document_wins_against_many_poor_ones_that_share_a_digit() -> None:
    crowd = list(range(20, 30))
    rules = grammar([1, *crowd], prior={1: 0.3, **dict.fromkeys(crowd, 0.07)})
    choices = legal(rules, [OPEN])
    assert choices[1] == 0.0
    assert math.exp(choices[2]) == pytest.approx(0.07 / 0.3)


def test_documents_that_are_written_count_no_more() -> None:
    rules = grammar([1, 2, 3], prior={1: 0.8, 2: 0.15, 3: 0.05})
    choices = legal(rules, [*tokens(1), OPEN])
    assert choices[2] == 0.0
    assert math.exp(choices[3]) == pytest.approx(1 / 3)


def test_a_prior_that_underflows_leaves_its_document_possible() -> None:
    rules = grammar([1, 2], prior={1: 1.0, 2: 0.0})
    assert set(legal(rules, [OPEN])) == {1, 2}
    assert math.isfinite(legal(rules, [OPEN])[2])


def end_after(named: list[int], prior: dict[int, float] | None) -> float:
    """What the prior has against the end mark once these were named; 0 is nothing."""
    rules = grammar(sorted(prior or range(1, 9)), max_documents=8, prior=prior)
    return legal(rules, [token for number in named for token in tokens(number)])[READ]


def test_of_several_documents_one_that_is_as_good_speaks_against_the_end() -> None:
    alike = {1: 0.24, 2: 0.23, 3: 0.22, 4: 0.21, 5: 1e-6, 6: 1e-7}
    against = [end_after([1, 2, 3, 4][:count], alike) for count in (2, 3, 4)]
    assert max(against[:2]) < -4  # others stand where the named ones do
    assert against[2] > -0.2  # the rest is far behind


def test_one_document_or_several_is_for_the_model_to_say() -> None:
    assert end_after([1], {1: 0.5, 2: 0.5, 3: 1e-9}) == 0.0


def test_of_several_documents_poor_ones_do_not_call_for_more_of_their_kind() -> None:
    poor = {1: 1.0, 2: 1e-6, 3: 1e-6, 4: 1e-6, 5: 5e-7}
    assert end_after([1, 2], poor) > -0.2


def test_a_prior_that_tells_nothing_apart_says_nothing_of_the_end() -> None:
    assert end_after([1, 2], None) == 0.0
    assert end_after([1, 2], dict.fromkeys(range(1, 9), 0.125)) == 0.0


def test_the_end_stays_possible_whatever_the_prior_says_against_it() -> None:
    crowd = dict.fromkeys(range(1, 8), 1.0) | {8: 0.0}
    assert -20 < end_after([1, 2], crowd) < -5


def test_a_tokenizer_that_drops_numbers_is_refused() -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        RoundGrammar({1: []}, [READ], [END], max_documents=1, may_end=False)
    with pytest.raises(ModelError, match="tokenizer"):
        RoundGrammar({1: [1]}, [], [END], max_documents=1, may_end=False)
