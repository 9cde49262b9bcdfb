from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

from msa.text import conversion, decoding, loaders, tables
from msa.text.loaders import (
    FieldNames,
    LoadedDocument,
    LoadFailure,
    load_documents,
    total_bytes,
)
from msa.types import Document


def load(*paths: Path, **options) -> tuple[dict[str, Document], list[LoadFailure]]:
    documents, failures = {}, []
    for loaded in load_documents(paths, **options):
        if isinstance(loaded, LoadedDocument):
            documents[loaded.document.id] = loaded.document
        else:
            failures.append(loaded)
    return documents, failures


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def only_failure(*paths: Path, **options) -> LoadFailure:
    documents, failures = load(*paths, **options)
    assert not documents
    assert len(failures) == 1, failures
    return failures[0]


# What is read


def test_a_folder_is_read_recursively_in_sorted_order_with_relative_posix_ids(tmp_path):
    write(tmp_path / "b.txt", "bee")
    write(tmp_path / "a/z.md", "# Zed\n\nlast letter")
    write(tmp_path / "a/c.TXT", "sea")
    loaded = list(load_documents([tmp_path]))
    assert [item.document.id for item in loaded] == ["a/c.TXT", "a/z.md", "b.txt"]
    assert loaded[1].document == Document("a/z.md", "\nlast letter", "Zed")
    assert [item.origin for item in loaded] == [item.document.id for item in loaded]
    assert loaded[0].source == str(tmp_path / "a/c.TXT")


def test_a_file_given_by_name_is_known_by_its_name(tmp_path):
    documents, _ = load(write(tmp_path / "deep/note.txt", "text"))
    assert list(documents) == ["note.txt"]


def test_jsonl_fields_go_where_they_belong(tmp_path):
    records = [
        {"id": "a", "text": "A", "title": "T", "year": 1990, "metadata": {"tags": ["x"]}},
        {"text": "B"},
        {"id": 7, "text": "C", "title": None},
    ]
    path = write(tmp_path / "d.jsonl", "\n\n".join(map(json.dumps, records)) + "\n")
    documents, failures = load(path)
    assert not failures
    assert documents["a"] == Document("a", "A", "T", {"year": 1990, "tags": ["x"]})
    (name,) = documents.keys() - {"a", "7"}
    assert name.startswith("d.jsonl:")
    assert documents[name].text == "B"
    assert documents["7"].title is None


def test_tables_keep_other_columns_as_metadata_and_long_or_quoted_text(tmp_path):
    long = "word " * 50_000
    before = csv.field_size_limit()
    path = write(tmp_path / "t.csv", f'id,text,author\na,"two\nlines",Ada\n\nb,{long},\n')
    documents, failures = load(path)
    assert not failures
    assert documents["a"] == Document("a", "two\nlines", None, {"author": "Ada"})
    assert documents["b"] == Document("b", long)
    assert csv.field_size_limit() == before
    documents, _ = load(write(tmp_path / "t.tsv", "text\ttitle\nhello\tGreeting\n"))
    ((name, document),) = documents.items()
    assert document == Document(name, "hello", "Greeting")


def test_field_names_can_be_chosen(tmp_path):
    fields = FieldNames(id="key", text="body", title="head")
    path = write(tmp_path / "t.csv", "key,body,head,id\nk,b,h,1\n")
    documents, _ = load(path, fields=fields)
    assert documents == {"k": Document("k", "b", "h", {"id": "1"})}


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.csv"])
def test_gzip_is_read_like_the_plain_file(tmp_path, name):
    data = {"a.jsonl": '{"id": "x", "text": "hello"}', "a.csv": "id,text\nx,hello\n"}
    data = data.get(name, "hello").encode()
    plain, _ = load(write(tmp_path / name, data))
    packed, failures = load(write(tmp_path / f"{name}.gz", gzip.compress(data)))
    assert not failures
    assert [d.text for d in packed.values()] == [d.text for d in plain.values()] == ["hello"]


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path):
    bom = b"\xef\xbb\xbf"
    for name, data in [
        ("a.txt", b"hello"),
        ("b.jsonl", b'{"id": "b", "text": "hello"}'),
        ("c.csv", b"text,id\nhello,c\n"),
    ]:
        documents, failures = load(write(tmp_path / name, bom + data))
        assert not failures
        assert [d.text for d in documents.values()] == ["hello"]


def test_html_is_converted_to_markdown(tmp_path):
    pytest.importorskip("markitdown", reason="needs the extra 'documents'")
    page = "<html><head><title>Ada</title></head><body><h1>Life</h1><p>Born 1815.</p></body></html>"
    documents, failures = load(write(tmp_path / "ada.html", page))
    assert not failures
    assert documents["ada.html"].title == "Ada"
    assert documents["ada.html"].text.startswith("# Life")


def test_bytes_read_add_up_to_the_total(tmp_path):
    write(tmp_path / "a.txt", "hello")
    write(tmp_path / "b.jsonl", '{"text": "x"}\n' * 50 + "bad\n")
    write(tmp_path / "c.jsonl.gz", gzip.compress(b'{"text": "y"}\n' * 50))
    write(tmp_path / "d.png", b"\0" * 100)
    steps: list[int] = []
    load(tmp_path, on_bytes=steps.append)
    assert sum(steps) == total_bytes([tmp_path]) > 700
    assert min(steps) >= 0


def test_records_are_read_as_they_are_asked_for(tmp_path):
    path = write(tmp_path / "a.jsonl", "".join(f'{{"text": "x{i}"}}\n' for i in range(200_000)))
    steps: list[int] = []
    next(iter(load_documents([path], on_bytes=steps.append)))
    assert sum(steps) < path.stat().st_size / 10


# What is not, and why


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"", "empty document"),
        ("a.txt", b" \n\t ", "empty document"),
        ("a.txt", b"abc\0def", "binary data"),
        ("a.txt", b"caf\xe9", "not valid UTF-8 at byte 3"),
        ("a.txt", "hello".encode("utf-16"), "UTF-16"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"\n\n", "the file is empty"),
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"id,text\n", "no rows"),
        ("a.csv", b"id,body\n1,x\n", "no column 'text' among 'id', 'body'"),
        ("a.csv", b"text,text\n1,x\n", "two columns have the same name"),
        ("a.txt.gz", b"not gzip", "damaged gzip"),
        ("a.txt.gz", gzip.compress(b"hello" * 1000, mtime=0)[:-12], "damaged gzip"),
        ("a.xyz", b"hello", "file type .xyz is not one of txt"),
        ("a.pdf.gz", b"hello", "file type .pdf.gz is not one of txt"),
        ("noextension", b"hello", "file type (none) is not one of txt"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(tmp_path, name, data, reason):
    path = write(tmp_path / name, data)
    failure = only_failure(path)
    assert failure.source == str(path)
    assert reason in failure.reason
    assert "\n" not in failure.reason
    assert not failure.ignored


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "malformed JSON"),
        (b"[1, 2]", "expected a JSON object per line, found list"),
        (b'{"body": "x", "id": "1"}', "no field 'text'; its fields are 'body', 'id'"),
        (b'{"text": 3}', "field 'text' is a number, expected a string"),
        (b'{"text": null}', "field 'text' is null"),
        (b'{"text": "x", "id": [1]}', "field 'id' is a list"),
        (b'{"text": "x", "id": true}', "field 'id' is a boolean"),
        (b'{"text": "x", "title": {}}', "field 'title' is an object"),
        (b'{"text": "x", "id": " "}', "the id is empty"),
        (b'{"text": "x", "id": "' + b"i" * 513 + b'"}', "the id has 513 characters"),
        (b'{"text": "  "}', "empty document"),
        (b'{"text": "caf\xe9"}', "not valid UTF-8"),
        (b'{"text": "x\\ud800"}', "not Unicode"),
        (b'{"text": "x", "k": "\\ud800"}', "metadata field holds characters"),
        (b'{"text": "x", "k": NaN}', "NaN is not a JSON value"),
        (b'{"text": "x", "k": ' + b"[" * 100_000 + b"}", "nested too deeply"),
        (b'{"text": "x", "k": ' + b"1" * 10_000 + b"}", "number is too long"),
        (b'{"text": "x", "k": 1, "metadata": {"k": 2}}', "beside and inside 'metadata'"),
        (b'{"text": "x", "metadata": 2}', "field 'metadata' is a number"),
    ],
)
def test_a_bad_jsonl_line_is_named_and_the_others_are_read(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    documents, failures = load(path)
    assert [d.text for d in documents.values()] == ["one", "three"]
    assert [f.source for f in failures] == [f"{path}:2"]
    assert reason in failures[0].reason
    assert "\n" not in failures[0].reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"only one", "1 values for 2 columns"),
        (b"a,b,c", "3 values for 2 columns"),
        (b'"a"b,c', "malformed row"),
        (b"x,caf\xe9", "not Unicode"),
        (b"x,a\0b", "binary data"),
        (b"x,", "empty document"),
    ],
)
def test_a_bad_table_row_is_named_and_the_others_are_read(tmp_path, row, reason):
    path = write(tmp_path / "a.csv", b"id,text\n1,one\n" + row + b"\n3,three\n")
    documents, failures = load(path)
    assert list(documents) == ["1", "3"]
    assert [f.source for f in failures] == [f"{path}:3"]
    assert reason in failures[0].reason


def test_a_quote_that_is_never_closed_is_named_where_it_opens(tmp_path):
    path = write(tmp_path / "a.csv", b'id,text\n1,one\n2,"two\n3,three\n')
    documents, failures = load(path)
    assert list(documents) == ["1", "3"]
    assert [f.source for f in failures] == [f"{path}:3"]
    assert "a quote opened on line 3" in failures[0].reason


@pytest.mark.parametrize(
    ("rows", "left_out"),
    [
        ('2,"two,x\n3,three,y\n4,four,z\n', [3]),
        ('2,"two,x\n3,three,y\n4,"four",z\n', [3]),
        ('2,"two,x\n3,"three,y\n4,four,z\n', [3, 4]),
        ('2,"two,x\n3,three,y\n4,four",z\n', []),  # a field of three lines, for all we know
        ('"2,two,x\n3,three,y\n4,four,"z"\n', [3]),
        ('2,"two\nlines",x\n3,three,y\n4,"four,z\n5,five,a\n', [6]),
    ],
)
def test_a_stray_quote_costs_its_own_line_only(tmp_path, rows, left_out):
    path = write(tmp_path / "a.csv", "id,text,more\n1,one,x\n" + rows + "9,nine,x\n")
    documents, failures = load(path)
    assert [f.source for f in failures] == [f"{path}:{line}" for line in left_out]
    assert {"1", "9"} <= set(documents)
    for line, row in enumerate(("id,text,more\n1,one,x\n" + rows).splitlines()[2:], 3):
        if left_out and line not in left_out and row[0].isdigit():
            assert row[0] in documents


def test_a_row_of_several_lines_with_a_value_too_few_is_not_taken_apart(tmp_path):
    path = write(tmp_path / "a.csv", 'id,text,more\n1,"Dear Sir,\nhello, you\nbye"\n2,two,x\n')
    documents, failures = load(path)
    assert list(documents) == ["2"]
    assert [f.source for f in failures] == [f"{path}:2"]
    assert "on lines 2 to 4" in failures[0].reason


def test_of_two_documents_with_one_id_the_second_is_a_failure(tmp_path):
    first = write(tmp_path / "a/x.jsonl", '{"id": "x", "text": "one"}')
    second = write(tmp_path / "b/x.jsonl", '{"id": "x", "text": "two"}')
    documents, failures = load(first.parent, second.parent)
    assert documents["x"].text == "one"
    (failure,) = failures
    assert failure.reason == f"duplicate id 'x', first used by {first}:1"
    assert not failure.ignored
    documents, failures = load(first, first)
    assert len(documents) == len(failures) == 1


# Identity


def test_files_of_one_name_in_two_folders_are_two_documents(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name / "notes.txt", name)
    documents, _ = load(tmp_path / "one", tmp_path / "two")
    assert {i: d.text for i, d in documents.items()} == {
        "one/notes.txt": "one",
        "two/notes.txt": "two",
    }
    for paths in ([tmp_path / "one"], [tmp_path / "two"], [tmp_path]):
        for loaded in load_documents(paths, root=tmp_path / "one"):
            name = loaded.document.text
            assert loaded.document.id == {"one": "notes.txt", "two": "../two/notes.txt"}[name]


def test_a_file_is_the_same_document_however_its_path_is_typed(tmp_path, monkeypatch):
    path = write(tmp_path / "a/b/x.txt", "text")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "other.txt").symlink_to(path)
    monkeypatch.chdir(tmp_path / "a")
    typed = ["b/x.txt", "../a/b/x.txt", path, tmp_path / "link/b/x.txt", tmp_path / "other.txt"]
    typed += [".", "b", tmp_path / "a", tmp_path / "link", tmp_path / "link/b/../b"]
    for given in typed:
        (loaded,) = load_documents([given], root=tmp_path)
        assert (loaded.document.id, loaded.origin) == ("a/b/x.txt", "a/b/x.txt")
    documents, failures = load(*map(Path, typed), root=tmp_path)
    assert list(documents) == ["a/b/x.txt"]
    assert len(failures) == len(typed) - 1
    assert all(f.ignored and "the same file" in f.reason for f in failures)


def test_a_link_into_a_store_of_blobs_keeps_its_own_name(tmp_path):
    blob = write(tmp_path / "blobs/0a1b2c", "text")
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "x.txt").symlink_to(blob)
    documents, _ = load(folder)
    assert list(documents) == ["x.txt"]


def test_records_without_ids_are_known_by_what_they_hold(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "two", "year": 1}\n')
    before, _ = load(path)
    write(path, '{"text": "new"}\n{"text": "two", "year": 1}\n\n{"text": "one"}\n')
    after, _ = load(path)
    assert before.items() <= after.items()
    write(path, '{"text": "two", "year": 1}\n{"text": "two", "year": 2}\n' * 2)
    documents, failures = load(path)
    assert len(documents) == 2
    assert [(f.ignored, f.reason) for f in failures] == [
        (True, f"the same record as {path}:1"),
        (True, f"the same record as {path}:2"),
    ]


def test_names_and_texts_come_in_nfc(tmp_path):
    path = write(tmp_path / "cafe\u0301.txt", "re\u0301sume\u0301")
    documents, _ = load(path)
    assert documents == {"café.txt": Document("café.txt", "résumé")}


# Walking


def test_what_cannot_be_read_in_a_folder_is_named_and_the_rest_is_read(tmp_path, monkeypatch):
    for name in ("a.txt", "b/c.txt", "m/n.txt", "z/z.txt"):
        write(tmp_path / name, name)
    (tmp_path / "d").symlink_to("d")
    (tmp_path / "e.txt").symlink_to("nowhere.txt")
    os.mkfifo(tmp_path / "f.txt")
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "m":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    documents, failures = load(tmp_path)
    assert list(documents) == ["a.txt", "b/c.txt", "z/z.txt"]
    assert {Path(f.source).name: f.origin for f in failures} == {
        "d": "d",
        "e.txt": "nowhere.txt",
        "f.txt": "f.txt",
        "m": "m",
    }
    assert not any(f.ignored for f in failures)
    assert total_bytes([tmp_path]) > 0


def test_a_file_that_vanishes_is_named_and_the_rest_is_read(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.txt", name)
    found = load_documents([tmp_path])
    first = next(found)
    (tmp_path / "b.txt").unlink()
    rest = list(found)
    assert first.document.id == "a.txt"
    assert [type(item) for item in rest] == [LoadFailure, LoadedDocument]


# Headings, titles, charsets


@pytest.mark.parametrize(
    ("text", "title", "rest"),
    [
        ("# C#\n\nA language.", "C#", "\nA language."),
        ("# Closed ##\nx", "Closed", "x"),
        ("# F# and C# #\r\nx", "F# and C#", "x"),
        ("#hashtag\nx", None, "#hashtag\nx"),
    ],
)
def test_the_first_heading_is_the_title(tmp_path, text, title, rest):
    documents, _ = load(write(tmp_path / "a.md", text))
    assert documents["a.md"] == Document("a.md", rest, title)


def test_a_long_heading_is_shortened_as_title_and_stays_in_the_text(tmp_path):
    heading = "word " * 200
    for text in (f"# {heading}\n\nbody", "# " + "北" * 300 + "\n\nbody"):
        documents, failures = load(write(tmp_path / "a.md", text))
        assert not failures
        assert documents["a.md"].text == text
        title = documents["a.md"].title
        assert len(title) <= 101
        assert title.endswith("…")


@pytest.mark.parametrize(
    ("head", "codec", "note"),
    [
        ("", "utf-8", None),
        ("", "utf-8-sig", None),
        ("", "utf-16", None),
        ('<meta charset="windows-1251">', "cp1251", None),
        ("<META http-equiv='Content-Type' content='text/html; charset=koi8-r'>", "koi8-r", None),
        ('<meta charset="iso-8859-1">', "utf-8", "it is UTF-8"),
    ],
)
def test_html_is_read_in_its_charset(tmp_path, head, codec, note):
    pytest.importorskip("markitdown", reason="needs the extra 'documents'")
    page = f"<html><head>{head}</head><body><p>Привет</p></body></html>"
    (loaded,) = load_documents([write(tmp_path / "a.html", page.encode(codec))])
    assert loaded.document.text == "Привет"
    assert (loaded.note is None) if note is None else (note in loaded.note)


def test_a_charset_that_is_guessed_is_noted_and_a_wrong_one_refused(tmp_path):
    pytest.importorskip("markitdown", reason="needs the extra 'documents'")
    (loaded,) = load_documents([write(tmp_path / "a.html", b"<p>caf\xe9</p>")])
    assert loaded.document.text == "café"
    assert "windows-1252" in loaded.note
    for head, data, reason in [
        ("utf-8", b"caf\xe9", "not valid UTF-8"),
        ("klingon", b"x", "'klingon' is not known"),
    ]:
        page = f'<meta charset="{head}"><p>'.encode() + data
        assert reason in only_failure(write(tmp_path / "b.html", page)).reason


def test_a_long_html_title_is_shortened_and_stays_in_the_text(tmp_path):
    pytest.importorskip("markitdown", reason="needs the extra 'documents'")
    title = "title " * 300
    page = f"<html><head><title>{title}</title></head><body><p>Body.</p></body></html>"
    documents, _ = load(write(tmp_path / "a.html", page))
    assert len(documents["a.html"].title) <= 101
    assert documents["a.html"].text == f"# {title.strip()}\n\nBody."


def test_what_a_folder_happens_to_hold_is_ignored_but_counted(tmp_path):
    write(tmp_path / "a.txt", "hello")
    write(tmp_path / ".git/config.txt", "x")
    write(tmp_path / ".hidden.txt", "x")
    write(tmp_path / "picture.png", b"\x89PNG")
    (tmp_path / "loop").symlink_to(tmp_path)
    documents, failures = load(tmp_path)
    assert list(documents) == ["a.txt"]
    assert all(failure.ignored for failure in failures)
    reasons = {Path(failure.source).name: failure.reason for failure in failures}
    assert reasons[".git"] == "hidden folder"
    assert reasons[".hidden.txt"] == "hidden file"
    assert "not followed" in reasons["loop"]
    assert ".png" in reasons["picture.png"]


def test_paths_that_are_no_files_are_named(tmp_path):
    assert only_failure(tmp_path / "nowhere").reason == "no such file or folder"
    assert only_failure(tmp_path).reason == "the folder holds no files"
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "gone.txt")
    assert "does not exist" in only_failure(link).reason
    os.mkfifo(tmp_path / "pipe.txt")
    assert "not a regular file" in only_failure(tmp_path / "pipe.txt").reason
    _, failures = load(tmp_path)
    assert {f.reason for f in failures} == {"not a regular file"}


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "secret")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert only_failure(path).reason == "cannot be read: Permission denied"


def test_a_text_of_absurd_length_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    for module in (decoding, loaders, tables):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 2**20)
    big = b"x" * (2**20 + 5)
    assert "longer than 1 MiB" in only_failure(write(tmp_path / "a.txt", big)).reason
    packed = write(tmp_path / "b.txt.gz", gzip.compress(big))
    assert "longer than 1 MiB" in only_failure(packed).reason
    lines = b'{"text": "' + big + b'"}\n{"text": "fine"}\n'
    documents, failures = load(write(tmp_path / "c.jsonl", lines))
    assert [d.text for d in documents.values()] == ["fine"]
    assert [f.source for f in failures] == [str(tmp_path / "c.jsonl:1")]
    documents, failures = load(write(tmp_path / "d.csv", b"text\n" + big + b"\nfine\n"))
    assert "fine" in [d.text for d in documents.values()]
    assert "field larger than field limit" in failures[0].reason


@pytest.mark.parametrize("name", ["a.pdf", "a.html", "a.docx"])
def test_without_the_extra_the_reason_names_the_command(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "markitdown", None)
    failure = only_failure(write(tmp_path / name, b"<p>x</p>"))
    assert "pip install 'msa-memory[documents]'" in failure.reason


@pytest.mark.parametrize("name", ["a.pdf", "a.docx"])
def test_a_damaged_file_is_one_failure_and_never_its_bytes_as_text(tmp_path, name):
    pytest.importorskip("markitdown", reason="needs the extra 'documents'")
    failure = only_failure(write(tmp_path / name, b"%PDF-1.4\nnothing here"))
    kind = name[2:].upper()
    assert failure.reason.startswith((f"this {kind} file cannot be converted", f"{kind} needs"))
    assert "\n" not in failure.reason


def test_when_only_the_converter_of_one_type_is_missing_the_reason_names_the_command(
    tmp_path, monkeypatch
):
    markitdown = pytest.importorskip("markitdown", reason="needs the extra 'documents'")

    def refuse(self, *args, **kwargs):
        raise markitdown.MissingDependencyException("no pdfminer")

    monkeypatch.setattr(markitdown.converters.PdfConverter, "convert", refuse)
    failure = only_failure(write(tmp_path / "a.pdf", b"%PDF-1.4\n"))
    assert failure.reason.endswith("pip install 'msa-memory[documents]'")


def test_pdf_and_docx_are_read(tmp_path):
    pytest.importorskip("pdfminer", reason="needs the extra 'documents'")
    pytest.importorskip("mammoth", reason="needs the extra 'documents'")
    write(tmp_path / "a.pdf", pdf("Ada was born in 1815."))
    write(tmp_path / "b.docx", docx("Ada died in 1852."))
    documents, failures = load(tmp_path)
    assert not failures
    assert documents["a.pdf"].text.strip() == "Ada was born in 1815."
    assert documents["b.docx"].text.strip() == "Ada died in 1852."


def pdf(text: str) -> bytes:
    """A PDF of one page with one line."""
    content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    start = len(data)
    data += b"xref\n0 6\n0000000000 65535 f \n" + table
    return data + b"trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % start


def docx(text: str) -> bytes:
    """A Word document of one paragraph."""
    word = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    package = "http://schemas.openxmlformats.org/package/2006"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    main = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    relation = "application/vnd.openxmlformats-package.relationships+xml"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(
            "[Content_Types].xml",
            f'<Types xmlns="{package}/content-types">'
            f'<Default Extension="rels" ContentType="{relation}"/>'
            f'<Override PartName="/word/document.xml" ContentType="{main}"/></Types>',
        )
        archive.writestr(
            "_rels/.rels",
            f'<Relationships xmlns="{package}/relationships">'
            f'<Relationship Id="r1" Type="{office}" Target="word/document.xml"/></Relationships>',
        )
        archive.writestr(
            "word/document.xml",
            f'<w:document xmlns:w="{word}"><w:body><w:p><w:r><w:t>{text}</w:t></w:r></w:p>'
            "</w:body></w:document>",
        )
    return packed.getvalue()


def test_a_packed_file_gives_what_lies_within_the_bound_and_says_where_it_ends(tmp_path):
    lines = b'{"id": "a", "text": "x"}\n' + b" " * 5000 + b"\n"
    packed = write(tmp_path / "a.jsonl.gz", gzip.compress(lines))
    documents, failures = load(packed, max_unpacked_bytes=4000)
    assert list(documents) == ["a"]
    assert ["unpacks to more than" in f.reason for f in failures] == [True]
    assert list(load(packed, max_unpacked_bytes=6000)[0]) == ["a"]
    text = write(tmp_path / "b.txt.gz", gzip.compress(b"y" * 5000))
    assert "unpacks to more than" in only_failure(text, max_unpacked_bytes=4000).reason
    assert not load(text)[1]


def test_a_docx_that_unpacks_to_too_much_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "MAX_UNPACKED_BYTES", 1000)
    path = tmp_path / "a.docx"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", "z" * 1001)
    assert "unpacks to more than" in only_failure(path).reason


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.MD", ".md"), ("b.jsonl.gz", ".jsonl.gz"), ("c", ""), ("d.PDF", ".pdf")]
)
def test_the_type_of_a_file_is_told_by_its_name(name, suffix):
    assert loaders.type_suffix(name) == suffix
    assert (loaders.why_not_read(name) is None) == bool(suffix)
