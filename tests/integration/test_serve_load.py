"""`benchmarks/serving.py` in short: a service under load, killed, used, and attacked.

How fast it is is not tested here; that nothing is lost, wrong, twice or told to strangers is.
"""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest

import serving
from evaluation_tools import QUESTIONS, write_question_set
from measuring.serving import Finding, percentile
from measuring.serving_page import section, write

for name in ("fastapi", "uvicorn", "mcp", "pydantic_settings", "prometheus_client"):
    pytest.importorskip(name)

SOURCE = {
    "command": "python benchmarks/serving.py start",
    "commit": "abc",
    "machine": "m",
    "cores": 2,
    "torch": "2",
    "model": "worlds",
    "seed": 7,
}


@pytest.fixture
def run(capsys):
    def run(*words: object) -> SimpleNamespace:
        code: object = 0
        try:
            serving.main([*map(str, words), "--json"])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        found = json.loads(out) if out else {}
        figures = {what: value for what, value, _ in found.get("figures", ())}
        return SimpleNamespace(code=code, err=err, found=found, figures=figures)

    return run


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One service with documents and 12 questions about them, for all tests that ask it."""
    args = serving.arguments(["concurrency", "--documents", "64"])
    environment = {"MSA_MAX_WAITING": "12"}
    with serving.filled(args, tmp_path_factory.mktemp("served"), 12, environment) as pair:
        yield pair


@pytest.fixture
def run_served(run, served, monkeypatch):
    """`run`, over that service."""
    monkeypatch.setattr(serving, "filled", lambda *_: contextlib.nullcontext(served))
    return run


@pytest.mark.slow
def test_questions_at_once_have_the_answers_that_they_have_alone(run_served):
    result = run_served("concurrency", "--clients", 12)
    assert result.found["failures"] == []
    assert result.figures["answers lost or different"] == "0"
    assert result.code == 0


@pytest.mark.slow
def test_questions_are_answered_beside_an_index_job_that_finishes(run_served):
    result = run_served("indexing", "--job-documents", 128)
    assert result.found["failures"] == []
    assert result.figures["documents stored"] == "128"


@pytest.mark.slow
def test_what_was_acknowledged_survives_kills(run):
    result = run("kills", "--kills", 1)
    assert result.found["failures"] == []
    assert int(result.figures["documents acknowledged"].replace(",", "")) > 0


@pytest.mark.slow
def test_no_deleted_text_comes_back_and_nothing_fails_in_use(run_served):
    result = run_served("soak", "--clients", 6, "--minutes", 0.1)
    assert result.found["failures"] == []
    assert {"added", "asked", "searched", "texts of clients shown"} <= set(result.figures)


@pytest.mark.slow
def test_strangers_get_nothing_and_break_nothing(run, monkeypatch):
    monkeypatch.setattr("measuring.hostile.BOMB_BYTES", 300 << 20)
    monkeypatch.setattr("measuring.hostile.SILENCE_SECONDS", 0.2)
    result = run("hostile", "--requests", 150)
    assert result.found["failures"] == []
    assert int(result.figures["requests"].replace(",", "")) > 150


@pytest.mark.slow
def test_documents_of_a_set_are_served_again_after_a_start(run, tmp_path):
    folder = write_question_set(tmp_path / "tiny")
    result = run("start", "--set", folder, "--documents", 2, "--repeats", 1)
    assert result.found["failures"] == []
    assert result.found["settings"]["passages"] == 2


def test_a_set_has_to_be_there_with_as_many_questions(run, tmp_path):
    folder = write_question_set(tmp_path / "tiny")
    result = run("concurrency", "--set", folder, "--clients", 9)
    assert result.code == f"error: {folder} holds {len(QUESTIONS)} questions, not 9"
    assert "corpus.jsonl" in run("start", "--set", tmp_path / "nowhere").code


def test_percentiles_are_values_that_were_measured():
    values = [float(v) for v in range(1, 101)]
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.95) == 95
    assert percentile([3.0], 0.95) == 3
    assert percentile([1.0, 2.0], 0.5) == 1


def test_a_section_takes_the_place_of_the_older_one(tmp_path):
    first = Finding("start", {"repeats": 1}, [("seconds", "9.00", "<= 15")])
    other = Finding("kills", {}, [("missing", "1", "0")], ["gone: <a> | b"])
    for finding in (first, other, first):
        path = write(tmp_path, finding, SOURCE)
    text = path.read_text()
    assert text.count("## From the start to the first answer\n") == 1
    assert text.index("## kill -9") < text.index("## From the start")
    assert "- gone: &lt;a> \\| b" in text
    assert section(first, SOURCE) in text
