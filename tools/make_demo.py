"""Write the documents and questions of `msa demo`.

    python tools/make_demo.py --data data                # src/msa/demo/real
    python tools/make_demo.py --data data --pick MODEL   # the same, the questions picked
    python tools/make_demo.py --worlds --pick worlds     # src/msa/demo/worlds

Real ones: passages of Wikipedia with questions of the development sets of SQuAD 2.0, HotpotQA and
2WikiMultihopQA. No passage shares a run of `RUN` words with any text that training may read as a
passage of its own: gold documents of training questions, all documents of the sets that are for
training alone, all plain texts. The seed is fixed. There are more candidates than questions shown:
without --pick the first ones are shown; with it all are asked, in both precisions that a CPU may
choose, and those are shown that come out right in both (prints which), of various kinds.

DATA holds `qa/`, `qa_train/` and `text/`, as docs/training.md describes question sets.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import sys
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from msa.demo.material import Step, step_of_row
from msa.evaluation.metrics import normalize_answer
from msa.evaluation.retrieval import BM25Retriever
from msa.synthetic_worlds import World, WorldDocument, WorldQuestion, generate_world
from msa.types import Document

SEED = 2603_23516
FOLDER = Path(__file__).parents[1] / "src/msa/demo"
Row = dict[str, object]

# Real documents

WITH_TRAIN_SPLIT = ("squad", "hotpotqa", "2wikimultihopqa", "musique", "strategyqa", "timeqa_human")
EVALUATION_TEXTS = ("wikitext2",)  # among the plain texts, never trained on
RUN, STRIDE = 12, 4
LEFT_OUT = ("Islamism",)  # an article whose sentences read badly as a first example
PASSAGES = 20  # of an article, at most
WORDS = (40, 190)  # of a passage
DISTRACTORS = 2  # beside every two-hop question
CANDIDATES = {"one hop": 4, "two hops": 40, "near": 16, "far": 16}  # one hop: of an article
SHOWN = {"one hop": 5, "two hops": 1, "unanswerable": 1}
PRECISIONS = ("float32", "bfloat16")
POINTING = re.compile(
    r"\b(it|its|they|their|them|he|she|his|her|him|this|that|these|those|here|there|author|article|"
    r"passage|following|above|other|another|also|same)\b",
    re.IGNORECASE,
)
NAMES = {
    "squad": "SQuAD 2.0 development set",
    "hotpotqa": "HotpotQA development set",
    "2wikimultihopqa": "2WikiMultihopQA development set",
}

# Invented notes: (id, title, text with a gap, question, answers before and after)
NOTES = (
    (
        "allotment-minutes",
        "Minutes of the Millbrook allotment committee",
        "Minutes of the Millbrook allotment committee, 12 March 2026. The greenhouse that the "
        "January storm damaged will be built again before May. {} will order the glass. Anna "
        "Okafor looks after the water pump. The next meeting is on 16 April.",
        "Who will order the glass for the greenhouse of the Millbrook allotments?",
        ("Tom Reyes", "Lise Brandt"),
    ),
    (
        "choir-rehearsals",
        "Rehearsals of the Oakfield choir",
        "The Oakfield choir rehearses every Tuesday at seven in the evening, from September to "
        "June. Rehearsals take place in {}. New singers are welcome; please bring a pencil. "
        "The concert of this season is on 20 June.",
        "Where does the Oakfield choir rehearse?",
        ("St Mark's Hall", "the Old Library"),
    ),
    (
        "laboratory-equipment",
        "Harlow laboratory: equipment",
        "Notes on the equipment of the Harlow laboratory. The electron microscope stands in room "
        "{}. It must be booked a day ahead. Priya Nair keeps the list of bookings and trains new "
        "users on Mondays.",
        "In which room is the electron microscope of the Harlow laboratory?",
        ("B214", "C107"),
    ),
    (
        "archive-handover",
        "Lindqvist archive: handover",
        "Handover of the Lindqvist archive, spring 2026. The scanning of the letters goes on as "
        "planned. The person in charge of the archive is {}. Requests for copies are answered "
        "within a week, and the reading room is open from Tuesday to Friday.",
        "Who is in charge of the Lindqvist archive?",
        ("Miriam Castell", "Daniel Hsu"),
    ),
)


@dataclass(frozen=True)
class Passage:
    """A document of a question set, and whether training may have read it."""

    id: str
    source: str
    title: str
    text: str
    clean: bool

    @property
    def words(self) -> int:
        return len(self.text.split())


def real(data: Path, model: str | None) -> None:
    rng = random.Random(SEED)
    passages = {name: read_passages(data, name) for name in NAMES}
    mark_clean(data, passages)
    taken, left_out = articles(passages["squad"])
    two_hops = bridges(data, passages, rng)
    gold = [passage for _, found in two_hops for passage in found]
    documents = {passage.id: passage for passage in [*taken, *gold]}
    for name in ("hotpotqa", "2wikimultihopqa"):
        near = neighbours([q for q, found in two_hops if found[0].source == name], passages[name])
        documents |= {passage.id: passage for passage in near}
    documents = without_repeated_texts(documents)
    shown = named(list(documents.values()))
    bank = Bank(list(documents.values()), shown)
    candidates = {
        "one hop": one_hop(data, bank, rng),
        "two hops": [bank.row(q, [p.id for p in found], found[0].source) for q, found in two_hops],
        "unanswerable": unanswerable(data, passages, left_out, bank, rng),
    }
    stories = [story(note) for note in NOTES]
    folder = FOLDER / "real"
    write(folder / "documents.jsonl", [bank.document(passage) for passage in bank.passages])
    asked, told = (
        pick(model, folder, candidates, stories, SHOWN) if model else (candidates, stories)
    )
    rows = [row for kind, count in SHOWN.items() for row in asked[kind][:count]]
    write(folder / "questions.jsonl", [*rows, *told[0]])
    print({kind: len(rows) for kind, rows in candidates.items()}, len(bank.passages), "passages")


def rows_of(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def read_passages(data: Path, name: str) -> dict[str, Passage]:
    """Gold documents of the questions of a development set."""
    questions = rows_of(data / "qa" / name / "questions.dev.jsonl.gz")
    gold = {i for question in questions for i in question["gold"]}
    return {
        row["id"]: Passage(row["id"], name, row["title"] or "", tidy(row["text"]), clean=False)
        for row in rows_of(data / "qa" / name / "corpus.jsonl.gz")
        if row["id"] in gold
    }


def tidy(text: str) -> str:
    """One line; the spaces that a tokenizer left around brackets go."""
    text = " ".join(text.split())
    return re.sub(r"(?<=\w)\( ", " (", re.sub(r" \)", ")", text))


def runs(text: str, stride: int = 1) -> set[int]:
    """Hashes of runs of words, at every place, or at every so many.

    Two texts that share `RUN` words in a row share one of these, one text's being taken at every
    place and the other's at every `STRIDE`.
    """
    words = re.sub(r"[^\w]+|_", " ", text.lower()).split()
    size = RUN - STRIDE + 1
    return {hash(tuple(words[i : i + size])) for i in range(0, len(words) - size + 1, stride)}


def training_texts(data: Path) -> Iterator[str]:
    """Every text that training may read: as a passage, a distractor or plain text."""
    for name in WITH_TRAIN_SPLIT:
        questions = rows_of(data / "qa" / name / "questions.train.jsonl.gz")
        used = {i for q in questions for i in (*q["gold"], *q.get("context_doc", ()))}
        corpus = rows_of(data / "qa" / name / "corpus.jsonl.gz")
        yield from (row["text"] for row in corpus if row["id"] in used)
    for path in [data / "qa/medquad/corpus.jsonl.gz", *data.glob("qa_train/*/corpus.jsonl.gz")]:
        yield from (row["text"] for row in rows_of(path))
    for path in sorted(data.glob("text/*.jsonl.gz")):
        if not path.name.startswith(EVALUATION_TEXTS):
            yield from (row["text"] for row in rows_of(path))


def mark_clean(data: Path, passages: dict[str, dict[str, Passage]]) -> None:
    """Find out which passages share no run of words with a text of training."""
    own = {p.id: runs(p.text) for found in passages.values() for p in found.values()}
    all_runs = set().union(*own.values())
    seen: set[int] = set()
    for text in training_texts(data):
        seen |= runs(text, STRIDE) & all_runs
    for found in passages.values():
        for passage in [*found.values()]:
            clean = bool(own[passage.id]) and not own[passage.id] & seen
            found[passage.id] = replace(passage, clean=clean)


def questions_of(data: Path, name: str) -> list[dict]:
    return [q for q in rows_of(data / "qa" / name / "questions.dev.jsonl.gz") if well_formed(q)]


def well_formed(question: dict) -> bool:
    """A question that can be read by itself, and whose answer is a short name or number."""
    text, answer = question["question"].strip(), question["answers"][0]
    words = text.split()
    return (
        6 <= len(words) <= 18
        and (text + answer).isascii()
        and re.match(r"[A-Z][^()]*\?$", text) is not None
        and not POINTING.search(text)
        and any(word[0].isupper() for word in words[1:])
        and len(answer.split()) <= 3
        and re.search(r"[A-Z0-9]", answer) is not None
        and normalize_answer(answer) not in normalize_answer(text)
    )


def articles(passages: dict[str, Passage]) -> tuple[list[Passage], list[Passage]]:
    """Passages of SQuAD's development articles: those of the memory, and those left out of it."""
    taken: dict[str, list[Passage]] = {}
    left_out = []
    for passage in passages.values():
        if passage.clean and passage.title and passage.title not in LEFT_OUT:
            fits = WORDS[0] <= passage.words <= WORDS[1]
            found = taken.setdefault(passage.title, [])
            (found if fits and len(found) < PASSAGES else left_out).append(passage)
    return [passage for found in taken.values() for passage in found], left_out


def bridges(
    data: Path, passages: dict[str, dict[str, Passage]], rng: random.Random
) -> list[tuple[dict, list[Passage]]]:
    """Two-hop questions whose first document names the title of the second, which answers."""
    chosen: list[tuple[dict, list[Passage]]] = []
    for name in ("hotpotqa", "2wikimultihopqa"):
        pool = []
        for question in questions_of(data, name):
            found = [passages[name][i] for i in question["gold"]]
            pairs = [found, found[::-1]] if len(found) == 2 else []
            ordered = [p for p in pairs if leads(question["question"], p, question["answers"][0])]
            if question["type"] in ("bridge", "compositional", "inference") and ordered:
                pool.append((question, ordered[0]))
        rng.shuffle(pool)
        chosen += pool[: CANDIDATES["two hops"] // 2]
    return chosen


def leads(question: str, pair: Sequence[Passage], answer: str) -> bool:
    first, second = pair
    bridge = re.sub(r" \(.*\)", "", second.title)
    return (
        all(p.clean and 25 <= p.words <= WORDS[1] for p in pair)
        and re.sub(r" \(.*\)", "", first.title).lower() in question.lower()
        and bridge.lower() not in question.lower()
        and bridge in first.text
        and answer in second.text
        and answer not in first.text
    )


def neighbours(questions: list[dict], passages: dict[str, Passage]) -> list[Passage]:
    """What a search by words finds beside the right documents."""
    pool = [p for p in passages.values() if p.clean and WORDS[0] <= p.words <= WORDS[1]]
    search = BM25Retriever([Document(p.id, p.text, p.title) for p in pool])
    scores = search.scores([q["question"] for q in questions])
    found = []
    for question, row in zip(questions, scores, strict=True):
        best = [pool[i] for i in np.argsort(-row, kind="stable")[:20]]
        found += [
            p for p in best if p.id not in question["gold"] and question["answers"][0] not in p.text
        ][:DISTRACTORS]
    return found


def without_repeated_texts(documents: dict[str, Passage]) -> dict[str, Passage]:
    """Question sets share passages; the first of them stays."""
    seen: dict[str, str] = {}
    for passage in documents.values():
        seen.setdefault(normalize_answer(passage.text), passage.id)
    return {key: documents[key] for key in seen.values()}


def named(passages: Sequence[Passage]) -> dict[str, str]:
    """Ids that can be read: the title, with a number where an article has several passages."""
    names: dict[str, str] = {}
    counts: dict[str, int] = {}
    titles = [slug(p.title) for p in passages]
    for passage, title in zip(passages, titles, strict=True):
        counts[title] = counts.get(title, 0) + 1
        several = titles.count(title) > 1
        names[passage.id] = f"{title}-{counts[title]}" if several else title
    return names


def slug(title: str) -> str:
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
    return re.sub(r"\W+", "-", plain.lower()).strip("-")


class Bank:
    """The demo's documents."""

    def __init__(self, passages: list[Passage], names: dict[str, str]) -> None:
        self.passages, self.names = passages, names
        self.search = BM25Retriever([Document(p.id, p.text, p.title) for p in passages])
        self.text = " ".join(f" {normalize_answer(p.title + ' ' + p.text)} " for p in passages)

    def document(self, passage: Passage) -> Row:
        name = self.names[passage.id]
        return {
            "id": name, "title": passage.title, "text": passage.text, "source": passage.source
        }  # fmt: skip

    def row(self, question: dict, gold: Sequence[str], source: str) -> Row:
        return {
            "step": "ask",
            "question": question["question"].strip(),
            "answers": question["answers"] if gold else [],
            "cited": [self.names[i] for i in gold],
            "refused": not gold,
            "source": f"{NAMES[source]}, {question['id']}",
        }

    def rank(self, question: str, gold: str) -> int:
        """Rank of a document by words, from 0."""
        scores = self.search.scores([question])[0]
        index = next(i for i, p in enumerate(self.passages) if p.id == gold)
        return int((scores > scores[index]).sum())

    def holds(self, answer: str) -> bool:
        return f" {normalize_answer(answer)} " in self.text


def one_hop(data: Path, bank: Bank, rng: random.Random) -> list[Row]:
    """Questions of SQuAD whose passage is the first by words too: they say what they ask about."""
    passages = {p.id: p for p in bank.passages}
    pool = questions_of(data, "squad")
    rng.shuffle(pool)
    by_article: dict[str, list[Row]] = {}
    used: set[str] = set()
    for question in pool:
        gold = question["gold"][0]
        if gold not in passages or gold in used or len(question["question"].split()) > 14:
            continue
        found = by_article.setdefault(passages[gold].title, [])
        once = passages[gold].text.count(question["answers"][0]) == 1
        if (
            len(found) < CANDIDATES["one hop"]
            and once
            and not bank.rank(question["question"], gold)
        ):
            used.add(gold)
            found.append(bank.row(question, [gold], "squad"))
    turns = [[rows[i] for rows in by_article.values() if i < len(rows)] for i in range(9)]
    return [row for turn in turns for row in shuffled(turn, rng)]


def shuffled(rows: list[Row], rng: random.Random) -> list[Row]:
    return rng.sample(rows, len(rows))


def unanswerable(
    data: Path,
    passages: dict[str, dict[str, Passage]],
    left_out: list[Passage],
    bank: Bank,
    rng: random.Random,
) -> list[Row]:
    """Questions whose documents and answers are not in the memory: on its articles and others."""
    missing = {p.id for p in left_out}
    near = [q for q in questions_of(data, "squad") if q["gold"][0] in missing]
    far = [
        q
        for q in questions_of(data, "hotpotqa")
        if not {slug(passages["hotpotqa"][i].title) for i in q["gold"]} & set(bank.names.values())
    ]
    rows = []
    for kind, name, pool in (("near", "squad", near), ("far", "hotpotqa", far)):
        fitting = [q for q in pool if not any(bank.holds(answer) for answer in q["answers"])]
        rows.append([bank.row(q, (), name) for q in rng.sample(fitting, CANDIDATES[kind])])
    return [row for pair in zip(*rows, strict=True) for row in pair]


def story(note: tuple[str, str, str, str, tuple[str, str]]) -> list[Row]:
    """A note that is added, changed and deleted, with a question after each."""
    name, title, text, question, (before, after) = note
    common: Row = {"question": question, "answers": [], "cited": [], "refused": True}

    def told(answer: str) -> Row:
        document = {"id": name, "title": title, "text": text.format(answer)}
        return {**common, "answers": [answer], "cited": [name], "refused": False} | {
            "document": document
        }

    return [
        {"step": "add", **told(before)},
        {"step": "update", **told(after), "never": [before]},
        {"step": "delete", **common, "deleted": name, "never": [before, after]},
    ]


# Picking


def pick(
    model: str,
    folder: Path,
    candidates: dict[str, list[Row]],
    stories: list[list[Row]],
    shown: dict[str, int],
) -> tuple[dict[str, list[Row]], list[list[Row]]]:
    """The candidates that a model answers as expected, in every precision, kinds mixed."""
    wrong: dict[str, str] = {}
    for precision in PRECISIONS:
        ask_all(model, precision, folder, candidates, stories, wrong)
    right = {
        kind: mixed([row for row in rows if row["question"] not in wrong])
        for kind, rows in candidates.items()
    }
    told = [rows for rows in stories if rows[0]["question"] not in wrong]
    for kind, rows in candidates.items():
        print(f"{kind}: {len(right[kind])} of {len(rows)} as expected, {shown[kind]} are shown")
    print(f"notes: {len(told)} of {len(stories)} as expected, 1 is shown")
    for question, difference in wrong.items():
        print(f"  {question}  {difference}")
    if not told or any(len(right[kind]) < count for kind, count in shown.items()):
        sys.exit("too few are as expected; nothing was picked")
    return right, told


def ask_all(
    model: str,
    precision: str,
    folder: Path,
    candidates: dict[str, list[Row]],
    stories: list[list[Row]],
    wrong: dict[str, str],
) -> None:
    """Ask every candidate; what differs joins `wrong`."""
    from msa import MemoryBank, MemoryEngine, load

    checkpoint = load(model, dtype=precision)
    lines = (folder / "documents.jsonl").read_text(encoding="utf-8").split("\n")
    documents = [json.loads(line) for line in lines if line]

    def judge(step: Step, answer: object) -> None:
        difference = step.difference(answer, checkpoint.template)
        if difference is not None:
            wrong.setdefault(step.question, f"{step.kind}, {precision}: {difference}")

    with (
        tempfile.TemporaryDirectory() as path,
        MemoryBank.create(Path(path, "bank"), checkpoint) as bank,
    ):
        bank.add(Document(d["id"], d["text"], d["title"]) for d in documents)
        engine = MemoryEngine(bank)
        for rows in candidates.values():
            steps = [step_of_row(row) for row in rows]
            answers = engine.ask([step.question for step in steps])
            for step, answer in zip(steps, answers, strict=True):
                judge(step, answer)
        for step in (step_of_row(row) for rows in stories for row in rows):
            if step.deleted is not None:
                bank.delete(step.deleted)
            else:
                bank.add([step.document], on_duplicate="update")
            judge(step, engine.ask(step.question))


def mixed(rows: list[Row]) -> list[Row]:
    """The same rows, each time the next whose article and first word were seen least."""
    seen: dict[str, int] = {}
    ordered: list[Row] = []
    left = list(rows)
    while left:
        marks = [[str(row["question"]).split()[0], re.sub(r"-\d+$", "", str(row["cited"][:1]))]
                 for row in left]  # fmt: skip
        costs = [sum(seen.get(mark, 0) for mark in some) for some in marks]
        best = costs.index(min(costs))
        for mark in marks[best]:
            seen[mark] = seen.get(mark, 0) + 1
        ordered.append(left.pop(best))
    return ordered


# Worlds

DOCUMENTS = 120
BREADTH = 0.15
HOPS = {"one hop": 1, "two hops": 2}
WORLD_SHOWN = {"one hop": 3, "two hops": 1}
WORLD_CANDIDATES = 8  # of each kind


def worlds(model: str | None) -> None:
    """Questions about a world of names that training never saw."""
    world = generate_world(SEED, DOCUMENTS, breadth=BREADTH, split="test")
    rng = random.Random(SEED)
    candidates = {kind: [*map(world_row, draw(world, n, rng))] for kind, n in HOPS.items()}
    other = generate_world(SEED + 1, 64, breadth=BREADTH, split="test")
    stories = additions(world, other, rng)
    folder = FOLDER / "worlds"
    write(folder / "documents.jsonl", [world_document(d) for d in world.documents])
    asked, told = (
        pick(model, folder, candidates, stories, WORLD_SHOWN) if model else (candidates, stories)
    )
    rows = [row for kind, count in WORLD_SHOWN.items() for row in asked[kind][:count]]
    write(folder / "questions.jsonl", [*rows, *told[0]])


def draw(world: World, hops: int, rng: random.Random) -> list[WorldQuestion]:
    """Questions of one kind, each about another document."""
    pool = [q for q in world.questions if q.hops == hops]
    rng.shuffle(pool)
    chosen: dict[str, WorldQuestion] = {}
    for question in pool:
        chosen.setdefault(question.gold[0], question)
    return [*chosen.values()][:WORLD_CANDIDATES]


def additions(world: World, other: World, rng: random.Random) -> list[list[Row]]:
    """People whom the world does not know: added, changed, deleted."""
    known = {d.title for d in world.documents}
    people = {d.key: d for d in other.documents if d.key.startswith("person")}
    pool = [
        q
        for q in other.questions
        if q.hops == 1 and q.gold[0] in people and people[q.gold[0]].title not in known
    ]
    stories = []
    for question in rng.sample(pool, WORLD_CANDIDATES):
        person = people[question.gold[0]]
        others = [q.answer for q in pool if same_kind(q, question) and q.answer != question.answer]
        if others and question.answer in person.text:
            text = person.text.replace(question.answer, "{}")
            answers = (question.answer, others[0])
            rows = story((slug(person.title), person.title, text, question.question, answers))
            # this model was not taught to refuse
            stories.append([*rows[:2], {**rows[2], "refused": None}])
    return stories


def same_kind(one: WorldQuestion, other: WorldQuestion) -> bool:
    return one.question.split()[:4] == other.question.split()[:4]


def world_document(document: WorldDocument) -> Row:
    return {"id": document.key, "title": document.title, "text": document.text}


def world_row(question: WorldQuestion) -> Row:
    return {
        "step": "ask",
        "question": question.question,
        "answers": [question.answer],
        "cited": list(question.gold),
        "refused": False,
    }


def write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write what msa demo works on.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="qa/, qa_train/, text/")
    parser.add_argument("--pick", metavar="MODEL", help="show what this model answers right")
    parser.add_argument("--worlds", action="store_true", help="the generated worlds instead")
    given = parser.parse_args()
    if given.worlds:
        worlds(given.pick)
    else:
        real(given.data, given.pick)


if __name__ == "__main__":
    main()
