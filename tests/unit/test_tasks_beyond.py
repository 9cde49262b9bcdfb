"""The tasks beyond matching are solved from their documents alone, by solvers of their own."""

from __future__ import annotations

import re
from collections import defaultdict
from datetime import datetime

import pytest

from msa.evaluation.question_sets import Question
from msa.evaluation.tasks import TASKS
from msa.evaluation.tasks.beyond import as_number, options_of
from msa.evaluation.tasks.words import rows
from task_tools import outcome, request, seen, write_texts

BEYOND = sorted(name for name in TASKS if name.startswith("beyond/"))
# In these a question has no name that only its documents have; see their own tests.
WITHOUT_NAMES = {"beyond/no_shared_words", "beyond/edited_facts"}
BOUGHT = re.compile(r"On (.+), (.+) bought a (\w+) from (\w+) for (\d+) crowns\.")
COUNT = 30


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


def asked(name, texts, **more):
    """Questions with the texts that each may see, id -> content."""
    found = TASKS[f"beyond/{name}"].load(request(texts, **({"size": 300, "count": COUNT} | more)))
    assert len(found.questions) == COUNT
    see = seen(found)
    return [(q, {d.id: d.content for d in see(q)}) for q in found.questions]


def day(text):
    return datetime.strptime(text, "%d %B %Y")


def names_in(text):
    """Surnames: words with a capital letter that do not begin the sentence."""
    return [word for word in re.findall(r"(?<=\s)[A-Z][a-z]+", text) if word != "House"]


def test_all_families_are_there():
    names = "counting aggregating comparing first_or_last ordering state_tracking dialogue"
    more = "no_shared_words contradictions edited_facts"
    assert set(BEYOND) == {f"beyond/{name}" for name in f"{names} {more}".split()}


@pytest.mark.parametrize("name", BEYOND)
def test_a_set_is_sound_and_comes_from_its_seed(name, texts):
    one, same, other = (
        TASKS[name].load(request(texts, size=300, seed=seed, count=COUNT)) for seed in (1, 1, 2)
    )
    assert one == same
    assert one.data_hash != other.data_hash
    ids = [d.id for d in one.documents]
    assert len(set(ids)) == len(ids)
    assert len({q.id for q in one.questions}) == COUNT
    for q in one.questions:
        assert set(q.gold) <= set(q.own) <= set(ids)
        assert bool(q.gold) == bool(q.answers)
        assert not set(q.answers) & set(q.wrong)


@pytest.mark.parametrize("name", BEYOND)
def test_the_right_answer_scores_and_a_refusal_does_not(name, texts):
    task = TASKS[name]
    for question in task.load(request(texts, count=COUNT)).questions:
        answer = question.answers[0] if question.answers else ""
        assert task.score(question, outcome(answer, refused=not answer))["score"] == 1
        wrong = outcome("I cannot say", refused=bool(answer))
        assert task.score(question, wrong)["score"] == 0
        for old in question.wrong:
            assert task.score(question, outcome(old))["score"] == 0


@pytest.mark.parametrize("name", sorted(set(BEYOND) - WITHOUT_NAMES))
def test_the_names_of_a_question_occur_in_its_own_documents_only(name, texts):
    found = TASKS[name].load(request(texts, size=300, count=COUNT))
    for question in found.questions:
        surnames = [n for n in names_in(question.text) if len(n) > 3]
        elsewhere = " ".join(d.content for d in found.documents if d.id not in question.own)
        owned = " ".join(d.content for d in found.documents if d.id in question.own)
        unique = [n for n in surnames if n in owned and not re.search(rf"\b{n}\b", elsewhere)]
        assert unique, question.text


def test_names_that_occur_in_the_haystack_are_not_used(tmp_path):
    first = TASKS["beyond/counting"].load(request(count=3))
    taken = [q.text.split()[-2] for q in first.questions]
    write_texts(tmp_path)
    (tmp_path / "0.txt").write_text(" ".join(f"Here comes {name}." for name in taken))
    found = TASKS["beyond/counting"].load(request(tmp_path, size=1000, count=200))
    assert all(name in " ".join(d.text for d in found.documents) for name in taken)
    assert not {q.text.split()[-2] for q in found.questions} & set(taken)


# No word in common

STOP = set(
    re.findall(
        r"\w+",
        "a an and as at be been by does for from has have her his in into is it its of on one or"
        " out that the their them there they this to two under up what where which who with",
    )
)


def stems(text):
    words = re.findall(r"[a-zà-ÿ]+", text.lower())
    return {re.sub(r"(ing|ed|es|s|er|ers)$", "", w)[:6] for w in words if w not in STOP}


def test_questions_share_no_content_word_with_any_passage_of_theirs(texts):
    for question, documents in asked("no_shared_words", texts):
        for i in question.own:
            shared = stems(question.text) & stems(documents[i])
            assert not shared, (question.text, documents[i], shared)
        right = [
            told
            for asked_, told in rows("no_shared_words")[question.kind]
            if asked_ == question.text or question.text.endswith(f" {asked_}?")
        ]
        (gold,) = question.gold
        assert all(part in documents[gold] for part in right[0].split("{name}"))
        assert question.answers[0] in documents[gold]
        assert len(right) == 1


def test_no_question_of_the_table_shares_a_word_with_any_passage_of_its_kind():
    for kind, lines in rows("no_shared_words").items():
        assert len({asked for asked, _ in lines}) == len(lines) > 20
        told = {passage: stems(passage.replace("{name}", "")) for _, passage in lines}
        for question, passage in lines:
            shared = {p: s & stems(question) for p, s in told.items() if s & stems(question)}
            assert not shared, question
            assert kind == "place" or ("{name}" in passage and question.endswith("?"))


# Events


def bought_by(documents, buyer):
    found = [BOUGHT.fullmatch(text) for text in documents.values()]
    return [match for match in found if match and match[2] == buyer]


def test_what_was_bought_is_counted(texts):
    counts = set()
    for question, documents in asked("counting", texts):
        item, buyer = re.fullmatch(r"How many (\w+)s did (.+) buy\?", question.text).groups()
        count = sum(match[3] == item for match in bought_by(documents, buyer))
        assert str(count) in question.answers
        assert count == len(question.gold) == as_number(question.answers[1])
        assert count < len(bought_by(documents, buyer))
        counts.add(count)
    assert counts == {1, 2, 3, 4, 5, 6}


def test_totals_and_greatest_values_are_over_all_purchases(texts):
    for question, documents in asked("aggregating", texts):
        buyer = re.search(r"did (\w+ \w+)|that (\w+ \w+) bought", question.text)
        bought = bought_by(documents, buyer[1] or buyer[2])
        assert len(bought) == len(question.gold) >= 2
        if "in total" in question.text:
            right = str(sum(int(match[5]) for match in bought))
        elif "most expensive" in question.text:
            right = max(bought, key=lambda match: int(match[5]))[3]
        else:
            right = str(len({match[4] for match in bought}))
        assert right == question.answers[0]


def test_the_greater_figure_decides(texts):
    for question, documents in asked("comparing", texts):
        figures = {}
        for option in options_of(question.text):
            (text,) = [t for t in documents.values() if option in t]
            figures[option] = int(re.search(r"\d+", text)[0])
        low = re.match(r"Which is (cheaper|older):", question.text)
        assert question.answers == ((min if low else max)(figures, key=figures.get),)
        assert len(figures) == 2


def opened(documents, options):
    found = {}
    for option in options:
        (text,) = [t for t in documents.values() if option in t]
        found[option] = day(re.search(r"on (\d+ \w+ \d+)\.", text)[1])
    return sorted(found, key=found.get)


def test_dates_decide_which_was_first_and_last(texts):
    for question, documents in asked("first_or_last", texts):
        order = opened(documents, options_of(question.text))
        assert len(order) == 3
        assert question.answers == (order[0 if "first" in question.text else -1],)


def test_dates_decide_the_order(texts):
    for question, documents in asked("ordering", texts):
        order = opened(documents, options_of(question.text))
        assert question.answers == (", ".join(order),)
        score = TASKS["beyond/ordering"].score
        a, b, c = order
        said = f"First the {a}, then the {b} and last the {c.split()[0]}"
        assert score(question, outcome(said))["score"] == 1
        assert score(question, outcome(f"{b}, {a}, {c}"))["score"] == 0
        assert score(question, outcome(f"{a}, {b}"))["score"] == 0


# Conflicts


def test_the_newest_note_holds_and_the_others_are_wrong(texts):
    for question, documents in asked("contradictions", texts):
        what, site = re.fullmatch(r"What is the (.+) of the (.+) now\?", question.text).groups()
        notes = []
        for text in documents.values():
            match = re.fullmatch(rf"Note of (.+): the {what} of the {site} is (.+)\.", text)
            if match:
                notes.append((day(match[1]), match[2]))
        *old, (newest, value) = sorted(notes)
        assert question.answers == (value,)
        assert set(question.wrong) == {v for _, v in old}
        all_days = [day(m[1]) for t in documents.values() if (m := re.match(r"Note of (.+?):", t))]
        assert max(all_days) > newest  # a newer note is about something else


def test_an_edited_fact_is_what_the_document_says_and_not_what_is_known(texts):
    tables = {title.partition(":")[0]: lines for title, lines in rows("edited_facts").items()}
    for question, documents in asked("edited_facts", texts):
        truths = dict(tables[question.kind])
        (subject,) = [s for s in truths if re.search(rf"\b{s}\b[ ?]", question.text)]
        (text,) = [documents[i] for i in question.own if subject in documents[i]]
        assert documents[question.gold[0]] == text
        told = text.replace(subject, "").split()
        values = [
            v for v in set(truths.values()) if f" {v} " in f" {' '.join(told)} ".replace(".", "")
        ]
        assert question.answers == (max(values, key=len),)
        assert question.wrong == (truths[subject],)


# States

SIDES = {"north": "south", "south": "north", "east": "west", "west": "east"}


def told_log(documents, own):
    entries = []
    for i in own:
        match = re.fullmatch(r"Log of \w+ House, (\d\d:\d\d)\. (.+)", documents[i])
        if match:
            entries.append((match[1], match[2], i))
    assert len({time for time, _, _ in entries}) == len(entries)
    return [(text, i) for _, text, i in sorted(entries)]


def play(entries):
    """Rooms of people, holders and rooms of things, rooms that things came to, and gifts."""
    room, holder, lies, trail, gifts = {}, {}, {}, defaultdict(list), []

    def mark(thing, where):
        lies[thing] = where
        if trail[thing][-1:] != [where]:
            trail[thing].append(where)

    for text, _ in entries:
        who, rest = text.rstrip(".").split(" ", 1)
        if rest.startswith("went to the "):
            room[who] = rest.split()[-1]
        elif rest.startswith("picked up the "):
            thing = rest.split()[-1]
            assert thing not in holder
            assert lies.get(thing, room[who]) == room[who]
            holder[thing] = who
        elif rest.startswith("put down the "):
            assert holder.pop(rest.split()[-1]) == who
        else:
            _, _, thing, _, other = rest.split()
            assert holder[thing] == who
            assert room[who] == room[other]
            holder[thing] = other
            gifts.append((who, thing, other))
        for thing, hand in holder.items():
            mark(thing, room[hand])
    return room, lies, trail, gifts


def solve(question, entries):
    room, lies, trail, gifts = play(entries)
    text = question.text
    if found := re.search(r"in which room is (the )?(\w+) at the end", text):
        return {(lies if found[1] else room)[found[2]]}
    if found := re.search(r"was the (\w+) just before it came to the (\w+)", text):
        rooms = trail[found[1]]
        return {rooms[i - 1] for i in range(1, len(rooms)) if rooms[i] == found[2]}
    if found := re.search(r"who gave the (\w+) to (\w+)", text):
        return {a for a, thing, b in gifts if (thing, b) == found.groups()}
    if found := re.search(r"what did (\w+) give to (\w+)", text):
        return {thing for a, thing, b in gifts if (a, b) == found.groups()}
    found = re.search(r"to whom did (\w+) give the (\w+)", text)
    return {b for a, thing, b in gifts if (a, thing) == found.groups()}


def test_states_follow_from_the_log(texts):
    kinds = set()
    for question, documents in asked("state_tracking", texts):
        kinds.add(question.kind)
        if question.kind == "two arguments":
            continue
        entries = told_log(documents, question.own)
        assert solve(question, entries) == set(question.answers)
        if question.kind in ("one fact", "two facts", "three arguments"):
            needed = [(text, i) for text, i in entries if i in question.gold]
            assert (
                len(needed) <= {"one fact": 1, "two facts": 2, "three arguments": 1}[question.kind]
            )
        if question.kind == "one fact":
            assert question.answers[0] in documents[question.gold[0]]
    assert len(kinds) == 5


def test_a_plan_has_one_room_on_the_side_that_is_asked_for(texts):
    plans = [pair for pair in asked("state_tracking", texts) if pair[0].kind == "two arguments"]
    for question, documents in plans:
        side, room = re.search(r"directly (\w+) of the (\w+)\?", question.text).groups()
        beside = set()
        for i in question.own:
            a, told, b = re.search(
                r"The (\w+) is directly (\w+) of the (\w+)", documents[i]
            ).groups()
            beside |= {a} if (told, b) == (side, room) else set()
            beside |= {b} if (SIDES[told], a) == (side, room) else set()
        assert beside == set(question.answers)
    assert len(plans) == COUNT // 5


# Dialogues


def turns(documents, own):
    """(day, full name of the speaker, sentence) of every turn."""
    found = []
    for i in own:
        head, _, rest = documents[i].partition(". ")
        when, *people = re.fullmatch(r"Conversation of (.+) between (.+) and (.+)", head).groups()
        for line in rest.split("\n"):
            short, _, said = line.partition(": ")
            (full,) = [name for name in people if name.split()[0] == short]
            found.append((day(when), full, said))
    return sorted(found)


def told_values(row, said, forms):
    """The value in a sentence that has one of the row's forms."""
    for form in forms:
        match = re.fullmatch(re.escape(row[form]).replace(r"\{value\}", "(.+)"), said)
        if match:
            return match[1]
    return None


def answer_dialogue(question, said):
    """Answers found by going through all that was said."""
    text, found = question.text, []
    for table, forms, asks in (("facts", (1,), (2, 3)), ("changes", (1, 2), (3,))):
        for row in rows("dialogue")[table]:
            for when, who, sentence in said:
                value = told_values(row, sentence, forms)
                if value is None:
                    continue
                if row[asks[0]].format(who=who) == text:
                    found.append((when, value))
                if table == "facts" and text.endswith(", " + row[3].format(value=value)):
                    found.append((when, who))
                if (
                    table == "facts"
                    and re.search(rf"tell .+ about {row[4]}\?$", text)
                    and who in text
                ):
                    found.append((when, f"{when.day} {when:%B %Y}"))
    return [value for _, value in sorted(found)]


def test_dialogues_are_answered_by_going_through_what_was_said(texts):
    kinds = defaultdict(int)
    for question, documents in asked("dialogue", texts):
        kinds[question.kind] += 1
        said = turns(documents, question.own)
        if question.kind == "when":
            name = re.search(r"did (.+) tell", question.text)[1]
            said = [turn for turn in said if turn[1] == name]
        found = answer_dialogue(question, said)
        if question.kind == "never said":
            assert (found, question.answers) == ([], ())
        else:
            assert found[-1] == question.answers[0]
            assert question.wrong == tuple(found[:-1])
    assert set(kinds.values()) == {COUNT // 5}


def test_the_questions_of_a_conversation_share_its_documents(texts):
    found = TASKS["beyond/dialogue"].load(request(texts, count=10))
    assert len(found.documents) == 2 * 8
    assert len({q.own for q in found.questions}) == 2


# Scores


@pytest.mark.parametrize(
    ("answers", "wrong", "answer", "score"),
    [
        (("Oslo",), ("Paris",), "It is Oslo.", 1),
        (("Oslo",), ("Paris",), "Oslo, not Paris", 0),
        (("Oslo",), (), "Oslofjord", 0),
        (("Oslo",), (), "I think\nOslo", 0),
        (("3", "three"), (), "Three lamps, on 5 May", 1),
        (("3", "three"), (), "On 5 May, 3 lamps", 0),
        (("1200",), (), "1,200 crowns", 1),
        ((), (), "Oslo", 0),
    ],
)
def test_a_short_answer_is_found_in_the_first_line(answers, wrong, answer, score):
    question = Question("What?", answers, (), wrong=wrong)
    given = TASKS["beyond/counting"].score(question, outcome(answer))
    assert given["score"] == score
    assert set(given) == {"score", "em", "f1"}


@pytest.mark.parametrize(
    ("answer", "score"),
    [("The Balford tower.", 1), ("Balford, not Arnell", 1), ("Arnell", 0), ("neither", 0)],
)
def test_the_option_that_is_named_first_counts(answer, score):
    question = Question(
        "Which is taller: the Arnell tower or the Balford tower?", ("Balford tower",), ()
    )
    assert TASKS["beyond/comparing"].score(question, outcome(answer))["score"] == score
