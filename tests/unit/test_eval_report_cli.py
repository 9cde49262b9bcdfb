"""`msa eval report` and `msa eval judge` on the command line."""

from __future__ import annotations

import json

import pytest

from evaluation_runs import about, row, write_run
from msa.cli.main import main
from msa.evaluation.judge import Judge, Judgement


@pytest.fixture
def runs(tmp_path):
    for system in ("msa", "bm25-1"):
        rows = [row(i, system, i % 2 == 0) for i in range(4)]
        write_run(tmp_path, about("qa/squad", 16_000, system), rows)
    return tmp_path


def ended(*words):
    with pytest.raises(SystemExit) as stop:
        main(["eval", *map(str, words)])
    return stop.value.code


def test_a_report_is_written_where_it_is_wanted(runs, capsys):
    assert ended("report", runs) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"Written: {runs / 'report.html'}",
        f"Written: {runs / 'report.md'}",
    ]
    assert ended("report", runs, "-o", runs / "x" / "a.html", "--compare", runs, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "html": str(runs / "x" / "a.html"),
        "markdown": str(runs / "x" / "a.md"),
    }
    assert "Compared with before" in (runs / "x" / "a.md").read_text()


def test_what_cannot_be_reported_is_one_line(tmp_path, capsys):
    assert ended("report", tmp_path) == 1
    assert "run `msa eval run` first" in capsys.readouterr().err


@pytest.fixture
def asked(monkeypatch):
    """Who was asked; what comes of it is settled."""
    calls = []

    def judge_runs(folder, judge, progress):
        calls.append((folder, judge))
        progress(1, 1)
        unread = ["x: q3"] if judge.model == "mumbling" else []
        return Judgement(3, 1, unread, 1200, 90, 0.0123, {"qa__squad@16000--msa": (3.5, 4)})

    monkeypatch.setattr("msa.evaluation.judge.judge_runs", judge_runs)
    monkeypatch.setenv("OPENAI_API_KEY", "the-key")
    monkeypatch.delenv("MSA_JUDGE_KEY", raising=False)
    return calls


def test_a_judge_is_asked_as_was_said(runs, asked, capsys):
    url = "http://127.0.0.1:9/v1"
    options = ["--concurrency", 3, "--timeout", 5, "--attempts", 2, "--prices", 2, 8]
    assert ended("judge", runs, "--judge-url", url, "--judge-model", "m", *options) == 0
    expected = Judge(
        url=url, model="m", key="the-key", concurrency=3, timeout=5, attempts=2, prices=(2, 8)
    )
    assert asked == [(runs, expected)]
    out, err = capsys.readouterr()
    assert out == "qa__squad@16000--msa: 3.50 of 5 (4 answers)\n"
    assert "Judged 3, kept 1; the judge read 1,200 tokens and wrote 90, cost 0.0123." in err


def test_a_key_of_our_own_goes_first_and_is_never_shown(runs, asked, capsys, monkeypatch):
    monkeypatch.setenv("MSA_JUDGE_KEY", "the-other")
    where = ("--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m")
    assert ended("judge", runs, *where, "--json") == 0
    assert asked[0][1].key == "the-other"
    assert "the-other" not in repr(asked[0][1]) + "".join(capsys.readouterr())


def test_answers_without_a_score_are_named_and_the_command_fails(runs, asked, capsys):
    where = ("--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "mumbling")
    assert ended("judge", runs, *where) == 1
    assert "1 answer got no readable score: x: q3; the same command asks again" in (
        capsys.readouterr().err
    )


def test_a_url_that_is_none_is_told(runs, capsys):
    assert ended("judge", runs, "--judge-url", "localhost", "--judge-model", "m") == 1
    assert "give one as in 'https://api.openai.com/v1'" in capsys.readouterr().err
