"""Write the demo's documents and questions from a generated world of held-out names.

    python tools/make_demo.py

The seed is fixed and the questions are the first of a shuffled list: none is chosen by hand.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from msa.training.worlds import World, WorldDocument, WorldQuestion, generate_world

SEED = 2603_23516
DOCUMENTS = 120
BREADTH = 0.15
QUESTIONS = {1: 5, 2: 5}
FOLDER = Path(__file__).parents[1] / "src/msa/demo/worlds"


def main() -> None:
    world = generate_world(SEED, DOCUMENTS, breadth=BREADTH, split="test")
    rng = random.Random(SEED)
    questions = draw(world, rng)
    other = generate_world(SEED + 1, 64, breadth=BREADTH, split="test")
    added, added_question = addition(world, other, rng)
    FOLDER.mkdir(parents=True, exist_ok=True)
    write(FOLDER / "documents.jsonl", [document_row(d) for d in world.documents])
    write(FOLDER / "questions.jsonl", [question_row(q) for q in questions])
    document = {**document_row(added), "id": f"new-{added.key}"}
    row = {**question_row(added_question), "document": document, "gold": [document["id"]]}
    (FOLDER / "added.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


def draw(world: World, rng: random.Random) -> list[WorldQuestion]:
    """Questions of both kinds, each about another document."""
    chosen: list[WorldQuestion] = []
    for hops, count in QUESTIONS.items():
        pool = [q for q in world.questions if q.hops == hops]
        rng.shuffle(pool)
        used: set[str] = set()
        for question in pool:
            if len(used) < count and question.gold[0] not in used:
                used.add(question.gold[0])
                chosen.append(question)
    return chosen


def addition(world: World, other: World, rng: random.Random) -> tuple[WorldDocument, WorldQuestion]:
    """A person whom the world does not know, with a question about them."""
    known = {d.title for d in world.documents}
    people = {d.key: d for d in other.documents if d.key.startswith("person")}
    pool = [
        q
        for q in other.questions
        if q.hops == 1 and q.gold[0] in people and people[q.gold[0]].title not in known
    ]
    question = rng.choice(pool)
    return people[question.gold[0]], question


def document_row(document: WorldDocument) -> dict[str, str]:
    return {"id": document.key, "title": document.title, "text": document.text}


def question_row(question: WorldQuestion) -> dict[str, object]:
    return {
        "question": question.question,
        "answer": question.answer,
        "gold": list(question.gold),
        "hops": question.hops,
    }


def write(path: Path, rows: list[dict[str, object]] | list[dict[str, str]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
