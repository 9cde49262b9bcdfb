"""A judge behind an OpenAI-compatible endpoint, against one that misbehaves, over real HTTP."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from evaluation_runs import EVIL, about, row, write_run
from msa.errors import InputError, JudgeError
from msa.evaluation.judge import (
    LONGEST_WAIT,
    Judge,
    _Client,
    judge_runs,
    judged_scores,
    read_score,
)
from msa.evaluation.runs import read_run

USAGE = {"prompt_tokens": 100, "completion_tokens": 10}


def said(content, **more):
    """A reply with that content."""
    return 200, {"choices": [{"message": {"content": content}}], "usage": USAGE, **more}, {}


def grade(score=5):
    return said(json.dumps({"reason": "as accepted", "score": score}))


class Endpoint:
    """What was asked, and a script of what is replied; the last line of it over and over."""

    def __init__(self, *script):
        self.script, self.bodies, self.headers = list(script), [], []
        self.lock, self.running, self.most = threading.Lock(), 0, 0

    def next(self, body, headers):
        with self.lock:
            self.bodies.append(json.loads(body))
            self.headers.append(headers)
            reply = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return reply(self.bodies[-1]) if callable(reply) else reply


@contextmanager
def serving(*script):
    """A judge on a free port; its address and what it was asked."""
    endpoint = Endpoint(*script)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/chat/completions"
            status, reply, headers = endpoint.next(body, dict(self.headers))
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            """A client that has given up is no error of the test."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", endpoint
        finally:
            server.shutdown()
            thread.join()


def judge(url, **options):
    return Judge(**{"url": url, "model": "grader", "pause": 0.01, "concurrency": 2, **options})


@pytest.fixture
def runs(tmp_path):
    rows = [row(0, "msa", True), row(1, "msa", False), row(2, "msa", False, "refused")]
    write_run(tmp_path, about("qa/squad", 16_000, "msa"), rows)
    return tmp_path


NAME = "qa__squad@16000--msa"


def rows_of(folder):
    return read_run(folder / "runs" / f"{NAME}.jsonl").rows


def test_every_answer_gets_its_score_tokens_and_price(runs):
    def reply(body):
        shown = json.loads(body["messages"][1]["content"])
        return grade({"Oslo": 5, "I do not know.": 0}.get(shown["answer"], 1))

    with serving(reply) as (url, endpoint):
        told = []
        found = judge_runs(
            runs, judge(url, key="secret", prices=(2.0, 8.0)), lambda *now: told.append(now)
        )
    assert judged_scores(runs, NAME, rows_of(runs)) == {"q0": 5.0, "q1": 1.0, "q2": 0.0}
    assert found.scores == {NAME: (2.0, 3)}
    assert (found.judged, found.kept, found.unreadable) == (3, 0, [])
    assert (found.prompt_tokens, found.completion_tokens) == (300, 30)
    assert found.cost == pytest.approx((300 * 2 + 30 * 8) / 1e6)
    assert told[-1] == (3, 3)
    assert {headers["Authorization"] for headers in endpoint.headers} == {"Bearer secret"}
    assert {body["model"] for body in endpoint.bodies} == {"grader"}
    assert "secret" not in (runs / "judged" / f"{NAME}.jsonl").read_text()


def test_it_goes_on_where_it_was_stopped_and_judges_anew_what_has_changed(runs):
    with serving(grade()) as (url, endpoint):
        judge_runs(runs, judge(url))
        assert judge_runs(runs, judge(url)).kept == 3
        assert len(endpoint.bodies) == 3
        changed = [dict(each) for each in rows_of(runs)]
        changed[0]["answer"] = "Bergen"
        write_run(runs, about("qa/squad", 16_000, "msa"), changed)
        assert judged_scores(runs, NAME, changed).keys() == {"q1", "q2"}
        found = judge_runs(runs, judge(url))
    assert (found.judged, found.kept) == (1, 2)


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"error": "slow down"}, {"Retry-After": "0.05"}),
        (500, b"<html>oops</html>", {}),
        (200, b"not json", {}),
        (200, {"choices": []}, {}),
        (200, {"choices": [{"message": {"content": None}}], "usage": "none"}, {}),
        said("I would rather not."),
        said('{"score": 7, "reason": "generous"}'),
    ],
    ids=["429", "500", "no json", "no choices", "no content", "no score", "score of 7"],
)
def test_what_passes_is_tried_again(runs, trouble):
    with serving(trouble, trouble, grade(4)) as (url, endpoint):
        found = judge_runs(runs, judge(url, concurrency=1))
    assert found.scores == {NAME: (4.0, 3)}
    assert len(endpoint.bodies) == 5


def test_a_request_that_takes_too_long_is_tried_again(runs):
    def slow(body):
        time.sleep(1.0)
        return grade()

    with serving(slow, grade()) as (url, _):
        found = judge_runs(runs, judge(url, timeout=0.3, concurrency=1))
    assert found.judged == 3


def test_it_waits_as_long_as_it_is_told_to_but_not_for_ever(runs):
    class Waits(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)

    waits: list[float] = []
    script = [(429, {}, {"Retry-After": seconds}) for seconds in ("7", "86400", "Mon, 1 Jan")]
    with serving(*script, grade()) as (url, _):
        client = _Client(judge(url, pause=0.1))
        client.stop = Waits()
        assert client.verdict(rows_of(runs)[0]).attempts == 4
    assert waits[:2] == [7, LONGEST_WAIT]
    assert 0.25 < waits[2] < 0.6  # its own: 0.1 seconds, doubled twice


def test_an_answer_without_a_readable_score_is_named_and_asked_again_later(runs):
    def reply(body):
        return said("hm") if "Bergen" in body["messages"][1]["content"] else grade()

    with serving(reply) as (url, _):
        found = judge_runs(runs, judge(url, attempts=2, prices=(1.0, 1.0)))
    assert found.unreadable == [f"{NAME}: q1"]
    assert (found.judged, found.prompt_tokens) == (2, 400)  # the failures have been paid for
    assert judged_scores(runs, NAME, rows_of(runs)).keys() == {"q0", "q2"}
    with serving(grade(1)) as (url, endpoint):
        assert judge_runs(runs, judge(url)).judged == 1
    assert len(endpoint.bodies) == 1


def test_a_refusal_stops_at_once_and_keeps_what_was_said(runs):
    with serving(grade(), (401, {"error": "no key"}, {})) as (url, endpoint):
        with pytest.raises(JudgeError, match=r"refuses with HTTP 401.*no key.*MSA_JUDGE_KEY"):
            judge_runs(runs, judge(url, concurrency=1))
        assert len(endpoint.bodies) == 2
    assert len(judged_scores(runs, NAME, rows_of(runs))) == 1


def test_what_does_not_pass_is_an_error_after_all_attempts(runs):
    with serving((503, {}, {})) as (url, endpoint):
        with pytest.raises(JudgeError, match=r"failed 3 times \(HTTP 503.*goes on from there"):
            judge_runs(runs, judge(url, attempts=3, concurrency=1))
        assert len(endpoint.bodies) == 3
    with pytest.raises(JudgeError, match="failed 2 times"):  # nobody listens there any more
        judge_runs(runs, judge(url, attempts=2))


def test_the_key_follows_no_redirect(runs):
    with serving(grade()) as (elsewhere, other):
        moved = (307, {}, {"Location": f"{elsewhere}/chat/completions"})
        with serving(moved) as (url, _), pytest.raises(JudgeError, match="HTTP 307"):
            judge_runs(runs, judge(url, key="secret"))
    assert not other.bodies


def test_a_model_that_takes_no_temperature_is_asked_without(runs):
    refusal = (400, {"error": {"message": "Unsupported value: 'temperature'"}}, {})
    with serving(refusal, grade()) as (url, endpoint):
        assert judge_runs(runs, judge(url, concurrency=1)).judged == 3
    assert ["temperature" in body for body in endpoint.bodies] == [True, False, False, False]


def test_as_many_are_asked_at_once_as_was_said(runs):
    rows = [row(i, "msa", True, question=f"{i}?") for i in range(8)]
    write_run(runs, about("qa/squad", 16_000, "msa"), rows)
    meeting = threading.Barrier(4, timeout=10)

    def reply(body):
        meeting.wait()  # passes only when four are here
        return grade()

    with serving(reply) as (url, _):
        assert judge_runs(runs, judge(url, concurrency=4)).judged == 8


def test_one_file_has_one_judge(runs):
    with serving(grade()) as (url, _):
        judge_runs(runs, judge(url))
        with pytest.raises(InputError, match=r"judged with judge 'grader', not 'other'; delete"):
            judge_runs(runs, judge(url, model="other"))


def test_what_is_wrong_with_the_call_is_said(tmp_path):
    with pytest.raises(InputError, match="judge's URL is 'file:///etc/passwd'; give one as in"):
        judge("file:///etc/passwd")
    with pytest.raises(InputError, match=r"no runs \(runs/\*.jsonl\)"):
        judge_runs(tmp_path, judge("http://127.0.0.1:9/v1"))


def test_answers_are_shown_to_the_judge_as_data(runs):
    write_run(runs, about("qa/squad", 16_000, "msa"), [row(0, "msa", True, answer=EVIL)])
    with serving(grade(0)) as (url, endpoint):
        judge_runs(runs, judge(url))
    (body,) = endpoint.bodies
    assert json.loads(body["messages"][1]["content"])["answer"] == EVIL


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"reason": "fine", "score": 4}', 4),
        ('```json\n{"score": 3.5}\n```', 3.5),
        ('<think>maybe {"score": 1}?</think> {"score": 5}', 5),
        ('{"score": "2"}', 2),
        ("Score: 4", 4),
        ("3", 3),
        ("score is 3/5", None),
        ("4/5", 4),
        ('{"score": true}', None),
        ('{"score": -1}', None),
        ("Score: 10", None),
        ("there are 3 errors", None),
        ("", None),
    ],
)
def test_scores_are_read_from_what_models_write(text, score):
    found = read_score(text)
    assert (found and found[0]) == score
