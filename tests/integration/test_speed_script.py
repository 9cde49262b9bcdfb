"""`benchmarks/speed.py` from end to end, on memories of a few documents."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import speed


@pytest.fixture(scope="module")
def model_folder(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys):
    def run(*words: object) -> SimpleNamespace:
        code: object = 0
        try:
            speed.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


def test_every_benchmark_speaks_json_and_writes_one_page(run, model_folder, tmp_path):
    common = ("--quick", "--repeats", 1, "--device", "cpu", "--json", "--output", tmp_path)
    sizes = ("--sizes", "8k,16k")
    kinds = {
        "routing": sizes,
        "encoding": ("--model", model_folder),
        "asking": ("--model", model_folder, *sizes),
        "scale": sizes,
    }
    for kind, words in kinds.items():
        result = run(kind, *words, *common)
        assert result.code == 0, result
        (line,) = result.out.splitlines()
        found = json.loads(line)
        assert found["kind"] == kind
        assert found["rows"]
        assert found["machine"]["torch"]
        assert found["command"].startswith(f"python benchmarks/speed.py {kind} --")
        assert (tmp_path / f"bench_{kind}.json").is_file()
    page = (tmp_path / "bench.md").read_text()
    assert page.count("\n## ") == 4
    assert "/ read once" in page


def test_figures_are_a_table_for_people(run):
    words = ("--sizes", "8k", "--dtypes", "float32", "--quick", "--repeats", 1, "--device", "cpu")
    result = run("routing", *words)
    assert result.code == 0
    assert "| tokens | 8k f32 |" in result.out
    assert "| chunks | 120 |" in result.out
    assert "| MSA / read once | " in result.out
    assert "Written" not in result.out


@pytest.mark.parametrize(
    "words",
    [("routing", "--dtypes", "int8"), ("scale", "--dtype", "both"), ("asking", "--repeats", "0")],
)
def test_wrong_usage_ends_with_the_usage(run, words):
    result = run(*words)
    assert result.code == 2
    assert f"argument {words[1]}: " in result.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("scale", "--layers", 3), "layers=3: expected an even number from 0 to 36"),
        (("routing", "--sizes", "900G"), "smaller --sizes"),
        (("routing", "--sizes", "1M,some"), "'some' is no size of a memory"),
        (("routing", "--device", "nowhere"), "device 'nowhere' cannot be used"),
    ],
)
def test_what_cannot_be_measured_is_one_line(run, words, message):
    result = run(*words, "--quick", *(() if "--device" in words else ("--device", "cpu")))
    assert message in result.code
    assert result.code.startswith("error: ")
    assert "\n" not in result.code
