"""A question set of a few documents, as a folder and as an object."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from msa.evaluation.question_sets import QuestionSet, read_question_set

DOCUMENTS = [
    {"id": "rome", "title": "Rome", "text": "It lies on the Tiber."},
    {"id": "oslo", "title": "", "text": "The capital of Norway, full of fjord boats."},
    {"id": "cake", "title": None, "text": "Flour, butter and sugar are mixed."},
    {"id": "ada", "text": "Ada sails a boat from Oslo every summer."},
    {"id": "a#1", "text": "Sharp things are kept in the drawer."},
]
QUESTIONS = [
    {
        "id": "q1",
        "question": "Which fjord has boats?",
        "answers": ["Oslo"],
        "gold": ["oslo"],
        "title_hint": "Oslo",
    },
    {"id": "q2", "question": "Where is Rome?", "answers": ["Tiber"], "gold": ["rome"]},
    {"id": "q3", "question": "How much sugar?", "answers": ["x", "y"], "gold": ["cake", "ada"]},
    {"id": "q4", "question": "Who is it?", "answers": [], "gold": [], "unanswerable": True},
]


def write_rows(path: Path, rows: list) -> None:
    """JSON lines, packed if the name says so."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_question_set(folder: Path) -> Path:
    """The set above, split dev."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "corpus.jsonl.gz", DOCUMENTS)
    write_rows(folder / "questions.dev.jsonl.gz", QUESTIONS)
    return folder


def tiny_question_set(folder: Path) -> QuestionSet:
    """The same, read."""
    return read_question_set(write_question_set(folder / "tiny"))
