"""The default model's tokenizer: byte-level BPE, digits one by one, special strings whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from msa.text.prompts import PromptTemplate

PAD = "<|pad|>"
# Words with their leading space; digits one by one; brackets alone, so that the marks of a
# document's number never merge with its neighbours; runs of other signs; white space.
_PIECES = r"\d| ?\p{L}+|[\[\]]| ?[^\s\p{L}\p{N}\[\]]+|\s+"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, template: PromptTemplate | None = None
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on texts.

    Args:
        texts: any number of strings.
        vocab_size: entries, the special strings and 256 bytes included.
        template: whose special strings become single tokens.

    Returns:
        A tokenizer in which every text can be encoded and decoded without loss.

    Source: ours. Digits are split so that numbers can be read and written one digit at a time.
    """
    template = template or PromptTemplate()
    specials = [PAD, *template.special_strings()]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_whole(texts, template), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=template.end,
        additional_special_tokens=[s for s in specials[1:] if s != template.end],
        clean_up_tokenization_spaces=False,
    )


def _whole(texts: Iterable[str], template: PromptTemplate) -> Iterator[str]:
    """The texts, and the fixed wording of the template often enough to become whole words."""
    fixed = template.question + template.restate + template.answer
    for index, text in enumerate(texts):
        if index % 20 == 0:
            yield fixed.replace("{question}", "")
        yield text
