from __future__ import annotations

import logging
import re
import socket
import subprocess
import sys

import pytest
from typer.main import get_command

from msa import MemoryBank

for name in ("fastapi", "uvicorn", "pydantic_settings", "prometheus_client", "multipart"):
    pytest.importorskip(name)


@pytest.fixture(autouse=True)
def _logging():
    """The service takes the log over; give it back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("msa.serve").setLevel(logging.NOTSET)


def serve(capsys, *options):
    """Exit code and last line on stderr of a service that cannot start."""
    from msa.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["serve", *map(str, options)])
    return ended.value.code, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 1, "there is no bank to serve; give --bank DIR"),
        (["--bank", "a/b=x"], 1, "--banks (MSA_BANKS): 'a/b' is no name of a bank"),
        (["--bank", "b", "--port", "70000"], 1, "--port (MSA_PORT): Input should be less than"),
        (["--bank", "b", "--host", "0.0.0.0"], 1, "give --api-key-file FILE, or --no-auth"),
        (["--bank", "b", "--api-key-file", "none"], 1, "key file none cannot be read"),
        (["nothing", "--bank", "b"], 2, "'nothing' does not exist"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line(
    capsys, tmp_path, monkeypatch, options, code, message
):
    monkeypatch.chdir(tmp_path)
    status, line = serve(capsys, *options)
    assert status == code
    assert message in line


def test_a_folder_with_other_files_is_not_made_a_bank(capsys, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    status, line = serve(capsys, "--bank", tmp_path)
    assert status == 1
    assert "is not a memory bank" in line or "no memory bank" in line


def test_a_bank_that_another_process_writes_to_is_named_before_a_model_is_loaded(
    capsys, tmp_path, tiny_model, tiny_tokenizer
):
    MemoryBank.create(tmp_path / "notes", tiny_model, tiny_tokenizer).close()
    hold = "import sys, msa\nwith msa.MemoryBank.open(sys.argv[1]):\n  print('held'); input()"
    command = [sys.executable, "-u", "-c", hold, str(tmp_path / "notes")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        options = ["--bank", tmp_path / "notes", "--model", tmp_path / "no-model"]
        status, line = serve(capsys, *options)
        other.communicate(b"\n", timeout=60)
    assert status == 1
    assert f"is being written by process {other.pid} on" in line
    assert "wait until it ends" in line


def test_files_need_a_bank_to_go_to(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    options = [tmp_path / "a.txt", "--banks-folder", tmp_path / "made"]
    status, line = serve(capsys, *options)
    assert status == 1
    assert "is to be indexed into which bank? give --bank DIR" in line


def test_a_port_that_is_taken_is_named(capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, line = serve(capsys, "--bank", tmp_path / "bank", "--port", port)
    assert status == 1
    assert f"cannot listen on 127.0.0.1, port {port}" in line


def test_the_event_loop_does_not_depend_on_what_is_installed():
    from msa.cli.serve import _server

    factory = _server(None, None).config.get_loop_factory()
    assert factory.__module__.partition(".")[0] == "asyncio"


def test_a_model_that_is_not_there_ends_the_service(capsys, tmp_path):
    options = ["--bank", tmp_path / "bank", "--port", 0, "--model", tmp_path / "no-model"]
    status, line = serve(capsys, *options)
    assert status == 1
    assert "no-model" in line


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, line = serve(capsys, "--bank", tmp_path / "bank")
    assert status == 1
    assert "pip install 'msa-memory[serve]'" in line


def test_help_tells_the_defaults_of_the_settings():
    from msa.cli.main import app
    from msa.serve.settings import ServeSettings

    told = {}
    for option in get_command(app).commands["serve"].params:
        found = re.search(r": ([\w.]+) if not given", getattr(option, "help", None) or "")
        if found:
            told[option.name] = found[1]
    defaults = {name: str(field.default) for name, field in ServeSettings.model_fields.items()}
    wrong = {n: words for n, words in told.items() if defaults[n].removesuffix(".0") != words}
    assert not wrong
    assert {"host", "port", "max_waiting", "ask_seconds", "replicas", "shards"} <= told.keys()
