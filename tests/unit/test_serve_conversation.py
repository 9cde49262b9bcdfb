"""The last question of a conversation is made whole, and one that is whole stays as it is."""

from __future__ import annotations

import gzip
import json
import math
import time

import pytest

import conversation
from msa.serve.openai.conversation import MAX_CHARACTERS, Turn, complete_question
from msa.serve.openai.english import names

BORN = [("user", "When was Erik Watts born?"), ("assistant", "In 1967.")]
TOUR = [("user", "Who won the Tour de France in 1994?"), ("assistant", "Miguel Indurain")]
PLACE = [("user", "Where was Erik Watts born?"), ("assistant", "Houston")]
FAUST = [("user", "Who wrote Faust?"), ("assistant", "Faust was written by Goethe.")]
ANNA = [("user", "Who is Anna Smith?"), ("assistant", "A painter.")]


def whole(earlier, question):
    return complete_question(question, [Turn(*turn) for turn in earlier])


@pytest.mark.parametrize(
    ("earlier", "question", "expected"),
    [
        (BORN, "Where did he live?", "Where did Erik Watts live?"),
        (BORN, "Who was his father?", "Who was Erik Watts' father?"),
        (BORN, "Who says he's rich?", "Who says Erik Watts's rich?"),
        (ANNA, "What did she paint?", "What did Anna Smith paint?"),
        (ANNA, "Who taught her?", "Who taught Anna Smith?"),
        (ANNA, "Who was her teacher?", "Who was Anna Smith's teacher?"),
        ([("user", "The Waterboys")], "Where did they play?", "Where did The Waterboys play?"),
        (TOUR, "When was he born?", "When was Miguel Indurain born?"),
        (FAUST, "When was he born?", "When was Goethe born?"),
        (FAUST, "When was it written?", "When was Faust written?"),
        (PLACE, "How large is it?", "How large is Houston?"),
        (PLACE, "How many people live there?", "How many people live in Houston?"),
        (PLACE, "When did he leave?", "When did Erik Watts leave?"),
    ],
)
def test_a_pronoun_gives_way_to_what_it_means(earlier, question, expected):
    assert whole(earlier, question) == expected


@pytest.mark.parametrize(
    ("earlier", "question", "expected"),
    [
        (TOUR, "And in 1995?", "Who won the Tour de France in 1995?"),
        (BORN, "What about Anna Watts?", "When was Anna Watts born?"),
        (BORN, "And Anna Watts?", "When was Anna Watts born?"),
        (BORN, "Where?", "Where was Erik Watts born?"),
        ([("user", "Did Erik Watts win?")], "When?", "When did Erik Watts win?"),
        (
            [("user", "When did the Mothers of Invention part?"), ("assistant", "In 1969")],
            "Why?",
            "Why did the Mothers of Invention part?",
        ),
        (FAUST, "Why?", "Who wrote Faust, and why?"),
        (
            [("user", "What did Anna Smith paint in London?"), ("assistant", "A ship.")],
            "And in Paris?",
            "What did Anna Smith paint in Paris?",
        ),
    ],
)
def test_the_rest_of_a_question_is_completed_from_the_one_before(earlier, question, expected):
    assert whole(earlier, question) == expected


@pytest.mark.parametrize(
    ("earlier", "question", "expected"),
    [
        ([("user", "INXS")], "Who else was in the band?", "Who else was in the band INXS?"),
        ([("user", "INXS")], "What happened in 1987?", "What happened in 1987 to INXS?"),
        (BORN, "What did Watts write?", "What did Erik Watts write?"),
    ],
)
def test_what_is_spoken_of_is_named(earlier, question, expected):
    assert whole(earlier, question) == expected


@pytest.mark.parametrize(
    "question",
    [
        "Who is Marie Curie?",
        "What is photosynthesis?",
        "What is the boiling point of water?",
        "Is it true that water boils at 100 degrees?",
        "Did Bob sell his house?",
        "Wann wurde er geboren?",
        "What did he say to her? " * 100,
        "thanks",
        "???",
        "",
    ],
)
@pytest.mark.parametrize("earlier", [BORN, FAUST, ANNA], ids=["born", "faust", "anna"])
def test_a_question_that_stands_on_its_own_stays_as_it_is(earlier, question):
    assert whole(earlier, question) == question


@pytest.mark.parametrize("question", ["When was he born?", "And in 1995?", "Why?"])
def test_without_earlier_turns_nothing_changes(question):
    assert whole([], question) == question
    assert whole([("user", "hello"), ("assistant", "Hello!")], question) == question


def test_what_a_pronoun_meant_is_remembered_from_turn_to_turn():
    earlier = [
        *BORN,
        ("user", "Who was his father?"),
        ("assistant", "Bill Watts"),
        ("user", "When was he born?"),
        ("assistant", "In 1939."),
    ]
    assert whole(earlier, "Where did he live?") == "Where did Bill Watts live?"


def test_he_is_nobody_who_was_called_she():
    earlier = [
        ("user", "When did Bob Hill marry?"),
        ("assistant", "In 1950."),
        ("user", "Where did he live?"),
        ("assistant", "In Rome."),
        ("user", "Who was Anna Hill?"),
        ("assistant", "His wife."),
        ("user", "What did she paint?"),
        ("assistant", "Ships."),
    ]
    assert whole(earlier, "When did he die?") == "When did Bob Hill die?"
    assert whole(earlier, "When did she die?") == "When did Anna Hill die?"


def test_names_are_runs_of_capitalized_words():
    text = "In March, Thomas A. Hendricks met the Mothers of Invention and Anna's son in Rome."
    found = list(names(text))
    assert found == ["Thomas A. Hendricks", "Mothers of Invention and Anna", "Rome"]
    assert list(names("Houston.")) == []
    assert list(names("Houston.", first=True)) == ["Houston"]


@pytest.mark.parametrize("text", ["he ", "A. ", "In Rome of the ", "it is ", "what about ", "\n"])
def test_long_texts_take_no_long_time(text):
    long = text * (200_000 // len(text))
    earlier = [(role, long) for _ in range(30) for role in ("user", "assistant")]
    start = time.process_time()
    assert whole(earlier, long) == long
    whole(earlier, "When was he born there?" + " he" * (MAX_CHARACTERS // 3 - 20))
    assert time.process_time() - start < 5


# ---- the benchmark

ROWS = [
    {
        "question": "When did they part?",
        "history": ["INXS", "History", "Who founded them?", "Andrew Farriss"],
        "rewrite": "When did INXS part?",
    },
    {"question": "Who is Bob?", "history": ["INXS", "History"], "rewrite": "Who is Bob?"},
]


def test_the_benchmark_counts_what_was_added_and_what_is_foreign():
    last, joined, made = (
        conversation.scores(ROWS, conversation.METHODS[name])
        for name in ("last question only", "all turns joined", "made whole")
    )
    assert (last["found"], last["foreign"], last["same_words"]) == (0.0, None, 0.5)
    assert (made["found"], made["foreign"], made["f1"]) == (1.0, 0.0, 1.0)
    assert (joined["found"], joined["recall"]) == (1.0, 1.0)
    assert joined["foreign"] == pytest.approx(6 / 7)  # all but INXS of the first row
    assert made["bleu"] == pytest.approx(1.0)


def test_bleu_counts_runs_of_words_and_punishes_short_texts():
    text = ["the", "cat", "sat", "on", "the", "mat"]
    assert conversation.bleu([(text, text)]) == pytest.approx(1.0)
    assert conversation.bleu([(text[::-1], text)]) == 0.0
    assert conversation.bleu([(text[:5], text)]) == pytest.approx(math.exp(1 - 6 / 5))


def test_the_benchmark_measures_the_second_half_and_writes_a_page(tmp_path, monkeypatch):
    text = "\n".join(map(json.dumps, [ROWS[1], ROWS[1], *ROWS]))
    (tmp_path / conversation.FILE).write_bytes(gzip.compress(text.encode()))
    words = ["conversation.py", "--questions", str(tmp_path), "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    conversation.main()
    results = json.loads((tmp_path / "conversation.json").read_text())
    assert results["questions"] == 2
    assert [row["count"] for row in results["rows"]] == [2, 2, 2, 1, 1, 1, 1, 1, 1]
    page = (tmp_path / "conversation.md").read_text()
    assert "| all | made whole | 2 | 1.000 |" in page
    assert "| When did they part? | When did INXS part? |" in page
