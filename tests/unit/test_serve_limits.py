from __future__ import annotations

import threading
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("pydantic_settings")

from msa.serve.errors import ServiceError
from msa.serve.fairness import Turns
from msa.serve.keys import ANONYMOUS, Principal
from msa.serve.limits import Admission

ALICE = Principal("alice", frozenset({"read"}), ("*",))
BOB = Principal("bob", frozenset({"read"}), ("*",))


def refusal(admission, principal):
    with pytest.raises(ServiceError) as refused:
        admission.admit(principal)
    return refused.value


def test_no_more_are_let_in_than_may_run_and_wait():
    admission = Admission(running=2, waiting=3, waiting_per_key=100)
    tickets = [admission.admit(ALICE) for _ in range(5)]
    error = refusal(admission, BOB)
    assert (error.status, error.code) == (429, "queue_full")
    tickets[0].close()
    tickets[0].close()  # twice: one place only
    admission.admit(BOB)
    assert refusal(admission, BOB).code == "queue_full"
    assert admission.inside == 5


def test_one_key_leaves_room_for_others():
    admission = Admission(running=1, waiting=10, waiting_per_key=2)
    for _ in range(3):
        admission.admit(ALICE)
    assert refusal(admission, ALICE).code == "key_limit"
    admission.admit(BOB)


def test_where_there_are_no_keys_all_share_the_queue():
    admission = Admission(running=1, waiting=5, waiting_per_key=0)
    for _ in range(6):
        admission.admit(ANONYMOUS)
    assert refusal(admission, ANONYMOUS).code == "queue_full"


def test_a_refusal_says_when_to_come_again_in_bounds_that_clients_obey():
    admission = Admission(running=1, waiting=0, waiting_per_key=0)
    admission.admit(ALICE)
    for seconds in (0.0, 1e6):
        admission.seconds_each = seconds
        headers = refusal(admission, BOB).headers
        assert 1 <= int(headers["Retry-After"]) <= 120
        assert int(headers["retry-after-ms"]) == 1000 * int(headers["Retry-After"])


def test_index_work_does_not_wait_when_nothing_is_asked():
    turns = Turns()
    turns.encode()
    assert turns.encode() < 0.1


def test_index_work_waits_for_a_question_but_keeps_its_share():
    turns = Turns(share=0.25)
    turns.encode()
    time.sleep(0.05)  # a piece of work
    with turns.asking():
        waited = turns.encode()
    assert 0.14 <= waited < 2.0  # three times as long as it worked


def test_index_work_goes_on_as_soon_as_the_question_ends():
    turns = Turns(share=0.001)
    turns.encode()
    time.sleep(0.02)
    asked, done = threading.Event(), threading.Event()

    def ask():
        with turns.asking():
            asked.set()
            done.wait(10)

    thread = threading.Thread(target=ask)
    thread.start()
    asked.wait(10)
    threading.Timer(0.1, done.set).start()
    assert turns.encode() < 9.0  # the share alone would let it wait for ten seconds
    thread.join()


def test_a_long_pause_before_does_not_make_the_wait_long(monkeypatch):
    monkeypatch.setattr("msa.serve.fairness.LONGEST_WAIT", 0.05)
    turns = Turns(share=0.01)
    turns.encode()
    time.sleep(0.05)
    with turns.asking():
        assert turns.encode() < 2.0
