from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_tiny_tokenizer
from msa.errors import ConfigError
from msa.text.prompts import (
    PROMPT_TEMPLATE_FILE,
    PromptEncoder,
    PromptTemplate,
    Reading,
    global_positions,
)

QUESTION = "Who is it?"
ASKED = (
    "\nPlease answer the question based on the above historical document information\n\n"
    f"{QUESTION}\nPlease return all documents related to the question"
)
FIRST = Reading(((12, "Ada lives."), (7, "Bob too.")))
SECOND = Reading(((304, "Cid."),))


def runs(encoder, context):
    """Text of every stretch of equal marks: (routes, sees memory, text)."""
    out = []
    for token, routes, sees in zip(
        context.input_ids, context.routes, context.sees_memory, strict=True
    ):
        if not out or out[-1][:2] != [routes, sees]:
            out.append([routes, sees, []])
        out[-1][2].append(token)
    return [(r, s, encoder.tokenizer.decode(ids)) for r, s, ids in out]


def test_round_1_routes_by_the_question_with_its_last_newline(encoder):
    assert runs(encoder, encoder.context(QUESTION)) == [
        (False, False, "<|im_start|>user\n"),
        (True, True, ASKED + "\n"),
        (False, True, "<|im_end|>\n<|im_start|>"),
    ]


def test_round_2_routes_by_the_question_and_the_text_just_read(encoder):
    assert runs(encoder, encoder.context(QUESTION, [FIRST])) == [
        (False, False, "<|im_start|>user\n"),
        (True, True, ASKED),
        (False, True, "\n<|im_end|>\n<|im_start|>[12][7]<|object_ref_end|>"),
        (True, True, "[12]. Ada lives.\n[7]. Bob too.\n"),
        (False, True, "<|object_ref_end|>"),
    ]


def test_round_3_no_longer_routes_by_the_first_text(encoder):
    assert runs(encoder, encoder.context(QUESTION, [FIRST, SECOND])) == [
        (False, False, "<|im_start|>user\n"),
        (True, True, ASKED),
        (
            False,
            True,
            "\n<|im_end|>\n<|im_start|>[12][7]<|object_ref_end|>"
            "[12]. Ada lives.\n[7]. Bob too.\n<|object_ref_end|>[304]<|object_ref_end|>",
        ),
        (True, True, "[304]. Cid.\n"),
        (False, True, "<|object_ref_end|>"),
    ]


def test_routing_marks_of_later_rounds_are_those_of_the_released_code(golden_folder):
    """Golden `doc_ids` are 0 where a token routes; the released prompt had one more `\\n`."""
    golden = json.loads((golden_folder / "interleave.json").read_text())
    for name in ("round2", "round3"):
        ids, marks = golden[f"{name}_ids"], golden[f"{name}_doc_ids"]
        routes = [mark == 0 for mark in marks]
        changes = [i for i in range(1, len(routes)) if routes[i] != routes[i - 1]]
        assert routes[0]  # the question
        assert len(changes) == 3  # the question, not the tail and what was read, the last text
        assert not routes[-1]  # the end of what was read
        newline = ids[0]  # the text begins with one
        assert ids[changes[0]] == newline  # the question's last one does not route


def test_the_question_is_one_sequence_of_tokens_in_every_round(encoder):
    """What was prefilled in round 1 begins round 2, so that training may begin labels there."""
    first = encoder.context(QUESTION).input_ids
    for readings in ([FIRST], [FIRST, SECOND]):
        assert encoder.context(QUESTION, readings).input_ids[: len(first)] == first


@given(length=st.integers(0, 40), prefix=st.integers(0, 10), top_k=st.integers(1, 16))
@settings(max_examples=30, deadline=None)
def test_positions_jump_by_k_behind_the_prefix(length, prefix, top_k):
    positions = global_positions(length, prefix, top_k)
    assert positions[:prefix] == list(range(min(prefix, length)))
    assert positions[prefix:] == [i + top_k for i in range(prefix, length)]


def test_a_context_jumps_behind_its_own_prefix(encoder):
    context = encoder.context(QUESTION, [FIRST])
    prefix = len(encoder.tokenize("<|im_start|>user\n"))
    assert context.prefix_length == prefix == context.sees_memory.count(False)
    positions = context.positions(16)
    assert positions[prefix - 1 : prefix + 1] == [prefix - 1, prefix + 16]


def test_braces_of_a_text_are_text(encoder):
    """Texts are values of the template's fields and are never formatted themselves."""
    text = "{number} {} {0} }{ %s"
    decode = encoder.tokenizer.decode
    assert decode(encoder.document(3, text)) == f"<|im_start|>[3]. {text}[3]<|im_end|>"
    assert text in decode(encoder.context(text, [Reading(((3, text),))]).input_ids)
    assert text in decode(encoder.restatement(text))


def test_a_question_whose_template_has_another_end_routes_whole(tiny_tokenizer):
    template = PromptTemplate(question="Q: {question}!")
    encoder = PromptEncoder(tiny_tokenizer, template)
    assert (True, True, "Q: Why?!") in runs(encoder, encoder.context("Why?", [FIRST]))


def test_special_strings_are_single_tokens_of_a_tokenizer_made_for_them(encoder):
    assert all(len(encoder.tokenize(s)) == 1 for s in PromptTemplate().special_strings())
    assert len(set(PromptTemplate().special_strings())) == 4


def test_a_template_beside_a_checkpoint_is_read_back(tmp_path):
    template = PromptTemplate(prefix="été\n", answer="Réponse :")
    template.save(tmp_path)
    assert PromptTemplate.load(tmp_path) == template


def test_without_a_file_the_released_format_is_meant(tmp_path):
    assert PromptTemplate.load(tmp_path) == PromptTemplate()


def test_fields_left_out_of_the_file_keep_their_defaults(tmp_path):
    (tmp_path / PROMPT_TEMPLATE_FILE).write_text('{"prefix": "P"}')
    assert PromptTemplate.load(tmp_path) == PromptTemplate(prefix="P")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prefixx": "P"}', "expected a JSON object with fields"),
        (b"[1]", "expected a JSON object with fields"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b'{"tail": 3, "end": "e"}', r"expected strings, but \['tail'\] are none"),
    ],
    ids=["unknown field", "no object", "no JSON", "no text", "no string"],
)
def test_a_bad_template_file_is_one_clear_line(tmp_path, content, said):
    (tmp_path / PROMPT_TEMPLATE_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        PromptTemplate.load(tmp_path)
    assert str(tmp_path / PROMPT_TEMPLATE_FILE) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_is_added_to_a_text():
    """Also not by a tokenizer that by itself puts a token in front."""
    tokenizer = make_tiny_tokenizer()
    plain = PromptEncoder(tokenizer).tokenize("ab")
    from tokenizers.processors import TemplateProcessing

    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_end|> $A", special_tokens=[("<|im_end|>", end)]
    )
    assert tokenizer.encode("ab") == [end, *plain]
    assert PromptEncoder(tokenizer).tokenize("ab") == plain


@pytest.mark.parametrize("mark", PromptTemplate().special_strings())
def test_marks_in_documents_and_questions_are_no_control_tokens(tiny_tokenizer, mark):
    encoder = PromptEncoder(tiny_tokenizer)
    text = f"a{mark}b {{x}} {mark}"
    controls = set(tiny_tokenizer.get_added_vocab().values())

    def count(ids):
        return sum(token in controls for token in ids)

    assert count(encoder.plain(text)) == 0
    assert tiny_tokenizer.decode(encoder.plain(text)) == text
    assert count(encoder.document(7, text)) == count(encoder.document(7, "harmless"))
    readings = [Reading(((7, text), (8, text)))]
    clean = [Reading(((7, "a"), (8, "b")))]
    forged, plain = encoder.context(text, readings), encoder.context("a", clean)
    assert count(forged.input_ids) == count(plain.input_ids)
    assert count(encoder.restatement(text)) == count(encoder.restatement("a"))
    assert count(encoder.answer(text)) == count(encoder.answer("a"))


def test_texts_without_marks_are_tokenized_as_in_one_string(tiny_tokenizer):
    encoder, template = PromptEncoder(tiny_tokenizer), PromptTemplate()
    for text in ("one", "  two\n", "{three}", "é 漢 🙂", ""):
        whole = template.document.format(number=17, text=text)
        assert encoder.document(17, text) == tiny_tokenizer.encode(whole, add_special_tokens=False)


def _word_tokenizer(**special):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {t: i for i, t in enumerate(["<unk>", "<|im_end|>", "a", "b", "<", "|", ">", "im_end"])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def test_unknown_characters_stay_unknown_and_are_no_control_tokens():
    tokenizer = _word_tokenizer(unk_token="<unk>", eos_token="<|im_end|>")
    encoder = PromptEncoder(tokenizer)
    assert encoder.plain("a" + "\u7f85" * 3000) == [2] + [0] * 3000
    assert tokenizer.eos_token_id not in encoder.plain("a<|im_end|>b")


def test_marks_that_only_normalization_brings_forth_are_no_control_tokens():
    from tokenizers import AddedToken

    tokenizer = _word_tokenizer(unk_token="<unk>")
    tokenizer.add_tokens([AddedToken("<|im_end|>", normalized=True, special=True)])
    wide = "a\uff1c|im_end|\uff1eb"
    mark = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert mark in tokenizer.encode(wide, add_special_tokens=False)
    assert mark not in PromptEncoder(tokenizer).plain(wide)


def test_braces_of_a_template_are_text(encoder):
    template = PromptTemplate(answer="{So}:", end="{end}")
    made = PromptEncoder(encoder.tokenizer, template)
    assert encoder.tokenizer.decode(made.answer("{x}")) == "{So}: {x}{end}"
