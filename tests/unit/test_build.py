from __future__ import annotations

import subprocess

from msa import build
from msa.build import commit


def test_an_installed_package_does_not_take_the_commit_of_a_repository_around_it(
    monkeypatch, tmp_path
):
    """Such as a virtual environment inside of a project has."""
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    monkeypatch.setattr(build, "_installed_commit", lambda: None)
    (tmp_path / "build.py").write_text("# a copy")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True)
    assert commit() is None
    for command in (["add", "."], ["commit", "--quiet", "-m", "ours"]):
        subprocess.run([*git, *command], check=True)
    clean = commit()
    assert clean
    assert not clean.endswith("+")
    (tmp_path / "build.py").write_text("# changed")
    assert commit() == clean + "+"


def test_what_was_installed_from_git_says_its_commit(monkeypatch):
    class Distribution:
        noted = '{"url": "https://x", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}}'

        def read_text(self, name):
            assert name == "direct_url.json"
            return self.noted

    monkeypatch.setattr(build.importlib.metadata, "distribution", lambda name: Distribution())
    assert build._installed_commit() == "0123456"
    Distribution.noted = None
    assert build._installed_commit() is None
