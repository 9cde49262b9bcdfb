"""The commands with stand-ins for bank and engine: what is parsed, called, printed and returned."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from rich.console import Console

from msa.cli import ask, index, main, options, output
from msa.errors import BankNotFoundError, InputError
from msa.memory.store.origins import Origin
from msa.types import Answer, Citation, Event, Hit, Round, RoutedDocument, Usage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(capsys):
    """Runs a command line; gives exit code, stdout and stderr."""

    def run(*words: object):
        with pytest.raises(SystemExit) as stop:
            main.main([str(word) for word in words])
        captured = capsys.readouterr()
        return SimpleNamespace(code=stop.value.code, out=captured.out, err=captured.err)

    return run


def commands(command=None, path=()):
    """Every command of the tree with its words."""
    command = command or typer.main.get_command(main.app)
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


COMMANDS = dict(commands())


# Help


def test_the_commands_are_there():
    names = {" ".join(path) for path in COMMANDS}
    expected = {"demo", "index", "ask", "search", "train", "bank", "convert", "serve", "mcp"}
    expected |= {f"model {name}".strip() for name in ("", "get", "list", "info")}
    expected |= {f"eval {name}".strip() for name in ("", "run", "tasks", "report", "judge")}
    bank = {"info", "list", "add", "delete", "compact", "verify", "repair"}
    assert expected | {f"bank {name}" for name in bank} | {""} == names


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_has_an_example_that_could_be_typed(run, path):
    result = run(*path, "--help")
    assert result.code == 0
    assert "Example: msa" in result.out
    example = COMMANDS[path].epilog.removeprefix("Example: ")
    assert example.startswith(" ".join(("msa", *path)))
    assert all(parameter.help for parameter in COMMANDS[path].params if parameter.name != "help")


SERVERS = {("serve",), ("mcp",)}  # they say nothing on stdout that is theirs to say


@pytest.mark.parametrize(
    "path", [p for p in COMMANDS if not hasattr(COMMANDS[p], "commands") and p not in SERVERS]
)
def test_every_command_speaks_json(path):
    assert "--json" in {option for p in COMMANDS[path].params for option in p.opts}


def test_the_page_about_the_commands_is_fresh():
    spec = importlib.util.spec_from_file_location("cli_docs", ROOT / "tools" / "cli_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == module.document(), "docs/cli.md is stale; write it anew with: make docs"


def test_version(run):
    import msa

    assert run("--version").out == f"msa {msa.__version__}\n"


# Errors and exit codes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["index", "x.txt"], "Missing option '--bank'"),
        (["ask", "why", "--bank", "b", "--max-rounds", "0"], "--max-rounds"),
        (["ask", "why", "--bank", "b", "--nonsense"], "--nonsense"),
        (["ask", "  ", "--bank", "b"], "the question is empty"),
        (["search", "", "--bank", "b"], "the query is empty"),
        (["search", "x", "--bank", "b", "--filter", "user"], "'user' is not NAME=VALUE"),
        (["search", "x", "--bank", "b", "--top-k", "many"], "--top-k"),
        (["bank", "add", "b", "i", "--text", "x", "--metadata", "{"], "not valid JSON"),
        (["bank", "add", "b", "i", "--text", "x", "--metadata", "[1]"], "expected a JSON object"),
        (["bank", "add", "b", "i", "--text", "x", "--metadata", "[" * 100_000], "too deeply"),
        (["search", "x", "--bank", "b", "--filter", "a=" + "[" * 100_000], "too deeply"),
    ],
)
def test_wrong_usage_is_one_line_on_stderr_and_exit_code_2(run, words, message):
    result = run(*words)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("Error: ")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert "--help" in result.err


@pytest.mark.parametrize("words", [[], ["bank"]])
def test_no_command_shows_help_and_is_wrong_usage(run, words):
    result = run(*words)
    assert result.code == 2
    assert "Example: msa" in result.out


class Raises:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, *args, **kwargs):
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("too\nlong \x1b[31m"), 1, "Error: too long [31m"),
        (BankNotFoundError("no bank [17]"), 1, "Error: no bank [17]"),
        (PermissionError(13, "Permission denied", "/x"), 1, "Error: /x: Permission denied"),
        (OSError(28, "No space left on device"), 1, "Error: No space left on device"),
        (ZeroDivisionError("by zero"), 1, "Error: ZeroDivisionError: by zero (a fault of ours; "),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (output.Interrupted("Interrupted. All is safe."), 130, "Interrupted. All is safe."),
    ],
)
def test_an_error_is_one_line_on_stderr(run, monkeypatch, error, code, line):
    monkeypatch.setattr(ask, "open_engine", Raises(error))
    result = run("search", "x", "--bank", "b")
    assert result.code == code
    assert result.out == ""
    assert result.err.startswith(line)
    assert result.err.count("\n") == 1


def test_debug_shows_the_traceback_wherever_it_stands(monkeypatch):
    monkeypatch.setattr(ask, "open_engine", Raises(InputError("bad")))
    for words in (["--debug", "search", "x", "-b", "b"], ["search", "x", "-b", "b", "--debug"]):
        with pytest.raises(InputError, match="bad"):
            main.main(words)


def test_after_two_dashes_debug_is_a_word_like_others(run, monkeypatch):
    asked = []
    monkeypatch.setattr(ask, "open_engine", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(ask, "_ask_one", lambda engine, question, *_, **__: asked.append(question))
    run("ask", "-b", "b", "--", "--debug")
    assert asked == ["--debug"]


# Index


class FakeOrigins:
    """Origins in a dictionary, id -> path; all of them are below whatever is asked for."""

    def __init__(self) -> None:
        self.paths: dict[str, str] = {}
        self.remembered = None

    def root(self):
        return self.remembered

    def remember_root(self, root):
        self.remembered = root

    def record(self, origins):
        self.paths.update({origin.document: origin.path for origin in origins})

    def below(self, path):
        return [Origin(*pair) for pair in self.paths.items()]


class FakeBank:
    """Keeps texts in a dictionary; refuses ids that begin with "bad"."""

    def __init__(self, texts: dict[str, str] | None = None) -> None:
        self.texts = texts or {}
        self.closed = False
        self.catalog = SimpleNamespace(origins=FakeOrigins())

    def delete(self, ids):
        for name in ids:
            del self.texts[name]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def info(self):
        return SimpleNamespace(num_ids=len(self.texts))

    def add(self, documents, *, on_duplicate, batch_tokens=1, progress=None, pool=None):
        counts = {"added": 0, "updated": 0, "unchanged": 0}
        failed = []
        for document in documents:
            if document.id.startswith("bad"):
                failed.append((document.id, "refused"))
                continue
            old = self.texts.get(document.id)
            kind = "added" if old is None else "unchanged" if old == document.text else "updated"
            if kind == "updated" and on_duplicate == "skip":
                failed.append((document.id, "is there"))
                continue
            counts[kind] += 1
            self.texts[document.id] = document.text
            progress(SimpleNamespace(documents=len(self.texts), tokens=10, seconds=1.0))
        return SimpleNamespace(
            **counts, failed=tuple(failed), parts=len(self.texts), tokens=100, seconds=2.0
        )


@pytest.fixture
def bank(monkeypatch):
    fake = FakeBank()
    fake.opened = []

    def open_or_create(*arguments):
        fake.opened.append(arguments)
        return fake

    monkeypatch.setattr(index, "open_or_create", open_or_create)
    return fake


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_index_counts_everything_and_says_why(run, bank, tmp_path):
    bank.texts = {"same.txt": "same", "old.txt": "old"}
    for name, data in {
        "same.txt": "same",
        "old.txt": "new",
        "fresh.txt": "fresh",
        "bad.txt": "x",
        "empty.txt": " ",
        "photo.png": "x",
    }.items():
        (tmp_path / name).write_text(data)
    result = run("index", tmp_path, "--bank", tmp_path / "bank")
    assert result.code == 0
    shown = [line.split() for line in result.out.splitlines()[:5]]
    counts = {"added": 1, "unchanged": 1, "updated": 1, "failed": 2, "ignored": 1}
    assert shown == [[name, str(count)] for name, count in counts.items()]
    assert f"{tmp_path / 'empty.txt'}: empty document" in result.out
    assert "bad.txt: refused" in result.out
    assert "photo.png: file type .png" in result.out
    assert "100 tokens encoded in 2.0 s (50 tokens/s)" in result.out
    assert result.err == ""
    assert bank.texts["old.txt"] == "new"
    assert bank.closed


def test_index_json_lists_every_failure(run, bank, tmp_path):
    (tmp_path / "good.txt").write_text("x")
    (tmp_path / "many.jsonl").write_text("{\n" * 30)
    result = run("index", tmp_path, "--bank", "bank", "--json")
    (report,) = lines(result.out)
    assert (report["added"], report["failed"], len(report["failures"])) == (1, 30, 30)
    assert report["failures"][0]["source"] == f"{tmp_path / 'many.jsonl'}:1"
    plain = run("index", tmp_path, "--bank", "bank")
    assert plain.out.count("malformed JSON") == 20
    assert "and 10 more; --json lists them all" in plain.out


def test_index_exits_with_1_if_nothing_could_be_stored_or_if_strict(run, bank, tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "empty.txt"
    good.write_text("x")
    bad.write_text("")
    assert run("index", good, bad, "--bank", "b").code == 0
    assert run("index", good, bad, "--bank", "b", "--strict").code == 1
    assert run("index", good, "--bank", "b", "--strict").code == 0
    bank.opened.clear()
    result = run("index", bad, tmp_path / "nowhere", "--bank", "b")
    assert result.code == 1
    assert "no such file or folder" in result.out
    assert result.err == "Error: no document found; b was not touched\n"
    assert not bank.opened


def test_index_skip_keeps_what_is_there_and_says_so(run, bank, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("new")
    bank.texts = {"a.txt": "old"}
    result = run("index", path, "--bank", "b", "--skip")
    assert bank.texts == {"a.txt": "old"}
    assert "a.txt: is there" in result.out
    assert result.code == 1


def test_index_takes_field_names_and_model(run, bank, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("key,body,head\nk,b,h\n")
    words = ["--id-field", "key", "--text-field", "body", "--title-field", "head"]
    result = run("index", path, "--bank", "b", "--model", "m", "--device", "cpu", *words)
    assert result.code == 0
    assert bank.texts == {"k": "b"}
    assert bank.opened == [(Path("b"), "m", "cpu", None)]


def test_an_interrupted_index_says_what_is_safe(run, bank, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x")
    bank.texts = {"one": "1", "two": "2"}
    monkeypatch.setattr(bank, "add", Raises(KeyboardInterrupt()))
    result = run("index", path, "--bank", "b")
    assert result.code == 130
    assert result.err.startswith("Interrupted. The bank holds 2 documents; run the same command")
    assert result.err.count("\n") == 1


def test_index_names_what_is_gone_and_deletes_it_when_asked(run, bank, tmp_path):
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "1", "text": "one"}\n{"id": "2", "text": "two"}\n')
    assert lines(run("index", tmp_path, "--bank", "b", "--json").out)[0]["gone"] == 0
    assert bank.catalog.origins.remembered == str(tmp_path.resolve())
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt").rename(tmp_path / "d.txt")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")  # there, but it cannot be read
    rows.write_text('{"id": "2", "text": "two"}\n')
    (report,) = lines(run("index", tmp_path, "--bank", "b", "--json").out)
    assert (report["gone"], report["pruned"]) == (3, 0)
    assert {gone["id"]: gone["reason"] for gone in report["gone_documents"]} == {
        "a.txt": "a.txt is not there any more",
        "b.txt": "b.txt is not there any more",
        "1": "not in rows.jsonl any more",
    }
    assert {"a.txt", "b.txt", "1"} <= bank.texts.keys()
    shown = run("index", tmp_path, "--bank", "b")
    assert "Gone:\n  a.txt: a.txt is not there any more\n" in shown.out
    assert "--prune" in shown.out
    (report,) = lines(run("index", tmp_path, "--bank", "b", "--prune", "--json").out)
    assert report["pruned"] == 3
    assert bank.texts.keys() == {"c.txt", "d.txt", "2"}


def test_index_notes_what_it_guessed(run, bank, tmp_path):
    pytest.importorskip("markitdown", reason="needs the extra 'documents'")
    (tmp_path / "a.html").write_bytes(b"<p>caf\xe9</p>")
    result = run("index", tmp_path, "--bank", "b")
    assert "Notes:\n" in result.out
    assert "windows-1252" in result.out


@pytest.mark.parametrize(
    ("pairs", "wanted"),
    [
        (["year=1910"], {"year": {"in": [1910, "1910"]}}),
        (["open=true"], {"open": {"in": [True, "true"]}}),
        (['year="1910"'], {"year": "1910"}),
        (["user=eve", "x=1e3"], {"user": "eve", "x": {"in": [1000.0, "1e3"]}}),
        (['year={"gte": 1910}'], {"year": {"gte": 1910}}),
        (["a=NaN"], {"a": "NaN"}),
        (["a=" + "1" * 5000], {"a": "1" * 5000}),
        (["a=b=c"], {"a": "b=c"}),
        (["tag=x", "tag=y"], {"and": [{"tag": "x"}, {"tag": "y"}]}),
    ],
)
def test_a_filter_on_the_command_line_finds_numbers_and_texts(pairs, wanted):
    assert options.metadata_filter(pairs) == wanted


def test_lines_of_stdin_end_as_they_do_everywhere(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\r\n two \ntwo\r\r\n\r\nlast"))
    assert list(options.stdin_lines()) == ["one\n", " two \n", "two\r\n", "\n", "last"]


# Ask and search

CITATIONS = (
    Citation("erik", 17, "Erik Watts", "Erik Watts is a son of Bill Watts.", 1),
    Citation("bill", 23, None, "Bill Watts\x1b[2J was born in 1939.", 2, (26, 30)),
)
ROUNDS = (
    Round(1, {2: (RoutedDocument("erik", 17, 0.91), RoutedDocument("x", 5, 0.5))}, CITATIONS[:1]),
    Round(2, {2: (RoutedDocument("bill", 23, 0.8),)}, CITATIONS[1:]),
)
ANSWER = Answer("Q?", "1939", CITATIONS, ROUNDS, Usage(200, 12, 0.1, 0.5), "answered")


class FakeEngine:
    def __init__(self) -> None:
        self.calls = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, question, *, stream=False, **chosen):
        if "fail" in question:
            raise InputError(f"cannot answer {question}")
        self.calls.append((question, chosen))
        return self.events() if stream else ANSWER

    def events(self):
        for turn in ROUNDS:
            yield Event("routing", turn.index, turn)
            for citation in turn.read:
                yield Event("reading", turn.index, citation)
        yield from (Event("token", 3, piece) for piece in ("19", "39\x07"))
        yield Event("answer", 3, ANSWER)

    def retrieve(self, query, top_k, filter):
        self.calls.append((query, filter))
        hits = [
            Hit("erik", 17, 0.9, {2: 0.91}, "Erik Watts", "Erik Watts is a son.", {"a": 1}),
            Hit("bill", 23, 0.1, {2: 0.5}, None, "Bill Watts was born in 1939.", {}),
        ]
        return hits[:top_k]


@pytest.fixture
def engine(monkeypatch):
    fake = FakeEngine()
    monkeypatch.setattr(ask, "open_engine", lambda *_: fake)
    return fake


def test_ask_prints_the_answer_and_what_was_read(run, engine):
    result = run("ask", "Q?", "--bank", "b")
    assert result.code == 0
    first, *rest = result.out.splitlines()
    assert first == "1939"
    assert "round 1 read  [17] erik  Erik Watts is a son of Bill Watts." in rest[0]
    assert "round 2 read  [23] bill  Bill Watts [2J was born in 1939." in rest[1]
    assert rest[2].strip() == "2 rounds, 200 + 12 tokens, 0.50 s"
    assert "\x1b" not in result.out
    assert engine.calls == [("Q?", {})]


def test_ask_hands_on_the_slack_and_the_shards(run, engine, monkeypatch):
    given = []
    monkeypatch.setattr(ask, "open_engine", lambda *some: given.append(some) or engine)
    assert run("ask", "Q?", "--bank", "b", "--slack", 0.8).code == 0
    assert run("search", "Q?", "--bank", "b", "--shards", 2, "--ray", "auto").code == 0
    assert given == [
        (Path("b"), None, None, 0.8, None, None),
        (Path("b"), None, None, None, 2, "auto"),
    ]


def test_slack_with_shards_is_refused_before_anything_is_loaded(run, tmp_path):
    result = run("ask", "Q?", "--bank", tmp_path, "--slack", 0.8, "--shards", 2)
    assert result.code == 1
    assert "--slack 0.8 with --shards: leave it out" in result.err


def test_ask_trace_shows_every_layer_of_every_round(run, engine):
    result = run("ask", "Q?", "--bank", "b", "--trace")
    assert "round 1 layer 2 routed  [17] erik 0.91, [5] x 0.50" in result.out
    assert "round 2 layer 2 routed  [23] bill 0.80" in result.out


def test_what_was_routed_goes_on_below_itself_without_breaking_an_entry(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    documents = tuple(RoutedDocument(f"document-{i}", i, 0.5) for i in range(9))
    ask.print_routing(output.stdout(), Round(1, {3: documents}, ()), shown=6, marked={"document-4"})
    written = sys.stdout.getvalue().splitlines()
    assert written[0].startswith("  round 1 layer 3 routed  [0] document-0 0.50, [1] document-1")
    assert all(line.startswith(" " * 26 + "[") for line in written[1:])
    assert "[4] *document-4 0.50," in "".join(written)
    assert "[5] document-5 0.50, and 3 more" in "".join(written)
    assert max(map(len, written)) <= output.PLAIN_WIDTH


def test_ask_json_is_the_whole_answer(run, engine):
    (answer,) = lines(run("ask", "Q?", "--bank", "b", "--json").out)
    assert answer["text"] == "1939"
    assert [c["id"] for c in answer["citations"]] == ["erik", "bill"]
    assert [c["span"] for c in answer["citations"]] == [None, [26, 30]]
    assert answer["rounds"][0]["routed"]["2"][0] == {"id": "erik", "number": 17, "score": 0.91}
    assert answer["usage"]["prompt_tokens"] == 200


def test_ask_stream_shows_every_step_in_order(run, engine):
    out = run("ask", "Q?", "--bank", "b", "--stream", "--trace").out
    places = [
        out.index(part) for part in ("layer 2 routed", "[17] erik  E", "[23] bill  B", "1939\n")
    ]
    assert places == sorted(places)
    assert "\x07" not in out
    kinds = [e["kind"] for e in lines(run("ask", "Q?", "-b", "b", "--stream", "--json").out)]
    assert kinds == ["routing", "reading", "routing", "reading", "token", "token", "answer"]


def test_ask_hands_on_only_the_options_that_were_given(run, engine):
    words = ["--max-rounds", 2, "--max-new-tokens", 9, "--temperature", 0.5, "--seed", 3]
    words += ["--prior-weight", 1, "--filter", "user=eve", "--filter", "year=1990"]
    run("ask", "Q?", "--bank", "b", *words)
    chosen = {"max_rounds": 2, "max_new_tokens": 9, "temperature": 0.5, "seed": 3}
    wanted = {"user": "eve", "year": {"in": [1990, "1990"]}}
    assert engine.calls == [("Q?", {**chosen, "prior_weight": 1.0, "filter": wanted})]


def test_ask_reads_questions_from_stdin_and_goes_on_after_a_bad_one(run, engine, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\n\n  fail this \nTwo?"))
    result = run("ask", "--bank", "b", "--json")
    assert [question for question, _ in engine.calls] == ["One?", "Two?"]
    assert len(lines(result.out)) == 2
    assert result.err == "Error: cannot answer fail this\n"
    assert result.code == 1


def test_stdin_that_is_no_text_is_one_clear_error(run, engine, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"One?\ncaf\xe9?\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    result = run("ask", "--bank", "b")
    assert result.code == 1
    assert result.err.startswith("Error: stdin is not valid text")
    assert result.err.count("\n") == 1


def test_output_goes_on_where_the_terminal_lacks_a_character(run, engine, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(engine, "ask", lambda *_, **__: replace(ANSWER, text="Café"))
    assert run("ask", "Q?", "--bank", "b").code == 0
    assert run("ask", "Q?", "--bank", "b", "--json").code == 0
    sys.stdout.flush()
    plain, *_, whole = raw.getvalue().decode("ascii").splitlines()
    assert plain == "Caf?"
    assert json.loads(whole)["text"] == "Café"


def test_search_lists_hits_best_first(run, engine):
    result = run("search", "watts", "--bank", "b")
    assert [line.split()[1] for line in result.out.splitlines()[::2]] == ["erik", "bill"]
    assert "Bill Watts was born in 1939." in result.out
    (hit,) = lines(run("search", "watts", "--bank", "b", "--json", "-k", 1).out)
    assert (hit["id"], hit["layer_scores"], hit["metadata"]) == ("erik", {"2": 0.91}, {"a": 1})


# Train


def test_train_hands_on_config_and_folder_and_keeps_stdout_for_the_result(run, monkeypatch):
    calls = []

    def train(config, folder, overrides, *, progress):
        print("noise of a trainer")
        progress("numbers", 5, 10, {"loss": 0.5, "learning_rate": 1e-3})
        calls.append((config, folder, overrides))
        return folder / "model"

    monkeypatch.setitem(sys.modules, "msa.training.run", SimpleNamespace(train=train))
    changes = ["--set", "seed=3", "--set", "stages[0].steps=2"]
    result = run("train", "c.yaml", "--output", "runs/a", "--json", *changes)
    assert calls == [(Path("c.yaml"), Path("runs/a"), ["seed=3", "stages[0].steps=2"])]
    assert lines(result.out) == [{"model": "runs/a/model"}]
    assert "noise" in result.err
    monkeypatch.setattr(sys.modules["msa.training.run"], "train", Raises(KeyboardInterrupt()))
    result = run("train", "c.yaml", "--output", "runs/a")
    assert (result.code, result.err.count("\n")) == (130, 1)
    assert "last checkpoint" in result.err


# Output


def test_numbers_and_sizes_read_well():
    assert output.number(1234567.4) == "1,234,567"
    assert output.size(999) == "999 bytes"
    assert output.size(1_234_567) == "1.2 MB"
    assert output.size(2.5e15) == "2,500.0 TB"
    assert output.plural(1, "token") == "1 token"
    assert output.plural(2000, "token") == "2,000 tokens"


def test_text_of_strangers_cannot_write_to_the_terminal():
    assert output.one_line("a\x1b[31m\n\tb\u202ec") == "a [31m b c"
    assert output.one_line("word " * 10, 11) == "word word…"
    assert ask.printable("a\x1b\nb") == "a\nb"


def test_progress_shows_a_bar_on_a_terminal_and_a_line_now_and_then_elsewhere(monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    bar = output.ProgressBar(terminal, "Indexing", 10)
    bar.start()
    bar.advance(5, "7 documents")
    bar.stop()
    assert "Indexing" in terminal.file.getvalue()
    assert "7 documents" in terminal.file.getvalue()

    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    plain = Console(file=io.StringIO(), width=100)
    bar = output.ProgressBar(plain, "Indexing", 10)
    bar.start()
    for _ in range(5):
        now[0] += output.QUIET_SECONDS / 2
        bar.advance(1, "7 documents")
    bar.stop()
    written = plain.file.getvalue()
    assert written == "Indexing 20%: 7 documents\nIndexing 40%: 7 documents\n"


def test_piped_output_is_plain_and_as_wide_as_said(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    console = output.stdout()
    console.print("bold [17] :smile:", style="bold red")
    assert sys.stdout.getvalue() == "bold [17] :smile:\n"
    assert console.width == output.PLAIN_WIDTH


# What is opened


def test_a_folder_that_is_no_bank_is_said_before_a_model_is_loaded(run, monkeypatch, tmp_path):
    monkeypatch.setattr(options, "load_model", Raises(AssertionError("loaded a model")))
    result = run("ask", "Q?", "--bank", tmp_path / "none")
    assert result.code == 1
    assert "none" in result.err
    assert result.err.count("\n") == 1
