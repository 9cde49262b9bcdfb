"""A prompt template for any tokenizer: marks that are single tokens, numbers that can be read back.

The released format needs four marks. Those that a tokenizer does not hold as one token are added
where its model has rows of embeddings to spare, else taken from its own special tokens that text
does not use, else added with new rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import cosine_similarity

from msa.errors import ModelError
from msa.text.prompts import PromptEncoder, PromptTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END = "<|im_start|>", "<|im_end|>"
READ, RETRIEVE = PromptTemplate().end_of_read, PromptTemplate().end_of_retrieve
# Special tokens of known families that plain text does not use.
SPARE = (
    *("<file_sep>", "<filename>", "<repo_name>", "<jupyter_output>"),
    *("<|reserved_special_token_0|>",),
    *("<|reserved_special_token_1|>", "<|fim_pad|>", "<|file_sep|>", "[control_8]", "[control_9]"),
)
# Rows of embeddings closer than this are one token to the model, whatever the tokenizer calls them:
# rows that pretraining never saw stay as they were initialized, often all equal.
MAX_COSINE = 0.98
NUMBERS = (1, 7, 10, 17, 120, 1745, 99999, 455577)
SAMPLE = "Erik Watts was born on 4 May 1932 in Halden, the son of J. Watts (1901-1975)."


@dataclass(frozen=True, slots=True)
class Marks:
    """A template that fits a tokenizer, and what the tokenizer gained for it.

    Attributes:
        template: the released format with marks of this tokenizer.
        added: tokens that were added to the tokenizer.
    """

    template: PromptTemplate
    added: tuple[str, ...]


def fit_template(
    tokenizer: PreTrainedTokenizerBase, embeddings: Tensor, template: PromptTemplate | None = None
) -> Marks:
    """A template whose marks are single tokens that the model can tell apart.

    Args:
        tokenizer: gains tokens where it must.
        embeddings: [V, E], the model's; tokens that are added beyond V get rows of their own.
        template: the format with the released marks in it; by default the released one.

    Raises:
        ModelError: numbers or marks do not come back as they were.
    """
    chosen = {
        START: _first(tokenizer, (START, tokenizer.bos_token)),
        END: _first(tokenizer, (END, tokenizer.eos_token)),
    }
    used = {chosen[START], chosen[END], tokenizer.bos_token, tokenizer.eos_token}
    used |= {tokenizer.pad_token, tokenizer.unk_token}
    added: list[str] = []
    rows = {token: _row(tokenizer, token) for token in chosen.values() if token}
    for mark in (START, END, READ, RETRIEVE):
        if chosen.get(mark):
            continue
        known = [row for row in rows.values() if row < len(embeddings)]
        spare_row = len(tokenizer) + len(added)
        to_spare = spare_row < len(embeddings) and _is_distinct(embeddings, spare_row, known)
        pool = [
            token
            for token in ((mark,) if to_spare else (mark, *SPARE))
            if _is_single(tokenizer, token)
            and _is_distinct(embeddings, _row(tokenizer, token), known)
        ]
        found = _first(tokenizer, pool, used)
        if found is None:
            found = mark
            rows[mark] = spare_row
            added.append(mark)
        else:
            rows[found] = _row(tokenizer, found)
        chosen[mark] = found
        used.add(found)
    if added:
        tokenizer.add_tokens(added, special_tokens=True)
    values = {}
    for name, text in asdict(template or PromptTemplate()).items():
        for mark, token in chosen.items():
            text = text.replace(mark, token)
        values[name] = text
    fitted = PromptTemplate(**values)
    check_template(tokenizer, fitted, [token for token in chosen.values() if token])
    return Marks(fitted, tuple(added))


def check_template(
    tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, marks: Iterable[str]
) -> None:
    """Refuse a tokenizer that garbles documents, numbers or marks.

    Raises:
        ModelError: the message says which.
    """
    encoder = PromptEncoder(tokenizer, template)
    for mark in marks:
        if not _is_single(tokenizer, mark):
            raise ModelError(f"the tokenizer splits the mark {mark!r}; it must be one token")
    seen: dict[tuple[int, ...], int] = {}
    for number in NUMBERS:
        ids = encoder.number(number)
        twin = seen.setdefault(tuple(ids), number)
        wanted = template.number.format(number=number)
        if twin != number or _decoded(tokenizer, ids) != wanted:
            raise ModelError(
                f"the tokenizer turns {wanted!r} into {_decoded(tokenizer, ids)!r}"
                f"{f', like {twin}' if twin != number else ''}; the model could not name documents"
            )
    text = template.document.format(number=17, text=SAMPLE)
    found = _decoded(tokenizer, encoder.document(17, SAMPLE))
    if found.split() != text.split():
        raise ModelError(f"the tokenizer turns {text!r} into {found!r}; documents would be garbled")


def _first(
    tokenizer: PreTrainedTokenizerBase, candidates: Iterable[str | None], used: Iterable[str] = ()
) -> str | None:
    """The first candidate that is one token and not used yet."""
    for token in candidates:
        if token and token not in used and _is_single(tokenizer, token):
            return token
    return None


def _row(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    return int(tokenizer.encode(token, add_special_tokens=False)[0])


def _is_distinct(embeddings: Tensor, row: int, others: Iterable[int]) -> bool:
    """Whether a row of the embedding differs in direction from all of the others."""
    if row >= len(embeddings):
        return True
    return all(
        float(cosine_similarity(embeddings[row].float(), embeddings[other].float(), dim=0))
        < MAX_COSINE
        for other in others
    )


def _is_single(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    ids = tokenizer.encode(token, add_special_tokens=False)
    known = ids[:1] != [tokenizer.unk_token_id] or token == tokenizer.unk_token
    return len(ids) == 1 and known


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip()
