"""What a rank of Memory Parallel holds, and what it answers (ours; see
`msa.memory.distributed.sharded_bank`).

Shapes: B batch, R routing tokens of the batch, U selected documents, C their chunks, G KV heads,
D head dim, K documents per row.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy
import torch
from torch import Tensor

from msa.errors import BankMismatchError, MSAError, RankError
from msa.memory.distributed.collective_rpc import (
    Exchange,
    Request,
    as_bytes,
    error_from_text,
    error_to_text,
    from_bytes,
)
from msa.memory.loaded.loaded_bank import BankSnapshot, LoadedBank
from msa.types import Selection

# Loads of all ranks until they have read the same generation, and the pause between two.
LOAD_ATTEMPTS = 50
LOAD_PAUSE = 0.1

# What is asked; the first argument is always the asker's name of a view:
# OPEN   filtered; bits of document numbers -> generation, first row, rows, documents (int64)
# CLOSE  -> nothing
# ROUTE  layer, K, B; routing tokens per row (int64 [B]), vectors (float32 [R, G*D])
#        -> rows of the whole bank (int64 [B, K]), scores (float32 [B, K]); K at most the share's
# CONTENT  layer; rows (int64 [U], ascending) -> of those held here: index of the dtype in `DTYPES`
#        and chunks of each (int64), pooled keys and pooled values ([C, G, D] each)
# NUMBERS  rows (int64 [U], ascending) -> numbers of those held here (int64)
OPEN, CLOSE, ROUTE, CONTENT, NUMBERS = range(1, 6)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ShardServer:
    """What a rank holds, and what it answers; the `Service` of its exchange.

    Status in the header of a turn: what bank this is, the latest generation that this rank has seen
    and wants (-1: none), the one that it has loaded, whether it is loading, whether that failed.
    """

    def __init__(self, digest: int) -> None:
        self.resident: LoadedBank
        self._digest = digest
        self._wanted = -1
        self._loaded = -1
        self._loading = True
        self._failed = False
        self._agreed = -1
        self._attempts = 0
        self._refusal: MSAError | None = None
        self._current: BankSnapshot
        self._views: dict[tuple[int, int], BankSnapshot] = {}
        self._exchange: Exchange

    # ---- one state for all

    def begin(self, resident: LoadedBank, exchange: Exchange) -> None:
        """Take the share that was loaded."""
        self.resident = resident
        self._exchange = exchange
        self._loaded = self._wanted = resident.generation
        self._loading = False

    def reach(self, generation: int) -> None:
        """Wait until all ranks use this generation or a later one.

        Raises:
            MSAError: a rank cannot load it; RankError: a rank failed, ended or fell silent.
        """
        self._refusal = None
        self._wanted = max(self._wanted, generation)
        self._exchange.wait_for(
            lambda: self._refusal is not None or self._agreed >= max(generation, 0)
        )
        if self._refusal is not None:
            raise self._refusal

    def status(self) -> list[int]:
        """See `Service.status`."""
        loading = self._loading  # read first: what was loaded is there when it is False
        return [self._digest, self._wanted, self._loaded, loading, self._failed, 0]

    def observe(self, table: Sequence[Sequence[int]]) -> None:
        """See `Service.observe`. All ranks see the same table, so all decide the same."""
        digests, wanted, loaded, loading, failed, _ = zip(*table, strict=True)
        if any(loading):
            return
        if len(set(digests)) > 1:
            others = [i for i, digest in enumerate(digests) if digest != digests[0]]
            self._refuse(
                BankMismatchError(
                    f"{self._exchange.name(0)} and {self._exchange.name(others[0])} have opened "
                    "different banks, or load them with other settings; give all ranks the same"
                )
            )
            return
        if any(failed):
            bad = failed.index(1)
            if max(wanted) > self._agreed:
                self._refuse(error_from_text(self._exchange.noted("load", bad)))
            return
        if len(set(loaded)) == 1 and loaded[0] > self._agreed:
            self._agreed = loaded[0]
            self._current = self.resident.view()
            self._attempts = 0
        if max(wanted) <= self._agreed:
            return
        if self._attempts == LOAD_ATTEMPTS:
            self._refuse(
                RankError(
                    f"the ranks do not come to read the same state of the bank (generations "
                    f"{', '.join(map(str, loaded))}, rank by rank): either it changes all the "
                    "time, or they do not see the same folder. Ask again when it is still, or open "
                    "one that all of them share"
                )
            )
            return
        self._attempts += 1
        self._loading = True
        threading.Thread(target=self._load, name="msa-load", daemon=True).start()

    def _refuse(self, error: MSAError) -> None:
        """All ranks stay with the state that they have."""
        self._refusal = error
        self._wanted = self._agreed
        self._attempts = 0
        self._failed = False

    def _load(self) -> None:
        """Load the bank as it is now, in a thread beside the turns."""
        if self._attempts > 1:
            time.sleep(LOAD_PAUSE)
        try:
            self.resident.refresh()
            self._loaded = self.resident.generation
        except Exception as error:  # of whatever kind: the ranks that wait for it are told
            known = error if isinstance(error, MSAError) else RankError(said(error))
            self._exchange.note("load", error_to_text(known))
            self._failed = True
        self._loading = False

    def forget(self) -> None:
        """Let go of all views."""
        self._views.clear()

    # ---- answers

    @torch.no_grad()
    def answer(self, requests: Sequence[Request]) -> list[Tensor | MSAError]:
        """See `Service.answer`."""
        answers: dict[int, Tensor | MSAError] = {}
        together: dict[tuple[int, int], list[Request]] = {}
        for request in requests:
            if request.kind == ROUTE:
                key = (id(self._view_of(request)), request.arguments[1])
                together.setdefault(key, []).append(request)
                continue
            try:
                answers[request.rank] = self._answered(request)
            except MSAError as error:
                answers[request.rank] = error
        for some in together.values():
            try:
                answers.update(self._routed(some))
            except MSAError as error:
                answers.update({request.rank: error for request in some})
        return [answers[request.rank] for request in requests]

    def _view_of(self, request: Request) -> BankSnapshot:
        return self._views[request.rank, request.arguments[0]]

    def _answered(self, request: Request) -> Tensor:
        name = (request.rank, request.arguments[0])
        if request.kind == OPEN:
            view = self._current
            if request.arguments[1]:
                view = _among(view, request.payload)
            self._views[name] = view
            size = len(view._rows.numbers)
            state = [view.generation, view.first_row, size, view.num_documents]
            return as_bytes(torch.tensor(state))
        if request.kind == CLOSE:
            del self._views[name]
            return torch.empty(0, dtype=torch.uint8)
        view = self._views[name]
        rows = from_bytes(request.payload, torch.int64).cpu() - view.first_row
        mine = rows[(rows >= 0) & (rows < len(view._rows.numbers))]
        if request.kind == NUMBERS:
            return as_bytes(view.rows_to_numbers(mine))
        assert request.kind == CONTENT
        if not len(mine):
            return torch.empty(0, dtype=torch.uint8)
        found = view.content(request.arguments[1], Selection(mine[:, None], torch.empty(0)))
        counts = found.mask.sum(1)
        head = torch.cat([counts.new_tensor([DTYPES.index(found.keys.dtype)]), counts])
        pieces = (head, found.keys[found.mask], found.values[found.mask])
        return torch.cat([as_bytes(piece) for piece in pieces])

    def _routed(self, requests: Sequence[Request]) -> dict[int, Tensor]:
        """Requests for one layer of one view, in one pass over the keys."""
        view, layer = self._view_of(requests[0]), requests[0].arguments[1]
        device = view._keys_device
        lengths, vectors, sizes = [], [], []
        for request in requests:
            batch = request.arguments[3]
            lengths.append(from_bytes(request.payload[: 8 * batch], torch.int64))
            vectors.append(from_bytes(request.payload[8 * batch :], torch.float32))
            sizes.append(batch)
        counts = torch.cat(lengths).to(device)
        manifest = self.resident.bank.manifest
        width = manifest.num_key_value_heads * manifest.head_dim
        flat = torch.cat(vectors).to(device).view(-1, width)
        mask = torch.arange(int(counts.max()), device=device) < counts[:, None]
        padded = flat.new_zeros((*mask.shape, width))
        padded[mask] = flat
        top_k = max(request.arguments[2] for request in requests)
        found = view.search(layer, padded, mask, top_k)
        rows = (found.documents + view.first_row).masked_fill(found.documents < 0, -1)
        answers = {}
        for request, documents, scores in zip(
            requests, torch.split(rows, sizes), torch.split(found.scores, sizes), strict=True
        ):
            best = slice(None, request.arguments[2])
            pieces = as_bytes(documents[:, best]), as_bytes(scores[:, best])
            answers[request.rank] = torch.cat(pieces)
        return answers


def _among(view: BankSnapshot, bits: Tensor) -> BankSnapshot:
    """The view, of documents whose number's bit is set; see `_bits`."""
    passes = torch.from_numpy(numpy.unpackbits(bits.cpu().numpy())).bool()
    numbers = view._rows.numbers
    known = numbers < len(passes)
    mask = view._rows.live & known
    mask[known] &= passes[numbers[known]]
    return replace(view, num_documents=int(mask.sum()), _mask=mask.to(view._keys_device))


def said(error: BaseException) -> str:
    """An error, for people at another rank."""
    text = str(error) if isinstance(error, MSAError) else f"{type(error).__name__}: {error}"
    return text.rstrip(": ")
