from __future__ import annotations

import json
import subprocess
import sys

import torch

from msa.evaluation import provenance as provenance_file
from msa.evaluation.provenance import commit, provenance


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


def test_an_installed_package_does_not_take_the_commit_of_a_repository_around_it(
    monkeypatch, tmp_path
):
    """Such as a virtual environment inside of a project has."""
    monkeypatch.setattr(provenance_file, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setattr(provenance_file, "_installed_commit", lambda: None)
    (tmp_path / "provenance.py").write_text("# a copy")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True)
    assert commit() is None
    for command in (["add", "."], ["commit", "--quiet", "-m", "ours"]):
        subprocess.run([*git, *command], check=True)
    clean = commit()
    assert clean
    assert not clean.endswith("+")
    (tmp_path / "provenance.py").write_text("# changed")
    assert commit() == clean + "+"


def test_what_was_installed_from_git_says_its_commit(monkeypatch):
    class Distribution:
        noted = '{"url": "https://x", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}}'

        def read_text(self, name):
            assert name == "direct_url.json"
            return self.noted

    monkeypatch.setattr(
        provenance_file.importlib.metadata, "distribution", lambda name: Distribution()
    )
    assert provenance_file._installed_commit() == "0123456"
    Distribution.noted = None
    assert provenance_file._installed_commit() is None
