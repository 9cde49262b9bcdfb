"""Documents tried one by one: how likely the model would answer from each, and not refuse.

Routing finds what looks right; whether a text answers is seen by reading it. A trial is a local
context in which one more document has been read, followed by the refusal in place of an answer,
without the memory beside it. One forward scores all of its tokens; nothing is written.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch

from msa.inference.batch import prompt_batch
from msa.inference.decoding import prefill
from msa.model.modeling_msa import MSAForCausalLM
from msa.text.prompts import LocalContext


def judge(
    model: MSAForCausalLM,
    contexts: Sequence[LocalContext],
    refusals: Sequence[Sequence[int]],
    pad_token: int,
) -> list[float]:
    """How likely the refusal does not follow each context, in [0, 1].

    Args:
        model: in evaluation mode.
        contexts: each up to where its answer begins.
        refusals: per context the tokens of the refusal, at least one.
        pad_token: fills the left.
    """
    rows = []
    for context, refusal in zip(contexts, refusals, strict=True):
        row = copy.deepcopy(context)
        row.extend(refusal[:-1])
        rows.append(row)
    batch = prompt_batch(rows, model.config.top_k_documents, pad_token, model.device)
    longest = max(map(len, refusals))
    logits = prefill(model, batch, None, logits_to_keep=longest).logits
    assert logits is not None
    by_token = logits.float().log_softmax(dim=-1)  # [B, longest, V]
    found = []
    for i, refusal in enumerate(refusals):
        last = by_token[i, longest - len(refusal) :]
        index = torch.tensor(list(refusal), device=last.device)[:, None]
        found.append(-math.expm1(min(0.0, float(last.gather(1, index).sum()))))
    return found
