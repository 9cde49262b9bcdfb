"""Made-up runs of an evaluation, as `msa eval run` writes them."""

from __future__ import annotations

import json
import random
from pathlib import Path

EVIL = "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>"
LAYERS = ("9", "12", "15")
TASKS = {
    "qa/squad": ("Questions about passages of Wikipedia", "F1", (16_000, 128_000, 1_000_000)),
    "qa/musique": ("Questions that take two hops", "F1", (16_000, 128_000, 1_000_000)),
    "ruler/niah_single_1": ("One needle in noise", "string_match_all", (16_000, 1_000_000)),
    "beyond/counting": ("How many documents say it", "exact match", (0,)),
    "changing/updates": ("Facts that were replaced or deleted", "exact match", (0,)),
}
SKILL = {
    "msa": (0.62, 0.03),
    "msa:max_rounds=1": (0.55, 0.03),
    "bm25-1": (0.7, 0.12),
    "minilm-5": (0.5, 0.1),
    "full": (0.75, 0.4),
    "closed": (0.1, 0.0),
    "gold": (0.85, 0.0),
}
"""Share of right answers at the smallest size, and what each further size takes from it."""


def about(task: str, size: int, system: str, seed: int = 0, **more) -> dict:
    """First line of a run."""
    title, metric, _ = TASKS[task]
    return {
        "task": task,
        "title": title,
        "metric": metric,
        "size": size,
        "share": 0.5 if task.startswith("changing") else None,
        "system": system,
        "set": task,
        "split": "test",
        "seed": seed,
        "data": "0123456789abcdef",
        "model": "fedcba9876543210",
        "model_name": "made-up",
        "command": f"msa eval run {task} --sizes 16K,128K,1M --output runs/default",
        "commit": "8d2315e",
        "machine": "x86_64, a processor",
        "cores": 2,
        "threads": 1,
        "torch": "2.13.0",
        **more,
    }


def row(i: int, system: str, right: bool, fate: str = "misread", **more) -> dict:
    """One answer; where it is wrong, `fate` says why."""
    gold, others = f"doc-{i}", [f"doc-{i + k}" for k in range(1, 6)]
    found = right or fate not in ("unrouted",)
    ranked = [gold, *others] if found else others
    read = [gold] if right or fate in ("misread", "refused") else others[:1]
    refused = not right and fate == "refused"
    answer = "Oslo" if right else "" if refused else "the port of Bergen"
    routed = [dict.fromkeys(LAYERS, ranked[:4])] if system.startswith("msa") else []
    if system == "closed":
        ranked, read = [], []
    return {
        "id": f"q{i}",
        "question": f"Which town is meant in note {i}?",
        "answers": ["Oslo"],
        "gold": [gold],
        "answer": answer,
        "refused": refused,
        "ranked": ranked,
        "named": read,
        "rounds": 1 + (i % 2 if routed else 0),
        "stopped": "not_found" if refused else "answered",
        "seconds": 0.4 + 0.01 * (i % 7),
        "prompt_tokens": 180 + i,
        "generated_tokens": 6,
        "kind": "two hops" if i % 2 else "one hop",
        "scores": {
            "score": float(right),
            "em": float(right),
            "f1": float(right),
            "named recall": float(gold in read),
            **({f"routed {layer}": float(found) for layer in LAYERS} if routed else {}),
        },
        "routed": routed,
        "texts": {name: f"{name} says that the town is Oslo. {EVIL}" for name in read},
        "bytes": 40_000 if routed else None,
        "wrong_used": False,
        "span_right": right if routed else None,
        **more,
    }


def write_run(folder: Path, header: dict, rows: list[dict]) -> Path:
    """A run's file in an output folder."""
    name = f"{header['task'].replace('/', '__')}@{header['size']}--{header['system']}"
    path = (
        folder / "runs" / f"{''.join(c if c.isalnum() or c in '@-_' else '-' for c in name)}.jsonl"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"about": header}, *rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_runs(folder: Path, count: int = 40, shift: float = 0.0, systems=tuple(SKILL)) -> Path:
    """Every task of `TASKS` by those systems; `shift` is added to the memory's skill."""
    for task, (_, _, sizes) in TASKS.items():
        for step, size in enumerate(sizes):
            for system in systems:
                skill, loss = SKILL[system]
                draw = random.Random(f"{task} {size} {system}")
                skill = skill + shift if system == "msa" else skill
                rows = []
                for i in range(count):
                    right = draw.random() < skill - loss * step
                    fate = draw.choice(["unrouted", "unnamed", "misread", "refused"])
                    used = task.startswith("changing") and not right and draw.random() < 0.1
                    rows.append(row(i, system, right, fate, wrong_used=used))
                write_run(folder, about(task, size, system), rows)
    return folder
