"""Asking a real bank on disk, while it changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_tiny_model, make_tiny_tokenizer
from msa import Document, MemoryBank, MemoryEngine
from msa.errors import (
    BankError,
    BankMismatchError,
    ConfigError,
    EmptyBankError,
    InputError,
    ModelError,
)
from msa.inference.options import AskOptions
from msa.memory.loaded.loaded_bank import LoadedBank
from msa.memory.search.clustered_index import PruningSettings
from msa.model.checkpoint import Checkpoint
from msa.text.prompts import PromptTemplate
from msa.types import Answer

DOCUMENTS = [
    Document("ada", "Ada was born in Rome.", title="Ada", metadata={"user": "a", "year": 1}),
    Document("bob", "Bob is Ada's son, a baker.", metadata={"user": "b", "year": 1}),
    Document("rome", "Rome lies on the Tiber.", metadata={"user": "a", "year": 2}),
    Document("cid", "Cid paints.", metadata={"user": "b"}),
    Document("tiber", "The Tiber is 406 km long.", metadata={"user": "a"}),
    Document("dee", "Dee measures rivers."),
]
QUESTION = "Where was Ada born?"
FEW = {"max_new_tokens": 6, "max_rounds": 2, "max_documents_per_round": 2}


@pytest.fixture
def model() -> Any:
    return make_tiny_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tiny_tokenizer()


@pytest.fixture
def bank(tmp_path: Path, model: Any, tokenizer: Any) -> Iterator[MemoryBank]:
    with MemoryBank.create(tmp_path / "bank", model, tokenizer) as bank:
        bank.add(DOCUMENTS)
        yield bank


def routed_ids(answer: Answer) -> set[str]:
    return {d.id for r in answer.rounds for layer in r.routed.values() for d in layer}


def watched(
    monkeypatch: pytest.MonkeyPatch, bank: MemoryBank, name: str, act: Callable[[], None]
) -> None:
    """Do something to the bank just before it is asked, as another process might."""
    method = getattr(bank, name)
    done: list[bool] = []

    def late(numbers: Any) -> Any:
        if not done:
            done.append(True)
            act()
        return method(numbers)

    monkeypatch.setattr(bank, name, late)


def test_every_citation_was_routed_to_and_stands_in_the_bank(
    bank: MemoryBank, model: Any, tokenizer: Any
) -> None:
    engine = MemoryEngine(bank)
    answer = engine.ask(QUESTION, **FEW)
    assert answer.citations
    texts = {d.id: d.text for d in DOCUMENTS}
    for citation in answer.citations:
        assert citation.text == texts[citation.id]
        assert bank.get(citation.id).number == citation.number
        layers = answer.rounds[citation.round - 1].routed.values()
        assert citation.id in {d.id for layer in layers for d in layer}
    for turn in answer.rounds:
        assert {i: len(found) for i, found in turn.routed.items()} == {2: 4, 3: 4}


def test_a_batch_answers_like_its_questions_one_by_one(
    bank: MemoryBank, model: Any, tokenizer: Any
) -> None:
    engine = MemoryEngine(bank, batch_size=3, **FEW)
    questions = [QUESTION, "Bob?", "How long is the river in the city where Ada was born?", "Cid?"]
    together = engine.ask(questions)
    alone = [engine.ask(q) for q in questions]
    for ours, theirs in zip(together, alone, strict=True):
        assert (ours.question, ours.text) == (theirs.question, theirs.text)
        assert ours.citations == theirs.citations
        assert ours.stopped == theirs.stopped
    assert engine.ask([]) == []
    hits = engine.retrieve(questions, top_k=3)
    for some, question in zip(hits, questions, strict=True):
        assert [h.id for h in some] == [h.id for h in engine.retrieve(question, top_k=3)]


def test_a_stream_ends_with_the_answer_that_is_given_without_one(
    bank: MemoryBank, model: Any, tokenizer: Any
) -> None:
    engine = MemoryEngine(bank, **FEW)
    plain = engine.ask(QUESTION)
    events = list(engine.ask(QUESTION, stream=True))
    assert events[-1].kind == "answer"
    answer = events[-1].data
    assert (answer.text, answer.citations) == (plain.text, plain.citations)
    assert "".join(e.data for e in events if e.kind == "token") == answer.text
    assert [e.data.id for e in events if e.kind == "reading"] == [c.id for c in answer.citations]
    assert [e.round for e in events if e.kind == "routing"] == [r.index for r in answer.rounds]


def test_retrieve_lists_as_many_as_asked_for_and_routes_as_an_answer_does(
    bank: MemoryBank, model: Any, tokenizer: Any
) -> None:
    engine = MemoryEngine(bank, **FEW)
    everything = engine.retrieve(QUESTION, top_k=99)
    assert sorted(h.id for h in everything) == sorted(d.id for d in DOCUMENTS)
    assert sum(h.score for h in everything) == pytest.approx(1)
    assert [h.id for h in engine.retrieve(QUESTION, top_k=2)][:1] == [everything[0].id]
    assert len(engine.retrieve(QUESTION, top_k=2)) == 2
    assert all(set(h.layer_scores) == {2, 3} for h in everything)
    first = engine.ask(QUESTION).rounds[0].routed
    for layer, routed in first.items():
        best = sorted(everything, key=lambda h: -h.layer_scores[layer])[: len(routed)]
        assert [d.id for d in routed] == [h.id for h in best]
        for d, h in zip(routed, best, strict=True):
            assert d.score == pytest.approx(h.layer_scores[layer], abs=1e-6)
    ada = next(h for h in everything if h.id == "ada")
    assert (ada.title, ada.text, ada.metadata) == ("Ada", DOCUMENTS[0].text, DOCUMENTS[0].metadata)


def test_a_question_sees_what_was_added_and_deleted_before_it(
    bank: MemoryBank, model: Any, tokenizer: Any
) -> None:
    engine = MemoryEngine(bank)
    bank.add([Document("eve", "Eve sails.")])
    assert "eve" in {h.id for h in engine.retrieve("Eve?", top_k=9)}
    bank.delete(["ada", "bob", "rome", "cid", "tiber"])
    bank.compact()
    answer = engine.ask(QUESTION, max_new_tokens=2)
    assert routed_ids(answer) == {"dee", "eve"}  # fewer documents than k
    bank.delete("dee")
    answer = engine.ask(QUESTION, max_new_tokens=2)
    assert routed_ids(answer) == {"eve"}  # one document
    assert [c.id for c in answer.citations] == ["eve"]
    bank.delete("eve")
    with pytest.raises(EmptyBankError, match="holds no documents; add some"):
        engine.ask(QUESTION)
    with pytest.raises(EmptyBankError, match="holds no documents; add some"):
        engine.retrieve(QUESTION)
    bank.add(DOCUMENTS[:1])
    assert [h.id for h in engine.retrieve(QUESTION)] == ["ada"]


@pytest.mark.parametrize("moment", ["ids", "get_many"])  # routed, not named; named, not read
def test_a_document_deleted_while_it_is_asked_for_is_not_read(
    bank: MemoryBank, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    engine = MemoryEngine(bank, **FEW)
    read = [c.id for c in engine.ask(QUESTION).citations]
    watched(monkeypatch, bank, moment, lambda: (bank.delete(read), bank.compact()))
    answer = engine.ask(QUESTION)
    assert answer.citations
    assert not {c.id for c in answer.citations} & set(read)
    assert not routed_ids(answer) & set(read)


def test_a_question_under_way_keeps_its_state_of_the_bank(
    bank: MemoryBank, model: Any, tokenizer: Any
) -> None:
    engine = MemoryEngine(bank, **FEW)
    before = engine.ask(QUESTION)
    events = engine.ask(QUESTION, stream=True)
    seen = [next(events)]  # the first round has routed
    bank.add([Document(f"new-{i}", f"{'xyzw'[i % 4]}{i * 7919} " * (i % 5 + 1)) for i in range(60)])
    answer = [*seen, *events][-1].data
    assert routed_ids(answer) == routed_ids(before)
    assert answer.text == before.text
    after = routed_ids(engine.ask(QUESTION))
    assert any(i.startswith("new-") for i in after)  # or the test would show nothing


def test_a_filter_keeps_tenants_apart(bank: MemoryBank, model: Any, tokenizer: Any) -> None:
    engine = MemoryEngine(bank, **FEW)
    for _ in range(2):  # the second time from the views that are kept
        assert {h.id for h in engine.retrieve(QUESTION, filter={"user": "a"})} == {
            "ada", "rome", "tiber"
        }  # fmt: skip
        assert routed_ids(engine.ask(QUESTION, filter={"user": "b"})) == {"bob", "cid"}
        assert [h.id for h in engine.retrieve(QUESTION, filter={"user": "a", "year": 2})] == [
            "rome"
        ]
    young = engine.retrieve(QUESTION, filter=lambda metadata: "year" not in metadata)
    assert {h.id for h in young} == {"cid", "tiber", "dee"}
    bank.add([Document("eve", "Eve sails.", metadata={"user": "b"})])
    assert routed_ids(engine.ask(QUESTION, filter={"user": "b"})) == {"bob", "cid", "eve"}
    with pytest.raises(EmptyBankError, match="passes the filter"):
        engine.ask(QUESTION, filter={"user": "c"})
    with pytest.raises(InputError, match="filter is str"):
        engine.ask(QUESTION, filter="user=a")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no JSON value"):
        engine.ask(QUESTION, filter={"user": object()})  # type: ignore[dict-item]


def test_a_filter_compares_as_json_does(bank: MemoryBank, model: Any, tokenizer: Any) -> None:
    kinds = {"one": 1, "true": True, "text": "1", "list": [1, 2], "none": None, "big": 1.5}
    bank.add([Document(name, f"{name} it is.", metadata={"is": v}) for name, v in kinds.items()])
    engine = MemoryEngine(bank, **FEW)

    def found(value: Any) -> set[str]:
        return {h.id for h in engine.retrieve(QUESTION, filter={"is": value})}

    assert found(1) == found(1.0) == {"one", "list"}  # a list holds what its elements are
    assert found(True) == {"true"}
    assert found("1") == {"text"}
    assert found((1, 2)) == found([1, 2]) == {"list"}  # a tuple is JSON's list, now and later
    assert found(None) == {"none"}
    for value in (False, [True, 2], [1], 1.25):
        with pytest.raises(EmptyBankError, match="passes the filter"):
            found(value)
    with pytest.raises(InputError, match="no JSON value"):
        found(math.nan)


def test_a_long_document_is_asked_in_parts(bank: MemoryBank, model: Any, tokenizer: Any) -> None:
    text = " ".join(f"Sentence {i} of the book tells of Ada." for i in range(60))
    bank.add([Document("book", text)])
    engine = MemoryEngine(bank)
    hits = engine.retrieve("What does the book tell?", top_k=99)
    parts = {h.id: h.text for h in hits if h.id.startswith("book#")}
    assert len(parts) == len(bank.parts("book")) > 1


def test_a_pruned_scan_gives_the_same_answers(bank: MemoryBank, model: Any, tokenizer: Any) -> None:
    full = MemoryEngine(bank, **FEW)
    pruned = MemoryEngine(bank, pruning=PruningSettings(block_size=2), **FEW)
    for question in (QUESTION, "Cid?"):
        ours, theirs = pruned.ask(question), full.ask(question)
        assert (ours.text, ours.citations, ours.rounds) == (
            theirs.text,
            theirs.citations,
            theirs.rounds,
        )
    loaded = LoadedBank(bank)
    with pytest.raises(InputError, match="memory is given, with plan or pruning"):
        MemoryEngine(bank, pruning=PruningSettings(), memory=loaded)


def test_a_bank_that_is_open_for_reading_follows_another_that_writes(
    bank: MemoryBank, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    reader = MemoryBank.open(tmp_path / "bank", model, tokenizer, read_only=True)
    with reader, MemoryEngine(reader, **FEW) as engine:
        assert engine.ask(QUESTION).citations
        bank.delete("ada")
        assert "ada" not in {h.id for h in engine.retrieve(QUESTION)}


def test_a_bank_brings_all_that_an_engine_needs_or_is_refused(
    bank: MemoryBank, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    for given in (tmp_path / "bank", str(tmp_path / "bank"), model):
        with pytest.raises(InputError, match=r"expected an open bank, as in MemoryEngine\(Mem"):
            MemoryEngine(given)
    bare = MemoryBank.open(tmp_path / "bank", read_only=True)
    with bare, pytest.raises(BankError, match=r"without a model.*with the one that made it"):
        MemoryEngine(bare)
    options = AskOptions(max_rounds=1)
    held = Checkpoint(model, tokenizer, PromptTemplate(), options, "tiny")
    with MemoryBank.open(tmp_path / "bank", held, read_only=True) as known:
        assert MemoryEngine(known).options == options
        assert MemoryEngine(known, options=AskOptions(), max_rounds=2).options.max_rounds == 2


def test_a_model_that_was_changed_after_its_bank_was_opened_is_refused(
    bank: MemoryBank, model: Any
) -> None:
    assert MemoryEngine(bank)
    model.model.layers[0].mlp.up_proj.weight.data[1, 3] += 1
    with pytest.raises(BankMismatchError, match="other model weights"):
        MemoryEngine(bank)


def test_options_beside_the_weights_are_the_engines_defaults(
    bank: MemoryBank, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "checkpoint")
    AskOptions(max_rounds=1, max_new_tokens=3).save(tmp_path / "checkpoint")
    loaded = type(model).from_pretrained(tmp_path / "checkpoint")
    reader = MemoryBank.open(tmp_path / "bank", loaded, tokenizer, read_only=True)
    engine = MemoryEngine(reader, max_new_tokens=5)
    assert engine.options == AskOptions(max_rounds=1, max_new_tokens=5)
    assert len(engine.ask(QUESTION).rounds) == 2  # one to read, one to answer
    assert engine.ask(QUESTION, max_new_tokens=1).usage.generated_tokens < 20
    assert MemoryEngine(bank).options == AskOptions()


def test_what_cannot_be_asked_is_refused_in_one_line(
    bank: MemoryBank, model: Any, tokenizer: Any
) -> None:
    engine = MemoryEngine(bank)
    cases: list[tuple[type[Exception], Callable[[], Any]]] = [
        (InputError, lambda: engine.ask("")),
        (InputError, lambda: engine.ask(7)),
        (InputError, lambda: engine.retrieve([QUESTION, None])),
        (InputError, lambda: engine.ask("why " * 900)),
        (InputError, lambda: engine.ask([QUESTION, "why " * 900])),
        (InputError, lambda: engine.retrieve("why " * 900)),
        (InputError, lambda: engine.retrieve(QUESTION, top_k=0)),
        (InputError, lambda: engine.retrieve(QUESTION, top_k=True)),
        (InputError, lambda: engine.ask([QUESTION], stream=True)),
        (InputError, lambda: engine.ask("", stream=True)),  # at once, not at the first event
        (ConfigError, lambda: engine.ask(QUESTION, top_k=3)),
        (ConfigError, lambda: engine.ask(QUESTION, max_rounds=0)),
        (ConfigError, lambda: MemoryEngine(bank, temperature=-1)),
    ]
    for kind, call in cases:
        with pytest.raises(kind) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("routing", [True, False])
def test_a_model_that_computes_nonsense_is_refused(
    bank: MemoryBank, model: Any, tokenizer: Any, routing: bool
) -> None:
    engine = MemoryEngine(bank)
    with torch.no_grad():
        if routing:
            model.model.layers[2].self_attn.router_q_proj[0].weight.fill_(math.nan)
        else:
            model.model.layers[2].mlp.up_proj.weight.fill_(math.nan)
    for call in (engine.ask, engine.retrieve):
        with pytest.raises(ModelError, match="NaN"):
            call(QUESTION)
    with pytest.raises(ModelError, match="NaN"):
        list(engine.ask(QUESTION, stream=True))


def test_a_model_whose_last_layer_computes_nonsense_answers_nothing(
    bank: MemoryBank, model: Any, tokenizer: Any
) -> None:
    engine = MemoryEngine(bank)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.fill_(math.nan)
    with pytest.raises(ModelError, match="logits are not finite"):
        engine.ask(QUESTION)


def test_several_threads_may_ask_one_engine(bank: MemoryBank, model: Any, tokenizer: Any) -> None:
    engine = MemoryEngine(bank, **FEW)
    questions = [QUESTION, "Bob?", "How long is the Tiber?", "Who paints?"]
    expected = [engine.ask(q).text for q in questions]
    with ThreadPoolExecutor(4) as pool:
        streams = pool.map(lambda q: list(engine.ask(q, stream=True))[-1].data, questions)
        answers = pool.map(engine.ask, questions)
        assert [a.text for a in answers] == expected
        assert [a.text for a in streams] == expected


def test_a_bfloat16_model_asks_its_bank(tmp_path: Path, tokenizer: Any) -> None:
    model = make_tiny_model().to(torch.bfloat16)
    with MemoryBank.create(tmp_path / "bank", model, tokenizer) as bank:
        bank.add(DOCUMENTS)
        engine = MemoryEngine(bank, prior_weight=1.0, **FEW)
        assert engine.ask(QUESTION).citations
        assert len(engine.retrieve(QUESTION)) == len(DOCUMENTS)
