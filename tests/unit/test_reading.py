"""Routing of a whole corpus, the reader without routing, systems and runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import make_tiny_model
from evaluation_tools import tiny_question_set
from msa import Document, MemoryBank, MemoryEngine
from msa.errors import InputError
from msa.evaluation.backbone import BackboneRetriever
from msa.evaluation.corpus_words import CorpusWords
from msa.evaluation.reader import ReadAnswer, TextReader, is_refusal
from msa.evaluation.retrieval import BM25Retriever, best_rows, z_scores
from msa.evaluation.routing import bank_states, fuse, layer_scores
from msa.evaluation.runs import read_run, run
from msa.evaluation.systems import (
    GoldSystem,
    MemorySystem,
    Outcome,
    ReaderSystem,
    _whole,
    bank_documents,
)
from msa.inference.options import AskOptions
from msa.inference.scheduler import Scheduler
from msa.memory.latent import LatentMemory
from msa.model.checkpoint import Checkpoint
from msa.text.prompts import PromptTemplate

TEMPLATE = PromptTemplate()


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory):
    return tiny_question_set(tmp_path_factory.mktemp("sets"))


def checkpoint_of(model, tokenizer):
    return Checkpoint(model, tokenizer, TEMPLATE, AskOptions(), "tiny")


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tiny_tokenizer):
    return checkpoint_of(tiny_model, tiny_tokenizer)


@pytest.fixture(scope="module")
def engine(tiny_model, tiny_tokenizer, tiny_set, tmp_path_factory):
    path = tmp_path_factory.mktemp("banks") / "bank"
    with MemoryBank.create(path, tiny_model, tiny_tokenizer) as bank:
        bank.add(bank_documents(tiny_set.documents))
        with MemoryEngine(bank, max_new_tokens=12) as engine:
            yield engine


@pytest.fixture(scope="module")
def states(engine, tiny_set):
    return bank_states(engine.bank, tiny_set.documents)


# ---- routing


def test_states_of_a_bank_stand_in_the_order_of_the_corpus(
    tiny_model, tiny_tokenizer, tiny_set, states, tmp_path
):
    """However they came into the bank: in commits, split into parts, among deleted ones."""
    documents = list(tiny_set.documents)
    with MemoryBank.create(
        tmp_path / "bank", tiny_model, tiny_tokenizer, max_document_tokens=40
    ) as bank:
        bank.add([Document("gone", "This text is deleted again. " * 3)])
        bank.add(reversed(documents), commit_tokens=50)
        bank.delete("gone")
        assert len(bank) > len(documents)  # some were split
        found = bank_states(bank, documents)
        some = bank_states(bank, documents[3:5])
    assert len(found.chunk_counts) == len(documents)
    assert (found.chunk_counts >= states.chunk_counts).all()
    start, stop = (int(found.chunk_counts[:i].sum()) for i in (3, 5))
    for layer, whole in found.layers.items():
        for name in ("pooled_keys", "pooled_values", "routing_keys"):
            part = getattr(some.layers[layer], name)
            torch.testing.assert_close(part, getattr(whole, name)[start:stop])
            assert len(getattr(whole, name)) == int(found.chunk_counts.sum())


@pytest.mark.parametrize("reduction", ["max", "pooled"])
def test_layer_scores_rank_as_the_engine_routes(tiny_tokenizer, tiny_set, tmp_path, reduction):
    model = make_tiny_model(query_reduction=reduction)
    with MemoryBank.create(tmp_path / "bank", model, tiny_tokenizer) as bank:
        bank.add(tiny_set.documents)
        engine = MemoryEngine(bank, max_rounds=1, max_new_tokens=1)
        texts = [question.text for question in tiny_set.questions]
        answers = engine.ask(texts)
        states = bank_states(bank, tiny_set.documents)
    checkpoint = checkpoint_of(model, tiny_tokenizer)
    found = layer_scores(checkpoint, states, texts, batch_size=3)
    for layer, scores in found.items():
        for row, answer in enumerate(answers):
            routed = answer.rounds[0].routed[layer]
            rows = best_rows(scores, model.config.top_k_documents)[row]
            assert [d.id for d in routed] == [tiny_set.documents[i].id for i in rows]
            np.testing.assert_allclose([d.score for d in routed], scores[row, rows], atol=1e-4)


def test_layers_are_added_with_their_weights():
    layers = {2: np.array([[1.0, 2.0]], np.float32), 3: np.array([[10.0, 0.0]], np.float32)}
    np.testing.assert_allclose(fuse(layers), [[11, 2]])
    np.testing.assert_allclose(fuse(layers, {3: 0.1}), [[1, 0]])
    normalized = fuse(layers, normalized=True)
    np.testing.assert_allclose(normalized, z_scores(layers[2]) + z_scores(layers[3]))


def test_the_backbones_own_states_find_a_text_by_itself(checkpoint, tiny_set):
    retriever = BackboneRetriever(checkpoint, tiny_set.documents, batch_tokens=100)
    texts = [document.content for document in tiny_set.documents]
    scores = retriever.scores(texts)
    np.testing.assert_allclose(scores.diagonal(), 1, atol=1e-4)
    assert [row[0] for row in best_rows(scores, 1)] == list(range(len(texts)))
    np.testing.assert_allclose(retriever.scores(texts[:1]), scores[:1], atol=1e-4)


# ---- reading


def test_the_reader_answers_as_the_engine_does_with_the_same_documents(
    checkpoint, tiny_set, states, engine
):
    """Same memory, same documents read: same prompt, same answer."""
    texts = [question.text for question in tiny_set.questions]
    answers = engine.ask(texts, max_rounds=1, max_documents_per_round=2)
    memory = LatentMemory(states, checkpoint.model.config.top_k_documents)
    reader = TextReader(checkpoint, max_new_tokens=12, memory=memory)
    rows = {document.id: i for i, document in enumerate(tiny_set.documents)}
    documents = [
        [(c.number, tiny_set.documents[rows[c.id]]) for c in answer.citations] for answer in answers
    ]
    read = reader.answer(texts, documents)
    assert [r.text for r in read] == [a.text for a in answers]
    assert [r.numbers for r in read] == [tuple(c.number for c in a.citations) for a in answers]


@pytest.mark.parametrize("weight", [{"evidence_weight": 40.0}, {"answer_beginnings": 4}], ids=str)
def test_the_reader_weighs_answers_as_the_engine_does(checkpoint, tiny_set, states, engine, weight):
    texts = [question.text for question in tiny_set.questions]
    asked = {"max_rounds": 1, "max_documents_per_round": 2, "min_documents_per_round": 2}
    answers = engine.ask(texts, **asked, **weight)
    assert [a.text for a in answers] != [a.text for a in engine.ask(texts, **asked)]
    memory = LatentMemory(states, checkpoint.model.config.top_k_documents)
    words = CorpusWords(document.content for document in tiny_set.documents)
    reader = TextReader(
        replace(checkpoint, ask_options=AskOptions(**weight)),
        max_new_tokens=12,
        memory=memory,
        coverage=words.coverage,
    )
    of_id = {document.id: document for document in tiny_set.documents}
    documents = [[(c.number, of_id[c.id]) for c in answer.citations] for answer in answers]
    assert [r.text for r in reader.answer(texts, documents)] == [a.text for a in answers]


@pytest.mark.parametrize("weight", [{"evidence_weight": 40.0}, {"answer_beginnings": 4}], ids=str)
def test_an_answer_that_is_drawn_keeps_the_probabilities_of_the_model(tiny_set, engine, weight):
    texts = [question.text for question in tiny_set.questions]
    drawn, plain = (engine.ask(texts, temperature=1.0, seed=3, **w) for w in (weight, {}))
    assert [a.text for a in drawn] == [a.text for a in plain]


def test_an_answer_of_several_beginnings_is_the_likeliest_and_comes_in_one_piece(tiny_set, engine):
    texts = [question.text for question in tiny_set.questions]
    several = {"answer_beginnings": 5, "max_new_tokens": 6}
    greedy, best = (engine.ask(texts, **(several | {"answer_beginnings": n})) for n in (1, 5))
    assert [a.text for a in greedy] != [a.text for a in best]
    for one, other in zip(greedy, best, strict=True):
        if one.text == other.text:
            assert one.usage.generated_tokens <= other.usage.generated_tokens
    for text, answer in zip(texts, best, strict=True):
        assert engine.ask(text, **several).text == answer.text  # whoever asks beside it
        events = list(engine.ask(text, stream=True, **several))
        pieces = [event.data for event in events if event.kind == "token"]
        assert pieces == ([answer.text] if answer.text else [])
        assert [event.kind for event in events].count("answer") == 1


def test_a_question_counts_once_however_many_texts_it_writes(tiny_set, engine):
    texts = [question.text for question in tiny_set.questions][:3]
    scheduler = Scheduler(engine.model, max_rows=2)
    requests = [engine.request(text, answer_beginnings=4) for text in texts]
    for request in requests:
        scheduler.add(request)
    most = 0
    while not (most or scheduler.idle):
        scheduler.step()
        rows = sum(len(cohort.rows) for cohort in scheduler._cohorts)
        most = rows if rows > 2 else 0
    assert most
    assert len(scheduler) == 3
    scheduler.remove(requests[0])
    assert len(scheduler) == 2
    assert set(scheduler.clear()) == set(requests[1:])
    assert scheduler.idle


def test_words_of_a_corpus_weigh_as_in_a_bank_of_it(tiny_set, engine):
    documents = tiny_set.documents
    words = CorpusWords(document.content for document in documents)
    texts = [*(document.text for document in documents), "Nothing", ""]
    for question in [*(q.text for q in tiny_set.questions), "Which zeppelin?", "?", "cafe\u0301"]:
        expected = engine.bank.lexical_coverage(question, texts)
        assert words.coverage(question, texts) == pytest.approx(expected)


def test_without_a_memory_only_the_documents_decide(checkpoint):
    reader = TextReader(checkpoint, max_new_tokens=5)
    rome, oslo = Document("r", "Rome"), Document("o", "Oslo")
    (one,), (other,) = (reader.answer(["Where?"], [[(1, read)]]) for read in (rome, oslo))
    assert one.text != other.text
    batch = reader.answer(["Where?"] * 2, [[(1, rome)], [(1, oslo)]])
    assert [r.text for r in batch] == [one.text, other.text]
    assert one.generated_tokens <= 5


def test_documents_without_room_are_left_out_and_a_question_without_room_is_refused(
    tiny_tokenizer,
):
    model = make_tiny_model(max_position_embeddings=400)
    reader = TextReader(checkpoint_of(model, tiny_tokenizer), max_new_tokens=4)
    rome, long = Document("r", "Rome"), Document("x", "x" * 400)
    (found,) = reader.answer(["Where?"], [[(7, rome), (9, long)]])
    assert found.numbers == (7,)
    with pytest.raises(InputError, match="Ask a shorter question"):
        reader.answer(["Where" * 99], [[]])


# ---- systems


class FakeReader:
    """Answers with the texts that it is handed."""

    def answer(self, questions, documents, max_new_tokens=None):
        texts = [" ".join(document.content for _, document in given) for given in documents]
        return [
            ReadAnswer(text, False, tuple(n for n, _ in given), 3, 2)
            for text, given in zip(texts, documents, strict=True)
        ]


def test_a_reader_gets_the_best_documents_and_never_the_hidden_ones(tiny_set):
    system = ReaderSystem(FakeReader(), BM25Retriever(tiny_set.documents), tiny_set.documents, 2)
    questions = tiny_set.questions[:2]
    first, second = system.ask(questions)
    assert (first.named[0], second.named[0]) == ("oslo", "rome")
    assert [len(o.named) for o in (first, second)] == [2, 2]
    assert len(first.ranked) == len(tiny_set.documents)
    assert first.answer.startswith(tiny_set.documents[1].content)
    hidden = system.ask([replace(questions[0], hidden=("oslo",)), questions[1]])
    assert "oslo" not in hidden[0].ranked
    assert len(hidden[0].ranked) == len(tiny_set.documents) - 1
    assert hidden[1].named == second.named


def test_the_ceiling_is_handed_the_gold_documents_in_their_order(tiny_set):
    questions = tiny_set.questions[2:]
    assert [o.named for o in GoldSystem(FakeReader(), tiny_set.documents).ask(questions)] == [
        ("cake", "ada"),
        (),
    ]
    none = GoldSystem(FakeReader(), tiny_set.documents, 0).ask(questions)
    assert [o.named for o in none] == [(), ()]


def test_a_memory_is_asked_without_the_hidden_documents(engine, tiny_set):
    system = MemorySystem(engine, tiny_set.documents, {"max_rounds": 1, "max_new_tokens": 4})
    outcomes = system.ask(tiny_set.questions)
    assert {o.rounds for o in outcomes} == {2}  # one that reads, one that answers
    assert all(o.named and set(o.named) <= set(o.ranked) for o in outcomes)
    hidden = [o.ranked[0] for o in outcomes]
    asked = [replace(q, hidden=(i,)) for q, i in zip(tiny_set.questions, hidden, strict=True)]
    for away, outcome in zip(hidden, system.ask(asked), strict=True):
        assert away not in outcome.ranked + outcome.named


def test_parts_of_a_document_count_as_the_document(tiny_set):
    known = {d.id for d in tiny_set.documents}
    assert _whole(["oslo#2", "a#1", "oslo#1", "rome"], known) == ("oslo", "a#1", "rome")


def test_a_refusal_is_known_by_its_words():
    template = PromptTemplate(refusal="the memory is silent")
    assert is_refusal("Memory is silent.", template)
    assert is_refusal(" ", template)
    assert not is_refusal("Rome", template)


# ---- runs

ABOUT = {"set": "tiny", "split": "dev", "system": "x", "data": "d", "model": "m", "seed": 1}


class FakeSystem:
    """Right about every question."""

    def __init__(self):
        self.asked = []

    def ask(self, questions):
        self.asked.append([q.id for q in questions])
        return [
            Outcome(
                answer=q.answers[0] if q.answers else "",
                refused=not q.answers,
                ranked=("x", *q.gold),
                named=q.gold,
                rounds=2,
                stopped="answered",
                seconds=0.5,
                prompt_tokens=7,
                generated_tokens=3,
            )
            for q in questions
        ]


def test_a_run_goes_on_where_it_was_stopped(tiny_set, tmp_path):
    path = tmp_path / "a.jsonl"
    system = FakeSystem()
    done = run(path, ABOUT, lambda: system, tiny_set.questions, batch_size=3)
    assert system.asked == [["q1", "q2", "q3"], ["q4"]]
    assert done.about["questions"] == 4
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])  # two answers, and one torn by the stop
    system = FakeSystem()
    again = run(path, ABOUT, lambda: system, tiny_set.questions, batch_size=3)
    assert system.asked == [["q1", "q2", "q3"], ["q4"]]  # batches as they were
    assert again == done
    run(path, ABOUT, lambda: pytest.fail("made for nothing"), tiny_set.questions)


@pytest.mark.parametrize("name", ["data", "model", "seed", "system"])
def test_a_run_of_something_else_is_not_gone_on_with(tiny_set, tmp_path, name):
    path = tmp_path / "a.jsonl"
    run(path, ABOUT, FakeSystem, tiny_set.questions)
    with pytest.raises(InputError, match=rf"was made with {name} .*give another output folder"):
        run(path, ABOUT | {name: "other"}, FakeSystem, tiny_set.questions)


def test_a_damaged_run_is_one_clear_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"about": {}}\nnonsense\n')
    with pytest.raises(InputError, match="line 2: not a line of a run"):
        read_run(path)
    path.write_text("{}\n")
    with pytest.raises(InputError, match="no run"):
        read_run(path)
    with pytest.raises(InputError, match="cannot be read as a run"):
        read_run(tmp_path)


def test_to_refuse_is_right_where_there_is_no_answer_and_nowhere_else(tiny_set, tmp_path):
    done = run(tmp_path / "a.jsonl", ABOUT, FakeSystem, tiny_set.questions)
    assert [row["refused"] for row in done.rows] == [False, False, False, True]
    assert {(row["em"], row["f1"]) for row in done.rows} == {(1, 1)}
    swapped = [replace(q, answers=() if q.answers else ("x",)) for q in tiny_set.questions]
    system = FakeSystem()
    outcomes = system.ask(tiny_set.questions)
    system.ask = lambda questions: outcomes
    done = run(tmp_path / "b.jsonl", ABOUT, lambda: system, swapped)
    assert {(row["em"], row["f1"]) for row in done.rows} == {(0, 0)}
