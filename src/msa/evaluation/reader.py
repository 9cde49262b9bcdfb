"""A model's reader without its routing: documents are handed over, by whoever found them.

This is retrieval-augmented generation on the same backbone, in the same text format and with the
same weights as when the model reads what it routed to itself: the local context of one round in
which these documents were named and read, the end of the retrieval, the question stated once more,
the lead-in of the answer. No memory is attended to unless one is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from msa.errors import InputError
from msa.inference.answers import AnswerText
from msa.inference.batch import prompt_batch
from msa.model.cache import MSACache
from msa.text.prompts import LocalContext, PromptEncoder, PromptTemplate, Reading
from msa.types import MemoryReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from msa.model.modeling_msa import MSAForCausalLM

ANSWER_TOKENS = 64


@dataclass(frozen=True, slots=True)
class ReadAnswer:
    """What was answered from documents that were handed over.

    Attributes:
        text: the answer.
        numbers: of the documents that the prompt had room for.
        prompt_tokens, generated_tokens: how much was read and written.
    """

    text: str
    numbers: tuple[int, ...]
    prompt_tokens: int
    generated_tokens: int


class TextReader:
    """Answers questions from given documents, greedily, in batches.

    Args:
        model: put into evaluation mode.
        tokenizer: the model's.
        template: text format.
        max_new_tokens: of an answer.
        memory: attended to beside the documents, routed from as the context says; none by default.
    """

    def __init__(
        self,
        model: MSAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
        *,
        max_new_tokens: int = ANSWER_TOKENS,
        memory: MemoryReader | None = None,
    ) -> None:
        self._model = model.eval()
        self._encoder = PromptEncoder(tokenizer, template)
        self._memory = memory
        self._max_new_tokens = max_new_tokens
        self._lead_in = self._encoder.tokenize(template.answer)
        end = self._encoder.tokenize(template.end)
        eos = model.generation_config.eos_token_id if model.generation_config else None
        others = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        ends = [end, *([token] for token in others)]
        self._answers = AnswerText(tokenizer, template, [e for e in ends if e])
        pad = tokenizer.pad_token_id
        self._pad: int = pad if pad is not None else 0

    def answer(
        self, questions: Sequence[str], documents: Sequence[Sequence[tuple[int, str]]]
    ) -> list[ReadAnswer]:
        """Answer a batch of questions.

        Args:
            questions: as asked.
            documents: (number, text) of those handed to each question, in reading order; the last
                ones are left out where the model has no positions for them. None at all is allowed.

        Raises:
            InputError: a question leaves no position for an answer.
        """
        pairs = zip(questions, documents, strict=True)
        fitted = [self._fitted(question, given) for question, given in pairs]
        contexts = [context for context, _ in fitted]
        written = self._write(contexts)
        return [
            ReadAnswer(self._answers.text(tokens), numbers, len(context.input_ids), len(tokens))
            for (context, numbers), tokens in zip(fitted, written, strict=True)
        ]

    def context(self, question: str, documents: Sequence[tuple[int, str]]) -> LocalContext:
        """The whole prompt: what the engine's own context is when it begins to answer."""
        readings = [Reading(tuple(documents))] if documents else []
        context = self._encoder.context(question, readings)
        context.extend(self._encoder.retrieval_end())
        context.extend(self._encoder.restatement(question))
        context.extend(self._lead_in)
        return context

    def _fitted(
        self, question: str, documents: Sequence[tuple[int, str]]
    ) -> tuple[LocalContext, tuple[int, ...]]:
        config = self._model.config
        room = config.max_position_embeddings - config.top_k_documents - 1
        for count in range(len(documents), -1, -1):
            context = self.context(question, documents[:count])
            if len(context.input_ids) <= room:
                return context, tuple(number for number, _ in documents[:count])
        raise InputError(
            f"the question needs {len(context.input_ids)} positions with its prompt; this model "
            f"has {room}. Ask a shorter question"
        )

    @torch.inference_mode()
    def _write(self, contexts: Sequence[LocalContext]) -> list[list[int]]:
        """Tokens of every answer, end mark included."""
        model, config = self._model, self._model.config
        prompts = prompt_batch(contexts, config.top_k_documents, self._pad, model.device)
        cache = MSACache()
        mask, positions = prompts.attention_mask, prompts.position_ids
        out = model(
            prompts.input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            memory=self._memory,
            routing_mask=prompts.routing_mask,
            memory_mask=prompts.memory_mask,
            logits_to_keep=1,
        )
        written: list[list[int]] = [[] for _ in contexts]
        last = int(positions[:, -1].max())
        steps = min(self._max_new_tokens, config.max_position_embeddings - 1 - last)
        for _ in range(max(1, steps)):
            tokens = out.logits[:, -1].argmax(dim=-1)
            for row, token in zip(written, tokens.tolist(), strict=True):
                if self._answers.find_end(row) is None:
                    row.append(token)
            if all(self._answers.find_end(row) is not None for row in written):
                break
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(contexts), 1)], dim=1)
            out = model(
                tokens[:, None],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
            )
        return written
