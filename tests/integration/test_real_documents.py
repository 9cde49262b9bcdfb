"""The benchmark of real documents, from a folder to a page, with a tiny model."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from conftest import make_tiny_model, make_tiny_tokenizer
from evaluation_tools import write_question_set
from msa.inference.options import AskOptions

SCRIPT = Path(__file__).parents[2] / "benchmarks/real_documents.py"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of a question set and of a checkpoint."""
    root = tmp_path_factory.mktemp("real")
    model, tokenizer = make_tiny_model(query_reduction="pooled"), make_tiny_tokenizer()
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    AskOptions(lexical_weight=1.0).save(root / "model")
    return str(write_question_set(root / "tiny")), str(root / "model")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the script; what it printed."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_retrieval_ranks_by_words_by_every_layer_and_by_all(command, places, tmp_path):
    folder, model = places
    output = tmp_path / "found.json"
    out = command("retrieval", folder, "--model", model, "--output", output)
    row = json.loads(output.read_text())["tiny"]
    expected = {"BM25", "MSA, layer 2", "MSA, layer 3", "MSA, fused", "MSA, as asked"}
    assert expected <= set(row["systems"])
    # Of four questions one has no gold document, and one has two, which cannot both be the first.
    assert row["systems"]["BM25"]["R@1"] == 66.67
    assert row["systems"]["BM25"]["share@1"] == 83.33
    assert row["systems"]["MSA, as asked"]["R@16"] == 100
    assert all(name in out for name in expected)
    reductions = ("--reductions", "pooled", "max", "--documents", 4)
    command("retrieval", folder, "--model", model, *reductions, "--output", output)
    names = json.loads(output.read_text())["tiny, 4 documents only"]["systems"]
    assert {"MSA, max, fused", "MSA, pooled, layer 3"} <= set(names)


def test_the_page_holds_every_set_that_the_file_holds(command, places, tmp_path):
    folder, model = places
    output = tmp_path / "made" / "found.json"
    command("retrieval", folder, "--output", output)
    command("retrieval", folder, "--model", model, "--output", output)
    command("retrieval", folder, "--documents", 4, "--output", output)
    row = json.loads(output.read_text())["tiny"]["systems"]["BM25"]
    page = output.with_suffix(".md").read_text()
    assert "| tiny dev | 4 | 5 | BM25 | 66.7 |" in page
    assert "| tiny dev | 4 | 5 | MSA, layer 2 |" in page
    assert "| tiny, 4 documents only dev | 4 | 4 | BM25 |" in page
    assert f"`{row['about']['command']}` (commit: {row['about']['commit']}; model: " in page
    assert "seed: 7)" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--minilm", "nowhere"), "nowhere: no config.json"),
        (("--config", "nothing=1"), "--config nothing: the model's configuration has no such"),
        (("--output", "page.md"), "--output page.md: expected the name of a .json file"),
        (("--split", "train"), "holds no questions.train.jsonl.gz"),
    ],
)
def test_what_cannot_be_ranked_is_one_clear_line(command, places, words, message):
    folder, model = places
    with pytest.raises(SystemExit) as caught:
        command("retrieval", folder, "--model", model, *words)
    assert str(caught.value).startswith("error: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
