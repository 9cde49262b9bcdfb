"""The Ray example makes a bank, and goes on with it; needs the extra `ray`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from msa.memory.bank import MemoryBank

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 400  # seconds; Ray starts many processes, and the machine may be busy

pytest.importorskip("ray.data", reason="the extra 'ray' is not installed")


# Two calls of the command in one Ray, which takes long to start. Three CPUs, so that two actors
# encode and one task reads, however many there are.
SCRIPT = """
import json, sys
import ray
import ray_index

ray.init(num_cpus=3, include_dashboard=False)
ray.init = lambda: None
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    ray_index.main()
"""


def run_example(folder: Path, *commands: list[object]) -> str:
    """What the commands print, in a process of their own, which Ray may fill with threads."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, words],
        cwd=ROOT,
        env=dict(
            os.environ,
            PYTHONPATH=f"{ROOT / 'src'}:{ROOT / 'examples'}",  # Ray's workers get it too
            OMP_NUM_THREADS="1",
            RAY_ADDRESS="local",  # never a cluster that happens to be near
            RAY_TMPDIR=str(folder),
            RAY_USAGE_STATS_ENABLED="0",
        ),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    if "The current node timed out during startup" in run.stderr:
        pytest.skip("Ray did not start within its own 30 seconds: the machine is too busy")
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.slow
def test_the_example_makes_one_bank_and_goes_on_with_it(tmp_path_factory):
    folder = tmp_path_factory.mktemp("r")  # short: Ray's sockets lie below it
    text = (resources.files("msa") / "demo" / "worlds" / "documents.jsonl").read_text("utf-8")
    lines = text.splitlines()[:60]
    files = [folder / "a.jsonl", folder / "b.jsonl"]
    files[0].write_text("\n".join(lines[:40]) + "\n", encoding="utf-8")
    files[1].write_text("\n".join(lines[40:]) + "\n", encoding="utf-8")
    bank = folder / "bank"
    said = run_example(folder, [files[0], "--bank", bank], [*files, "--bank", bank])
    assert [line for line in said.splitlines() if "added" in line] == [
        "40 added, 0 updated, 0 unchanged, 0 failed",
        "20 added, 0 updated, 40 unchanged, 0 failed",
    ]
    with MemoryBank.open(bank, read_only=True) as made:
        report = made.verify()
        assert report.ok, report.problems
        assert not report.orphans
        stored = {s.document.id: s.document.text for s in made.documents()}
    assert stored == {d["id"]: d["text"] for d in map(json.loads, lines)}
