"""Memory Parallel with 2 and 3 gloo processes: what one process answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import parallel_tools as tools
from bank_tools import make_documents
from conftest import make_tiny_model
from msa import Document, MemoryEngine, load
from msa.errors import ConfigError, InputError
from msa.memory.bank import MemoryBank
from msa.memory.distributed.sharded_bank import ShardedBank
from msa.memory.loaded.loaded_bank import LoadedBank

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = [
    "selections",
    "few",
    "empty",
    "engine",
    "growing",
    "bad_question",
    "different_banks",
    "damaged",
]
TWIN = "the very same words, over and over, in three documents that only their ids tell apart"


def corpus():
    """Documents of uneven length; three are equal but for their ids, far from each other."""
    documents = make_documents(60)
    for place in (12, 35, 58):
        documents[place] = Document(f"twin{place}", TWIN)
    return [
        Document(d.id, d.text, metadata={"place": i, "kind": "ab"[i % 2]})
        for i, d in enumerate(documents)
    ]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """A model and banks, as all ranks see them."""
    folder = tmp_path_factory.mktemp("parallel")
    model = make_tiny_model(max_position_embeddings=4096)
    digits = [tiny_tokenizer.convert_tokens_to_ids(c) for c in "0123456789"]
    with torch.no_grad():  # the number stands in the encoded text: equal texts leave equal states
        weight = model.get_input_embeddings().weight
        weight[digits] = weight[digits[0]].clone()
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    documents = corpus()
    with MemoryBank.create(folder / "bank", model, tiny_tokenizer) as bank:
        for start in range(0, 60, 20):
            bank.add(documents[start : start + 20])
        bank.delete(["doc5", "doc6", "doc44"])
    for world in (2, 3):
        with MemoryBank.create(folder / f"growing{world}", model, tiny_tokenizer) as bank:
            bank.add(make_documents(30))
    with MemoryBank.create(folder / "few", model, tiny_tokenizer) as bank:
        bank.add(documents[:2])
    MemoryBank.create(folder / "empty", model, tiny_tokenizer).close()
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def world(request):
    return request.param


@pytest.fixture(scope="module")
def seen(world, folder, tmp_path_factory):
    """Scenario -> rank -> what it saw."""
    out = tmp_path_factory.mktemp("ranks") / "out"
    found = tools.run_ranks(SCENARIOS, world, folder, out)
    for ranks in found.values():
        for rank in ranks.values():
            assert "failed" not in (rank or []), rank["failed"]
    assert all(len(ranks) == world for ranks in found.values())
    return found


@pytest.fixture
def alone(folder):
    with MemoryBank.open(folder / "bank", read_only=True) as bank:
        yield LoadedBank(bank)


def test_every_rank_selects_and_fetches_what_one_process_does(seen, world, alone):
    for rank, (found, _, _) in seen["selections"].items():
        wanted = []
        for view in tools.views(alone, rank, world):
            wanted += [tools.routed(view, *question) for question in tools.plan(rank, world)]
            wanted += [tools.routed(view, 7, 3, zero=True)]
        assert found == tools.as_json(wanted)
        assert bool(found) == (rank < world - 1)  # the last has no question


def test_the_shares_are_uneven_and_together_the_bank(seen, world, alone):
    shares = [(first, size) for _, size, first in seen["selections"].values()]
    assert sum(size for _, size in shares) == len(alone)
    assert len({size for _, size in shares}) > 1
    assert [first for first, _ in shares] == sorted(first for first, _ in shares)


def test_equal_documents_of_several_shares_go_to_the_lower_row(alone, folder, world):
    """The corpus has such ties, so that the comparison with one process covers them."""
    numbers = {d.document.id: d.number for d in alone.bank.documents()}
    view = alone.view(top_k=57)
    selection = view.route(2, *tools.queries(0, 2))
    found = view.rows_to_numbers(selection.documents)[0].tolist()
    places = [found.index(numbers[f"twin{i}"]) for i in (12, 35, 58)]
    assert sorted(places) == list(range(min(places), min(places) + 3))
    scores = selection.scores[0, places]
    assert float(scores.max() - scores.min()) <= 1e-5


def test_fewer_documents_than_ranks(seen, folder):
    with MemoryBank.open(folder / "few", read_only=True) as bank:
        wanted = tools.as_json(tools.routed(LoadedBank(bank), 3, 2))
    assert all(rank == wanted for rank in seen["few"].values())


def test_an_empty_bank_is_said_to_be_empty(seen):
    assert all(text.startswith("EmptyBankError: bank") for text in seen["empty"].values())


def test_answers_and_hits_are_those_of_one_process(seen, folder, tiny_tokenizer, world):
    bank = MemoryBank.open(folder / "bank", load(folder / "model"), read_only=True)
    with bank, MemoryEngine(bank) as engine:
        for rank, found in seen["engine"].items():
            questions = tools.QUESTIONS[rank : rank + 2]
            assert found == ([] if rank == 0 else tools.as_json(tools.asked(engine, questions)))
            assert rank == 0 or any(read for _, _, read, *_ in found[:2])


def test_documents_that_come_and_go_are_seen_at_the_next_refresh_by_all(seen, folder, world):
    with MemoryBank.open(folder / f"growing{world}", read_only=True) as bank:
        resident = LoadedBank(bank)
        now = tools.as_json(tools.routed(resident, 5, 2))
    for before, same, changed, after, generation in seen["growing"].values():
        assert same  # a view keeps its state
        assert changed == [True, False]
        assert generation == resident.generation
        assert before["documents"] == 30
        assert after == now
        assert before != after


def test_a_rank_that_leaves_by_an_error_stops_the_others_with_its_reason(seen):
    texts = dict(seen["bad_question"])
    assert texts.pop(1) == "InputError: top_k=0: expected at least 1"
    for text in texts.values():
        assert re.match(
            r"PeerStoppedError: rank 1 \(.*\) stopped: top_k=0: expected at least 1\. Start", text
        )


def test_ranks_with_different_banks_are_refused(seen):
    words = r"BankMismatchError: rank 0 \(.*\) and rank 1 \(.*\) have opened different"
    for text in seen["different_banks"].values():
        assert re.match(words, text), text


def test_what_a_rank_cannot_read_is_an_error_for_the_asker_alone(seen):
    ranks = seen["damaged"]
    assert ranks[1][0] == "BankCorruptError: segment 'x' is damaged"
    assert all(len(found) == 1 for rank, found in ranks.items() if rank != 1)
    assert len({found[-1] for found in ranks.values()}) == 1


@pytest.mark.parametrize("how", ["killed", "silent"])
def test_a_dead_rank_is_one_clear_error_for_the_others(how, folder, tmp_path):
    found = tools.run_ranks([how], 3, folder, tmp_path / "out")[how]
    assert sorted(found) == [0, 2], found
    for first, second in found.values():
        assert re.match(
            r"RankError: rank 1 \(.*, process \d+\) ended, or has not answered for 4 s\. .* "
            r"Start the command again on all ranks\.$",
            first,
        )
        assert second == first


def test_without_a_process_group_it_says_what_to_start(alone):
    with pytest.raises(ConfigError, match="start the program with torchrun"):
        ShardedBank(alone.bank)


def test_a_timeout_must_be_above_zero(alone):
    with pytest.raises(InputError, match="expected above 0"):
        ShardedBank(alone.bank, timeout=0)


def test_msa_search_under_torchrun_prints_once_what_one_process_finds(folder, tmp_path):
    script = tmp_path / "command.py"
    script.write_text("from msa.cli.main import main\nmain()\n")
    words = ["--standalone", "--nproc-per-node", 2, script, "search", "Whose lamp?", "--json"]
    words += ["--bank", folder / "bank", "--model", folder / "model", "--device", "cpu"]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *map(str, words)],
        env=dict(os.environ, PYTHONPATH=str(ROOT / "src"), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=2 * tools.PATIENCE,
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    bank = MemoryBank.open(folder / "bank", load(folder / "model"), read_only=True)
    with bank, MemoryEngine(bank) as engine:
        hits = engine.retrieve("Whose lamp?", top_k=10)
    assert [hit["id"] for hit in found] == [hit.id for hit in hits]
    assert [hit["score"] for hit in found] == pytest.approx([hit.score for hit in hits], abs=1e-5)
