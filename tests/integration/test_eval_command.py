"""`msa eval` from end to end with the small model: a tiny form of every task, stops, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluation_tools import write_question_set, write_rows
from msa.cli import main
from msa.evaluation.runs import read_run
from msa.evaluation.suite import SHARES, SHORT
from msa.evaluation.tasks import TASKS, all_tasks

SOURCE = Path(__file__).parents[2] / "src"
WORDS = ("river", "castle", "harvest", "letter", "engine", "garden", "winter", "market", "journey")


@pytest.fixture
def run(capsys):
    """Runs a command line in this process; gives exit code, stdout, stderr, and JSON lines."""

    def run(*words: object) -> SimpleNamespace:
        with pytest.raises(SystemExit) as stop:
            main.main([str(word) for word in words])
        out, err = capsys.readouterr()
        parsed = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        return SimpleNamespace(code=stop.value.code, out=out, err=err, json=parsed)

    return run


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A folder of some thousand words of text."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [
        f"The {WORDS[i % 9]} of the {WORDS[i * 5 % 7]} was near the {WORDS[i % 8]} in {1800 + i}."
        for i in range(400)
    ]
    (folder / "a.txt").write_text("\n\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A question set, and a folder in BEIR's format."""
    folder = tmp_path_factory.mktemp("data")
    write_question_set(folder / "tiny")
    beir = folder / "mini"
    (beir / "qrels").mkdir(parents=True)
    texts = ["Rome lies on the Tiber.", "Oslo is the capital.", "Flour and butter."]
    write_rows(beir / "corpus.jsonl", [{"_id": f"d{i}", "text": t} for i, t in enumerate(texts)])
    write_rows(beir / "queries.jsonl", [{"_id": "a", "text": "Where is the Tiber?"}])
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\na\td0\t1\n")
    return folder


def contents(folder: Path) -> dict[str, list[dict]]:
    """Every run without what differs between two of them: times, and the command."""
    found = {}
    for path in sorted((folder / "runs").glob("*.jsonl")):
        held = read_run(path)
        about = {k: v for k, v in held.about.items() if k != "command"}
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in held.rows]
        found[path.name] = [about, *rows]
    return found


FAMILIES = sorted({name.partition("/")[0] for name in TASKS} | {"qa", "curve", "beir"})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_form_of_every_task_runs(run, texts, data, tmp_path, family):
    systems = ["msa:max_new_tokens=8", "bm25-1"]
    words = ("--sizes", "2K", "--count", 2, "--texts", texts, "--data", data, "--output", tmp_path)
    result = run("eval", family, *words, "--json", "--systems", *systems)
    assert result.code == 0, result.err
    tasks = [t for t in all_tasks(data).values() if t.name.startswith(f"{family}/")]
    wanted = {
        (task.name, share, system)
        for task in tasks
        for share in (SHARES if task.change else (None,))
        for system in systems
    }
    assert {(row["task"], row["share"], row["system"]) for row in result.json} == wanted
    for row in result.json:
        assert 0 <= row["score"] <= 1
        held = read_run(row["run"])
        assert len(held.rows) == row["questions"] >= 1
        assert len({one["id"] for one in held.rows}) == len(held.rows)
        for one in held.rows:
            assert not set(one["ranked"]) & others_own(one, held.rows)
        assert held.about["commit"]
        assert held.about["machine"]
    assert run("eval", "report", tmp_path).code == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(task.name in page for task in tasks)


def others_own(row: dict, rows: list[dict]) -> set[str]:
    """Documents of the needle tasks that only other questions may see, by their names."""
    mine = row["id"].partition("/")[0]
    ids = {i for one in rows for i in one["ranked"] + one["gold"]}
    return {
        i
        for i in ids
        if i.partition(".")[0] in {o["id"] for o in rows} and i.partition(".")[0] != mine
    }


def test_two_runs_with_one_seed_are_equal_and_another_seed_is_another_run(run, tmp_path):
    words = ("eval", "curve/worlds", "ruler/niah_single_1", "--sizes", "1K", "--count", 3)
    systems = ("--systems", "msa", "bm25-2+rerank", "gold")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        result = run(*words, "--seed", seed, "--output", tmp_path / name, *systems)
        assert result.code == 0, result.err
    first, second, other = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert len(first) == 6
    assert first.keys() == other.keys()
    assert first != other
    # the haystack of noise is encoded once, the needles are in a copy
    assert len(list((tmp_path / "a" / "banks").glob("*-own-*"))) == 1


def test_a_run_that_was_killed_is_gone_on_with(run, tmp_path):
    words = ["eval", "curve/worlds", "--sizes", "1K", "--count", "8", "--batch-size", "2"]
    words += ["--systems", "msa", "bm25-1"]
    code = "from msa.cli.main import main; main()"
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", code, *words[:8], "--output", str(killed), *words[8:]]
    child = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(SOURCE)}, stdout=subprocess.DEVNULL
    )
    path = killed / "runs" / "curve__worlds@1000--msa.jsonl"
    ends = time.monotonic() + 240
    while not (path.is_file() and path.read_bytes().count(b"\n") >= 3):
        assert child.poll() is None, "it was done before it could be killed"
        assert time.monotonic() < ends, "nothing was answered"
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    answered = path.read_bytes().count(b"\n") - 1
    assert 0 < answered < 8
    with path.open("a") as file:
        file.write('{"id": "torn')
    assert run(*words[:8], "--output", killed, *words[8:]).code == 0
    assert run(*words[:8], "--output", tmp_path / "whole", *words[8:]).code == 0
    assert contents(killed) == contents(tmp_path / "whole")
    before = path.read_bytes()
    assert run(*words[:8], "--output", killed, *words[8:]).code == 0
    assert path.read_bytes() == before  # nothing is asked twice


def test_the_short_form_says_what_it_leaves_out(run, tmp_path):
    result = run("eval", "--short", "curve", "--output", tmp_path, "--json", "--systems", "bm25-1")
    assert result.code == 0, result.err
    assert {row["task"] for row in result.json} == {"curve/worlds"}
    assert "left out: no task 'curve/squad'" in result.err
    chosen = next(s for s in SHORT if s.tasks == ("curve/worlds",))
    assert {row["size"] for row in result.json} == set(chosen.sizes)


def test_what_lacks_its_material_is_named_and_the_rest_is_run(run, tmp_path):
    words = ("--sizes", "1K", "--count", 1, "--output", tmp_path, "--json", "--systems", "closed")
    result = run("eval", "ruler/niah_single_1", "ruler/niah_single_2", *words)
    assert result.code == 1
    assert [row["task"] for row in result.json] == ["ruler/niah_single_1"]
    assert "ruler/niah_single_2 at 1,000 tokens is left out: this task hides" in result.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ruler/vx",), "no task 'ruler/vx'; the nearest: ruler/vt"),
        (("ruler/vt", "--sizes", "16X"), "size '16X': expected tokens, such as 16K"),
        (("ruler/vt", "--systems", "bm25"), "system 'bm25': expected one of bm25-K"),
        (("ruler/vt", "--systems", "@all"), "no group '@all'; there are:"),
        (("qa/x",), "give its folder with --data"),
        (("ruler/vt", "--data", "nowhere"), "nowhere: no such folder"),
        (("ruler/vt", "--systems", "minilm-1"), "all-MiniLM-L6-v2 is not here yet"),
    ],
)
def test_what_cannot_be_run_is_one_clear_line(run, tmp_path, words, message):
    result = run("eval", *words, "--output", tmp_path)
    assert result.code == 1
    assert result.err.startswith("Error: ")
    assert result.err.count("\n") == 1, result.err
    assert message in result.err


def test_usage_is_said(run, tmp_path):
    assert run("eval").code == 2
    assert run("eval", "run", "--output", tmp_path).code == 2
    assert run("eval", "ruler").code == 2  # without a folder
    listed = run("eval", "tasks", "--json")
    assert {row["task"] for row in listed.json} == set(TASKS)
    assert "ruler/vt" in run("eval", "tasks").out


def test_a_run_of_something_else_is_not_gone_on_with(run, tmp_path):
    words = ("eval", "curve/worlds", "--sizes", "1K", "--output", tmp_path, "--systems", "closed")
    assert run(*words[:4], "--count", 2, *words[4:]).code == 0
    result = run(*words[:4], "--count", 4, *words[4:])
    assert result.code == 1
    assert "was made with questions 2, not 4; give another output folder" in result.err
