"""The files that make this a project: what they promise, kept."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src" / "msa").rglob("*.py"))


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_constraints_pin_every_direct_dependency_within_its_range(project):
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    extras = project["project"]["optional-dependencies"].values()
    for line in [
        *project["project"]["dependencies"],
        *(line for extra in extras for line in extra),
    ]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(pinned[name]), line
        assert "==" not in line, f"pyproject.toml gives ranges, not pins: {line}"


def test_the_versions_agree(project):
    import msa

    version = project["project"]["version"]
    assert msa.__version__ == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_apache_2_in_full(project):
    text = (ROOT / "LICENSE").read_text()
    assert project["project"]["license"] == "Apache-2.0"
    assert text.lstrip().startswith("Apache License\n")
    assert "END OF TERMS AND CONDITIONS" in text
    assert all(f"\n   {number}. " in text for number in range(1, 10))


@pytest.mark.parametrize("target", ["demo", "test", "lint", "types", "docs", "dist"])
def test_make_targets_install_torch_first_and_alone(target, tmp_path):
    """`make -n` in a clone without a virtual environment says what would be done."""
    command = ["make", "--dry-run", "--always-make", target, f"VENV={tmp_path / 'venv'}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    installs = [line for line in run.stdout.splitlines() if "pip install" in line]
    assert f"torch=={pins()['torch']}" in installs[0]
    assert "--editable" in installs[1]
    assert "--constraint constraints.txt" in installs[1]
    assert f"-m venv {tmp_path / 'venv'}" in run.stdout


def test_ci_runs_every_check_and_may_be_executed():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    steps = {"make lint", "make test", "make docs", "make dist"}
    assert steps <= set(path.read_text().splitlines())


def test_functions_keep_their_size():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[min(len(node.body) - 1, ast.get_docstring(node) is not None)]
                length = (node.end_lineno or 0) - first.lineno + 1
                assert length <= 60, f"{path}:{node.lineno}: {node.name} has {length} lines"


def test_public_functions_and_classes_say_what_they_give():
    missing = []
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            named = isinstance(node, ast.ClassDef | ast.FunctionDef)
            if named and not node.name.startswith("_") and not ast.get_docstring(node):
                missing.append(f"{path}:{node.lineno}: {node.name}")
    assert not missing


def test_no_file_names_a_place_on_somebodys_machine():
    # Nothing in the project may depend on where it was made.
    home = re.compile(r"(?<![\w.])/(work|root|home|Users)/\w")
    kinds = ("*.py", "*.md", "*.toml", "*.yaml", "*.txt", "Makefile", "run")
    tracked = subprocess.run(
        ["git", "ls-files", "--", *kinds], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    found = [
        name
        for name in tracked.stdout.splitlines()
        if (ROOT / name).is_file() and home.search((ROOT / name).read_text(encoding="utf-8"))
    ]
    assert not found


def test_the_wheel_holds_the_type_marker_and_no_tests(project):
    assert (ROOT / "src" / "msa" / "py.typed").is_file()
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["src/msa"]


def test_python_is_new_enough(project):
    assert project["project"]["requires-python"] == ">=3.11"
    assert sys.version_info >= (3, 11)
