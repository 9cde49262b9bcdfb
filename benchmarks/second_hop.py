"""The second document of two, found by words once the first was read.

    python benchmarks/second_hop.py FOLDER BANK [--questions 150] [--seed 7]

FOLDER is a question set with a train split, BANK a bank that holds its corpus (`msa index`).
Of every question with two gold documents each is read once and the other looked for among all but
it: by BM25 (`lexical_search` with a `LexicalQuery`) and as questions are asked (`lexical_ranking`).
"""

from __future__ import annotations

import argparse
import random

from msa import MemoryBank
from msa.memory.store.word_index import LexicalQuery
from msa.training.question_sets import QuestionSet

DEPTHS = (1, 2, 4)
FOUND = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("bank")
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    questions = QuestionSet.load(args.folder, on_error="skip")
    two = [q for q in questions.questions if len(q.gold) == 2 and not q.unanswerable]
    asked = random.Random(args.seed).sample(two, min(args.questions, len(two)))
    found = {"BM25": [0] * len(DEPTHS), "ranking": [0] * len(DEPTHS)}
    with MemoryBank.open(args.bank, read_only=True) as bank:
        for question in asked:
            for read, wanted in (question.gold, question.gold[::-1]):
                query = LexicalQuery(question.question, (questions.documents[read].content,))
                known = {part.number for part in bank.parts(read)}
                gold = {part.number for part in bank.parts(wanted)}
                ways = {"BM25": bank.lexical_search, "ranking": bank.lexical_ranking}
                for name, search in ways.items():
                    ((*hits,),) = search([query], FOUND)
                    unread = [number for number, _ in hits if number not in known]
                    for i, depth in enumerate(DEPTHS):
                        found[name][i] += not gold.isdisjoint(unread[:depth])
    print(f"{questions.name}: {len(asked)} questions, {2 * len(asked)} second documents")
    for name, counts in found.items():
        shares = " / ".join(f"{50 * count / len(asked):.1f}" for count in counts)
        print(f"{name:8} among the first {DEPTHS}: {shares}")


if __name__ == "__main__":
    main()
