"""Write docs/results/README.md from the JSON files beside it.

python benchmarks/results_page.py
"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs/results"
SETS = {"one_hop": "one hop", "two_hop": "two hops", "questions": "as asked"}
NAMES = {"squad": "SQuAD dev", "2wikimultihopqa": "2WikiMultihopQA dev"}

REAL = {
    "real_documents.md": "what is found",
    "ablations.md": "what is found by other routers, without training and on the way",
    "evaluation.md": "what is answered, in every task, up to 10 million tokens",
    "what_did_not_help.md": "what did not help",
}
OTHERS = {
    "bench.md": "Speed: routing, encoding, asking, and the shapes of a 4B model",
    "pruning.md": "the pruned scan: what it reads, what it misses, how long it takes",
    "routing_pooled.md": "one vector per question, beside reading the keys once and FAISS",
    "scan_versions.md": "the scan of routing keys before and now",
    "processes.md": "one bank over several processes, on Ray",
    "serving.md": "a service under load",
    "lost_documents.md": "documents lost when many write at once: none",
}
LIMITS = """\
On a CPU that multiplies in float32 only (AVX2, no AMX, no bfloat16 units) arithmetic, not memory,
limits a full scan: 32 question tokens ask for 16 multiplications per byte of a bfloat16 key, and
the bare product of Eq. 2 (`product` in the tables) takes many times as long as reading the keys
once. Less is gained by a better kernel than by reading fewer keys: the pruned scan.
"""


def main() -> None:
    parts = [
        f"# Results\n\nReal documents, with the default model: {', '.join(links(REAL))}.\n\n"
        "What follows is written from the JSON files in this folder by\n"
        "`python benchmarks/results_page.py`. Each holds its command, commit, machine and seed.\n"
        "Shares are in percent.\n"
    ]
    sections = (
        ("quality", quality),
        ("real_input", real_input),
        ("scaling", scaling),
        ("scaling_squad", scaling_real),
    )
    for name, section in sections:
        path = FOLDER / f"{name}.json"
        if path.is_file():
            parts.append(section(json.loads(path.read_text(encoding="utf-8"))))
    others = [f"- {link}" for link in links(OTHERS)]
    parts.append("## Speed\n\n" + "\n".join(others) + "\n\n" + LIMITS)
    (FOLDER / "README.md").write_text("\n".join(parts), encoding="utf-8")


def links(pages: dict[str, str]) -> list[str]:
    """Links to those of the pages that are there."""
    return [f"[{text}]({name})" for name, text in pages.items() if (FOLDER / name).is_file()]


def heading(title: str, about: dict) -> str:
    """Title and provenance."""
    kept = {k: v for k, v in about.items() if v is not None and k != "command"}
    lines = "; ".join(f"{k}: {v}" for k, v in kept.items())
    return f"## {title}\n\n`{about['command']}`\n\n{lines}\n"


def quality(results: dict) -> str:
    """Routing, naming and answers of the default model."""
    rows = [
        heading("The worlds model", results.pop("about")),
        "Worlds are invented and use names that training never draws. *Routed*: the first document "
        "needed is among\nthe 16 that some layer selected in round 1; *all routed*: every one, in "
        "some round; *named*: the first\ndocument read is the right one; *all read*: "
        "every one was read. EM and F1 as SQuAD scores.\n",
        "| bank | documents | questions | n | routed | all routed | named | all read | EM | F1 "
        "| s/question |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    compared = []
    for bank, row in results.items():
        for key, label in SETS.items():
            if key not in row:
                continue
            f = row[key]
            shares = " | ".join(
                f"{100 * f[k]:.1f}"
                for k in ("routed", "routed_all", "named", "named_all", "exact_match", "f1")
            )
            rows.append(
                f"| {NAMES.get(bank, bank.replace('_', ' of '))} | {row['documents']:,} | {label} "
                f"| {f['questions']} | {shares} | {f['seconds_per_question']:.2f} |"
            )
            if "bm25_recall_at_16" in row:
                compared.append(
                    f"| {NAMES[bank]} | {100 * f['retrieve_recall_at_16']:.1f} "
                    f"| {100 * row['bm25_recall_at_16']:.1f} |"
                )
    if compared:
        rows += [
            "\nRecall at 16 of the documents needed, in one retrieval from the question alone:\n",
            "| bank | `MemoryEngine.retrieve` | BM25 (`bm25s`) |",
            "|---|---|---|",
            *compared,
        ]
    return "\n".join(rows) + "\n"


def real_input(results: dict) -> str:
    """Indexing and asking on real text."""
    rows = [
        heading("Real input", results.pop("about")),
        "| file | documents | with parts | failed | tokens | tokens/s encoded "
        "| MB per million tokens | s to load | s/question | s/search |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        size = sum(r["bytes_per_million_tokens"].values()) / 1e6
        rows.append(
            f"| {name} | {r['documents']:,} | {r['documents_and_parts']:,} | {r['failed']} "
            f"| {r['tokens']:,} | {r['encoded_tokens_per_second']:,} | {size:.0f} "
            f"| {r['seconds_to_load_for_asking']:.2f} | {r['seconds_per_question_median']:.3f} "
            f"| {r['seconds_per_search_mean']:.3f} |"
        )
    return "\n".join(rows) + "\n"


def scaling(results: dict) -> str:
    """One bank that grows."""
    rows = [
        heading("A memory that grows", results.pop("about")),
        "The same questions, one at a time, in a bank that grows around their documents: 100 of "
        "one hop, 100 of two.\nRouting is all layers and all rounds of a question. Peak memory is "
        "that of the asking process. A scan with a number is pruned with that slack, 1 being exact "
        "([how](../inference.md)).\n",
        "| tokens | documents | GB on disk | tokens/s built | scan | routed | one-hop EM "
        "| two-hop EM | routing s, p50 / p95 | of one round | answer s, p50 / p95 | peak GB "
        "| s to load |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        rate = r["tokens_added"] / r["seconds_to_add_them"] if r["tokens_added"] else None
        speed = "" if rate is None else f"{rate:,.0f}"
        built = f"{r['documents']:,} | {r['bytes_on_disk'] / 1e9:.2f} | {speed}"
        for found in r["asked"]:
            rows.append(f"| {name} | {built} | {found['scan']} | {asked(found)} |")
            name, built = "", " | | "
    return "\n".join(rows) + "\n"


def scaling_real(results: dict) -> str:
    """Banks of real text, with the default model."""
    rows = [
        heading("Real text, with the default model", results.pop("about")),
        "The questions of SQuAD dev in banks of several sizes: their passages, the rest of the "
        "set, then other\ntexts. One question at a time. *Recall*: the passage is among the "
        "first 16 of the ranking, words included.\n*Keys read*: what it takes to read all routing "
        "keys from memory once. Peak memory is that of the asking process.\n",
        "| tokens | documents | GB on disk | recall@16 | EM | F1 | routing s of a round, p50 / p95 "
        "| keys read, s | answer s, p50 / p95 | peak GB | s to load |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        for found in r["asked"]:
            q = found["questions"]
            shares = (q["recall_at_16"], q["exact_match"], q["f1"])
            cells = [
                name,
                f"{r['documents']:,}",
                f"{r['bytes_on_disk'] / 1e9:.3f}",
                *(f"{100 * share:.1f}" for share in shares),
                spread(found["routing_seconds_per_round"]),
                f"{found['reading_keys_seconds']:.4f}",
                spread(found["total_seconds"]),
                f"{found['peak_memory_of_asking'] / 1e9:.2f}",
                f"{found['seconds_to_load']:.1f}",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def spread(seconds: dict) -> str:
    """Median and 95th percentile."""
    return f"{seconds['p50']:.3f} / {seconds['p95']:.3f}"


def asked(r: dict) -> str:
    """The columns that tell of asking."""
    one, two = r["one_hop"], r["two_hop"]
    shares = (one["routed"], one["exact_match"], two["exact_match"])
    names = ("routing_seconds", "routing_seconds_per_round", "total_seconds")
    times = [spread(r[k]) if k in r else "" for k in names]
    cells = [f"{100 * share:.1f}" for share in shares] + times
    return " | ".join(
        [*cells, f"{r['peak_memory_of_asking'] / 1e9:.2f}", f"{r['seconds_to_load']:.1f}"]
    )


if __name__ == "__main__":
    main()
