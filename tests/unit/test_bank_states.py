"""A bank under any sequence of changes, kills and readers holds what a dictionary would."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from bank_tools import LAYERS, make_document
from msa import MemoryBank
from msa.errors import DocumentNotFoundError
from msa.memory.ingest.encoder import DocumentEncoder
from msa.memory.loaded.loaded_bank import LoadedBank
from msa.memory.store.records import EncodedBatch
from msa.types import LatentStates, LayerStates

NAMES = st.sampled_from("abcdef")
VERSIONS = st.integers(0, 3)
DOCUMENTS = st.dictionaries(NAMES, VERSIONS, min_size=1, max_size=3)
CHUNK = 8


def version(name, number):
    """The document of this name in its n-th version; those of "c" have to be split."""
    return make_document(name, number, words=25 if name == "c" else 3)


def states_without_a_model(self, batch):
    """Every number of a document's states is the document's number."""
    counts = torch.tensor([-(-len(ids) // CHUNK) for _, ids in batch])
    numbers = torch.tensor([float(n) for n, _ in batch])
    filled = torch.repeat_interleave(numbers, counts)[:, None, None].expand(-1, 2, 16)
    layers = {i: LayerStates(filled, filled + 0.25, filled + 0.5) for i in LAYERS}
    return EncodedBatch(tuple(n for n, _ in batch), LatentStates(counts, layers))


class BankMachine(RuleBasedStateMachine):
    """The bank beside a dictionary, id -> version, and two readers of it."""

    model = tokenizer = None  # the test gives them

    def __init__(self):
        super().__init__()
        self.patch = mock.patch.object(DocumentEncoder, "_encode_batch", states_without_a_model)
        self.patch.start()
        self.room = tempfile.TemporaryDirectory()
        self.folders = 0
        self.held = {}
        self.owners = {}
        self.views = []
        self.bank = None

    def folder(self):
        self.folders += 1
        return Path(self.room.name, str(self.folders))

    @initialize()
    def create(self):
        self.path = self.folder()
        options = {"max_document_tokens": 128, "dtype": torch.float32}
        MemoryBank.create(self.path, self.model, self.tokenizer, **options).close()
        self.open()

    def open(self):
        self.bank = MemoryBank.open(self.path, self.model, self.tokenizer)
        self.readers = [MemoryBank.open(self.path, read_only=True) for _ in range(2)]
        self.loaded = LoadedBank(self.readers[0])

    def close(self):
        if self.bank is not None:
            self.loaded.close()
            for bank in (self.bank, *self.readers):
                bank.close()

    # ---- changes

    @rule(documents=DOCUMENTS)
    def add(self, documents):
        report = self.bank.add(
            (version(*item) for item in documents.items()), on_duplicate="update"
        )
        new = [name for name in documents if name not in self.held]
        same = [name for name, number in documents.items() if self.held.get(name) == number]
        assert (report.added, report.unchanged) == (len(new), len(same))
        assert not report.failed
        self.held.update(documents)

    @rule(documents=DOCUMENTS)
    def add_what_is_new(self, documents):
        self.bank.add((version(*item) for item in documents.items()), on_duplicate="skip")
        self.held = {**documents, **self.held}

    @rule(name=NAMES, number=VERSIONS)
    def update(self, name, number):
        if name in self.held:
            self.bank.update(version(name, number))
            self.held[name] = number
        else:
            with pytest.raises(DocumentNotFoundError):
                self.bank.update(version(name, number))

    @rule(names=st.sets(NAMES, min_size=1, max_size=2))
    def delete(self, names):
        if names <= self.held.keys():
            assert self.bank.delete(names) == len(names)
            for name in names:
                del self.held[name]
        else:
            with pytest.raises(DocumentNotFoundError):
                self.bank.delete(names)

    @rule()
    def compact(self):
        self.bank.compact()
        assert len(self.bank.catalog.segments()) <= 1

    # ---- ends

    @rule()
    def reopen(self):
        self.close()
        self.open()

    @rule(
        change=st.sampled_from(["add", "update", "delete", "compact"]),
        documents=DOCUMENTS,
        committed=st.booleans(),
    )
    def kill(self, change, documents, committed):
        """Go on with what is on disk right before or after the commit of a change."""
        before, left = dict(self.held), self.folder()
        name, number = next(iter(documents.items()))

        def copied(method):
            def call(*arguments, **named):
                if not committed and not left.exists():
                    shutil.copytree(self.path, left)
                found = method(*arguments, **named)
                if committed and not left.exists():
                    shutil.copytree(self.path, left)
                return found

            return call

        catalog = self.bank.catalog
        watched = {n: copied(getattr(catalog, n)) for n in ("commit", "delete", "replace_segments")}
        with mock.patch.multiple(catalog, **watched):
            {
                "add": lambda: self.add(documents),
                "update": lambda: self.update(name, number),
                "delete": lambda: self.delete({name}),
                "compact": self.bank.compact,
            }[change]()
        if not left.exists():  # there was nothing to commit
            shutil.copytree(self.path, left)
        elif not committed:
            self.held = before
        self.close()
        self.path = left
        self.open()
        report = self.bank.verify()
        assert report.ok, report.problems
        assert report.orphans == ()

    # ---- readers

    @rule()
    def keep_a_view(self):
        self.loaded.refresh()
        self.views = [*self.views, (self.loaded.view(), self.numbers())][-2:]

    def numbers(self):
        return {stored.number for stored in self.bank.documents()}

    def check_view(self, view, numbers):
        """It selects from these documents, and gives their states and no others."""
        rows = view._rows
        assert set(rows.numbers[rows.live].tolist()) == numbers
        for layer in LAYERS if numbers else ():
            chosen = rows.live.nonzero().flatten()
            own = torch.repeat_interleave(rows.numbers[chosen], rows.chunk_counts[chosen])
            keys, values = view._content.read(view._rows, layer, chosen)
            assert torch.equal(keys[:, 0, 0], own.float())
            assert torch.equal(values[:, 1, 3], own + 0.25)
            owners = torch.repeat_interleave(rows.numbers, rows.chunk_counts)
            assert torch.equal(view._indexes[layer].keys.keys[: len(owners), 1, 2], owners + 0.5)

    @invariant()
    def all_see_what_the_dictionary_holds(self):
        if self.bank is None:
            return
        for bank in (self.bank, *self.readers):
            stored = bank.documents()
            found = {s.part_of or s.document.id: s.document.metadata["seed"] for s in stored}
            assert found == self.held
            assert {bank.parts(name)[0].num_parts for name in found} <= {1, 2, 3}
        for s in stored:  # a number means one text for ever
            text = s.document.id, s.document.text
            assert self.owners.setdefault((self.folders, s.number), text) == text

    @invariant()
    def readers_give_the_states_of_these_documents(self):
        if self.bank is not None:
            self.loaded.refresh()
            self.check_view(self.loaded.view(), self.numbers())
            for view, numbers in self.views:
                self.check_view(view, numbers)

    def teardown(self):
        if self.bank is not None:
            report = self.bank.verify()
            assert report.ok, report.problems
            self.close()
        self.patch.stop()
        self.room.cleanup()


def test_whatever_happens_a_bank_holds_what_a_dictionary_would(tiny_model, tiny_tokenizer):
    assert tiny_model.config.chunk_size == CHUNK
    BankMachine.model, BankMachine.tokenizer = tiny_model, tiny_tokenizer
    run_state_machine_as_test(
        BankMachine,
        settings=settings(
            max_examples=15,
            stateful_step_count=16,
            deadline=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
