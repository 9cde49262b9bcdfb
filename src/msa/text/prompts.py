"""The text format of documents, questions and rounds (that of the released model).

The format is data: a `PromptTemplate`, stored beside a checkpoint as `prompt_template.json`. The
functions here turn texts into a `LocalContext`: token ids together with two marks per token, which
tokens route (Eq. 2) and which see the memory (Eq. 3). Training and inference both go through them.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from msa.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_TEMPLATE_FILE = "prompt_template.json"


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """Strings of the text format. The defaults are those of the released model.

    Attributes:
        prefix: stands in front of every question; sees no memory.
        document: what is encoded into the memory (stage 1).
        question: the question as it routes in round 1.
        question_end: the last characters of `question` that no longer route from round 2 on.
        tail: stands between the question and what the model writes; does not route.
        number: how the model writes a document's number.
        read: a document's text as it is given to the model.
        end_of_read: ends the numbers that the model writes, and the texts that it is given.
        end_of_retrieve: the model needs no more documents.
        restate: the question again, in front of the answer.
        answer: how the answer begins.
        refusal: the answer when what was read does not hold one.
        end: ends the answer.
    """

    prefix: str = "<|im_start|>user\n"
    document: str = "<|im_start|>[{number}]. {text}[{number}]<|im_end|>"
    question: str = (
        "\nPlease answer the question based on the above historical document information\n\n"
        "{question}\nPlease return all documents related to the question\n"
    )
    question_end: str = "\n"
    tail: str = "<|im_end|>\n<|im_start|>"
    number: str = "[{number}]"
    read: str = "[{number}]. {text}\n"
    end_of_read: str = "<|object_ref_end|>"
    end_of_retrieve: str = "<End-of-Retrieve>"
    restate: str = "<|im_start|>The user's question is: {question}\n<|object_ref_end|>"
    answer: str = "The answer to the question is:"
    refusal: str = "not in this memory"
    end: str = "<|im_end|>"

    @classmethod
    def compact(cls) -> PromptTemplate:
        """Ours, for models that are not the released one: fewer tokens around the question.

        They dilute a query that is pooled over the question's tokens, and all are paid for.
        """
        return cls(
            question="\n{question}\n",
            restate="<|im_start|>Question: {question}\n<|object_ref_end|>",
            answer="Answer:",
        )

    def special_strings(self) -> tuple[str, ...]:
        """Markers that a tokenizer made for this format must hold as single tokens."""
        return ("<|im_start|>", self.end, self.end_of_read, self.end_of_retrieve)

    def save(self, folder: str | Path) -> None:
        """Write the template beside a checkpoint; the one that was there stays if that fails."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        path = Path(folder, PROMPT_TEMPLATE_FILE)
        scratch = path.with_suffix(".partial")
        scratch.write_text(text + "\n", encoding="utf-8")
        scratch.replace(path)

    @classmethod
    def load(cls, folder: str | Path) -> PromptTemplate:
        """Read the template beside a checkpoint; the released format if there is none.

        Raises:
            ConfigError: the file cannot be read as JSON, or holds other fields than these.
        """
        path = Path(folder, PROMPT_TEMPLATE_FILE)
        if not path.is_file():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
        known = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or set(values) - known:
            raise ConfigError(f"{path}: expected a JSON object with fields {sorted(known)}")
        wrong = sorted(name for name, value in values.items() if not isinstance(value, str))
        if wrong:
            raise ConfigError(f"{path}: expected strings, but {wrong} are none")
        return cls(**values)


@dataclass(slots=True)
class LocalContext:
    """The active tokens of one question.

    Attributes:
        input_ids: token ids, prefix first.
        routes: True for tokens that route.
        sees_memory: False for the prefix.
        prefix_length: tokens of the prefix; positions of the others start at prefix_length + k.
    """

    input_ids: list[int] = field(default_factory=list)
    routes: list[bool] = field(default_factory=list)
    sees_memory: list[bool] = field(default_factory=list)
    prefix_length: int = 0

    def extend(self, ids: Iterable[int], *, routes: bool = False, sees_memory: bool = True) -> None:
        """Append tokens that share their marks."""
        ids = list(ids)
        self.input_ids += ids
        self.routes += [routes] * len(ids)
        self.sees_memory += [sees_memory] * len(ids)

    def positions(self, top_k: int) -> list[int]:
        """Global RoPE positions (paper 3.2.2): prefix from 0, the rest from prefix_length + k."""
        return global_positions(len(self.input_ids), self.prefix_length, top_k)


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read in one round: document numbers as written, and their texts."""

    documents: tuple[tuple[int, str], ...]


def global_positions(length: int, prefix_length: int, top_k: int) -> list[int]:
    """Positions of a local context: 0.. for the prefix, then prefix_length + top_k onwards."""
    return [i if i < prefix_length else i + top_k for i in range(length)]


class PromptEncoder:
    """Turns texts into token ids and marks, with one tokenizer and one template."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template or PromptTemplate()
        self._added: dict[str, int] = dict(tokenizer.get_added_vocab())
        # An unknown character is no control token, unless its token has another use.
        others = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token}
        unknown = {tokenizer.unk_token} - others - set(self.template.special_strings())
        self._controls = frozenset(i for t, i in self._added.items() if t not in unknown)
        longest_first = sorted(self._added, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first))
        self._marks = re.compile(f"({pattern})") if pattern else None
        self._prefix = self.tokenize(self.template.prefix)
        self._tail = self.tokenize(self.template.tail)
        self._end_of_read = self.tokenize(self.template.end_of_read)

    def tokenize(self, template: str) -> list[int]:
        """Token ids of a string of the template; nothing is added."""
        return self._format((_escaped(template), {}))

    def plain(self, text: str) -> list[int]:
        """Token ids of a text of a user or a document: none of them is a control token.

        What reads like a mark of the template, `<|im_end|>` say, becomes the characters it is
        written with. Texts without such strings are tokenized as they are anywhere.
        """
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False) if text else []
        if not self._controls.intersection(ids):
            return ids
        if len(text) == 1:  # an added token of one character, or the replacement character itself
            return self.plain("\ufffd") if text != "\ufffd" else []
        assert self._marks is not None
        cuts = [found.start() + 1 for found in self._marks.finditer(text)]
        # one that only the tokenizer's normalization brings forth: every character by itself
        cuts = [cut for cut in cuts if cut < len(text)] or list(range(1, len(text)))
        bounds = [0, *cuts, len(text)]
        return [token for a, b in pairwise(bounds) for token in self.plain(text[a:b])]

    def _format(self, *templates: tuple[str, Mapping[str, object]]) -> list[int]:
        """Token ids of templates, one after the other, with the values of their fields.

        Marks in the templates are control tokens, those in values are not. Literals and values
        between two marks are tokenized together, as in a whole string.
        """
        ids: list[int] = []
        pending = ""
        for template, values in templates:
            for literal, field_name, _, _ in string.Formatter().parse(template):
                for part in self._marks.split(literal) if self._marks else [literal]:
                    if part in self._added:
                        ids += [*self.plain(pending), self._added[part]]
                        pending = ""
                    else:
                        pending += part
                if field_name is not None:
                    pending += str(values[field_name])
        return ids + self.plain(pending)

    def document(self, number: int, text: str) -> list[int]:
        """What stage 1 encodes for one document."""
        return self._format((self.template.document, {"number": number, "text": text}))

    def number(self, number: int) -> list[int]:
        """A document's number as the model writes it."""
        return self._format((self.template.number, {"number": number}))

    def written(self, numbers: Sequence[int]) -> list[int]:
        """A whole round as the model writes it: the numbers, then the end mark."""
        return [t for n in numbers for t in self.number(n)] + self._end_of_read

    def reading(self, reading: Reading) -> list[int]:
        """The texts that the model is given, without the end mark."""
        read = self.template.read
        return self._format(*((read, {"number": n, "text": t}) for n, t in reading.documents))

    def context(self, question: str, readings: Sequence[Reading] = ()) -> LocalContext:
        """The local context at the beginning of a round.

        Round 1 routes by the question; later rounds by the question, without its last characters,
        and by the text read last (paper 3.5; the released code's layout).
        """
        template = self.template
        asked = template.question
        end = template.question_end if readings and asked.endswith(template.question_end) else ""
        asked = asked.removesuffix(end)
        context = LocalContext(prefix_length=len(self._prefix))
        context.extend(self._prefix, sees_memory=False)
        context.extend(self._format((asked, {"question": question})), routes=True)
        context.extend(self.tokenize(end) if end else [])
        context.extend(self._tail)
        for i, reading in enumerate(readings):
            context.extend(self.written([n for n, _ in reading.documents]))
            context.extend(self.reading(reading), routes=i == len(readings) - 1)
            context.extend(self._end_of_read)
        return context

    def retrieval_end(self) -> list[int]:
        """What the model writes when it needs no more documents."""
        return self.tokenize(self.template.end_of_retrieve)

    def restatement(self, question: str) -> list[int]:
        """What the model is given after it has ended its retrieval."""
        return self._format((self.template.restate, {"question": question}))

    def answer(self, answer: str) -> list[int]:
        """A whole answer as the model writes it, for training."""
        template = self.template
        lead_in, end = _escaped(template.answer), _escaped(template.end)
        return self._format((f"{lead_in} {{answer}}{end}", {"answer": answer}))


def _escaped(text: str) -> str:
    """A text as a template of itself."""
    return text.replace("{", "{{").replace("}", "}}")
