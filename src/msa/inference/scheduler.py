"""Continuous batching: many questions through one model, which join and leave as they come and go.

A step prefills some of the prompts that wait, and lets every row that is writing write a token.
Rows are prefilled together, whatever bank, filter or options their questions have; while they write
they share the model's forward passes with the rows that came before them. What a question is
answered does not depend on who else is asking (in float32 but for rounding: the products of a
larger batch are summed in another order).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msa.errors import MSAError
from msa.inference.batch import prompt_batch
from msa.inference.decoding import (
    Decoder,
    RoundRow,
    TextRow,
    begin_texts,
    choose_next,
    feed_pending,
)
from msa.inference.fusion import rank_judged
from msa.inference.interleave import Interleave, Request
from msa.inference.judging import Trial, judge
from msa.inference.trace import CandidateReader, Candidates, candidates
from msa.text.prompts import LocalContext
from msa.types import Content, Event, MemoryReader, Selection

if TYPE_CHECKING:
    from msa.model.modeling_msa import MSAForCausalLM

# Prompt tokens of one prefill, padding included; a longer prompt is prefilled alone.
PREFILL_TOKENS = 2048
# Tokens that a question which may try documents is counted with, before it is known how many.
TRIAL_TOKENS = 256
# Prompts are prefilled together if the longest has at most so many times the tokens of the
# shortest: what is between is padding, which costs as much as what is asked.
SIMILAR_PROMPTS = 1.5
# From when a question was left out of so many prefills, its prompts are the next, however long.
PATIENCE = 4
# Rows write together if the longer cache has at most so many times the columns of the shorter.
SIMILAR_LENGTH = 2.0


_Trial = tuple[int, int, Trial]  # row of the question, document's number


@dataclass(eq=False, slots=True)
class _Prompt:
    """A question that waits for the prefill of its next round.

    Attributes:
        run: the question.
        context: what is to be prefilled.
    """

    run: Interleave
    context: LocalContext

    def __len__(self) -> int:
        return len(self.context.input_ids)


@dataclass(slots=True)
class _Cohort:
    """Rows that write together.

    Attributes:
        decoder: of the rows.
        runs: their questions.
        rows: what each of them writes.
    """

    decoder: Decoder
    runs: list[Interleave]
    rows: list[RoundRow | TextRow]

    def select(self, keep: Sequence[int]) -> _Cohort:
        """Some of the rows; this cohort is not used any more, if no row is left out."""
        decoder = self.decoder if len(keep) == len(self.runs) else self.decoder.select(keep)
        return _Cohort(decoder, [self.runs[i] for i in keep], [self.rows[i] for i in keep])

    def join(self, other: _Cohort) -> None:
        self.decoder.join(other.decoder)
        self.runs += other.runs
        self.rows += other.rows


@dataclass(slots=True)
class Scheduler:
    """Runs questions to their answers; one thread calls it.

    Example::

        scheduler = Scheduler(engine.model)
        scheduler.add(engine.request("When was Erik Watts' father born?"))
        while not scheduler.idle:
            for request, event in scheduler.step():
                ...

    Attributes:
        model: of all requests, in evaluation mode.
        max_rows: questions that are under way together; further ones wait.
        prefill_tokens: prompt tokens of one step, padding included.
    """

    model: MSAForCausalLM
    max_rows: int = 16
    prefill_tokens: int = PREFILL_TOKENS
    _new: deque[Request] = field(default_factory=deque)
    _waiting: list[_Prompt] = field(default_factory=list)  # for a prefill
    _cohorts: list[_Cohort] = field(default_factory=list)
    _events: list[tuple[Request, Event | MSAError]] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        """True if there is nothing to do."""
        return not (self._new or self._waiting or self._cohorts)

    def __len__(self) -> int:
        """Questions that are under way or wait."""
        return len(self._new) + self._under_way

    @property
    def _under_way(self) -> int:
        writing = {id(run) for cohort in self._cohorts for run in cohort.runs}
        return len(self._waiting) + len(writing)

    def add(self, request: Request) -> None:
        """Take a question, of `MemoryEngine.request`; it is begun in one of the next steps."""
        self._new.append(request)

    def remove(self, request: Request) -> None:
        """Forget a question, wherever it is; no event of it comes any more."""
        if request in self._new:
            self._new.remove(request)
        self._waiting = [some for some in self._waiting if some.run.request is not request]
        self._leave(lambda run: run.request is request)

    def clear(self) -> list[Request]:
        """Forget all questions; those that were forgotten."""
        runs = [some.run for some in self._waiting]
        runs += [run for cohort in self._cohorts for run in cohort.runs]
        forgotten = list(dict.fromkeys([*self._new, *(run.request for run in runs)]))
        self._new.clear()
        self._waiting, self._cohorts = [], []
        return forgotten

    @torch.no_grad()
    def step(self) -> list[tuple[Request, Event | MSAError]]:
        """Run the model a little.

        Returns:
            What happened, in order. A question's last event is its "answer", or the error of its
            bank that ended it.

        Raises:
            ModelError: the model computes what is not a number; no question can go on.
        """
        self._events = []
        while self._new and self._under_way < self.max_rows:
            self._wait(Interleave(self._new.popleft()))
        if self._waiting:
            self._prefill(self._next_prompts())
        for cohort in self._cohorts.copy():
            self._cohorts.remove(cohort)
            self._advance(cohort)
        return self._events

    # ---- prefill

    def _wait(self, run: Interleave) -> None:
        """Let a question wait for the prefill of its next round."""
        self._waiting.append(_Prompt(run, run.context()))

    def _next_prompts(self) -> list[_Prompt]:
        """Prompts that are prefilled next: the shortest first, of like length, up to the budget.

        Those that others were often preferred to go before all.
        """
        found = sorted(self._waiting, key=lambda some: (some.run.left_out < PATIENCE, len(some)))
        taken: list[_Prompt] = []
        shortest = longest = len(found[0])
        tried = 0
        for prompt in found:
            shortest, longest = min(shortest, len(prompt)), max(longest, len(prompt))
            tried += TRIAL_TOKENS * prompt.run.tries
            padded = longest > SIMILAR_PROMPTS * shortest
            if taken and (padded or (len(taken) + 1) * longest + tried > self.prefill_tokens):
                break
            taken.append(prompt)
        self._waiting = [some for some in self._waiting if some not in taken]
        for prompt in self._waiting:
            prompt.run.left_out += 1
        return taken

    def _prefill(self, prompts: Sequence[_Prompt]) -> None:
        """Run the model on whole contexts, routing included, and begin the round of each."""
        runs = [prompt.run for prompt in prompts]
        contexts = [prompt.context for prompt in prompts]
        form = runs[0].request.format
        # questions that go to one state of a memory in the same way
        groups = _groups((id(run.request.snapshot), id(run.request.options)) for run in runs)
        readers = [
            CandidateReader(runs[rows[0]].request.snapshot.reader, form.top_k) for rows in groups
        ]
        memory = readers[0] if len(groups) == 1 else _Together(readers, groups)
        decoder = Decoder(
            self.model, prompt_batch(contexts, form.top_k, form.pad, form.device), memory, form.pad
        )
        sound: list[int] = []
        for reader, rows in zip(readers, groups, strict=True):
            sound += self._take_candidates(reader, [prompts[row] for row in rows], rows)
        sound.sort()
        naming, ending = [], []
        writers: dict[int, RoundRow] = {}
        for row in sound:
            writer = runs[row].naming()
            if writer is None:
                runs[row].unread_round()
                ending.append(row)
            else:
                writers[row] = writer
                naming.append(row)
        if ending:
            self._begin_answers(decoder.select(ending), [runs[row] for row in ending])
        if naming:
            part = decoder if len(naming) == len(runs) else decoder.select(naming)
            self._enter(
                _Cohort(part, [runs[row] for row in naming], [writers[row] for row in naming])
            )

    def _take_candidates(
        self,
        reader: CandidateReader,
        prompts: Sequence[_Prompt],
        rows: Sequence[int],
    ) -> list[int]:
        """Give the questions of one memory what they were routed to; rows that can go on."""
        runs = [prompt.run for prompt in prompts]
        first = runs[0].request
        reader.check()  # an error of the model, not of this memory
        try:
            found = candidates(reader, first.snapshot, first.options, [run.query() for run in runs])
            copies = first.snapshot.copies(
                [(some.fused, run.read) for run, some in zip(runs, found, strict=True)]
            )
            found = self._judged(runs, found)
        except MSAError as error:
            self._events += [(run.request, error) for run in runs]
            return []
        going_on = []
        for prompt, some, known, row in zip(prompts, found, copies, rows, strict=True):
            take = partial(prompt.run.routed, some, known, len(prompt), reader.seconds)
            if self._tried(prompt.run, take):
                going_on.append(row)
        return going_on

    def _judged(self, runs: Sequence[Interleave], found: Sequence[Candidates]) -> list[Candidates]:
        """Candidates in the order in which they come once the model has tried the best of them."""
        trials = [
            (row, number, trial)
            for row, (run, some) in enumerate(zip(runs, found, strict=True))
            for number, trial in run.trials(some).items()
        ]
        if not trials:
            return list(found)
        judged: list[dict[int, float]] = [{} for _ in runs]
        for part in _parts(trials, self.prefill_tokens):
            pad = runs[part[0][0]].request.format.pad
            likely = judge(self.model, [trial for _, _, trial in part], pad)
            for (row, number, trial), probability in zip(part, likely, strict=True):
                judged[row][number] = probability
                runs[row].prompt_tokens += len(trial)
        ranked = []
        for run, some, each in zip(runs, found, judged, strict=True):
            options = run.request.options
            fused = rank_judged(
                some.fused,
                each,
                weight=options.judge_weight,
                temperature=options.prior_temperature,
            )
            ranked.append(Candidates(some.layers, fused))
        return ranked

    def _tried(self, run: Interleave, doing: Callable[[], Iterable[Event]]) -> bool:
        """Do something for one question and pass its events on; False if it failed."""
        try:
            self._events += [(run.request, event) for event in doing()]
        except MSAError as error:
            self._events.append((run.request, error))
            return False
        return True

    # ---- writing

    def _enter(self, cohort: _Cohort) -> None:
        """Let rows write, together with those whose caches are about as long."""
        length = cohort.decoder.length
        for other in self._cohorts:
            lengths = sorted((length, other.decoder.length))
            if lengths[1] <= SIMILAR_LENGTH * lengths[0]:
                other.join(cohort)
                return
        self._cohorts.append(cohort)

    def _leave(self, leaves: Callable[[Interleave], bool]) -> None:
        """Take rows out of all cohorts."""
        left = []
        for cohort in self._cohorts:
            keep = [i for i, run in enumerate(cohort.runs) if not leaves(run)]
            if keep:
                left.append(cohort.select(keep))
        self._cohorts = left

    def _advance(self, cohort: _Cohort) -> None:
        """Write a token in every row; those that are done go their ways."""
        choose_next(cohort.decoder, cohort.rows)
        keep: list[int] = []
        ending: list[int] = []
        for i, row in enumerate(cohort.rows):
            if isinstance(row, TextRow):
                goes_on = self._wrote_text(cohort.runs[i], row)
            else:
                goes_on = not row.done or self._wrote_round(cohort, i, row, ending)
            if goes_on:
                keep.append(i)
        if ending:
            decoder = cohort.decoder.select(ending)
            decoder.rewind(range(len(ending)))
            self._begin_answers(decoder, [cohort.runs[i] for i in ending])
        if keep:
            rest = cohort.select(keep)
            feed_pending(rest.decoder, rest.rows)
            self._enter(rest)

    def _wrote_text(self, run: Interleave, row: TextRow) -> bool:
        """Pass on what a row has written of its answer; False if that is all."""
        if row.done:
            self._tried(run, partial(run.finish, row))
            return False
        return self._tried(run, partial(run.pieces, row))

    def _wrote_round(self, cohort: _Cohort, i: int, row: RoundRow, ending: list[int]) -> bool:
        """Read what a row has named: it waits for its next prompt then, or is put into `ending`.

        Returns:
            True if the round is to be written again.
        """
        run = cohort.runs[i]
        again = False

        def read() -> list[Event]:
            nonlocal again
            events = run.named(row)
            again = events is None
            return events or []

        if not self._tried(run, read):
            return False
        if again:
            writer = run.naming()
            assert writer is not None
            cohort.rows[i] = writer
            cohort.decoder.rewind([i])
        elif run.rounds[-1].read:
            self._wait(run)
        else:
            ending.append(i)
        return again

    def _begin_answers(self, decoder: Decoder, runs: list[Interleave]) -> None:
        """State questions again after their prompts, and let the model answer."""
        refusals = [tuple(run.refusal) for run in runs]
        for rows in _groups(refusals):
            part = decoder if len(rows) == len(runs) else decoder.select(rows)
            self._answer(part, [runs[row] for row in rows], refusals[rows[0]])

    def _answer(self, decoder: Decoder, runs: list[Interleave], refusal: Sequence[int]) -> None:
        """The same of questions that are refused with the same tokens, or not at all."""
        likely = decoder.feed([run.begin_answer() for run in runs], refusal)
        for run, log_probability in zip(runs, likely, strict=bool(refusal)):
            run.judge_refusal(log_probability)
        rows = [
            run.answering(position) for run, position in zip(runs, decoder.positions, strict=True)
        ]
        writing: list[int] = []
        texts: list[RoundRow | TextRow] = []
        for i, (run, row) in enumerate(zip(runs, rows, strict=True)):
            begun = [row]
            if run.beginnings > 1 and not row.done:
                begun = begin_texts(decoder.logits[i], row, run.beginnings)
            run.write(begun)
            if row.done:  # refused before anything was written
                self._tried(run, partial(run.finish, row))
            else:
                writing += [i] * len(begun)
                texts += begun
        if writing:
            part = decoder if writing == list(range(len(decoder))) else decoder.select(writing)
            self._enter(_Cohort(part, [runs[i] for i in writing], texts))


def _groups(keys: Iterable[Hashable]) -> list[list[int]]:
    """Rows that have the same key."""
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _parts(trials: list[_Trial], limit: int) -> Iterable[list[_Trial]]:
    """Trials of like length together, of at most so many tokens, padding included."""
    part: list[_Trial] = []
    for trial in sorted(trials, key=lambda some: len(some[2])):
        if part and (len(part) + 1) * len(trial[2]) > limit:
            yield part
            part = []
        part.append(trial)
    if part:
        yield part


class _Together:
    """A `MemoryReader` for a batch whose rows go to different memories."""

    def __init__(self, readers: Sequence[MemoryReader], groups: Sequence[Sequence[int]]) -> None:
        self._parts = [
            (reader, torch.tensor(rows)) for reader, rows in zip(readers, groups, strict=True)
        ]
        self._chosen: dict[int, list[Selection]] = {}

    def route(self, layer: int, vectors: Tensor, routing_mask: Tensor) -> Selection:
        """Choose documents for every row from its own memory; -1 where that has fewer."""
        found = []
        for reader, rows in self._parts:
            index = rows.to(vectors.device)
            found.append(reader.route(layer, vectors[index], routing_mask[index]))
        self._chosen[layer] = found
        width = max(some.documents.shape[1] for some in found)
        shape = len(vectors), width
        documents = found[0].documents.new_full(shape, -1)
        scores = found[0].scores.new_full(shape, -torch.inf)
        for (_, rows), some in zip(self._parts, found, strict=True):
            columns = slice(None, some.documents.shape[1])
            documents[rows, columns] = some.documents
            scores[rows, columns] = some.scores
        return Selection(documents, scores)

    def content(self, layer: int, selection: Selection) -> Content:
        """Content of what `route` chose in this layer, of every row from its own memory."""
        found = [
            reader.content(layer, some)
            for (reader, _), some in zip(self._parts, self._chosen[layer], strict=True)
        ]
        batch, width = len(selection.documents), max(some.mask.shape[1] for some in found)
        keys = found[0].keys.new_zeros(batch, width, *found[0].keys.shape[2:])
        values = torch.zeros_like(keys)
        mask = found[0].mask.new_zeros(batch, width)
        for (_, rows), some in zip(self._parts, found, strict=True):
            columns = slice(None, some.mask.shape[1])
            keys[rows, columns] = some.keys
            values[rows, columns] = some.values
            mask[rows, columns] = some.mask
        return Content(keys, values, mask)
