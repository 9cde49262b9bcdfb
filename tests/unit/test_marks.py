from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from msa.model.marks import SPARE, fit_template


def spare_tokenizer() -> PreTrainedTokenizerFast:
    """Characters, the marks of a chat format, and special tokens that no text uses."""
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    vocabulary = {c: i for i, c in enumerate(characters)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.add_special_tokens(
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "additional_special_tokens": list(SPARE[:4]),
        }
    )
    return tokenizer


def test_tokens_that_the_model_cannot_tell_apart_are_no_marks() -> None:
    tokenizer = spare_tokenizer()
    torch.manual_seed(0)
    embeddings = torch.randn(len(tokenizer), 32)
    twins = [tokenizer.convert_tokens_to_ids(t) for t in (SPARE[0], SPARE[2], "<|im_end|>")]
    embeddings[twins] = 2.0 * embeddings[twins[0]]  # never trained: all alike
    template = fit_template(tokenizer, embeddings).template
    assert [template.end_of_read, template.end_of_retrieve] == [SPARE[1], SPARE[3]]


def test_marks_are_added_when_no_spare_token_is_distinct() -> None:
    tokenizer = spare_tokenizer()
    embeddings = torch.randn(len(tokenizer), 32)
    embeddings[-6:] = embeddings[-1]
    marks = fit_template(tokenizer, embeddings)
    assert marks.added == (marks.template.end_of_read, marks.template.end_of_retrieve)
