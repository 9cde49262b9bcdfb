from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("pydantic_settings")
pytest.importorskip("prometheus_client")
pytest.importorskip("multipart")

from pydantic import ValidationError

from msa.serve.native import MOST_NESTED, AskBody, SearchBody


def nested(depth):
    value = "deepest"
    for _ in range(depth):
        value = [value]
    return {"a": value}


def test_whole_numbers_may_be_written_as_json_writes_them():
    body = AskBody.model_validate({"question": "a", "options": {"max_rounds": 2.0, "seed": 3}})
    assert body.options.given() == {"max_rounds": 2, "seed": 3}
    assert SearchBody.model_validate({"query": "a", "top_k": 7.0}).top_k == 7


@pytest.mark.parametrize(
    "changes",
    [
        {"stream": 1},
        {"options": {"max_rounds": "2"}},
        {"options": {"max_rounds": 2.5}},
        {"options": {"max_rounds": True}},
        {"options": {"batch_size": 4}},
        {"questions": ["b"]},
        {"question": None, "questions": []},
        {"question": None, "questions": ["b"] * 65},
        {"question": None, "questions": ["b"], "stream": True},
        {"question": " \n"},
        {"question": "\ud800"},
        {"filter": {"a": "\ud800"}},
        {"filter": {"\ud800": 1}},
        {"filter": nested(MOST_NESTED)},
    ],
)
def test_what_is_not_as_described_is_refused(changes):
    body = {"question": "a", **changes}
    with pytest.raises(ValidationError):
        AskBody.model_validate({name: v for name, v in body.items() if v is not None})


def test_conditions_may_nest_as_deep_as_is_said():
    body = AskBody.model_validate({"question": "a", "filter": nested(MOST_NESTED - 2)})
    assert body.filter == nested(MOST_NESTED - 2)
