"""The decode loop against the model run from scratch; choosing and drawing of tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from conftest import make_tiny_model
from msa.errors import ModelError
from msa.inference.batch import prompt_batch
from msa.inference.choosing import GUIDED_TOKENS, Sampler, check_logits, choose
from msa.inference.constraints import RoundGrammar, Written
from msa.inference.decoding import (
    Decoder,
    RoundRow,
    TextRow,
    begin_texts,
    feed_pending,
    prefill,
    write_all,
)
from msa.memory.latent import LatentMemory
from msa.model import modeling_msa
from msa.text.prompts import LocalContext

PAD, OPEN, CLOSE, READ, END = 0, 10, 11, 12, 13
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, params=[False, True], ids=["together", "alone"])
def rows_attend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a batch attend together, or each by itself, as in bfloat16 on a CPU."""
    monkeypatch.setattr(modeling_msa, "_is_exact", lambda hidden: request.param)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_tiny_model()


@pytest.fixture(scope="module")
def memory(model: Any) -> LatentMemory:
    torch.manual_seed(0)
    ids = torch.randint(20, 400, (5, 17))
    with torch.no_grad():
        states = model.encode_documents(ids, torch.tensor([17, 9, 8, 3, 12]))
    return LatentMemory(states, 3)


def context(length: int, seed: int) -> LocalContext:
    torch.manual_seed(seed)
    made = LocalContext(prefix_length=2)
    made.extend([20, 21], sees_memory=False)
    made.extend(torch.randint(20, 400, (length,)).tolist(), routes=True)
    return made


def whole(model: Any, memory: Any, made: LocalContext, tokens: list[int]) -> torch.Tensor:
    """Logits [V] behind a context and further tokens, from one forward over all of it."""
    longer = LocalContext(prefix_length=made.prefix_length)
    longer.input_ids = made.input_ids + tokens
    longer.routes = made.routes + [False] * len(tokens)
    longer.sees_memory = made.sees_memory + [True] * len(tokens)
    batch = prompt_batch([longer], model.config.top_k_documents, PAD, CPU)
    return prefill(model, batch, memory).logits[0, -1]


CONTEXTS = [context(9, 0), context(4, 1), context(9, 2)]


@pytest.mark.parametrize("rows", [[0], [0, 2], [0, 1, 2]], ids=["one", "alike", "padded"])
def test_feeding_any_runs_of_tokens_is_one_forward_over_all_of_them(
    model: Any, memory: Any, rows: list[int]
) -> None:
    contexts = [CONTEXTS[row] for row in rows]
    batch = prompt_batch(contexts, model.config.top_k_documents, PAD, CPU)
    decoder = Decoder(model, batch, memory, PAD)
    written: list[list[int]] = [[] for _ in rows]
    for step in ([[5], [6, 7, 8], [9]], [[30, 31], [], [40]], [[50], [51], [52]]):
        decoder.feed([step[i] for i in range(len(rows))])
        for i in range(len(rows)):
            written[i] += step[i]
            if step[i]:
                expected = whole(model, memory, contexts[i], written[i])
                torch.testing.assert_close(decoder.logits[i], expected, atol=1e-4, rtol=1e-4)


def decoder_of(model: Any, memory: Any, contexts: list[LocalContext]) -> Decoder:
    batch = prompt_batch(contexts, model.config.top_k_documents, PAD, CPU)
    return Decoder(model, batch, memory, PAD)


def test_rewinding_leaves_the_prompts_of_the_rows_that_stay(model: Any, memory: Any) -> None:
    decoder = decoder_of(model, memory, CONTEXTS)
    first = decoder.logits
    decoder.feed([[5], [6, 7], []])
    decoder.rewind()
    assert torch.equal(decoder.logits, first)
    decoder = decoder.select([2, 1])
    assert torch.equal(decoder.logits, first[[2, 1]])
    decoder.feed([[8], [9]])
    for row, token, logits in zip((2, 1), (8, 9), decoder.logits, strict=True):
        expected = whole(model, memory, CONTEXTS[row], [token])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_rows_leave_join_and_begin_again_as_if_they_were_alone(model: Any, memory: Any) -> None:
    """Whatever happens to a decoder, the logits of a row are those of its own tokens."""
    rng = random.Random(0)
    contexts = [context(length, seed) for seed, length in enumerate([9, 4, 30, 9, 17, 2, 24, 5])]
    decoders: list[tuple[Decoder, list[int]]] = []
    written: dict[int, list[int]] = {}
    waiting = list(range(len(contexts)))
    for _ in range(60):
        action = rng.choice(["begin", "feed", "feed", "select", "join", "rewind", "rewind all"])
        if action == "begin" and waiting:
            rows, waiting = waiting[:2], waiting[2:]
            some = [contexts[row] for row in rows]
            decoders.append((decoder_of(model, memory, some), rows))
            written |= {row: [] for row in rows}
        if not decoders:
            continue
        at = rng.randrange(len(decoders))
        decoder, rows = decoders[at]
        if action == "feed":
            tokens = [[rng.randrange(20, 400) for _ in range(rng.randrange(3))] for _ in rows]
            if any(tokens):
                decoder.feed(tokens)
            for row, some_tokens, logits in zip(rows, tokens, decoder.logits, strict=True):
                written[row] += some_tokens
                if some_tokens:
                    expected = whole(model, memory, contexts[row], written[row])
                    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        elif action == "select" and len(rows) > 1:
            keep = rng.sample(range(len(rows)), len(rows) - 1)
            waiting += [row for i, row in enumerate(rows) if i not in keep]
            decoders[at] = decoder.select(keep), [rows[i] for i in keep]
        elif action == "join" and len(decoders) > 1:
            other_decoder, others = decoders.pop(at - 1)
            decoder.join(other_decoder)
            rows += others
        elif action.startswith("rewind"):
            some_rows = None if action == "rewind all" else [rng.randrange(len(rows))]
            decoder.rewind(some_rows)
            for i in range(len(rows)) if some_rows is None else some_rows:
                written[rows[i]] = []
                expected = whole(model, memory, contexts[rows[i]], [])
                torch.testing.assert_close(decoder.logits[i], expected, atol=1e-4, rtol=1e-4)
    assert max(len(rows) for _, rows in decoders) > 2


@pytest.mark.parametrize("rows", [[0], [0, 1]], ids=["one", "padded"])
@pytest.mark.parametrize("tokens", [[7], [7, 30, 9]])
@pytest.mark.parametrize("fed", [True, False], ids=["as it is fed", "later"])
def test_the_probability_of_going_on_is_told_without_going_on(
    model: Any, memory: Any, rows: list[int], tokens: list[int], fed: bool
) -> None:
    contexts = [CONTEXTS[row] for row in rows]
    batch = prompt_batch(contexts, model.config.top_k_documents, PAD, CPU)
    decoder = Decoder(model, batch, memory, PAD)
    likely = decoder.feed([[5, 6], [8]][: len(rows)], tokens if fed else ())
    if not fed:
        assert likely == []
        likely = decoder.log_probability(tokens)
    for made, start, value in zip(contexts, ([5, 6], [8]), likely, strict=False):
        expected = sum(
            float(whole(model, memory, made, start + tokens[:i]).log_softmax(-1)[token])
            for i, token in enumerate(tokens)
        )
        assert value == pytest.approx(expected, abs=1e-3)
    for made, start, logits in zip(contexts, ([5, 6], [8]), decoder.logits, strict=False):
        torch.testing.assert_close(logits, whole(model, memory, made, start), atol=1e-4, rtol=1e-4)
    decoder.feed([[50]] * len(rows))  # as if nothing had been asked
    for made, start, logits in zip(contexts, ([5, 6], [8]), decoder.logits, strict=False):
        expected_logits = whole(model, memory, made, [*start, 50])
        torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)


def greedy(count: int) -> list[Sampler]:
    return [Sampler(0.0, 1.0, None) for _ in range(count)]


def test_texts_end_with_their_marks_or_their_budgets_and_know_their_probability(
    model: Any, memory: Any
) -> None:
    def texts(ends: list[list[int]], budgets: list[int]) -> list[TextRow]:
        rows = [TextRow(Sampler(0.0, 1.0, None), ends, budget) for budget in budgets]
        write_all(decoder_of(model, memory, CONTEXTS), rows)
        return rows

    free = texts([], [6, 4, 1])
    assert [len(t.tokens) for t in free] == [6, 4, 1]
    assert not any(t.ended for t in free)
    for made, text in zip(CONTEXTS, free, strict=True):
        total = 0.0
        for i, token in enumerate(text.tokens):
            logits = whole(model, memory, made, text.tokens[:i])
            assert int(logits.argmax()) == token
            total += float(logits.log_softmax(-1)[token])
        assert text.log_probability == pytest.approx(total, abs=1e-3)
    ended = texts([free[0].tokens[1:3]], [6, 4, 1])  # an end mark of two tokens
    assert ended[0].ended
    assert ended[0].tokens == free[0].tokens[:3]
    assert [len(t.tokens) for t in ended[1:]] == [4, 1]
    some = texts([], [0, 4, 0])
    assert [t.tokens for t in some] == [[], free[1].tokens, []]
    assert [t.tokens for t in texts([], [0, 0, 0])] == [[], [], []]


def test_a_text_does_not_begin_with_the_token_that_is_barred(model: Any, memory: Any) -> None:
    def texts(not_first: Sequence[int]) -> list[TextRow]:
        samplers = greedy(len(CONTEXTS))
        rows = [TextRow(sampler, [], 3, not_first) for sampler in samplers]
        write_all(decoder_of(model, memory, CONTEXTS), rows)
        return rows

    free = texts([])
    barred = free[0].tokens[0]
    for made, before, row in zip(CONTEXTS, free, texts([barred]), strict=True):
        logits = whole(model, memory, made, [])
        logits[barred] = -torch.inf
        assert row.tokens[0] == int(logits.argmax()) != barred
        if before.tokens[0] != barred:
            assert row.tokens == before.tokens


def numbers(*some: int) -> dict[int, list[int]]:
    return {n: [OPEN, *(int(d) for d in str(n)), CLOSE] for n in some}


def grammar(*some: int, **options: Any) -> RoundGrammar:
    options = {"max_documents": 2, "may_end": False, **options}
    return RoundGrammar(numbers(*some), [READ], [END], **options)


def rounds(decoder: Decoder, rules: list[RoundGrammar], weight: float = 0.0) -> list[Written]:
    rows = [RoundRow(rule, Sampler(0.0, 1.0, None), weight) for rule in rules]
    write_all(decoder, rows)
    return [row.written for row in rows if row.written is not None]


def scored_by_hand(model: Any, memory: Any, made: LocalContext, rules: RoundGrammar, weight: float):
    """Greedy within the grammar, one forward over everything for every token."""
    writer = rules.begin()
    while legal := writer.legal():
        logits = whole(model, memory, made, writer.tokens)
        writer.push(max(legal, key=lambda t: float(logits[t]) + weight * legal[t]))
    return writer.complete


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_rounds_are_the_likeliest_tokens_within_each_rows_grammar(
    model: Any, memory: Any, weight: float
) -> None:
    prior = {7: 0.1, 17: 0.5, 170: 0.3, 23: 0.1}
    rules = [grammar(7, 17, 170, 23, prior=prior), grammar(170, 173), grammar(5, may_end=True)]
    written = rounds(decoder_of(model, memory, CONTEXTS), rules, weight)
    for made, rule, wrote in zip(CONTEXTS, rules, written, strict=True):
        assert wrote == scored_by_hand(model, memory, made, rule, weight)


def test_what_is_forced_from_beginning_to_end_asks_nothing_of_the_model(
    model: Any, memory: Any
) -> None:
    decoder = decoder_of(model, memory, CONTEXTS[:2])
    decoder.feed = None  # type: ignore[method-assign]
    rules = [grammar(170, max_documents=1), grammar()]
    written = rounds(decoder, rules)
    assert [(w.numbers, w.ended) for w in written] == [((170,), False), ((), True)]


@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_a_shift_says_whether_the_retrieval_ends_and_the_models_own_odds_are_kept(
    model: Any, memory: Any, shift: float
) -> None:
    logits = whole(model, memory, CONTEXTS[0], []).float()
    row = RoundRow(grammar(5, 17, may_end=True), Sampler(0.0, 1.0, None), 0.0, shift)
    write_all(decoder_of(model, memory, CONTEXTS[:1]), [row])
    assert row.written is not None
    ends = bool(logits[END] + shift > logits[OPEN])
    assert row.written.ended == ends
    chosen = float(logits.softmax(0)[END if ends else OPEN])
    odds = math.log(chosen / (1 - chosen))
    assert row.end_log_odds == pytest.approx(odds if ends else -odds, abs=1e-3)


def test_a_round_that_must_read_has_no_odds_of_ending(model: Any, memory: Any) -> None:
    row = RoundRow(grammar(5, 17), Sampler(0.0, 1.0, None), 0.0, 1e4)
    write_all(decoder_of(model, memory, CONTEXTS[:1]), [row])
    assert row.written is not None
    assert row.written.numbers
    assert row.end_log_odds is None


# ---- choosing


def test_illegal_tokens_lose_even_against_legal_ones_that_the_model_holds_impossible() -> None:
    class Fixed:
        logits = torch.full((1, 16), 50.0)

        def feed(self, tokens: Any) -> None:
            pass

    Fixed.logits[0, [5, OPEN]] = -math.inf
    decoder: Any = Fixed()
    (written,) = rounds(decoder, [grammar(5, 6, max_documents=1)])
    assert written.numbers == (6,)
    Fixed.logits[0, 6] = -math.inf
    (written,) = rounds(decoder, [grammar(5, 6, max_documents=1)])
    assert written.numbers == (5,)


def test_draws_follow_the_probabilities_and_stay_within_the_nucleus() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    sampler = Sampler(1.0, 1.0, 0)
    drawn = [choose(logits, [sampler], None, [True])[0][0] for _ in range(2000)]
    shares = [drawn.count(token) / len(drawn) for token in range(4)]
    assert shares == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)
    narrow = Sampler(1.0, 0.7, 0)
    drawn = [choose(logits, [narrow], None, [True])[0][0] for _ in range(500)]
    assert set(drawn) == {0, 1}
    assert drawn.count(0) / len(drawn) == pytest.approx(0.5 / 0.8, abs=0.07)
    cold = Sampler(0.01, 1.0, 0)
    assert {choose(logits, [cold], None, [True])[0][0] for _ in range(50)} == {0}
    token, log_probability = choose(logits, [narrow], None, [True])[0]
    assert log_probability == pytest.approx(float(logits[0, token]))  # the model's own


def test_a_seed_decides_what_is_drawn_and_the_global_generator_only_without_one() -> None:
    def draws(seed: int | None) -> list[float]:
        sampler = Sampler(1.0, 1.0, seed)
        return [sampler.draw() for _ in range(4)]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert draws(1) == draws(1) != draws(2)
    assert torch.equal(before, torch.get_rng_state())
    free = draws(None)
    assert free != draws(None)
    torch.manual_seed(0)
    assert draws(None) == free


def test_a_guide_chooses_among_the_likeliest_tokens_of_its_row() -> None:
    logits = torch.arange(20.0).repeat(3, 1).log_softmax(-1)
    asked: list[int] = []

    def guide(token: int) -> float:
        asked.append(token)
        return -5.5 if token > 14 else 0.0

    guides = [None, guide, None]
    samplers = [*greedy(2), Sampler(1.0, 1.0, 0)]
    chosen = choose(logits, samplers, None, [True] * 3, guides)
    assert [token for token, _ in chosen[:2]] == [19, 14]
    assert [value for _, value in chosen[:2]] == pytest.approx(logits[0, [19, 14]].tolist())
    assert asked == [19, 18, 17, 16, 15, 14]  # none that cannot win
    assert chosen[2] == choose(logits[:1], [Sampler(1.0, 1.0, 0)], None, [True])[0]
    barred = logits.clone()
    barred[:, 14] = -math.inf
    chosen = choose(logits, samplers, barred, [True] * 3, guides)
    assert [token for token, _ in chosen[:2]] == [19, 19]
    few = torch.zeros(1, 3)
    assert choose(few, greedy(1), None, [True], [lambda token: -abs(token - 2)])[0][0] == 2


def test_a_preference_sees_the_text_with_every_token_that_may_follow(
    model: Any, memory: Any
) -> None:
    seen: list[list[int]] = []

    def prefer(tokens: Sequence[int]) -> float:
        seen.append(list(tokens))
        return 1000.0 * (tokens[-1] % 2 - 1)

    rows = [TextRow(s, [], 3, (), p) for s, p in zip(greedy(2), (prefer, None), strict=True)]
    write_all(decoder_of(model, memory, CONTEXTS[:2]), rows)
    alone = [TextRow(greedy(1)[0], [], 3)]
    write_all(decoder_of(model, memory, CONTEXTS[1:2]), alone)
    assert rows[1].tokens == alone[0].tokens  # another row's preference is not its own
    assert 3 <= len(seen) <= 3 * GUIDED_TOKENS
    assert seen[-1][:2] == rows[0].tokens[:2]
    likely = {tokens[0] for tokens in seen if len(tokens) == 1}
    assert rows[0].tokens[0] % 2 == any(token % 2 for token in likely)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_of_texts_that_begin_differently_the_best_is_written_to_its_end(
    model: Any, memory: Any, count: int
) -> None:
    def prefer(tokens: Sequence[int]) -> float:
        return -0.5 * sum(token % 2 for token in tokens)

    barred = [int(decoder_of(model, memory, CONTEXTS[:1]).logits[0].argmax())]

    def row() -> TextRow:
        return TextRow(greedy(1)[0], [], 4, barred, prefer)

    decoder = decoder_of(model, memory, CONTEXTS[:1])
    texts = begin_texts(decoder.logits[0], row(), count)
    firsts = [text.tokens[0] for text in texts]
    assert len(set(firsts)) == len(firsts) == min(count, GUIDED_TOKENS)
    assert not set(firsts) & set(barred)
    several = decoder.select([0] * len(texts))
    feed_pending(several, texts)
    write_all(several, texts)
    best = max(texts, key=lambda text: text.score)
    alone = []
    for first in firsts:
        text = row()
        decoder.rewind()
        text.take(first, float(decoder.logits[0].float().log_softmax(-1)[first]))
        feed_pending(decoder, [text])
        write_all(decoder, [text])
        alone.append(text)
    wanted = max(alone, key=lambda text: text.log_probability + prefer(text.tokens))
    assert best.tokens == wanted.tokens
    assert best.score == pytest.approx(wanted.log_probability + prefer(wanted.tokens), abs=1e-4)
    assert all(text.score <= text.log_probability for text in texts)
    for text in texts:  # what was dropped could not win
        assert text.score > -math.inf or text.log_probability <= best.score
    greedily = row()
    decoder.rewind()
    write_all(decoder, [greedily])
    assert firsts[0] == greedily.tokens[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_refused(bad: float) -> None:
    logits = torch.zeros(2, 16)
    check_logits(logits)
    logits[1, 3] = bad
    with pytest.raises(ModelError, match="not finite"):
        check_logits(logits)
    with pytest.raises(ModelError, match="not finite"):
        choose(logits, greedy(2), None, [True, True])
    with pytest.raises(ModelError, match="not finite"):
        begin_texts(logits[1], TextRow(greedy(1)[0], [], 4), 3)
    choose(logits, greedy(2), None, [True, False])  # a row that has ended may hold anything
    with pytest.raises(ModelError, match="not finite"):
        check_logits(torch.full((2, 4), -math.inf))
    logits[1, 3] = -math.inf  # one impossible token
    check_logits(logits)
