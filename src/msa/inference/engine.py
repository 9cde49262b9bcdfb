"""MemoryEngine: questions to a memory bank (stages 2 and 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from msa.errors import BankError, InputError, MSAError
from msa.inference.batch import prompt_batch
from msa.inference.decoding import prefill
from msa.inference.interleave import AskFormat, Request
from msa.inference.options import AskOptions
from msa.inference.scheduler import Scheduler
from msa.inference.snapshot import BankQuerySnapshot, QuerySnapshot, SnapshotCache
from msa.inference.trace import CandidateReader, Candidates, candidates
from msa.memory.bank import MemoryBank
from msa.memory.distributed.sharded_bank import ShardedBank
from msa.memory.loaded.loaded_bank import LoadedBank
from msa.memory.loaded.memory_plan import MemoryPlan
from msa.memory.search.clustered_index import PruningSettings
from msa.memory.store.filters import Filter
from msa.memory.store.lifetime import ClosedAtExit, Lifetime, NotPickled
from msa.memory.store.word_index import LexicalQuery
from msa.model.loading import loadable_name
from msa.text.normalization import nfc
from msa.text.prompts import PromptEncoder
from msa.types import Answer, Event, Hit, whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from msa.model.modeling_msa import MSAForCausalLM

Questions = list[str] | tuple[str, ...]


class MemoryEngine(ClosedAtExit, NotPickled):
    """Asks a bank with the model that it was opened with.

    Every question sees the bank as it is when the question comes, and that state to its end.

    Example::

        with MemoryBank.open("bank/", msa.load("worlds"), read_only=True) as bank:
            engine = MemoryEngine(bank)
            answer = engine.ask("When was Erik Watts' father born?")
            print(answer.text, [c.id for c in answer.citations])

    Attributes:
        model: the bank's, in evaluation mode.
        bank: that it asks.
        options: how questions are asked unless a call says otherwise.
    """

    def __init__(
        self,
        bank: MemoryBank,
        *,
        device: torch.device | str | None = None,
        options: AskOptions | None = None,
        memory: LoadedBank | ShardedBank | None = None,
        plan: MemoryPlan | None = None,
        pruning: PruningSettings | None = None,
        **changes: Any,
    ) -> None:
        """Load a bank for asking.

        Args:
            bank: opened with its checkpoint, or with model and tokenizer; stays the caller's. Its
                model is put into evaluation mode.
            device: where the model is moved; by default it stays where it is.
            options: by default those of the checkpoint that the bank was opened with, else the
                `ask_options.json` beside the model's weights, if there is one.
            memory: this bank, loaded by the caller, such as a
                `msa.memory.distributed.sharded_bank.ShardedBank`; it stays the caller's.
            plan: what of the bank lies where; by default `msa.memory.loaded.memory_plan.plan`
                decides. Not with `memory`.
            pruning: search the routing keys in blocks, not all of them (see `LoadedBank`). Not
                with `memory`.
            **changes: single fields of `AskOptions`, such as `prior_weight=0.5`.

        Raises:
            BankError: the bank was opened without a model, is closed, or cannot be asked.
            BankMismatchError: the model has changed since the bank was opened.
            BudgetError: it does not fit into memory; the message says what would.
            InputError: what was given is no bank; `plan` or `pruning` with `memory`; `pruning`
                with keys on a GPU.
            ConfigError: an option is not valid.
        """
        if memory is not None and (plan is not None or pruning is not None):
            raise InputError("memory is given, with plan or pruning; say these when it is loaded")
        model, tokenizer = _parts_to_ask(bank)
        bank.manifest.check(bank.path, model, tokenizer, None)  # it may have been trained since
        self.options = _default_options(bank, options).with_changes(**changes)
        if device is not None:
            model.to(torch.device(device))
        self.model = model.eval()
        self.bank = bank
        self._life = Lifetime(
            f"this engine of bank '{bank.path}'", "make another: MemoryEngine(bank)"
        )
        self._format = AskFormat(self.model, PromptEncoder(tokenizer, bank.template))
        self._own: LoadedBank | None = None  # to be closed here
        if memory is None:
            memory = self._own = LoadedBank(
                bank, model.device, content_dtype=model.dtype, plan=plan, pruning=pruning
            )
        self._snapshots = SnapshotCache(bank, memory)

    def close(self) -> None:
        """Release what was loaded; the bank stays open. Calling it twice does nothing."""
        if self._life.is_elsewhere or self._life.ended:
            return
        self._life.end()
        if self._own is not None:
            self._own.close()

    @overload
    def retrieve(
        self, question: str, top_k: int = ..., filter: Filter | None = ...
    ) -> list[Hit]: ...

    @overload
    def retrieve(
        self, question: Questions, top_k: int = ..., filter: Filter | None = ...
    ) -> list[list[Hit]]: ...

    def retrieve(
        self, question: str | Questions, top_k: int = 16, filter: Filter | None = None
    ) -> list[Hit] | list[list[Hit]]:
        """Documents that the model routes to for a question, best first.

        One prefill, no generation. The model sees the content of as many documents as when it is
        asked (its configured k), so that its layers look for the same; `top_k` only says how many
        are listed.

        Args:
            question: one, or several.
            top_k: documents to list, at least 1.
            filter: metadata that documents must have, or a function of their metadata.

        Returns:
            At most `top_k` hits, for every question.

        Raises:
            EmptyBankError: there is no document (that passes the filter).
            InputError: the question or `top_k` is not valid.
            ModelError: the model computes what is not a number.
        """
        questions = _checked(question)
        top_k = whole_number(top_k, "top_k", 1)
        snapshot = self._snapshot(self.options, filter, top_k)
        found = self._routed(questions, snapshot, self.options)
        hits = [self._ranked(some, snapshot, top_k) for some in found]
        return hits[0] if isinstance(question, str) else hits

    def candidates(
        self, questions: Sequence[str], filter: Filter | None = None, **changes: Any
    ) -> list[Candidates]:
        """What every question is routed to in round 1, per layer and fused; no texts are read.

        Args:
            questions: one or more.
            filter: as in `ask`.
            **changes: fields of `AskOptions` that are to differ.

        Raises:
            EmptyBankError, InputError, ConfigError, ModelError, LexicalIndexError: see `ask`.
        """
        options = self.options.with_changes(**changes)
        return self._routed(_checked(questions), self._snapshot(options, filter), options)

    def _snapshot(
        self, options: AskOptions, filter: Filter | None, top_k: int = 1
    ) -> BankQuerySnapshot:
        """The bank as it is now; its layers select as many documents as anybody wants.

        Raises:
            BankError: the engine is closed, or this is a forked child.
        """
        self._life.check()
        visible: int = self.model.config.top_k_documents
        return self._snapshots.snapshot(max(top_k, visible, options.candidates), filter)

    @torch.no_grad()
    def _routed(
        self, questions: Sequence[str], snapshot: QuerySnapshot, options: AskOptions
    ) -> list[Candidates]:
        """Candidates of round 1: the layers up to the last routing layer, nothing written."""
        form, visible = self._format, self._format.top_k
        for text in questions:
            form.check_length(text, options)
        found: list[Candidates] = []
        for some in _batches(questions, options.batch_size):
            contexts = [form.encoder.context(q) for q in some]
            batch = prompt_batch(contexts, visible, form.pad, self.model.device)
            reader = CandidateReader(snapshot.reader, visible)
            prefill(self.model, batch, reader, routing_only=True)
            found += candidates(reader, snapshot, options, [LexicalQuery(q) for q in some])
        return found

    @staticmethod
    def _ranked(found: Candidates, snapshot: QuerySnapshot, top_k: int) -> list[Hit]:
        """The best of one question's candidates."""
        fused = found.fused
        layers = {layer: dict(scores) for layer, scores in found.layers.items()}
        there = snapshot.ids(fused)
        best = [number for number in fused if number in there][:top_k]
        stored = snapshot.texts(best)
        return [
            Hit(
                id=stored[number].document.id,
                number=number,
                score=fused[number].prior,
                layer_scores={i: some[number] for i, some in layers.items() if number in some},
                title=stored[number].document.title,
                text=stored[number].document.text,
                metadata=stored[number].document.metadata,
            )
            for number in best
            if number in stored
        ]

    @overload
    def ask(
        self,
        question: str,
        *,
        stream: Literal[False] = ...,
        filter: Filter | None = ...,
        **changes: Any,
    ) -> Answer: ...

    @overload
    def ask(
        self,
        question: str,
        *,
        stream: Literal[True],
        filter: Filter | None = ...,
        **changes: Any,
    ) -> Iterator[Event]: ...

    @overload
    def ask(
        self,
        question: Questions,
        *,
        stream: Literal[False] = ...,
        filter: Filter | None = ...,
        **changes: Any,
    ) -> list[Answer]: ...

    def ask(
        self,
        question: str | Questions,
        *,
        stream: bool = False,
        filter: Filter | None = None,
        **changes: Any,
    ) -> Answer | list[Answer] | Iterator[Event]:
        """Answer a question from the bank.

        Args:
            question: one, or several; several are run through the model together and get the
                answers that they would get one by one (unless they are sampled).
            stream: yield what happens as it happens; for one question. Closing the iterator stops
                the model.
            filter: metadata that documents must have, or a function of their metadata.
            **changes: fields of `AskOptions` that are to differ for this call.

        Returns:
            The answer; a list of answers; or with `stream` an iterator of events, of which the
            last holds the answer.

        Raises:
            EmptyBankError: there is no document (that passes the filter).
            InputError: the question is no text, empty, or does not fit into the model's positions.
            ConfigError: an option is not valid.
            ModelError: the model computes what is not a number.
        """
        options = self.options.with_changes(**changes)
        questions = _checked(question)
        if stream and not isinstance(question, str):
            raise InputError(
                f"A list of {len(questions)} questions cannot be streamed; ask them one by one, or "
                "without stream=True."
            )
        snapshot = self._snapshot(options, filter)
        requests = [self._request(text, snapshot, options, stream=stream) for text in questions]
        scheduler = Scheduler(self.model, max_rows=options.batch_size)
        for request in requests:
            scheduler.add(request)
        if stream:
            return (event for _, event in _events(scheduler))
        answers = {
            request: event.data for request, event in _events(scheduler) if event.kind == "answer"
        }
        in_order: list[Answer] = [answers[request] for request in requests]
        return in_order[0] if isinstance(question, str) else in_order

    def request(
        self, question: str, *, filter: Filter | None = None, stream: bool = False, **changes: Any
    ) -> Request:
        """A question for `msa.inference.scheduler.Scheduler`, which asks many together.

        It sees the bank as it is now.

        Args:
            question, filter: as in `ask`.
            stream: whether "token" events are wanted.
            **changes: fields of `AskOptions` that are to differ.

        Raises:
            EmptyBankError, InputError, ConfigError: see `ask`.
        """
        options = self.options.with_changes(**changes)
        (text,) = _checked([question] if isinstance(question, str) else question)
        return self._request(text, self._snapshot(options, filter), options, stream=stream)

    def _request(
        self, question: str, snapshot: QuerySnapshot, options: AskOptions, *, stream: bool
    ) -> Request:
        self._format.check_length(question, options)
        return Request(question, snapshot, options, self._format, stream)


def _parts_to_ask(bank: object) -> tuple[MSAForCausalLM, PreTrainedTokenizerBase]:
    """Model and tokenizer of a bank.

    Raises:
        InputError: it is no bank.
        BankError: it was opened without a model; the message says what to type.
    """
    if not isinstance(bank, MemoryBank):
        raise InputError(
            f"MemoryEngine was given a {type(bank).__name__}: expected an open bank, as in "
            "MemoryEngine(MemoryBank.open(folder, msa.load(name)))"
        )
    bank.check_open()
    if bank.model is None or bank.tokenizer is None:
        name = loadable_name(bank.manifest.model)
        checkpoint = f"msa.load({name!r})" if name else f"the model {bank.manifest.model!r}"
        raise BankError(
            f"bank '{bank.path}' was opened without a model, and cannot be asked; open it with "
            f"the one that made it: MemoryBank.open({str(bank.path)!r}, {checkpoint})"
        )
    return bank.model, bank.tokenizer


def _default_options(bank: MemoryBank, given: AskOptions | None) -> AskOptions:
    """What was given, else what the bank's checkpoint says, else the options without one."""
    if given is not None:
        return given
    if bank.ask_options is not None:
        return bank.ask_options
    name = "" if bank.model is None else bank.model.name_or_path
    return AskOptions.load(name) if name else AskOptions()


def _checked(question: object) -> list[str]:
    """Questions as a list, in NFC.

    Raises:
        InputError: one of them is no text, or empty.
    """
    if not isinstance(question, str | list | tuple):
        raise InputError(
            f"The question is {type(question).__name__}; give a string, or a list of strings."
        )
    questions = [question] if isinstance(question, str) else list(question)
    for i, text in enumerate(questions):
        name = "The question" if isinstance(question, str) else f"Question {i + 1}"
        if not isinstance(text, str):
            raise InputError(f"{name} is {type(text).__name__}; give a string.")
        if not text.strip():
            raise InputError(f"{name} is empty; ask something.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{name} is not valid Unicode text ({error.reason}).") from error
    return [nfc(text) for text in questions]


def _events(scheduler: Scheduler) -> Iterator[tuple[Request, Event]]:
    """What happens until all questions are answered.

    Raises:
        MSAError: the first that ends a question.
    """
    while not scheduler.idle:
        for request, event in scheduler.step():
            if isinstance(event, MSAError):
                raise event
            yield request, event


def _batches(questions: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(questions), size):
        yield questions[start : start + size]
