"""Own and hidden documents, banks of haystacks and their copies, full context, the reranker."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from evaluation_tools import tiny_question_set
from msa import Document, MemoryBank
from msa.errors import InputError
from msa.evaluation.banks import HaystackBanks, copy_bank
from msa.evaluation.question_sets import Question, QuestionSet, hash_of
from msa.evaluation.reader import ReadAnswer, TextReader
from msa.evaluation.rerank import Reranker
from msa.evaluation.retrieval import BM25Retriever, JoinedRetriever
from msa.evaluation.runs import document_scores
from msa.evaluation.systems import FULL, FullSystem, Outcome, ReaderSystem
from msa.evaluation.tasks.base import Change
from msa.evaluation.workbench import Workbench, Workplace, expanded_systems, parse_system
from msa.inference.options import AskOptions
from msa.model.checkpoint import Checkpoint
from msa.text.prompts import PromptTemplate

FIELDS = ("north", "south", "east", "west", "hill", "valley")
BOXES = ("red", "green", "blue")
HAY = tuple(
    Document(f"hay-{i}", f"Hay of the {f} is dry and yellow.") for i, f in enumerate(FIELDS)
)
NEEDLES = tuple(
    Document(f"q{i}.0", f"The code of the {b} box is {i}77.") for i, b in enumerate(BOXES)
)
ASKED = tuple(
    Question(f"What is in the {b} box?", (f"{i}77",), (f"q{i}.0",), f"q{i}", own=(f"q{i}.0",))
    for i, b in enumerate(BOXES)
)
SET = QuestionSet("boxes", "test", (*HAY, *NEEDLES), ASKED, "0123")


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tiny_tokenizer):
    options = AskOptions(max_rounds=1, max_new_tokens=4)
    return Checkpoint(tiny_model, tiny_tokenizer, PromptTemplate(), options, "tiny")


@pytest.fixture
def place(tmp_path):
    return Workplace(banks=tmp_path / "banks", cache=tmp_path / "cache")


def seen(outcomes):
    """Every document that came up, per question."""
    routed = [{i for turn in o.routed for some in turn.values() for i in some} for o in outcomes]
    return [set(o.ranked) | set(o.named) | more for o, more in zip(outcomes, routed, strict=True)]


@pytest.mark.parametrize("system", ["msa", "bm25-2", "backbone-2", "bm25-2+rerank", "full"])
def test_a_question_sees_the_haystack_and_its_own_documents_only(checkpoint, place, system):
    bench = Workbench(checkpoint, SET, place)
    asked = [*ASKED[:2], replace(ASKED[2], hidden=("q2.0", "hay-1", "hay-2"))]
    found = seen(bench.system(system).ask(asked))
    bench.close()
    hay = {d.id for d in HAY}
    assert all(some - hay <= {f"q{i}.0"} for i, some in enumerate(found))
    assert not found[2] & {"q2.0", "hay-1", "hay-2"}
    if system == "full":
        assert found[0] == hay | {"q0.0"}


@pytest.mark.parametrize("system", ["msa", "bm25-1", "backbone-1", "bm25-1+rerank"])
def test_rankings_show_nothing_of_others_either(checkpoint, place, system):
    bench = Workbench(checkpoint, SET, place)
    outcomes = bench.system(system).rank(ASKED, 5)
    bench.close()
    for i, outcome in enumerate(outcomes):
        assert outcome.stopped == "ranked"
        assert not outcome.answer
        assert 1 <= len(outcome.ranked) <= 5
        assert {x for x in outcome.ranked if x.startswith("q")} <= {f"q{i}.0"}


@pytest.mark.parametrize("system", ["full", "gold", "closed"])
def test_what_searches_nothing_ranks_nothing(checkpoint, place, system):
    with pytest.raises(InputError, match=r"leave (it|them) out here"):
        Workbench(checkpoint, SET, place).system(system).rank(ASKED, 5)


def test_a_memory_says_what_was_routed_read_and_fetched(checkpoint, place):
    bench = Workbench(checkpoint, SET, place)
    (outcome,) = bench.system("msa").ask(ASKED[:1])
    layers = set(checkpoint.model.config.routing_layers)
    assert all(set(turn) == layers for turn in outcome.routed)
    assert set(outcome.texts) == set(outcome.named)
    width = 2 * 2 * 16 * 4  # a key and a value of 2 heads of 16 numbers in float32
    assert outcome.bytes
    assert outcome.bytes % width == 0
    bench.close()


def test_a_question_may_say_how_long_its_answer_is(checkpoint, place):
    bench = Workbench(checkpoint, SET, place)
    questions = [replace(ASKED[0], max_new_tokens=1), ASKED[1]]
    for system in ("msa", "bm25-1"):
        short, usual = bench.system(system).ask(questions)
        assert len(short.answer) <= 1 or short.generated_tokens < usual.generated_tokens
    bench.close()


def test_what_shows_everything_is_refused_where_not_all_may_be_seen(checkpoint, place):
    with pytest.raises(InputError, match=r"\+memory shows every document"):
        Workbench(checkpoint, SET, place).system("gold+memory")
    hidden = replace(SET, questions=(replace(ASKED[0], own=(), hidden=("hay-1",)),))
    with pytest.raises(InputError, match=r"\+memory shows every document"):
        Workbench(checkpoint, hidden, place).system("closed+memory")


def test_the_compressed_memory_is_attended_to_where_all_may_see_it(checkpoint, place, tmp_path):
    questions = tiny_question_set(tmp_path)
    bench = Workbench(checkpoint, questions, place)
    prompts = {}
    for system in ("gold", "gold+memory", "closed+memory"):
        outcomes = bench.system(system).ask(questions.questions)
        gold = [() if system == "closed+memory" else q.gold for q in questions.questions]
        assert [o.named for o in outcomes] == gold
        prompts[system] = [(o.answer, o.prompt_tokens) for o in outcomes]
    assert prompts["gold"] != prompts["gold+memory"]
    bench.close()


# ---- full context


class CountingReader:
    """Has room for 10 texts of one token."""

    def room(self, question):
        return 10

    def size(self, number, text):
        return 1

    def answer(self, questions, documents, max_new_tokens=None):
        return [ReadAnswer("x", False, tuple(n for n, _ in given), 0, 0) for given in documents]


def test_full_context_draws_what_it_has_room_for_without_looking_at_gold():
    documents = [Document(str(i), "x") for i in range(40)]
    questions = [Question("?", ("x",), ("39",), f"q{i}", own=("39",)) for i in range(60)]
    system = FullSystem(CountingReader(), documents, owned={"39"}, seed=1)
    outcomes = system.ask(questions)
    assert {len(o.named) for o in outcomes} == {10}
    assert {o.stopped for o in outcomes} == {FULL}
    share = sum("39" in o.named for o in outcomes) / len(outcomes)
    assert 0.05 < share < 0.6  # a quarter of the documents have room
    places = {o.named.index("39") for o in outcomes if "39" in o.named}
    assert len(places) > 1  # anywhere among the others
    shared = [[int(i) for i in o.named if i != "39"] for o in outcomes]
    assert all(row == sorted(row) for row in shared)  # which keep their order
    assert [o.named for o in system.ask(questions)] == [o.named for o in outcomes]
    assert [o.named for o in FullSystem(CountingReader(), documents, seed=2).ask(questions)] != [
        o.named for o in outcomes
    ]


def test_full_context_has_everything_where_there_is_room():
    documents = [Document(str(i), "x") for i in range(8)]
    (outcome,) = FullSystem(CountingReader(), documents).ask([Question("?", ("x",), ("3",), "q")])
    assert outcome.named == tuple("01234567")
    assert outcome.stopped == "answered"


def test_a_reader_knows_its_room(checkpoint):
    reader = TextReader(checkpoint, max_new_tokens=1)
    text = "What is it?"
    sizes = [reader.size(n, "Some text.") for n in range(1, 4)]
    context = reader.context(text, [(n, "Some text.") for n in range(1, 4)])
    positions = checkpoint.model.config.max_position_embeddings
    assert len(context.input_ids) + reader.room(text) - sum(sizes) <= positions
    assert reader.room("word " * 3000) < 0


# ---- reranker


def test_the_reranker_orders_by_the_likelihood_of_the_question(checkpoint):
    """As one by one, without padding and in any batch."""
    texts = ["A b.", "The code of a box is on its lid.", "x" * 30, "Box. " * 9]
    question = "What is it?"
    order, tokens = Reranker(checkpoint).order(question, texts)
    encode = checkpoint.tokenizer.encode
    scores, length = [], 0
    for text in texts:
        asked = encode(question)
        ids = torch.tensor([encode(text) + encode("\nQuestion: ") + asked])
        with torch.no_grad():
            logits = checkpoint.model(ids, use_cache=False).logits[0].log_softmax(-1)
        places = range(ids.shape[1] - len(asked), ids.shape[1])
        scores.append(sum(float(logits[p - 1, ids[0, p]]) for p in places))
        length += ids.shape[1]
    assert order == sorted(range(len(texts)), key=lambda i: -scores[i])
    assert tokens == length


def test_reranked_documents_are_counted_as_read(checkpoint, place):
    bench = Workbench(checkpoint, SET, place)
    (plain,) = bench.system("bm25-1").ask(ASKED[:1])
    (ranked,) = bench.system("bm25-1+rerank").ask(ASKED[:1])
    assert set(plain.ranked) == set(ranked.ranked)
    assert ranked.prompt_tokens > plain.prompt_tokens + 6 * 30


def test_joined_retrievers_stand_one_behind_the_other():
    parts = [BM25Retriever(HAY), BM25Retriever(NEEDLES)]
    scores = JoinedRetriever(parts).scores(["coins of the green box", "hay of the west"])
    assert scores.shape == (2, 9)
    assert np.argmax(scores[0]) == 7
    assert np.argmax(scores[1]) == 3


# ---- banks


def test_a_haystack_is_encoded_once(checkpoint, tmp_path, monkeypatch):
    banks = HaystackBanks(tmp_path, checkpoint)
    first = banks.bank(HAY, NEEDLES[:1])
    assert banks.bank(HAY) != first
    added = []
    add = MemoryBank.add

    def counted(self, documents, **options):
        documents = list(documents)
        added.extend(d.id for d in documents)
        return add(self, documents, **options)

    monkeypatch.setattr(MemoryBank, "add", counted)
    second = banks.bank(HAY, NEEDLES[1:])
    assert added == ["q1.0", "q2.0"]
    banks.bank(HAY, NEEDLES[:1])
    assert added == ["q1.0", "q2.0"]
    for folder, own in ((first, NEEDLES[:1]), (second, NEEDLES[1:]), (banks.bank(HAY), ())):
        with MemoryBank.open(folder, read_only=True) as bank:
            assert {d.document.id for d in bank.documents()} == {d.id for d in (*HAY, *own)}
            assert bank.verify().problems == ()


def test_an_unfinished_bank_is_gone_on_with_and_an_unfinished_copy_made_anew(checkpoint, tmp_path):
    banks = HaystackBanks(tmp_path, checkpoint)
    whole = banks.bank(HAY)
    with MemoryBank.open(whole, checkpoint) as bank:
        bank.delete(["hay-4", "hay-5"])
    copy = banks.bank(HAY, NEEDLES)
    with MemoryBank.open(copy, read_only=True) as bank:
        assert len(bank) == len(HAY) + len(NEEDLES)
    partial = copy.with_name(copy.name + ".partial")
    copy.rename(partial)
    (partial / "bank.json").write_text("torn")
    assert banks.bank(HAY, NEEDLES) == copy
    assert not partial.exists()


def test_a_changed_bank_is_a_copy(checkpoint, tmp_path):
    banks = HaystackBanks(tmp_path, checkpoint)
    before = banks.bank(HAY)
    new = Document("new", "Straw.")
    changes = (Change("hay-0"), Change("hay-1", replace(HAY[1], text="Wet.")), Change("new", new))
    after = banks.changed(before, changes)
    assert banks.changed(before, changes) == after
    assert banks.changed(before, ()) == before
    with MemoryBank.open(before, read_only=True) as bank:
        assert {d.document.text for d in bank.documents()} == {d.text for d in HAY}
    with MemoryBank.open(after, read_only=True) as bank:
        texts = {d.document.id: d.document.text for d in bank.documents()}
    assert texts.keys() == {d.id for d in HAY[1:]} | {"new"}
    assert texts["hay-1"] == "Wet."


def test_changes_to_the_same_document_are_made_in_their_order(checkpoint, tmp_path):
    banks = HaystackBanks(tmp_path, checkpoint)
    changes = (Change("hay-0"), Change("hay-0", replace(HAY[0], text="Back.")), Change("hay-1"))
    with MemoryBank.open(banks.changed(banks.bank(HAY), changes), read_only=True) as bank:
        texts = {d.document.id: d.document.text for d in bank.documents()}
    assert texts["hay-0"] == "Back."
    assert "hay-1" not in texts


def test_a_document_that_cannot_be_stored_is_named(checkpoint, tmp_path):
    with pytest.raises(InputError, match="1 documents cannot be stored, the first is 'bad'"):
        HaystackBanks(tmp_path, checkpoint).bank([Document("bad", "")])


def test_a_bank_is_copied_where_there_are_no_links(checkpoint, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    whole = HaystackBanks(tmp_path / "a", checkpoint).bank(HAY)
    monkeypatch.setattr("os.link", refuse)
    copy_bank(whole, tmp_path / "copy")
    with MemoryBank.open(tmp_path / "copy", read_only=True) as bank:
        assert bank.verify().problems == ()


def test_the_hash_follows_what_is_stored():
    assert hash_of(HAY) != hash_of(HAY[:5]) != hash_of([*HAY[:4], HAY[5]])
    assert hash_of([Change("a")]) != hash_of([Change("a", Document("a", "x"))])


# ---- names and figures


def test_names_of_systems_are_taken_apart():
    found = parse_system("hybrid-10+rerank+memory")
    assert (found.kind, found.depth, found.rerank, found.memory) == ("hybrid", 10, True, True)
    assert parse_system("msa:max_rounds=1").options == {"max_rounds": 1}
    assert parse_system("full+memory").memory
    assert expanded_systems(["@depths", "bm25-1"], [2])[:3] == ["bm25-1", "bm25-5", "bm25-10"]
    alone = {"layer_weights": {"3": 1}, "lexical_weight": 0}
    assert parse_system(expanded_systems(["@layers"], [2, 3])[1]).options == alone


@pytest.mark.parametrize("name", ["bm25", "bm25-0", "gold+rerank", "full-3x", "msax", "bm25-1:a=1"])
def test_a_system_that_is_none_is_one_clear_line(name):
    with pytest.raises(InputError, match="expected one of bm25-K"):
        expanded_systems([name], [2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("@nothing", "no group '@nothing'; there are: @documents"),
        ("msa:max_rounds", "option 'max_rounds': expected NAME=VALUE"),
        ("msa:max_rounds=x", "'x' is no JSON value"),
    ],
)
def test_a_group_or_an_option_that_is_none_is_one_clear_line(name, message):
    with pytest.raises(InputError, match=message):
        expanded_systems([name], [2])


def test_documents_are_scored_as_read_and_as_routed():
    question = Question("?", ("x",), ("a", "b"), "q")
    turns = ({2: ("a", "x"), 3: ("x",)}, {2: ("b",), 3: ("b",)})
    outcome = Outcome("x", False, ("a",), ("a", "x"), 2, "answered", 0, 0, 0, routed=turns)
    assert document_scores(question, outcome) == {
        "named precision": 0.5,
        "named recall": 0.5,
        "named f1": 0.5,
        "routed 2": 1.0,
        "routed 3": 0.5,
        "routed": 1.0,
    }
    assert document_scores(replace(question, gold=()), outcome) == {}


def test_sets_without_own_documents_are_as_before(tmp_path):
    assert tiny_question_set(tmp_path).owned() == frozenset()
    system = ReaderSystem(CountingReader(), BM25Retriever(HAY), HAY, 2)
    (outcome,) = system.ask([Question("hay of the west", ("x",), ("hay-3",), "q")])
    assert outcome.named[0] == "hay-3"
