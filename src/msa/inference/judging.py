"""Documents tried one by one: how likely the model finds the question after a text.

Routing and words find what looks right. Where several look right, the one from which the question
follows is the better one (query likelihood: Ponte and Croft 1998; zero-shot with a language model:
Sachan et al. 2022, arXiv 2204.07496). One forward scores a few texts together: no memory beside
them, no template, nothing written.

Shapes: B texts, T tokens of the longest with its question, S tokens of the longest question, V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from msa.inference.batch import left_padded
from msa.model.modeling_msa import MSAForCausalLM
from msa.text.prompts import PromptEncoder

MAX_TEXT_TOKENS = 512
"""Longer texts are cut there."""
BEFORE_QUESTION = "\nQuestion: "


@dataclass(frozen=True, slots=True)
class Trial:
    """A text and the question after it.

    Attributes:
        input_ids: tokens of both.
        question_length: how many of the last ones are the question, at least one.
    """

    input_ids: Sequence[int]
    question_length: int

    def __len__(self) -> int:
        return len(self.input_ids)


def make_trials(
    encoder: PromptEncoder, question: str, texts: Sequence[str], max_positions: int
) -> list[Trial]:
    """One trial per text; none at all where the question has no tokens or leaves no room.

    Args:
        encoder: of the model.
        question: follows each text.
        texts: cut to fit.
        max_positions: of the model.
    """
    asked = encoder.plain(question)
    after = [*encoder.plain(BEFORE_QUESTION), *asked]
    room = min(MAX_TEXT_TOKENS, max_positions - len(after))
    if not asked or room < 1:
        return []
    return [Trial([*encoder.plain(text)[:room], *after], len(asked)) for text in texts]


@torch.no_grad()
def judge(model: MSAForCausalLM, tried: Sequence[Trial], pad_token: int) -> list[float]:
    """How likely the question's tokens are after each text: their geometric mean, in [0, 1].

    Args:
        model: in evaluation mode.
        tried: run through the model together, at least one.
        pad_token: fills the left.
    """
    ids = left_padded([t.input_ids for t in tried], pad_token, model.device)
    mask = left_padded([[1] * len(t) for t in tried], 0, model.device)
    longest = max(t.question_length for t in tried)
    out = model(
        ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=longest + 1,
        use_cache=False,
    )
    by_token = out.logits[:, :-1].float().log_softmax(-1)  # [B, S, V]
    of_question = by_token.gather(-1, ids[:, -longest:, None])[..., 0].tolist()
    return [
        math.exp(sum(row[-t.question_length :]) / t.question_length)
        for row, t in zip(of_question, tried, strict=True)
    ]
