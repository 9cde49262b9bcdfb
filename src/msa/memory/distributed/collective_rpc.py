"""Turns of collectives in lock step, by which ranks ask each other at any time (ours).

Ranks run their own models, so they ask at different times, for different layers, with different
batch sizes, or not at all; collectives want all ranks at once. So every rank has one thread that
takes *turns* with those of the others, whatever its model is doing. In a turn

1. all ranks gather everybody's header: what this rank asks, if anything, and how it is
   (CPU, a few integers);
2. if somebody asks, all ranks gather the requests, padded to the longest;
3. every rank answers all requests from what it holds;
4. the answers go back: their sizes are gathered, then one all-to-all brings every asker its own.

While nobody asks, a turn is step 1 alone, some tens of times a second. It tells ranks that live
from those that do not: a process that ended closes its connections, one that hangs lets the turn
run into the timeout. Either way the turn fails on every rank, and everyone who waits gets one
`RankError`. A rank leaves in one of two ways. Done: it goes on answering until all are done.
Stopped (by an error of its own): it says so, with the reason, and all others stop too.

A group of its own is used, so nothing of this mixes with collectives of the caller. Headers travel
by gloo; requests and answers by NCCL where every rank has a GPU of its own, else by gloo.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from msa import errors
from msa.errors import ConfigError, MSAError, RankError
from msa.memory.loaded.memory_plan import available_memory

NUM_ARGUMENTS = 4
NUM_STATUS = 6
# Between two turns while nobody asks: short after a request, since more may follow.
IDLE_SECONDS = (0.001, 0.02)
IDLE_SHARE = 0.02
# How long a failed rank looks for the others, to say which one is gone.
INQUEST_SECONDS = 2.0
_AGAIN = "Start the command again on all ranks."


class PeerStoppedError(RankError):
    """Another rank stopped by an error of its own, which it says itself."""


_ASKING, _DONE, _STOPPED = range(3)
_PARTED = "the ranks have parted; nothing can be asked any more"
_made: Counter[str] = Counter()  # exchanges of a process group


@dataclass(frozen=True, slots=True)
class Peer:
    """What a rank says of itself when they meet.

    Attributes:
        host, process: where it runs.
        gpu: that it computes on; empty without one.
        memory, gpu_memory: free bytes, before anything was loaded.
    """

    host: str
    process: int
    gpu: str
    memory: int
    gpu_memory: int

    @classmethod
    def here(cls, device: torch.device) -> Peer:
        """What this process says."""
        gpu, free = "", 0
        if device.type == "cuda":
            gpu = str(torch.cuda.get_device_properties(device).uuid)
            free = torch.cuda.mem_get_info(device)[0]
        return cls(socket.gethostname(), os.getpid(), gpu, available_memory(), free)


@dataclass(frozen=True, slots=True)
class Request:
    """What one rank asks of all.

    Attributes:
        rank: who asks.
        kind: above 0.
        arguments: `NUM_ARGUMENTS` integers.
        payload: uint8 [bytes], on the device of the exchange.
    """

    rank: int
    kind: int
    arguments: tuple[int, ...]
    payload: Tensor


class Service(Protocol):
    """What a rank does in a turn. Called by the thread of the exchange."""

    def status(self) -> Sequence[int]:
        """`NUM_STATUS` integers that all ranks shall know."""
        ...

    def observe(self, table: Sequence[Sequence[int]]) -> None:
        """The status of every rank, in order: the same table on all ranks, turn by turn."""
        ...

    def answer(self, requests: Sequence[Request]) -> list[Tensor | MSAError]:
        """For every request uint8 bytes, or the error that its asker shall get.

        Any other error that is raised here stops all ranks.
        """
        ...


@dataclass(slots=True)
class _Call:
    """A request on its way; `answers` one per rank when it is back."""

    kind: int
    arguments: tuple[int, ...]
    payload: Tensor
    done: threading.Event = field(default_factory=threading.Event)
    answers: list[Tensor] = field(default_factory=list)
    error: Exception | None = None


class Exchange:
    """One rank's part in the turns. All ranks make one, in the same order.

    Attributes:
        rank, world: this one, and how many.
        peers: all ranks, in order.
        device: where payloads and answers lie: that of the ranks with NCCL, else the CPU.
    """

    def __init__(
        self,
        service: Service,
        device: torch.device,
        group: dist.ProcessGroup | None,
        timeout: float,
        start_timeout: float,
    ) -> None:
        """Meet the other ranks and begin.

        Args:
            service: answers.
            device: where this rank computes.
            group: the ranks; all by default.
            timeout: seconds that a rank may be silent.
            start_timeout: seconds that a rank may come later than another.

        Raises:
            ConfigError: there is no process group.
            RankError: a rank does not come.
        """
        self._service = service
        self._timeout = timeout
        self._compute = device
        parent = _parent(group)
        self.rank: int = dist.get_rank(parent)
        self.world: int = dist.get_world_size(parent)
        self._store = _store(parent)
        self.peers = self._meet(start_timeout)
        own = len({peer.gpu for peer in self.peers if peer.gpu}) == self.world
        own = own and dist.is_nccl_available()
        self.device = device if own else torch.device("cpu")
        self._group: Any = dist.new_group(
            None if group is None else dist.get_process_group_ranks(parent),
            timeout=timedelta(seconds=timeout),
            backend="cpu:gloo,cuda:nccl" if own else "gloo",
            use_local_synchronization=group is not None,
        )
        self._changed = threading.Condition()
        self._calls: deque[_Call] = deque()
        self._state = _ASKING
        self._error: RankError | None = None
        self._over = False
        self._worked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="msa-exchange", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)

    # ---- for the rank's own threads

    def ask(
        self, kind: int, arguments: Sequence[int], payload: Tensor | None = None
    ) -> list[Tensor]:
        """The answers of all ranks, in order: uint8 tensors on the device of the exchange.

        Args:
            kind: above 0; the service knows it.
            arguments: up to `NUM_ARGUMENTS` integers.
            payload: any dtype and device; its bytes are sent.

        Raises:
            RankError: a rank ended, fell silent or stopped.
            MSAError: what a rank's service answered.
        """
        call = self.post(kind, arguments, payload)
        call.done.wait()
        if call.error is not None:
            raise call.error
        if self.device.type == "cuda":
            for answer in call.answers:  # made on another stream
                answer.record_stream(torch.cuda.current_stream(self.device))
        return call.answers

    def post(self, kind: int, arguments: Sequence[int], payload: Tensor | None = None) -> _Call:
        """`ask` without waiting."""
        content = torch.empty(0, dtype=torch.uint8) if payload is None else as_bytes(payload)
        content = content.to(self.device)
        if content.is_cuda:
            torch.cuda.current_stream(self.device).synchronize()
        padded = (*arguments, *[0] * (NUM_ARGUMENTS - len(arguments)))
        call = _Call(kind, padded, content)
        with self._changed:
            if self._over:
                call.error = self._error or RankError(_PARTED)
                call.done.set()
            else:
                self._calls.append(call)
                self._changed.notify_all()
        return call

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait for what the service observes.

        Raises:
            RankError: a rank ended, fell silent or stopped.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._over or condition())
            if not condition():
                raise self._error or RankError(_PARTED)

    def note(self, kind: str, text: str) -> None:
        """Leave a text for the other ranks, to be read with `noted`."""
        self._store.set(f"{kind}/{self.rank}", text)

    def noted(self, kind: str, rank: int) -> str:
        """A text that a rank has left; empty if there is none."""
        try:
            key = f"{kind}/{rank}"
            return str(self._store.get(key).decode()) if self._store.check([key]) else ""
        except RuntimeError:  # torch's errors of stores: whoever holds it is gone
            return ""

    def name(self, rank: int) -> str:
        """A rank, as people are told of it."""
        peer = self.peers[rank]
        return f"rank {rank} ({peer.host}, process {peer.process})"

    def finish(self) -> None:
        """Go on answering until all ranks have called this.

        Raises:
            RankError: a rank ended, fell silent or stopped before that.
        """
        with self._changed:
            if not self._over:
                self._state = _DONE
                self._changed.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def failure(self, wait: float = 0.0) -> RankError | None:
        """What has gone wrong with another rank; waits a moment for it to show."""
        with self._changed:
            self._changed.wait_for(lambda: self._over, wait)
            return self._error

    def stop(self, reason: str) -> None:
        """Leave at once; the other ranks stop too, with this reason."""
        with self._changed:
            if not self._over:
                self._note_stop(reason)
                self._state = _STOPPED
                self._changed.notify_all()
        self._thread.join(self._timeout + INQUEST_SECONDS)

    def _at_exit(self) -> None:
        self.stop("its process ended before it was done")

    # ---- the thread

    def _run(self) -> None:
        error: RankError | None = None
        try:
            with self._stream():
                while not self._turn():
                    self._rest()
        except RankError as failure:
            error = failure
        except _BrokenError as failure:
            error = self._inquest(str(failure))
        except Exception as failure:  # handed to every caller of this rank, and said to the others
            reason = f"{type(failure).__name__}: {failure}"
            self._note_stop(reason)
            error = RankError(f"this rank cannot answer the others ({reason}). {_AGAIN}")
            error.__cause__ = failure
        self._part(failed=error is not None)
        with self._changed:
            self._error = error
            self._over = True
            for call in self._calls:
                call.error = error or RankError(_PARTED)
                call.done.set()
            self._changed.notify_all()
        atexit.unregister(self._at_exit)

    def _part(self, *, failed: bool) -> None:
        """Close the connections; ranks that wait for this one get an error at once."""
        group, self._group = self._group, None
        if group is None:
            return
        with contextlib.suppress(RuntimeError):
            if failed and self.device.type == "cuda":
                group.abort()
            dist.destroy_process_group(group)

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        """A stream of the thread's own, so that answers do not queue behind the model."""
        if self._compute.type != "cuda":
            yield
            return
        torch.cuda.set_device(self._compute)
        with torch.cuda.stream(torch.cuda.Stream(self._compute)):  # type: ignore[no-untyped-call]
            yield

    def _rest(self) -> None:
        with self._changed:
            since = time.monotonic() - self._worked
            if not self._calls:
                low, high = IDLE_SECONDS
                self._changed.wait(min(max(since * IDLE_SHARE, low), high))

    def _turn(self) -> bool:
        """One turn; True when all ranks are done."""
        with self._changed:
            call = self._calls[0] if self._calls else None
            # who is done has asked everything, but may still let go of what it held
            state = _ASKING if call is not None and self._state == _DONE else self._state
        header = [state, 0, 0, *[0] * NUM_ARGUMENTS, *self._service.status()]
        if call is not None:
            header[1 : 3 + NUM_ARGUMENTS] = [call.kind, len(call.payload), *call.arguments]
        table = torch.stack(self._gather(torch.tensor(header))).tolist()
        if state == _STOPPED:
            raise RankError("this rank was stopped; make the engine or ShardedBank anew")
        self._check(table)
        with self._changed:
            self._service.observe([row[3 + NUM_ARGUMENTS :] for row in table])
            self._changed.notify_all()
        askers = [rank for rank, row in enumerate(table) if row[1]]
        if askers:
            self._worked = time.monotonic()
            self._serve(table, askers, call)
        return all(row[0] == _DONE for row in table)

    def _check(self, table: Sequence[Sequence[int]]) -> None:
        stopped = [rank for rank, row in enumerate(table) if row[0] == _STOPPED]
        if stopped:
            reason = self.noted("stopped", stopped[0]) or "see what it says itself"
            raise PeerStoppedError(
                f"{self.name(stopped[0])} stopped: {reason.rstrip('.')}. {_AGAIN}"
            )

    def _serve(
        self, table: Sequence[Sequence[int]], askers: Sequence[int], call: _Call | None
    ) -> None:
        """Steps 2 to 4 of a turn."""
        longest = max(table[rank][2] for rank in askers)
        payload = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        if call is not None:
            payload[: len(call.payload)] = call.payload
        payloads = self._gather(payload) if longest else [payload] * self.world
        requests = [
            Request(
                rank,
                table[rank][1],
                tuple(table[rank][3 : 3 + NUM_ARGUMENTS]),
                payloads[rank][: table[rank][2]],
            )
            for rank in askers
        ]
        answers = self._service.answer(requests)
        sizes = torch.zeros((self.world, 2), dtype=torch.int64)  # to every rank; 1 for an error
        parts = []
        for rank, answer in zip(askers, answers, strict=True):
            failed = isinstance(answer, MSAError)
            if isinstance(answer, MSAError):
                text = error_to_text(answer).encode()
                answer = torch.tensor(list(text), dtype=torch.uint8)
            parts.append(answer.to(self.device))
            sizes[rank] = torch.tensor([len(answer), failed])
        matrix = torch.stack(self._gather(sizes))  # [from, to, 2]
        mine = matrix[:, self.rank]
        received = torch.empty(int(mine[:, 0].sum()), dtype=torch.uint8, device=self.device)
        splits = mine[:, 0].tolist(), sizes[:, 0].tolist()
        self._collective(dist.all_to_all_single, received, torch.cat(parts), *splits)
        if call is not None:
            self._deliver(call, torch.split(received, mine[:, 0].tolist()), mine[:, 1].tolist())

    def _deliver(self, call: _Call, answers: Sequence[Tensor], failed: Sequence[int]) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        if any(failed):
            text = bytes(answers[failed.index(1)].cpu().tolist()).decode()
            call.error = error_from_text(text)
        call.answers = list(answers)
        with self._changed:
            self._calls.popleft()
        call.done.set()

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """The same tensor of every rank."""
        gathered = [torch.empty_like(tensor) for _ in range(self.world)]
        self._collective(dist.all_gather, gathered, tensor)
        return gathered

    def _collective(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Run one and wait for it.

        Raises:
            _BrokenError: it failed. Nothing of it is kept, so that its connections can close.
        """
        failure = None
        try:
            work = function(*arguments, group=self._group, async_op=True)
            if self.device.type == "cuda":  # NCCL's own way to end on a timeout ends the process
                until = time.monotonic() + self._timeout
                while not work.is_completed():
                    if time.monotonic() > until:
                        raise RuntimeError(f"no answer within {self._timeout:g} s")
                    time.sleep(0)
            work.wait()
        except RuntimeError as error:
            failure = (str(error).splitlines() or [type(error).__name__])[0]
        if failure is not None:
            work = None
            raise _BrokenError(failure)

    # ---- meeting and parting

    def _meet(self, seconds: float) -> list[Peer]:
        """Wait for all ranks.

        Raises:
            RankError: a rank does not come.
        """
        self.note("peer", json.dumps(asdict(Peer.here(self._compute))))
        missing = self._absent("peer", seconds)
        if missing:
            raise RankError(
                f"rank {missing[0]} of {self.world} has not come within {seconds:.0f} s. All ranks "
                f"must make the engine or the ShardedBank. {_AGAIN}"
            )
        return [Peer(**json.loads(self.noted("peer", rank))) for rank in range(self.world)]

    def _absent(self, kind: str, seconds: float) -> list[int]:
        """Ranks that leave no note of this kind in time."""
        missing = []
        until = time.monotonic() + seconds
        for rank in range(self.world):
            left = max(until - time.monotonic(), 0.001)
            try:
                self._store.wait([f"{kind}/{rank}"], timedelta(seconds=left))
            except RuntimeError:  # of torch: not there in time, or no store any more
                missing.append(rank)
        return missing

    def _note_stop(self, reason: str) -> None:
        with contextlib.suppress(RuntimeError):
            self.note("stopped", reason)

    def _inquest(self, reason: str) -> RankError:
        """Find out which rank is gone: all that live see the turn fail, and say that they do."""
        with contextlib.suppress(RuntimeError):
            self.note("failed", reason)
        self._part(failed=True)  # so that the turn of the others fails too
        missing = self._absent("failed", INQUEST_SECONDS)
        for rank in range(self.world):
            if rank != self.rank and (said := self.noted("stopped", rank)):
                return PeerStoppedError(f"{self.name(rank)} stopped: {said.rstrip('.')}. {_AGAIN}")
        if not missing or self.rank in missing:
            return RankError(
                f"a rank ended or lost its connection, it cannot be said which (torch: {reason}). "
                + _AGAIN
            )
        names = " and ".join(self.name(rank) for rank in missing)
        return RankError(
            f"{names} ended, or has not answered for {self._timeout:g} s. What it held of the "
            f"memory is missing. {_AGAIN}"
        )


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes: uint8 [bytes]."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def from_bytes(content: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of a type, out of their bytes."""
    return content.clone().view(dtype)  # a part of a buffer may begin at any byte


def error_to_text(error: MSAError) -> str:
    """An error, as it travels to another rank."""
    return f"{type(error).__name__}\n{error}"


def error_from_text(text: str) -> MSAError:
    """The error of another rank, of its class if it is one of ours."""
    name, _, message = text.partition("\n")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, MSAError):
        return kind(message)
    return RankError(f"{name}: {message}")


class _BrokenError(Exception):
    """A collective failed; torch's reason."""


def _parent(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError(
            "there is no process group for a parallel memory: start the program with torchrun and "
            "call torch.distributed.init_process_group() first"
        )
    parent = group if group is not None else dist.group.WORLD
    assert parent is not None
    return parent


def _store(parent: dist.ProcessGroup) -> Any:
    """A place of this exchange's own in the store where the ranks met."""
    _made[parent.group_name] += 1
    name = f"msa-exchange-{_made[parent.group_name]}"
    return dist.distributed_c10d.PrefixStore(name, parent.get_group_store())
