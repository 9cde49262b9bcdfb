"""A bank against a dictionary: any order of writing, killing, reopening and reading."""

from __future__ import annotations

import shutil
import signal
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from test_bank_durability import kill_at_call

from bank_tools import make_document, states_of
from conftest import make_tiny_model, make_tiny_tokenizer
from msa.memory.bank import MemoryBank

NAMES = [f"n{i}" for i in range(6)]
VERSIONS = st.integers(0, 3)
SOME = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)


class BankMachine(RuleBasedStateMachine):
    """A bank with a writer and two readers, and a dictionary: id -> version of its text."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="msa-machine-"))
        self.path = self.folder / "bank"
        self.model, self.tokenizer = make_tiny_model(), make_tiny_tokenizer()
        self.expected: dict[str, int] = {}
        self.owners: dict[int, str] = {}  # number -> the id that it was first seen with

    @initialize()
    def create(self) -> None:
        self.bank = MemoryBank.create(self.path, self.model, self.tokenizer)
        self.readers = [MemoryBank.open(self.path, read_only=True) for _ in range(2)]

    def written(self, names: list[str], version: int, on_duplicate: str) -> dict[str, int]:
        """What the bank must hold after an `add`, which is not made here."""
        old = {} if on_duplicate == "update" else self.expected
        return {**self.expected, **{name: version for name in names if name not in old}}

    @rule(
        names=SOME, version=VERSIONS, mode=st.sampled_from(["skip", "update"]), tiny=st.booleans()
    )
    def add(self, names: list[str], version: int, mode: str, tiny: bool) -> None:
        documents = [make_document(name, version) for name in names]
        after = self.written(names, version, mode)
        report = self.bank.add(documents, on_duplicate=mode, commit_tokens=1 if tiny else 10_000)
        assert report.added == len(after.keys() - self.expected.keys())
        self.expected = after

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), version=VERSIONS)
    def update(self, data: st.DataObject, version: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.expected)))
        self.bank.update(make_document(name, version))
        self.expected[name] = version

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.expected)), min_size=1, unique=True))
        assert self.bank.delete(names) == len(names)
        for name in names:
            del self.expected[name]

    @rule()
    def compact(self) -> None:
        self.bank.compact()

    @rule()
    def reopen(self) -> None:
        self.bank.close()
        self.bank = MemoryBank.open(self.path, self.model, self.tokenizer)

    @rule(which=st.integers(0, 1))
    def reopen_a_reader(self, which: int) -> None:
        self.readers[which].close()
        self.readers[which] = MemoryBank.open(self.path, read_only=True)

    @rule(
        names=SOME,
        version=VERSIONS,
        call=st.integers(1, 30),
        doing=st.sampled_from(["add", "delete", "compact"]),
    )
    def kill(self, names: list[str], version: int, call: int, doing: str) -> None:
        """Another process writes and is killed at one of its calls; all of it is there or none."""
        self.bank.close()

        def operation(bank: MemoryBank, tell: object) -> None:
            if doing == "compact":
                bank.compact()
            elif doing == "delete":
                bank.delete([name for name in names if name in bank])
            else:
                bank.add([make_document(n, version) for n in names], on_duplicate="update")

        after = dict(self.expected)
        if doing == "add":
            after = self.written(names, version, "update")
        elif doing == "delete":
            after = {name: v for name, v in after.items() if name not in names}
        code, said = kill_at_call(self.path, call, self.model, self.tokenizer, operation)
        assert code in (0, -signal.SIGKILL), said
        self.bank = MemoryBank.open(self.path, self.model, self.tokenizer)
        if code == 0 or self.held(self.bank) != self.texts(self.expected):
            self.expected = after

    def texts(self, versions: dict[str, int]) -> dict[str, str]:
        return {name: make_document(name, version).text for name, version in versions.items()}

    @staticmethod
    def held(bank: MemoryBank) -> dict[str, str]:
        return {stored.document.id: stored.document.text for stored in bank.documents()}

    @invariant()
    def writer_and_readers_hold_what_the_dictionary_holds(self) -> None:
        for bank in (self.bank, *self.readers):
            assert self.held(bank) == self.texts(self.expected)
            assert len(bank) == len(self.expected)
        for stored in self.bank.documents():  # a number is never given to another document
            name = stored.document.id
            assert self.owners.setdefault(stored.number, name) == name
        assert {name for name in NAMES if name in self.bank} == self.expected.keys()

    def teardown(self) -> None:
        if hasattr(self, "bank"):
            report = self.bank.verify()
            assert report.ok, report
            if self.expected:
                assert states_of(self.bank).keys() == {s.number for s in self.bank.documents()}
            for bank in (self.bank, *self.readers):
                bank.close()
        shutil.rmtree(self.folder)


BankMachine.TestCase.settings = settings(
    max_examples=12,
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestBankMachine = BankMachine.TestCase
