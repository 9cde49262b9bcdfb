"""`msa bench` from end to end, on memories of a few documents."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from msa.cli import main


@pytest.fixture(scope="module")
def model_folder(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def bench(capsys):
    def run(*words: object) -> SimpleNamespace:
        with pytest.raises(SystemExit) as stop:
            main.main(["bench", *(str(word) for word in words)])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=stop.value.code, out=out, err=err)

    return run


def test_every_benchmark_speaks_json_and_writes_one_page(bench, model_folder, tmp_path):
    common = ("--quick", "--repeats", 1, "--device", "cpu", "--json", "--output", tmp_path)
    sizes = ("--sizes", "8k,16k")
    runs = {
        "routing": sizes,
        "encoding": ("--model", model_folder),
        "asking": ("--model", model_folder, *sizes),
        "scale": sizes,
    }
    for kind, words in runs.items():
        result = bench(kind, *words, *common)
        assert result.code == 0, result
        (line,) = result.out.splitlines()
        found = json.loads(line)
        assert found["kind"] == kind
        assert found["rows"]
        assert found["machine"]["torch"]
        assert (tmp_path / f"bench_{kind}.json").is_file()
    page = (tmp_path / "bench.md").read_text()
    assert page.count("\n## ") == 4
    assert "/ read once" in page


def test_figures_are_a_table_for_people(bench):
    words = ("--sizes", "8k", "--dtype", "float32", "--quick", "--repeats", 1, "--device", "cpu")
    result = bench("routing", *words)
    assert result.code == 0
    lines = {" ".join(line.split()) for line in result.out.splitlines()}
    assert "tokens 8k f32" in lines
    assert "chunks 120" in lines
    assert any(line.startswith("MSA / read once ") for line in lines)
    assert "Written" not in result.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("routing", "--sizes", "1M,some"), "'some' is no size of a memory"),
        (("routing", "--dtype", "int8"), "expected bfloat16 or float32, or both"),
        (("scale", "--dtype", "bfloat16,float32"), "expected bfloat16 or float32"),
        (("asking", "--repeats", "0"), "--repeats"),
    ],
)
def test_wrong_usage_is_one_line(bench, words, message):
    result = bench(*words)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("scale", "--layers", 3), "layers=3: expected an even number from 0 to 36"),
        (("routing", "--sizes", "900G"), "smaller --sizes"),
        (("routing", "--device", "nowhere"), "device 'nowhere' cannot be used"),
    ],
)
def test_what_cannot_be_measured_is_one_line(bench, words, message):
    result = bench(*words, "--quick", *(() if "--device" in words else ("--device", "cpu")))
    assert result.code == 1
    assert message in result.err
    assert result.err.count("\n") == 1
