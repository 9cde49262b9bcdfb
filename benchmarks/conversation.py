"""How well questions of conversations are made whole, beside the rewrites of people.

    python benchmarks/conversation.py --questions DIR [--output docs/results]

The questions are those of CANARD (Elgohary et al., 2019; CC BY-SA 4.0), in a folder with
`questions.train.jsonl.gz`: a row has `question`, `history` (title and section of an article, then
questions and answers in turns) and `rewrite`, what a person made of the question. The title is
taken as the first thing that the user said, the section as the answer to it.

The first half of the rows was used to make the rules; what is measured is the second half.

Writes conversation.json and conversation.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from measuring.results import write_results
from measuring.timing import machine
from msa.serve.openai.conversation import Turn, complete_question
from msa.serve.openai.english import FUNCTION_WORDS

FILE = "questions.train.jsonl.gz"
Row = dict
Method = Callable[[Row], str]


def completed(row: Row) -> str:
    """By the rules."""
    turns = [Turn("assistant" if i % 2 else "user", t) for i, t in enumerate(row["history"])]
    return complete_question(row["question"], turns)


METHODS: dict[str, Method] = {
    "last question only": lambda row: row["question"],
    "all turns joined": lambda row: " ".join([*row["history"], row["question"]]),
    "made whole": completed,
}


def main() -> None:
    args = arguments()
    rows = read(Path(args.questions))
    half = len(rows) // 2
    results: dict = {
        "command": "python " + " ".join(sys.argv),
        **machine(torch.device("cpu")),
        "questions": len(rows) - half,
        "rows": [],
    }
    for name, some in groups(rows[half:]).items():
        for method, write in METHODS.items():
            row = {"questions": name, "method": method, **scores(some, write)}
            results["rows"].append(row)
            print(json.dumps(row), flush=True)
    results["examples"] = examples(rows[half:], args.examples)
    write_results(args.output, "conversation", results, page)


def read(folder: Path) -> list[Row]:
    """The rows of the set, in its order."""
    with gzip.open(folder / FILE, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """All rows; those whose rewrite says more than the question; those whose does not."""
    more = [row for row in rows if missing(row)]
    return {
        "all": list(rows),
        "need what came before": more,
        "stand on their own": [row for row in rows if not missing(row)],
    }


def words(text: str) -> list[str]:
    """Words of a text, without case and the 's behind names."""
    return re.findall(r"\w+", re.sub(r"['’]s\b", "", text.casefold()))


def content(text: str) -> set[str]:
    """Words that name something."""
    return set(words(text)) - FUNCTION_WORDS


def missing(row: Row) -> set[str]:
    """Content words of the rewrite that the question lacks."""
    return content(row["rewrite"]) - set(words(row["question"]))


def scores(rows: Sequence[Row], write: Method) -> dict[str, float | int | None]:
    """What a method makes of some rows, beside the rewrites.

    Returns:
        Means over rows of the share of the rewrite's words that were written (recall), of the
        words written that are the rewrite's (precision) and of their F1; BLEU-4 of all together;
        over all rows, the share of the content words that the question lacks that was added
        (found), and of the content words added, the share that is foreign to the rewrite.
    """
    recalls, precisions, f1s, same = [], [], [], 0
    lacking = found = added = foreign = 0
    for row in rows:
        ours, theirs = Counter(words(write(row))), Counter(words(row["rewrite"]))
        shared = (ours & theirs).total()
        recall, precision = shared / max(1, theirs.total()), shared / max(1, ours.total())
        recalls.append(recall)
        precisions.append(precision)
        f1s.append(2 * recall * precision / (recall + precision) if shared else 0.0)
        same += ours == theirs
        lacks = missing(row)
        adds = content(write(row)) - set(words(row["question"]))
        lacking += len(lacks)
        found += len(lacks & set(ours))
        added += len(adds)
        foreign += len(adds - set(theirs))
    count = max(1, len(rows))
    return {
        "count": len(rows),
        "recall": sum(recalls) / count,
        "precision": sum(precisions) / count,
        "f1": sum(f1s) / count,
        "bleu": bleu([(words(write(r)), words(r["rewrite"])) for r in rows]),
        "same_words": same / count,
        "found": found / lacking if lacking else None,
        "added": added,
        "foreign": foreign / added if added else None,
    }


def bleu(pairs: Sequence[tuple[list[str], list[str]]], longest: int = 4) -> float:
    """BLEU of (written, reference) pairs, over all of them together."""
    logarithm = 0.0
    for size in range(1, longest + 1):
        shared = total = 0
        for ours, theirs in pairs:
            some = Counter(grams(ours, size))
            shared += (some & Counter(grams(theirs, size))).total()
            total += some.total()
        if not shared:
            return 0.0
        logarithm += math.log(shared / total) / longest
    written, wanted = (sum(len(pair[i]) for pair in pairs) for i in (0, 1))
    return math.exp(logarithm + min(0.0, 1 - wanted / written))


def grams(text: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    for start in range(len(text) - size + 1):
        yield tuple(text[start : start + size])


def examples(rows: Sequence[Row], count: int) -> list[dict[str, str]]:
    """Some rows at even distances, whatever came of them."""
    picked = rows[:: max(1, len(rows) // count)][:count] if count else []
    return [
        {
            "before": row["history"][-1],
            "question": row["question"],
            "made_whole": completed(row),
            "rewrite": row["rewrite"],
        }
        for row in picked
    ]


def page(results: dict) -> str:
    """The results for people."""
    lines = [
        "# Questions of conversations, made whole",
        "",
        f"`{results['command']}`",
        "",
        f"commit: {results['commit']}; machine: {results['machine']}",
        "",
        f"The second half ({results['questions']:,} questions) of the rewrites of CANARD's "
        "development set (Elgohary et al., 2019; CC BY-SA 4.0); the rules were made with the first "
        "half. *Recall*, *precision* and *F1*: words, beside what a person wrote. *Found*: of the "
        "content words that the question lacks, the share that was added; *foreign*: of the "
        "content words added, the share that the person did not write. In QuAC's conversations, "
        'about one article each, people also write what an earlier answer said ("besides ..."); '
        "the rules add only who or what is spoken of.",
        "",
        "| questions | method | count | recall | precision | F1 | BLEU-4 | same words | found "
        "| foreign |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        shares = ["recall", "precision", "f1", "bleu", "same_words", "found", "foreign"]
        cells = [row["questions"], row["method"], f"{row['count']:,}"]
        cells += ["–" if row[s] is None else f"{row[s]:.3f}" for s in shares]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Rows at even distances:", "", "| said before | question | made whole | person |"]
    lines.append("|---|---|---|---|")
    for row in results["examples"]:
        cells = [short(row[k]) for k in ("before", "question", "made_whole", "rewrite")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def short(text: str, width: int = 100) -> str:
    """A table's cell."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", required=True, help=f"folder with {FILE}")
    parser.add_argument("--examples", type=int, default=20, help="rows shown on the page")
    parser.add_argument("--output", help="folder for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
