"""Memory Parallel over NCCL: a GPU per rank, the selections of one process on one GPU."""

from __future__ import annotations

import pytest
import torch

import parallel_tools as tools
from bank_tools import make_documents
from msa import Document
from msa.memory.bank import MemoryBank
from msa.memory.loaded.loaded_bank import LoadedBank

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices: NCCL wants one for each rank"
)


def test_every_rank_selects_and_fetches_what_one_gpu_does(tmp_path, tiny_model, tiny_tokenizer):
    folder = tmp_path / "banks"
    folder.mkdir()
    documents = [
        Document(d.id, d.text, metadata={"place": i}) for i, d in enumerate(make_documents(60))
    ]
    with MemoryBank.create(folder / "bank", tiny_model, tiny_tokenizer) as bank:
        bank.add(documents[:40])
        bank.add(documents[40:])
        bank.delete(["doc5", "doc44"])
    world = min(3, torch.cuda.device_count())
    found = tools.run_ranks(["nccl"], world, folder, tmp_path / "out")["nccl"]
    assert len(found) == world
    with MemoryBank.open(folder / "bank", read_only=True) as bank:
        alone = LoadedBank(bank, "cuda:0")
        for rank, seen in found.items():
            assert "failed" not in seen, seen["failed"]
            wanted = []
            for view in tools.views(alone, rank, world):
                wanted += [tools.routed(view, *question) for question in tools.plan(rank, world)]
                wanted += [tools.routed(view, 7, 3, zero=True)]
            assert seen[0] == tools.as_json(wanted)
