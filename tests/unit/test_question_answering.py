from __future__ import annotations

import json

import pytest

from msa.errors import InputError
from msa.evaluation.question_answering import ask_all, score, world_questions
from msa.evaluation.question_sets import Question
from msa.synthetic_worlds import generate_world
from msa.types import Answer, Citation, Round, RoutedDocument, Usage

ONE = Question("Where was Ada born?", ("Rome", "Roma"), ("ada",))
TWO = Question("Where does Ada's son paint?", ("Oslo",), ("ada", "bob"))


def answer(question, text, rounds, read):
    """`rounds`: per round, layer -> ids routed to; `read`: ids in reading order."""
    citations = tuple(Citation(i, n, None, "", 1) for n, i in enumerate(read))
    made = tuple(
        Round(
            index,
            {layer: tuple(RoutedDocument(i, 0, 0.5) for i in ids) for layer, ids in one.items()},
            (),
        )
        for index, one in enumerate(rounds, 1)
    )
    return Answer(question.text, text, citations, made, Usage(1, 1, 0.0, 9.0), "answered")


def test_a_right_answer_scores_one_everywhere():
    good = answer(TWO, "Oslo.", [{2: ["x"], 3: ["ada"]}, {2: ["bob"], 3: []}], ["ada", "bob"])
    figures = score([TWO], [good], 0.25).as_dict()
    assert figures.pop("questions") == 1
    assert figures.pop("seconds_per_question") == 0.25
    assert set(figures.values()) == {1.0}


@pytest.mark.parametrize(
    ("rounds", "read", "expected"),
    [
        # routed, routed_all, named, named_all
        ([{2: ["x"]}, {2: ["ada", "bob"]}], ["ada", "bob"], (0, 1, 1, 1)),  # first one too late
        ([{2: ["ada"]}, {2: ["x"]}], ["ada"], (1, 0, 1, 0)),
        ([{2: ["ada", "bob"]}], ["bob", "ada"], (1, 1, 0, 1)),  # read in the wrong order
        ([{2: ["ada", "bob"]}], ["x", "ada", "bob"], (1, 1, 0, 1)),
        ([{2: ["bob"]}], [], (0, 0, 0, 0)),
        ([], [], (0, 0, 0, 0)),
    ],
)
def test_routing_and_naming_are_scored_by_round_and_order(rounds, read, expected):
    figures = score([TWO], [answer(TWO, "?", rounds, read)])
    assert (figures.routed, figures.routed_all, figures.named, figures.named_all) == expected


def test_figures_are_means_over_the_questions():
    answers = [
        answer(ONE, "the Roma", [{2: ["ada"]}], ["ada"]),
        answer(TWO, "Oslo Norway", [{2: ["ada"]}], ["ada"]),
    ]
    figures = score([ONE, TWO], answers)
    assert figures.questions == 2
    assert (figures.routed, figures.routed_all) == (1.0, 0.5)
    assert (figures.named, figures.named_all) == (1.0, 0.5)
    assert figures.exact_match == 0.5
    assert figures.f1 == pytest.approx((1 + 2 / 3) / 2)
    json.dumps(figures.as_dict())


def test_every_question_needs_its_answer():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        score([ONE, TWO], [answer(ONE, "", [], [])])


class Engine:
    """Answers with the question's own words and remembers how it was asked."""

    def __init__(self):
        self.asked = []

    def ask(self, questions, **options):
        self.asked.append((len(questions), options))
        return [answer(Question(q, (), ("a",)), q, [], []) for q in questions]


def test_questions_are_asked_in_batches_and_in_order():
    questions = [Question(f"q{i}", (f"q{i}",), ("a",)) for i in range(37)]
    engine, told = Engine(), []
    figures, answers = ask_all(engine, questions, progress=told.append, max_rounds=2)
    assert engine.asked == [(n, {"max_rounds": 2}) for n in (16, 16, 5)]
    assert told == [16, 32, 37]
    assert [a.question for a in answers] == [q.text for q in questions]
    assert figures.exact_match == 1.0
    assert 0 < figures.seconds_per_question < 1  # the clock of the whole, not the answers' own


def test_no_questions_are_refused():
    with pytest.raises(InputError, match="give at least one"):
        ask_all(Engine(), [])


def test_a_world_to_test_on_has_names_that_training_never_saw():
    documents, one, two = world_questions(3, 40, 5)
    assert len(documents) == 40
    assert (len(one), len(two)) == (5, 5)
    by_id = {d.id: d for d in documents}
    for question in [*one, *two]:
        assert question.answers[0] in by_id[question.gold[-1]].text
    assert {len(q.gold) for q in one} == {1}
    assert {len(q.gold) for q in two} == {2}
    trained = {d.title for s in range(5) for d in generate_world(s, 40).documents}
    assert not trained & {d.title for d in documents}
    assert world_questions(3, 40, 5) == (documents, one, two)
