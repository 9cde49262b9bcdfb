"""Citations in the form that each client shows."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("pydantic_settings")

from msa.serve.openai.citations import (
    cite,
    file_annotation,
    open_webui_event,
    sources,
    url_annotation,
    without_marks,
)
from msa.types import Answer, Citation, RankedDocument, Round, Usage

BASE = "http://localhost:8000"
ADA = Citation("ada", 3, "Ada [1] <b>", "Ada was born in Rome.", 1, (16, 20))
BOB = Citation("bob", 7, None, "Bob is Ada's son.", 2)
RANKED = (RankedDocument("ada", 3, 2.0, 0.75, (2,), None),)
ANSWER = Answer(
    "Where?",
    "Rome",
    (ADA, BOB, ADA),
    (Round(1, {}, (ADA,), RANKED), Round(2, {}, (BOB,))),
    Usage(9, 2, 0.1, 0.2),
    "answered",
)
CITED = sources(ANSWER, "notes", BASE)


def test_every_document_is_a_source_once_with_an_address_that_highlights_the_answer():
    assert [s.url for s in CITED] == [
        "http://localhost:8000/d/notes/3?span=16-20",
        "http://localhost:8000/d/notes/7",
    ]
    assert [s.score for s in CITED] == [0.75, 0.0]
    assert CITED[0].as_json() == {
        "id": "ada",
        "number": 3,
        "title": "Ada [1] <b>",
        "url": "http://localhost:8000/d/notes/3?span=16-20",
        "round": 1,
        "score": 0.75,
        "span": (16, 20),
    }


def test_annotations_leave_the_text_and_span_it():
    text = cite("Rome", CITED, "annotations")
    assert text.text == "Rome"
    assert [url_annotation(mark) for mark in text.marks][1] == {
        "type": "url_citation",
        "url_citation": {
            "start_index": 0,
            "end_index": 4,
            "title": "bob",
            "url": "http://localhost:8000/d/notes/7",
        },
    }
    assert [file_annotation(mark)["index"] for mark in text.marks] == [4, 4]


@pytest.mark.parametrize("form", ["markers", "open_webui"])
def test_markers_stand_where_their_annotations_say(form):
    text = cite("Rome", CITED, form)
    assert text.text == "Rome [1][2]"
    assert [text.text[m.start : m.end] for m in text.marks] == ["[1]", "[2]"]
    assert [file_annotation(mark)["index"] for mark in text.marks] == [5, 8]


def test_markdown_lists_the_sources_and_titles_are_no_markdown():
    text = cite("Rome", CITED, "markdown").text
    assert text.splitlines() == [
        "Rome [1][2]",
        "",
        "Sources:",
        r"- [1] [Ada \[1\] \<b\>](http://localhost:8000/d/notes/3?span=16-20)",
        "- [2] [bob](http://localhost:8000/d/notes/7)",
    ]


def test_no_citations_are_written_when_none_are_wanted_or_there_are_none():
    assert cite("Rome", CITED, "none").text == "Rome"
    assert cite("Rome", CITED, "none").marks == ()
    for form in ("annotations", "markers", "markdown", "open_webui"):
        assert cite("Rome", [], form).text == "Rome"


@pytest.mark.parametrize("form", ["annotations", "markers", "markdown", "open_webui", "none"])
def test_an_answer_that_comes_back_loses_its_marks(form):
    assert without_marks(cite("Rome", CITED, form).text) == "Rome"


def test_open_webui_gets_the_passage_and_an_id_that_is_no_address():
    event = open_webui_event(CITED[1])
    assert event == {
        "type": "source",
        "data": {
            "source": {
                "id": "notes#7",
                "name": "bob",
                "url": "http://localhost:8000/d/notes/7",
            },
            "document": ["Bob is Ada's son."],
            "metadata": [
                {
                    "source": "notes#7",
                    "name": "bob",
                    "source_url": "http://localhost:8000/d/notes/7",
                }
            ],
            "distances": [0.0],
        },
    }
