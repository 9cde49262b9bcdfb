"""Uploaded files that are converted by a process of its own."""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("markitdown", reason="needs the extra 'documents'")

from msa.serve.file_reader import FileReader
from msa.text.loaders import LoadFailure, load_documents

PAGE = "<html><title>Öfen</title><h1>Öfen</h1><p>Der Ofen ist \u2028 warm.</p></html>"


class StoppedError(Exception):
    pass


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(PAGE, encoding="utf-8")
    return path


@contextlib.contextmanager
def reading(seconds=120.0, check=lambda: None):
    with contextlib.closing(FileReader(seconds, 2**20, check)) as reader:
        yield reader


def test_it_reads_what_is_read_without_it(tmp_path, page):
    broken = tmp_path / "broken.pdf"
    broken.write_bytes(b"%PDF-1.4 no more")
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "One."}\n{"id": "two"}\n')
    with reading() as reader:
        for path in (page, broken, lines):
            assert list(reader.load(path)) == list(load_documents([path], root=path.parent))
        first = reader._process
        assert isinstance(next(reader.load(broken)), LoadFailure)
        assert reader._process is first, "a file that is refused costs no new process"
    assert first.returncode is not None


def test_a_process_that_ends_is_replaced(page):
    with reading() as reader:
        (document,) = reader.load(page)
        reader._process.kill()
        reader._process.wait()
        assert list(reader.load(page)) == [document]


def test_a_file_that_takes_too_long_is_a_failure_and_the_process_is_gone(page):
    with reading(seconds=0.01) as reader:
        (failure,) = reader.load(page)
        assert failure.reason.startswith("converting it took longer than 0.01 s;")
        assert failure.source == str(page)
        assert reader._process is None


def test_who_is_not_waited_for_any_more_ends_it(page):
    def stop():
        raise StoppedError

    with reading(check=stop) as reader:
        with pytest.raises(StoppedError):
            list(reader.load(page))
        process = reader._process
    assert process.returncode is not None
