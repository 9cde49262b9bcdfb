"""Options, fusion, traces, batches and the text of answers: everything around the rounds."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_tiny_tokenizer
from msa.errors import ConfigError, InputError, ModelError
from msa.inference.answers import AnswerPieces, AnswerText
from msa.inference.batch import prompt_batch
from msa.inference.engine import _checked
from msa.inference.options import ASK_OPTIONS_FILE, AskOptions
from msa.inference.trace import CandidateReader
from msa.text.prompts import LocalContext, PromptTemplate
from msa.types import Content, Selection

# ---- options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_rounds", 0),
        ("max_rounds", 2.0),
        ("max_rounds", True),
        ("max_documents_per_round", -1),
        ("max_new_tokens", "64"),
        ("batch_size", 0),
        ("candidates", 0),
        ("min_documents_per_round", 0),
        ("min_documents_per_round", 5),
        ("lexical_weight", -1),
        ("judged_documents", 0),
        ("judge_weight", -0.5),
        ("judge_margin", float("nan")),
        ("end_weight", -1.0),
        ("evidence_weight", -1.0),
        ("end_bias", float("inf")),
        ("layer_weights", {}),
        ("layer_weights", {2: 0}),
        ("layer_weights", {2: -1.0}),
        ("layer_weights", {"two": 1}),
        ("layer_weights", [1, 2]),
        ("refusal_threshold", -0.1),
        ("refusal_threshold", 1.5),
        ("refusal_threshold", True),
        ("refusal_weights", [1.0]),
        ("refusal_weights", {"bias": "x"}),
        ("prior_weight", -0.1),
        ("prior_weight", float("nan")),
        ("prior_temperature", 0.0),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", -1),
        ("seed", 1.5),
        ("force_answer_prefix", "yes"),
        ("allow_unread", 1),
    ],
)
def test_options_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is .*; give"):
        AskOptions(**{name: value})


def test_weights_of_unknown_features_are_refused_and_the_known_ones_named() -> None:
    with pytest.raises(ConfigError, match=r"refusal_weights has 'margin'; give some of refusal_l"):
        AskOptions(refusal_weights={"margin": 1.0})


def test_unknown_options_are_refused_and_the_known_ones_named() -> None:
    with pytest.raises(ConfigError, match=r"Unknown option 'rounds'; there are: max_rounds, "):
        AskOptions().with_changes(rounds=3)
    changed = AskOptions().with_changes(max_rounds=3)
    assert changed.max_rounds == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.max_rounds = 4  # type: ignore[misc]


def test_options_are_kept_beside_a_checkpoint(tmp_path: Any) -> None:
    assert AskOptions.load(tmp_path) == AskOptions()
    options = AskOptions(
        max_rounds=2,
        prior_weight=0.5,
        seed=7,
        layer_weights={2: 1, 10: 0.5},
        refusal_threshold=0.4,
        refusal_weights={"bias": -1.0, "refusal_logit": 0.5},
    )
    options.save(tmp_path)
    assert AskOptions.load(tmp_path) == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        (json.dumps({"top_k": 3}), "Unknown option 'top_k'"),
        (json.dumps({"max_rounds": 0}), "max_rounds is 0"),
    ],
)
def test_a_bad_options_file_is_named(tmp_path: Any, text: str, message: str) -> None:
    (tmp_path / ASK_OPTIONS_FILE).write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        AskOptions.load(tmp_path)
    assert str(tmp_path / ASK_OPTIONS_FILE) in str(error.value)


def test_options_need_no_torch() -> None:
    code = "import sys, msa.inference.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- questions


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "The question is empty"),
        (" \n\t", "The question is empty"),
        (3, "The question is int; give a string, or a list"),
        (None, "The question is NoneType"),
        (b"why?", "The question is bytes"),
        (["why?", ""], "Question 2 is empty"),
        (["why?", 7], "Question 2 is int"),
        ("caf\udce9?", "not valid Unicode"),
    ],
)
def test_what_is_no_question_is_refused(question: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _checked(question)


# ---- routing


class Memory:
    """Always selects the same."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.asked: list[Selection] = []

    def route(self, layer: int, queries: torch.Tensor, mask: torch.Tensor) -> Selection:
        return self.selection

    def content(self, layer: int, selection: Selection) -> Content:
        self.asked.append(selection)
        empty = torch.zeros(2, 0, 1, 1)
        return Content(empty, empty, torch.zeros(2, 0, dtype=torch.bool))


def test_all_candidates_are_kept_and_the_model_is_shown_its_share() -> None:
    inf = float("inf")
    documents = torch.tensor([[5, 2, 9], [4, -1, -1]])
    memory = Memory(Selection(documents, torch.tensor([[0.5, 0.25, 0.125], [0.5, -inf, -inf]])))
    reader = CandidateReader(memory, visible=2)
    shown = reader.route(3, torch.zeros(2, 1, 4), torch.ones(2, 1, dtype=torch.bool))
    reader.content(3, shown)
    assert shown.documents.tolist() == memory.asked[0].documents.tolist() == [[5, 2], [4, -1]]
    assert reader.rows() == [{3: [(5, 0.5), (2, 0.25), (9, 0.125)]}, {3: [(4, 0.5)]}]
    assert reader.seconds > 0


def test_queries_that_are_not_numbers_are_refused() -> None:
    memory = Memory(Selection(torch.tensor([[1]]), torch.tensor([[0.5]])))
    vectors, mask = torch.zeros(1, 2, 4), torch.tensor([[False, True]])
    vectors[0, 0] = torch.nan  # does not route
    reader = CandidateReader(memory, 1)
    reader.route(7, vectors, mask)
    assert reader.rows() == [{7: [(1, 0.5)]}]
    for value in (torch.nan, torch.inf):
        vectors[0, 1, 2] = value
        reader = CandidateReader(memory, 1)
        reader.route(6, torch.zeros(1, 2, 4), mask)
        reader.route(7, vectors, mask)
        with pytest.raises(ModelError, match="layer 7 are NaN or infinite"):
            reader.rows()


# ---- batches


def context(prefix: int, length: int) -> LocalContext:
    made = LocalContext(prefix_length=prefix)
    made.extend(range(10, 10 + prefix), sees_memory=False)
    made.extend(range(20, 20 + length - 1), routes=True)
    made.extend([99])
    return made


def test_prompts_are_padded_on_the_left_with_the_first_position_repeated() -> None:
    batch = prompt_batch([context(2, 4), context(2, 2)], 8, 0, torch.device("cpu"))
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, 22, 99], [0, 0, 10, 11, 20, 99]]
    assert batch.attention_mask.tolist() == [[1] * 6, [0, 0, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 10, 11, 12, 13], [0, 0, 0, 1, 10, 11]]
    assert batch.routing_mask.int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0]]
    assert batch.memory_mask.int().tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert batch.next_positions == (14, 12)
    alike = prompt_batch([context(2, 4), context(2, 4)], 8, 0, torch.device("cpu"))
    assert alike.attention_mask is None
    assert alike.length == 6


# ---- answers

TOKENIZER = make_tiny_tokenizer()
TEMPLATE = PromptTemplate()


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return found


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (" Rome<|im_end|>", "Rome"),
        ("The answer to the question is: Rome <|im_end|> more", "Rome"),
        (" Rome", "Rome"),
        ("<|im_end|>", ""),
        ("The answer", "The answer"),
        (" a <|im_start|>b<|im_end|>", "a b"),
    ],
)
def test_lead_in_and_end_mark_are_no_part_of_the_answer(written: str, text: str) -> None:
    reader = AnswerText(TOKENIZER, TEMPLATE, [ids("<|im_end|>")])
    assert reader.text(ids(written)) == text


@settings(deadline=None)
@given(
    st.text(st.sampled_from("The answer to is:\u00e9\U0001f600 \n#."), max_size=40), st.booleans()
)
def test_the_pieces_of_any_answer_are_its_text(written: str, ended: bool) -> None:
    ends = [ids("<|im_end|>"), ids("#.#")]  # the second as if a tokenizer had split its mark
    reader = AnswerText(TOKENIZER, TEMPLATE, ends)
    tokens = ids(written) + (ends[0] if ended else [])
    pieces = AnswerPieces(reader)
    given_ = [pieces.push(token) for token in tokens] + [pieces.finish()]
    assert "".join(given_) == reader.text(tokens)
    assert not any("\ufffd" in piece for piece in given_)
