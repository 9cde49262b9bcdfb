from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from msa.synthetic_worlds import generate_world
from msa.text.prompts import PromptEncoder, PromptTemplate, Reading
from msa.training.tokenizer import PAD, train_tokenizer

VOCAB = 600
few = settings(max_examples=60, deadline=None)
# Every kind of character that can be encoded: no half surrogates.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@pytest.fixture(scope="module")
def tokenizer():
    world = generate_world(0, 30)
    # brackets and digits side by side, as often as could ever tempt the trainer
    tempting = ["[12][34][12][34]", "][ ][ ]] [[ ].", "2024 2024 2024"] * 200
    return train_tokenizer([*(d.text for d in world.documents), *tempting], VOCAB)


@pytest.fixture(scope="module")
def reloaded(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text, add_special_tokens=False)]


@given(texts)
@example("  two  spaces\t\ttabs\r\n\n")
@example("e\u0301 \u00e9 \ufb01 \u1e9b\u0323")  # never composed, decomposed or folded
@example("\u202eright\u202c to left \u05d0\u05d1, zero\u200bwidth, \ufeffmark")
@example("😀👩‍👩‍👧 ½ Ⅷ ² ٣ ३ \ufffd \x00\x7f")
@example("don 't , wait .")  # no clean-up of spaces in front of signs
@few
def test_every_text_comes_back_as_it_was(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


@given(texts)
@example("a . b , c ' s")
@few
def test_a_saved_tokenizer_reads_and_writes_alike(tokenizer, reloaded, text):
    ids = reloaded.encode(text, add_special_tokens=False)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert reloaded.decode(ids) == text


@given(st.integers(0, 10**9), texts)
@few
def test_digits_are_single_tokens_wherever_they_stand(tokenizer, number, text):
    own = {tokenizer.convert_tokens_to_ids(d): d for d in "0123456789"}
    assert len(own) == 10
    ids = tokenizer.encode(f"{text}{number}{text}", add_special_tokens=False)
    written = "".join(own.get(i, "") for i in ids)
    digits = "".join(c for c in text if c in "0123456789")
    assert written == f"{digits}{number}{digits}"


@pytest.mark.parametrize("text", ["][", "[12][34]", "[[]]", "a[b]c", " [ ] ", "]. [", "-]["])
def test_brackets_never_merge_with_their_neighbours(tokenizer, text):
    assert all(p in "[]" or not set(p) & set("[]") for p in pieces(tokenizer, text))


def test_no_entry_holds_a_bracket_or_a_digit_and_something_else(tokenizer):
    for token in tokenizer.get_vocab():
        if len(token) > 1:
            assert not set(token) & set("[]0123456789"), token


@given(st.lists(st.integers(0, 99999), min_size=1, max_size=4))
@few
def test_numbers_written_in_a_row_are_those_written_one_by_one(tokenizer, numbers):
    """What the grammar of inference joins token by token is what the whole text would be."""
    encoder = PromptEncoder(tokenizer)
    text = "".join(f"[{n}]" for n in numbers) + "<|object_ref_end|>"
    assert encoder.written(numbers) == encoder.tokenize(text)


def test_special_strings_are_single_tokens_at_the_front(tokenizer):
    specials = [PAD, *PromptTemplate().special_strings()]
    assert [tokenizer.convert_tokens_to_ids(s) for s in specials] == list(range(len(specials)))
    for i, special in enumerate(specials):
        assert tokenizer.encode(f"a{special}b", add_special_tokens=False)[1] == i
    assert tokenizer.pad_token_id == 0
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_template_of_ones_own_has_its_own_special_strings():
    template = PromptTemplate(end="<end>", end_of_read="<read>", end_of_retrieve="<enough>")
    tokenizer = train_tokenizer(["a b c"] * 30, 300, template)
    for special in template.special_strings():
        assert len(tokenizer.encode(special, add_special_tokens=False)) == 1
    assert tokenizer.eos_token == "<end>"


def test_the_vocabulary_has_the_size_asked_for(tokenizer):
    assert len(tokenizer) == VOCAB


def test_the_wording_of_the_template_takes_few_tokens(tokenizer):
    """It stands in every context: its words are learned whole, whatever the texts are."""
    context = PromptEncoder(tokenizer).context("Q?", [Reading(((12, "T."),))])
    assert len(context.input_ids) < 55
    assert {" answer", " question", " documents"} <= set(
        pieces(tokenizer, PromptTemplate().question + PromptTemplate().answer)
    )


def test_training_is_repeatable(tokenizer):
    world = generate_world(1, 20)
    once, again = (train_tokenizer((d.text for d in world.documents), 400) for _ in range(2))
    assert once.get_vocab() == again.get_vocab()
