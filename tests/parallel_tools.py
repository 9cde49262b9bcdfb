"""What ranks do in the tests of Memory Parallel. A rank writes what it saw as JSON."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from bank_tools import LAYERS, make_documents
from msa.errors import MSAError
from msa.memory.bank import MemoryBank
from msa.memory.distributed.sharded_bank import ShardedBank
from msa.memory.loaded.loaded_bank import BankSnapshot, LoadedBank

WIDTH = 2 * 16  # KV heads, head dim
QUESTIONS = ["Which river?", "Whose lamp is it?", "Who wrote the letter?", "Where is the garden?"]
# Seconds for which a test waits for its ranks: for a hang, not for a slow machine.
PATIENCE = 600


def is_even(metadata):
    return metadata["place"] % 2 == 0


def queries(seed, batch, tokens=5, zero=False):
    """Routing vectors and mask; rows have 0 to `tokens` routing tokens."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(batch, tokens, WIDTH, generator=generator) / WIDTH**0.5
    mask = torch.arange(tokens) < torch.randint(0, tokens + 1, (batch, 1), generator=generator)
    mask[0, 0] = True
    return (vectors * 0 if zero else vectors), mask


def rounded(score):
    """A score as far as it is the same whatever stands beside it in a product."""
    return round(score, 4)


def routed(view, seed, batch, zero=False):
    """All that a memory answers to some queries, in all layers."""
    found = {"documents": len(view)}
    for layer in LAYERS:
        device = view.route(LAYERS[0], *queries(seed, 1)).scores.device
        vectors, mask = (t.to(device) for t in queries(seed + layer, batch, zero=zero))
        selection = view.route(layer, vectors, mask)
        content = view.content(layer, selection)
        digest = hashlib.sha256()
        for tensor in (content.keys, content.values):
            digest.update(tensor[content.mask].float().cpu().numpy().tobytes())
        found[layer] = {
            "rows": selection.documents.tolist(),
            "scores": [[rounded(s) for s in row] for row in selection.scores.tolist()],
            "numbers": view.rows_to_numbers(selection.documents).tolist(),
            "mask": content.mask.tolist(),
            "content": digest.hexdigest(),
        }
    return found


def asked(engine, questions):
    """Answers and hits, without times."""
    seen = []
    for answer in engine.ask(questions, max_new_tokens=6, max_rounds=2):
        rounds = []
        for turn in answer.rounds:
            routed = sorted(turn.routed.items())
            some = [[k, [[d.id, rounded(d.score)] for d in documents]] for k, documents in routed]
            rounds.append([turn.index, some])
        read = [[c.id, c.round] for c in answer.citations]
        seen.append([answer.question, answer.text, read, rounds, answer.usage.prompt_tokens])
    for hits in engine.retrieve(questions, top_k=6, filter={"kind": "b"}):
        found = [
            [[layer, rounded(score)] for layer, score in sorted(hit.layer_scores.items())]
            for hit in hits
        ]
        seen.append(
            [[hit.id, rounded(hit.score), some] for hit, some in zip(hits, found, strict=True)]
        )
    return seen


# ---- scenarios: (rank, world, folder) -> what was seen


def plan(rank, world):
    """Questions of a rank: seed and batch size of each; the last rank has none."""
    if rank == world - 1:
        return []
    return [(100 * rank + i, 1 + 2 * rank + i % 2) for i in range(1 + 2 * rank)]


def selections(rank, world, folder, device="cpu"):
    seen = []
    with MemoryBank.open(folder / "bank", read_only=True) as bank:
        with ShardedBank(bank, device, timeout=60) as memory:
            for view in views(memory, rank, world):
                seen += [routed(view, *question) for question in plan(rank, world)]
                seen += [routed(view, 7, 3, zero=True)] if plan(rank, world) else []
        shares = LoadedBank(bank, shard=(rank, world)).view()
        return [seen, len(shares), shares.first_row]


def views(memory, rank, world):
    """The views that a rank asks: with filters, and with another number of documents."""
    if not plan(rank, world):
        return []
    return [memory.view(), memory.view(is_even, top_k=3), memory.view(lambda m: m["place"] > 40)]


def few(rank, world, folder):
    with MemoryBank.open(folder / "few", read_only=True) as bank, ShardedBank(bank) as memory:
        return routed(memory, 3, 2)


def empty(rank, world, folder):
    with MemoryBank.open(folder / "empty", read_only=True) as bank, ShardedBank(bank) as memory:
        assert not len(memory)
        try:
            memory.route(LAYERS[0], *queries(1, 1))
        except MSAError as error:
            return said(error)
        return None


def engine(rank, world, folder):
    from msa import MemoryBank, MemoryEngine, load

    bank = MemoryBank.open(folder / "bank", load(folder / "model"), read_only=True)
    with bank, MemoryEngine(bank, parallel=True) as engine:
        return [] if rank == 0 else asked(engine, QUESTIONS[rank : rank + 2])


def growing(rank, world, folder):
    """Rank 0 adds and deletes documents; a view from before stays as it was."""
    from msa import load

    path = folder / f"growing{world}"
    with MemoryBank.open(path, read_only=True) as bank, ShardedBank(bank) as memory:
        old = memory.view()
        before = routed(old, 5, 2)
        dist.barrier()
        if rank == 0:
            loaded = load(folder / "model")
            with MemoryBank.open(path, loaded.model, loaded.tokenizer) as writer:
                writer.add(make_documents(15, "new"))
                writer.delete(["doc3", "doc21"])
        dist.barrier()
        changed = [memory.refresh(), memory.refresh()]
        same = routed(old, 5, 2) == before
        return [before, same, changed, routed(memory.view(), 5, 2), memory.generation]


def bad_question(rank, world, folder):
    """One rank leaves by an error."""
    with MemoryBank.open(folder / "bank", read_only=True) as bank:
        try:
            with ShardedBank(bank) as memory:
                if rank == 1:
                    memory.view(top_k=0)
        except MSAError as error:
            return said(error)
    return None


def different_banks(rank, world, folder):
    with MemoryBank.open(folder / ("few" if rank else "bank"), read_only=True) as bank:
        try:
            ShardedBank(bank)
        except MSAError as error:
            return said(error)
    return None


def damaged(rank, world, folder):
    """What one rank cannot read is an error for the asker alone; all go on."""
    from msa.errors import BankCorruptError

    def refuse(self, layer, selection):
        raise BankCorruptError("segment 'x' is damaged")

    whole = BankSnapshot.content
    seen = []
    with MemoryBank.open(folder / "bank", read_only=True) as bank, ShardedBank(bank) as memory:
        view = memory.view()
        selection = view.route(LAYERS[0], *queries(0, 1, zero=True))  # the first rows: rank 0's
        dist.barrier()
        if rank == 0:
            BankSnapshot.content = refuse
        dist.barrier()
        if rank == 1:
            try:
                view.content(LAYERS[0], selection)
            except MSAError as error:
                seen.append(said(error))
        dist.barrier()
        BankSnapshot.content = whole
        dist.barrier()
        seen.append(view.content(LAYERS[0], selection).mask.sum().item())
    return seen


def fall(rank, world, folder, how):
    """Rank 1 is killed or stopped while the others ask."""
    with MemoryBank.open(folder / "bank", read_only=True) as bank:
        memory = ShardedBank(bank, timeout=4)
        view = memory.view()
        routed(view, 1, 1)
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), how)
        try:
            while True:
                routed(view, rank, 1)
        except MSAError as error:
            first = said(error)
        try:  # nothing hangs afterwards
            memory.close()
        except MSAError as error:
            return [first, said(error)]


def killed(rank, world, folder):
    return fall(rank, world, folder, signal.SIGKILL)


def silent(rank, world, folder):
    return fall(rank, world, folder, signal.SIGSTOP)


def said(error):
    return f"{type(error).__name__}: {error}"


# ---- processes


def _rank(scenario_names, rank, world, folder, out):
    warnings.simplefilter("error", FutureWarning)
    torch.set_num_threads(1)
    nccl = scenario_names == ["nccl"]
    if nccl:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo",
        init_method=f"file://{out}/meet",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=PATIENCE),
    )
    for name in scenario_names:
        try:
            if nccl:
                seen = selections(rank, world, folder, f"cuda:{rank}")
            else:
                seen = globals()[name](rank, world, folder)
        except Exception:
            seen = {"failed": traceback.format_exc()}
        (out / f"{name}-{rank}.json").write_text(json.dumps(seen))
        if seen and "failed" in seen:
            os._exit(1)
    if scenario_names[0] not in ("killed", "silent"):
        dist.destroy_process_group()


def run_ranks(scenario_names, world, folder, out):
    """Run scenarios one after the other, in as many processes: name -> rank -> what it saw.

    A rank that did not write is missing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["msa.memory.distributed.sharded_bank", "msa.inference.engine"])
    out.mkdir()
    ranks = [
        context.Process(target=_rank, args=(scenario_names, rank, world, folder, out))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    lost = 1 if scenario_names[0] in ("killed", "silent") else None
    for rank, process in enumerate(ranks):
        if rank != lost:
            process.join(PATIENCE)
    for process in ranks:
        process.kill()  # those that hang, and the one that is stopped
        process.join()
    return {
        name: {
            rank: json.loads(path.read_text())
            for rank in range(world)
            if (path := Path(out, f"{name}-{rank}.json")).exists()
        }
        for name in scenario_names
    }


def as_json(value):
    """As it comes back from a rank."""
    return json.loads(json.dumps(value))
