from __future__ import annotations

import json
import sys

import torch

from msa.evaluation.provenance import provenance


def test_a_figure_says_how_it_was_made(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/real.py", "--seed", "7"])
    found = provenance(7, model="abc")
    assert found["command"] == "python benchmarks/real.py --seed 7"
    assert (found["seed"], found["model"]) == (7, "abc")
    assert found["torch"] == torch.__version__
    assert found["commit"]
    assert found["machine"]
    json.dumps(found)


def test_no_place_on_this_machine_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/msa", "/a/b/data/qa/squad", "runs", "/top"])
    assert provenance(0)["command"] == "msa data/qa/squad runs top"
