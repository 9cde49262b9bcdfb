"""What the README says to type works: its console and Python blocks, run in order.

They run in a scratch folder in which everything of the repository is linked, so that relative paths
hold and what they write stays out of the repository. `make` targets must exist, `msa train` must
name a valid config; installing and cloning are left to `.ci/run` in a fresh clone. A block below a
line `<!-- not run: REASON -->` is left out.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
LANGUAGES = {"console", "sh", "bash", "shell", "python"}
LEFT_TO_CI = {"git", "cd", "pip", "pip3", "python3", "source", "."}
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]*?) -->\n+)?"
    r"^```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    language: str
    body: str
    line: int


def blocks(text: str) -> list[Block]:
    """Blocks to run, in order."""
    return [
        Block(match["language"], match["body"], text.count("\n", 0, match.start("body")))
        for match in BLOCK.finditer(text)
        if match["language"] in LANGUAGES and not match["reason"]
    ]


def commands(body: str) -> list[str]:
    """Command lines of a console block: those behind `$ ` if there are any, otherwise all."""
    lines = body.replace("\\\n", " ").splitlines()
    prompted = [line[2:] for line in lines if line.startswith("$ ")]
    return [line.strip() for line in prompted or lines if line.strip() and line.strip()[0] != "#"]


@pytest.fixture
def scratch(tmp_path) -> Path:
    """The repository by links, and `msa` and `python` on the path; of the docs a few pages."""
    for entry in ROOT.iterdir():
        if entry.name not in {".git", ".venv", "docs"}:
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "docs").mkdir()
    for page in ("index.md", "evaluation.md", "models.md"):
        (tmp_path / "docs" / page).symlink_to(ROOT / "docs" / page)
    programs = tmp_path / ".bin"
    programs.mkdir()
    for name, arguments in (("msa", '-c "from msa.cli.main import main; main()"'), ("python", "")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def check(command: str, scratch: Path) -> None:
    """Run one command line, or check what it names where running it is not for a test."""
    words = shlex.split(command, comments=True)
    if words[0].split("/")[-1] in LEFT_TO_CI:
        return
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in words[1:] if "=" not in word} <= targets, command
        return
    if words[0] == ".ci/run":
        assert os.access(ROOT / ".ci" / "run", os.X_OK)
        return
    if words[:2] == ["msa", "train"]:
        from msa.training.config import load_config

        load_config(scratch / words[2])
        return
    if words[:2] == ["msa", "serve"]:
        serve(words, scratch)
        return
    execute(["bash", "-euo", "pipefail", "-c", command], scratch, command)


def serve(words: list[str], scratch: Path) -> None:
    """Serve until it says that it is ready, then stop it."""
    pytest.importorskip("fastapi", reason="needs the extra 'serve'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*words, "--port", str(port)],
        cwd=scratch,
        env=environment(scratch),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(1200):
            assert process.poll() is None
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
                break
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def environment(scratch: Path) -> dict[str, str]:
    path = f"{scratch / '.bin'}{os.pathsep}{os.environ['PATH']}"
    return dict(
        os.environ, PATH=path, PYTHONPATH=str(ROOT / "src"), HF_HUB_OFFLINE="1", COLUMNS="100"
    )


def execute(arguments: list[str], scratch: Path, shown: str) -> None:
    run = subprocess.run(
        arguments,
        cwd=scratch,
        env=environment(scratch),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, f"{shown}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
    assert "Traceback" not in run.stderr


def test_what_the_readme_says_works(scratch):
    if not README.is_file():
        pytest.skip("there is no README.md")
    found = blocks(README.read_text(encoding="utf-8"))
    assert any("msa demo" in block.body or "make demo" in block.body for block in found)
    assert any(block.language == "python" for block in found)
    for block in found:
        where = f"README.md:{block.line}"
        if block.language == "python":
            execute([sys.executable, "-c", block.body], scratch, where)
            continue
        for command in commands(block.body):
            check(command, scratch)


EXAMPLE = """\
```console
$ make demo
$ printf 'Ada was born\\n' \\
    > ada.txt
a line of output
```

<!-- not run: needs a GPU -->
```console
exit 1
```

```python
from pathlib import Path
assert Path("ada.txt").read_text() == "Ada was born\\n"
```

```text
not a command
```
"""


def test_blocks_are_found_run_in_order_and_left_out_where_said(scratch):
    found = blocks(EXAMPLE)
    assert [(block.language, block.line) for block in found] == [("console", 1), ("python", 13)]
    assert commands(found[0].body)[0] == "make demo"
    for command in commands(found[0].body):
        check(command, scratch)
    execute([sys.executable, "-c", found[1].body], scratch, "example")
    with pytest.raises(AssertionError, match="make nothing"):
        check("make nothing", scratch)
    with pytest.raises(AssertionError, match="no such command"):
        check("echo no such command >&2; false", scratch)
    assert not (ROOT / "ada.txt").exists()
