"""Prompts of benchmarks, taken apart into what is to be remembered and what is asked."""

from __future__ import annotations

import pytest

from msa.errors import InputError
from msa.integrations.prompt_splitting import SplitPrompt, split_prompt

QUESTION = "What are all the special magic numbers for pot mentioned in the provided text?"


@pytest.mark.parametrize(
    ("prompt", "context", "question"),
    [
        (
            f"Memorize it.\nThe grass is green.\n{QUESTION} The special magic numbers for pot are",
            "Memorize it.\nThe grass is green.",
            QUESTION,
        ),
        (
            "Title: A\n\nBackground: B, a town.\n\nQuestion: Where is B?\n\nAnswer:",
            "Title: A\n\nBackground: B, a town.",
            "Where is B?",
        ),
        (
            "Question: old?\nAnswer: yes\n\nPassages.\nQuestion: Who said it\nAnswer:",
            "Question: old?\nAnswer: yes\n\nPassages.",
            "Who said it",
        ),
        ("Passage one.\n\n**Question**: Who?\n**Answer:**", "Passage one.", "Who?"),
        (
            "Question: what it is about is below.\nA long text.\nIts second line.\nWho is it?",
            "Question: what it is about is below.\nA long text.\nIts second line.",
            "Who is it?",
        ),
        ("A text.\nSummarize it.\nThe answer is:", "A text.", "Summarize it."),
        ("Where was Ada born?", "", "Where was Ada born?"),
        ("Question: Where was Ada born?\nAnswer:", "", "Where was Ada born?"),
        ("Answer:", "", "Answer:"),
    ],
)
def test_the_question_is_what_is_asked_last(prompt, context, question):
    assert split_prompt(prompt) == SplitPrompt(context, question)


def test_a_pattern_takes_apart_what_is_written_otherwise():
    pattern = r"(?P<question>[^\n]+)\n---\n(?P<context>.*)"
    assert split_prompt("Who?\n---\nIt was\nAda.", pattern) == SplitPrompt("It was\nAda.", "Who?")


@pytest.mark.parametrize(
    ("prompt", "pattern", "message"),
    [
        (" \n", None, "the prompt is empty"),
        ("x", "(", r"split='\(' is no regular expression"),
        ("x", "(?P<context>.*)", r"has no group \(\?P<question>\.\.\.\)"),
        ("x", "(?P<context>a)(?P<question>b)", "does not match the prompt 'x'"),
    ],
)
def test_what_cannot_be_taken_apart_is_told(prompt, pattern, message):
    with pytest.raises(InputError, match=message):
        split_prompt(prompt, pattern)
