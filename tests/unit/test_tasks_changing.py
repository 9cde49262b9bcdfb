"""A memory that changes: what is right follows from the documents as they are then."""

from __future__ import annotations

import re

import pytest

from msa.errors import InputError
from msa.evaluation.tasks import TASKS
from task_tools import outcome, request, write_texts

TASK = TASKS["changing/facts"]
SHARES = (0, 0.1, 0.5, 1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


def told(documents):
    """(attribute, site) -> value, over all documents."""
    matches = [re.match(r"The (.+) of the (\w+ \w+) is (.+)\.$", text) for text in documents]
    return {(match[1], match[2]): match[3] for match in matches if match}


def asked(question):
    return re.fullmatch(r"What is the (.+) of the (.+)\?", question.text).groups()


def after(wanted, share):
    """The set, and the texts by id and the questions after the changes."""
    before = TASK.load(wanted)
    texts = {d.id: d.text for d in before.documents}
    changed = TASK.change(wanted, share)
    for change in changed.changes:
        assert change.id in texts
        if change.document is None:
            del texts[change.id]
        else:
            assert change.document.id == change.id
            assert change.document.text != texts[change.id]
            texts[change.id] = change.document.text
    return before, texts, changed


@pytest.mark.parametrize("share", SHARES)
def test_what_is_right_after_changes_follows_from_the_documents(share, texts):
    before, now, changed = after(request(texts, size=2000, count=40), share)
    old, new = told(d.text for d in before.documents), told(now.values())
    assert len(old) == 40
    for question, was in zip(changed.questions, before.questions, strict=True):
        assert (question.id, question.text) == (was.id, was.text)
        fact = asked(question)
        assert was.answers == (old[fact],)
        assert question.answers == ((new[fact],) if fact in new else ())
        outdated = new.get(fact) != old[fact]
        assert question.wrong == ((old[fact],) if outdated else ())
        assert question.gold == (was.gold if fact in new else ())
        kinds = {True: "replaced" if fact in new else "deleted", False: "unchanged"}
        assert question.kind == kinds[outdated]


@pytest.mark.parametrize("share", SHARES)
def test_that_share_is_changed_half_deleted_half_replaced(share, texts):
    before, _, changed = after(request(texts, size=4000, count=40), share)
    for start, count in (("fact-", 40), ("hay-", len(before.documents) - 40)):
        some = [change for change in changed.changes if change.id.startswith(start)]
        assert len(some) == round(share * count)
        deleted = sum(change.document is None for change in some)
        assert deleted == len(some) // 2
    assert len({change.id for change in changed.changes}) == len(changed.changes)


def test_a_larger_share_changes_what_a_smaller_one_does(texts):
    small, large = (TASK.change(request(texts, size=2000, count=40), share) for share in (0.1, 0.5))
    assert 0 < len(small.changes) < len(large.changes)
    assert all(change in large.changes for change in small.changes)


def test_nothing_changes_by_a_share_of_nothing(texts):
    wanted = request(texts, size=500)
    changed = TASK.change(wanted, 0)
    assert changed.changes == ()
    assert changed.questions == TASK.load(wanted).questions


def test_an_outdated_answer_scores_nothing_and_a_deleted_fact_is_refused():
    changed = TASK.change(request(count=40), 0.5)
    replaced = next(q for q in changed.questions if q.kind == "replaced")
    deleted = next(q for q in changed.questions if q.kind == "deleted")
    assert TASK.score(replaced, outcome(replaced.answers[0]))["score"] == 1
    assert TASK.score(replaced, outcome(replaced.wrong[0]))["score"] == 0
    assert TASK.score(deleted, outcome(deleted.wrong[0]))["score"] == 0
    assert TASK.score(deleted, outcome("", refused=True))["score"] == 1


def test_every_fact_is_asked_about_once_and_sites_are_unique(texts):
    found = TASK.load(request(texts, size=500, count=60))
    sites = [asked(question)[1] for question in found.questions]
    assert len({site.split()[0] for site in sites}) == 60
    for question, site in zip(found.questions, sites, strict=True):
        with_site = [d.id for d in found.documents if site in d.text]
        assert with_site == list(question.gold)
        assert question.own == ()


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none_is_one_clear_line(share):
    with pytest.raises(InputError, match=f"a share of {share} of the documents; expected 0 to 1"):
        TASK.change(request(), share)
