"""Bulk encoding under torchrun: rank 0 holds the bank, every rank encodes its share.

Every rank is given the same stream of documents. A document belongs to the rank that its id's
CRC-32 names, so one id always comes to one rank, in the order of the stream. Ranks meet through
torchrun's store; from then on each holds one TCP connection to rank 0, over which it asks what
`msa.memory.distributed.bulk_ingest.Desk` lists, as JSON. A process that dies closes its connection,
a host that dies stops answering (TCP keepalive), and one that hangs falls silent: rank 0 tells the
others to stop and raises one error. What was committed until then stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from msa.errors import BankError, ConfigError, MSAError, RankError
from msa.memory.bank import MemoryBank
from msa.memory.distributed.bulk_ingest import Assignment, BulkEncoder, Coordinator, Window
from msa.memory.distributed.wire import (
    Channel,
    answer_in,
    answer_out,
    claim_in,
    claim_out,
    window_in,
    window_out,
)
from msa.memory.ingest.encoder import DEFAULT_BATCH_TOKENS
from msa.memory.ingest.pipeline import COMMIT_TOKENS, DocumentKey, OnDuplicate
from msa.memory.store.reports import AddProgress, AddReport
from msa.text.prompts import PromptTemplate
from msa.types import Document

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from transformers import PreTrainedTokenizerBase

    from msa.model.modeling_msa import MSAForCausalLM

DEFAULT_TIMEOUT = 600.0
_GREETING_BYTES = 4096
_ALIVE_EVERY = 64  # documents
_PARTING_SECONDS = 2.0
_GO_ON = "What was committed stays; the same command goes on from there"


class StoppedError(RankError):
    """Rank 0 has ended the run, and says itself why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands among those that torchrun started.

    Attributes:
        rank, world: this one, and how many.
        local_rank: among those of this host; chooses its GPU.
        address, port: where they meet.
        attempt: how often torchrun has started them all again.
    """

    rank: int
    world: int
    local_rank: int
    address: str
    port: int
    attempt: str = "0"

    @classmethod
    def from_environment(cls) -> Place | None:
        """As torchrun sets it; None for a process that runs alone.

        Raises:
            ConfigError: it is set in part.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return None
        try:
            return cls(
                int(os.environ["RANK"]),
                int(os.environ["WORLD_SIZE"]),
                int(os.environ.get("LOCAL_RANK", os.environ["RANK"])),
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
            )
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, but RANK, MASTER_ADDR or "
                f"MASTER_PORT is not usable ({error}); start it with torchrun, or unset WORLD_SIZE"
            ) from None

    @property
    def device(self) -> str:
        """GPU of this rank, or the CPU where there is none."""
        import torch

        return f"cuda:{self.local_rank}" if torch.cuda.is_available() else "cpu"


# ---- shares


class Share:
    """The documents of one rank out of a stream, and what tells that all ranks had the same stream.

    Args:
        documents: the whole stream.
        place: of the rank.
        alive: called now and then, however long the rank has nothing to do.
    """

    def __init__(
        self, documents: Iterable[Document], place: Place, alive: Callable[[], None]
    ) -> None:
        self._documents, self._place, self._alive = documents, place, alive
        self._count = 0
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[Document]:
        for document in self._documents:
            name = str(getattr(document, "id", "")).encode(errors="surrogatepass")
            self._count += 1
            self._digest.update(name + b"\0")
            if zlib.crc32(name) % self._place.world == self._place.rank:
                yield document
            if self._count % _ALIVE_EVERY == 0:
                self._alive()

    @property
    def signature(self) -> tuple[int, str]:
        """Number of documents in the stream, and a hash of their ids in order."""
        return self._count, self._digest.hexdigest()


def _store(place: Place, timeout: float) -> TCPStore:
    """The store where ranks meet: torchrun's, or rank 0's where somebody else started them."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    theirs = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return TCPStore(
            place.address,
            place.port,
            place.world,
            is_master=place.rank == 0 and not theirs,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RankError(
            f"rank {place.rank} of {place.world} cannot reach the store at {place.address}:"
            f"{place.port} ({reason}); are MASTER_ADDR and MASTER_PORT those of rank 0's host?"
        ) from None


def _store_key(place: Place) -> str:
    return f"msa/bulk/{place.attempt}"


# ---- rank 0


class Lead:
    """Rank 0: answers the other ranks while it encodes its own share. Use it with `with`.

    Args:
        place: of this process.
        timeout: seconds after which a rank that says nothing counts as lost.

    Raises:
        RankError: there is no store to meet at.
    """

    def __init__(self, place: Place, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._place, self._timeout = place, timeout
        self._token = secrets.token_hex(16)
        self._changed = threading.Condition()
        self._failure: Exception | None = None
        self._closing = False
        self._coordinator: Coordinator | None = None
        self._channels: dict[int, Channel] = {}
        self._signatures: dict[int, tuple[str, int, str]] = {}
        self._threads: list[threading.Thread] = []
        self._since = time.monotonic()
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
        self._start(self._accept)
        self._meeting = _store(place, timeout)  # kept: it may be here that the others meet
        where = {"port": self._listener.getsockname()[1], "token": self._token}
        self._meeting.set(_store_key(place), json.dumps(where))

    def __enter__(self) -> Lead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def add(
        self,
        bank: MemoryBank,
        documents: Iterable[Document],
        *,
        on_duplicate: OnDuplicate = "error",
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        commit_tokens: int = COMMIT_TOKENS,
        progress: Callable[[AddProgress], None] | None = None,
    ) -> AddReport:
        """`MemoryBank.add` with all ranks; each of them calls `Follower.add` with these documents.

        Args:
            bank: open for writing, with its model.
            documents: the whole stream.
            on_duplicate, batch_tokens, commit_tokens: see `MemoryBank.add`.
            progress: called after every commit of any rank, in any thread.

        Raises:
            RankError: a rank failed, ended or fell silent. What was committed stays.
            MSAError: as `MemoryBank.add` raises it.
        """
        if bank.model is None or bank.tokenizer is None:
            raise BankError(f"bank '{bank.path}' was opened without a model; give it to encode")
        coordinator = Coordinator(bank, on_duplicate=on_duplicate, progress=progress)
        try:
            with self._changed:
                self._coordinator = coordinator
                self._changed.notify_all()
            encoder = BulkEncoder(
                bank.path,
                bank.model,
                bank.tokenizer,
                coordinator,
                "rank 0",
                batch_tokens=batch_tokens,
                commit_tokens=commit_tokens,
                alive=self.check,
            )
            share = Share(documents, self._place, self.check)
            encoder.add(share)
            self._wait_for_all(*share.signature)
            return coordinator.finish()
        finally:
            coordinator.close()  # before the bank is: no thread may commit after that

    def check(self) -> None:
        """Raise what has gone wrong with any rank."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            missing = set(range(1, self._place.world)) - self._channels.keys()
        if missing and time.monotonic() - self._since > self._timeout:
            raise RankError(
                f"rank {min(missing)} of {self._place.world} has not come within "
                f"{self._timeout:.0f} s. {_GO_ON}"
            )

    def failure(self, wait: float = 0.0) -> Exception | None:
        """What has gone wrong with another rank; waits a moment for it to show."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None, wait)
            return self._failure

    def _wait_for_all(self, count: int, digest: str) -> None:
        """Wait until all ranks are done; compare what they were given with what this one was."""
        while True:
            with self._changed:
                if len(self._signatures) == self._place.world - 1:
                    break
                self._changed.wait(0.2)  # short, so that Ctrl-C is noticed
            self.check()
        for name, other_count, other_digest in self._signatures.values():
            if (other_count, other_digest) != (count, digest):
                raise RankError(
                    f"{name} was given {other_count} documents, rank 0 {count}"
                    f"{'' if other_count != count else ' (others, or in another order)'}: all "
                    "ranks must read the same files. What they stored stays; give all hosts the "
                    "same files and run the same command again"
                )

    def close(self) -> None:
        """Tell the ranks that are not done to stop, and hang up."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            # Who is on the way here would wait long for a rank that has ended.
            everyone = self._place.world - 1
            self._changed.wait_for(lambda: len(self._channels) == everyone, _PARTING_SECONDS)
            channels = list(self._channels.values())
        with contextlib.suppress(RuntimeError):  # for those that come later
            self._meeting.set(_store_key(self._place), json.dumps({"stop": True}))
        for channel in channels:
            with contextlib.suppress(OSError):
                channel.send({"stop": True})
        # Who hears it hangs up; who computes just now is not waited for.
        until = time.monotonic() + _PARTING_SECONDS
        for thread in self._threads[1:]:
            thread.join(max(0.0, until - time.monotonic()))
        for channel in channels:
            channel.close()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    # ---- threads: one that accepts, one for every rank

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, Channel(connection, self._timeout))

    def _serve(self, channel: Channel) -> None:
        """Answer one rank until it is done."""
        try:
            hello = channel.receive(_GREETING_BYTES)
            known = secrets.compare_digest(str(hello["token"]), self._token)
            rank, name = int(hello["rank"]), str(hello["name"])
        except (OSError, KeyError, TypeError, ValueError):
            known = False
        if not known:
            channel.close()
            return
        with self._changed:
            self._channels[rank] = channel
            self._changed.notify_all()
            late = self._closing or self._failure is not None
        try:
            if late:  # nobody else tells it
                channel.send({"stop": True})
            while rank not in self._signatures:
                message = channel.receive()
                if message["ask"] != "alive":
                    channel.send({"answer": self._answer(rank, name, message)})
        except TimeoutError:
            self._fail(RankError(f"{name} has said nothing for {self._timeout:.0f} s. {_GO_ON}"))
        except OSError:
            self._fail(RankError(f"{name} ended before it was done. {_GO_ON}"))
        except Exception as error:
            self._fail(error)

    def _answer(self, rank: int, name: str, message: dict[str, Any]) -> Any:
        """The answer to one question of a rank."""
        ask: str = message["ask"]
        value: Any = message.get("value")
        worker = f"rank {rank}"
        if ask == "failed":
            raise RankError(f"{name}: {value}. {_GO_ON}")
        if ask == "done":
            with self._changed:
                self._signatures[rank] = (name, *value)
                self._changed.notify_all()
            return None
        coordinator = self._opened()
        if ask == "join":
            return coordinator.join(worker)
        if ask == "claim":
            claims = [claim_in(claim) for claim in value]
            return [answer_out(answer) for answer in coordinator.claim(worker, claims)]
        if ask == "claim_parts":
            return coordinator.claim_parts(worker, value)
        assert ask == "commit", ask
        return coordinator.commit(worker, window_in(value))

    def _opened(self) -> Coordinator:
        """The coordinator, when rank 0 has opened the bank."""
        with self._changed:
            self._changed.wait_for(lambda: self._coordinator or self._failure or self._closing)
            if self._coordinator is None:
                raise StoppedError("rank 0 has stopped")
            return self._coordinator

    def _fail(self, error: Exception) -> None:
        """Keep the first failure, and let all others stop."""
        with self._changed:
            if self._failure is not None or self._closing:
                return
            self._failure = error
            channels = list(self._channels.values())
            self._changed.notify_all()
        for channel in channels:
            with contextlib.suppress(OSError):
                channel.send({"stop": True})


# ---- the other ranks


class Follower:
    """A rank that is not the first: the coordinator's stand-in here. Use it with `with`.

    Args:
        place: of this process.
        timeout: seconds after which rank 0 counts as lost.

    Raises:
        RankError: rank 0 cannot be reached.
    """

    def __init__(self, place: Place, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._place, self._timeout = place, timeout
        self._said = time.monotonic()
        self._meeting, until = _store(place, timeout), time.monotonic() + timeout
        while not (where := self._published()):
            if where is None:
                raise self._lost("ended before it could be reached")
            if time.monotonic() > until:
                raise self._lost(f"has not come within {timeout:.0f} s")
            time.sleep(0.05)
        if "stop" in where:
            raise StoppedError("rank 0 has stopped")
        try:
            connection = socket.create_connection((place.address, where["port"]), timeout)
            self._channel = Channel(connection, timeout)
            name = f"rank {place.rank} of {place.world} (process {os.getpid()} on "
            name += f"{socket.gethostname()})"
            self._channel.send({"token": where["token"], "rank": place.rank, "name": name})
        except OSError as error:
            self._meeting.set_timeout(timedelta(seconds=_PARTING_SECONDS))
            if "stop" in (self._published() or {}):
                raise StoppedError("rank 0 has stopped") from None
            raise self._lost(f"cannot be reached on port {where['port']} ({error})") from None

    def _published(self) -> dict[str, Any] | None:
        """What rank 0 has put into the store so far; None when the store is gone."""
        key = _store_key(self._place)
        try:
            return dict(json.loads(self._meeting.get(key))) if self._meeting.check([key]) else {}
        except RuntimeError:
            return None

    def __enter__(self) -> Follower:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()

    def add(
        self,
        path: str | Path,
        model: MSAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        documents: Iterable[Document],
        *,
        template: PromptTemplate | None = None,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        commit_tokens: int = COMMIT_TOKENS,
    ) -> None:
        """Encode this rank's share; rank 0 calls `Lead.add` meanwhile.

        Args:
            path: the bank's folder, on a file system that all hosts share.
            model, tokenizer, template: those of rank 0.
            documents: the whole stream, the same as rank 0's.
            batch_tokens, commit_tokens: see `MemoryBank.add`.

        Raises:
            StoppedError: rank 0 has ended the run.
            RankError: rank 0 is gone.
            MSAError: this rank cannot go on; `tell` rank 0.
        """
        encoder = BulkEncoder(
            path,
            model,
            tokenizer,
            self,
            f"rank {self._place.rank}",
            template=template,
            batch_tokens=batch_tokens,
            commit_tokens=commit_tokens,
            alive=self.alive,
        )
        share = Share(documents, self._place, self.alive)
        encoder.add(share)
        self._ask("done", share.signature)

    def join(self, worker: str) -> str:
        """See `Coordinator.join`; waits until rank 0 has opened the bank."""
        return str(self._ask("join"))

    def claim(self, worker: str, claims: Sequence[DocumentKey]) -> list[Assignment | str | None]:
        """See `Coordinator.claim`."""
        answers = self._ask("claim", [claim_out(claim) for claim in claims])
        return [answer_in(answer) for answer in answers]

    def claim_parts(self, worker: str, parts: Sequence[Sequence[str]]) -> list[int | str]:
        """See `Coordinator.claim_parts`."""
        answers: list[int | str] = self._ask("claim_parts", parts)
        return answers

    def commit(self, worker: str, window: Window) -> None:
        """See `Coordinator.commit`."""
        self._ask("commit", window_out(window))

    def alive(self) -> None:
        """Tell rank 0 now and then that this rank works, and hear whether it should stop.

        Raises:
            StoppedError: rank 0 has ended the run.
            RankError: rank 0 is gone.
        """
        try:
            if self._channel.has_message():  # nothing was asked: it is a stop, or the end
                self._hear()
            if time.monotonic() - self._said > min(5.0, self._timeout / 10):
                self._said = time.monotonic()
                self._channel.send({"ask": "alive"})
        except OSError as error:
            raise self._gone(error) from None

    def tell(self, error: BaseException) -> bool:
        """Let rank 0 say why this rank failed; False if it cannot be told."""
        known = isinstance(error, MSAError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        try:
            self._channel.send({"ask": "failed", "value": reason.rstrip(".")})
        except OSError:
            return False
        with contextlib.suppress(OSError, RankError):
            self._hear()  # rank 0 answers with a stop: now it has been heard
        return True

    def _ask(self, ask: str, value: Any = None) -> Any:
        try:
            self._said = time.monotonic()
            self._channel.send({"ask": ask, "value": value})
            return self._hear()
        except OSError as error:
            raise self._gone(error) from None

    def _hear(self) -> Any:
        message = self._channel.receive()
        if "stop" in message:
            raise StoppedError("rank 0 has stopped")
        return message["answer"]

    def _gone(self, error: OSError) -> RankError:
        if isinstance(error, TimeoutError):
            return self._lost(f"has not answered for {self._timeout:.0f} s")
        try:
            while self._channel.has_message():  # what it said last may still be there
                self._hear()
        except StoppedError as stop:
            return stop
        except OSError:
            pass
        return self._lost("ended before all was done")

    def _lost(self, what: str) -> RankError:
        where = f"rank 0 (on {self._place.address})"
        return RankError(f"{where} {what}. {_GO_ON}")
