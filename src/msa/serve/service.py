"""What a service consists of, and its life: loading, serving, stopping."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

from fastapi import Depends, Request

from msa.build import commit
from msa.model.identity import Fingerprints, model_fingerprints
from msa.serve.asking import AskService
from msa.serve.banks import BankRegistry, BankState, ServedBank
from msa.serve.errors import ServiceError, log_failure
from msa.serve.fairness import Turns, aside
from msa.serve.jobs import Jobs
from msa.serve.keys import ADMIN, ANONYMOUS, Keys, Principal, principal
from msa.serve.metrics import Metrics
from msa.serve.settings import ServeSettings

if TYPE_CHECKING:
    from msa.model.checkpoint import Checkpoint

State = Literal["loading", "ready", "draining", "failed"]


class Service:
    """Everything that the app uses; `app.state.service`.

    Args:
        settings: how it runs.
        checkpoint: the model with what belongs to it, or a function that loads it; by default the
            one that the settings name is loaded.
        paths: files and folders to be indexed into the first bank, as a job.
        read_only: open the banks for reading only.

    Attributes:
        settings, keys, metrics, registry, asking, turns, jobs: its parts.
        checkpoint: the model, once it is loaded.
        fingerprints: of its weights, once they are known.
        commit: of this package, see `msa.build.commit`.
        state: "loading", "ready", "draining" or "failed".
        failure: why loading failed.

    Raises:
        ConfigError: the key file cannot be used.
    """

    def __init__(
        self,
        settings: ServeSettings,
        checkpoint: Checkpoint | Callable[[], Checkpoint] | None = None,
        paths: Sequence[Path] = (),
        *,
        read_only: bool = False,
    ) -> None:
        self.settings = settings
        self.keys = Keys.load(settings.api_key_file)
        self.metrics = Metrics()
        self.turns = Turns(settings.encode_share)
        self.registry = BankRegistry(settings, read_only=read_only)
        self.metrics.watch_banks(self.registry.all)
        self.asking = AskService(settings, self.metrics, self.turns)
        self.jobs = Jobs(settings, self.registry, self.turns)
        self.metrics.watch_jobs(self.jobs.counts)
        self.checkpoint: Checkpoint | None = None
        self.fingerprints: Fingerprints | None = None
        self.commit: str | None = None
        self.state: State = "loading"
        self.failure: Exception | None = None
        self._given = checkpoint
        self._paths = paths
        self._read_only = read_only

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls,
        settings: ServeSettings,
        checkpoint: Checkpoint | Callable[[], Checkpoint] | None = None,
        *,
        read_only: bool = False,
    ) -> AsyncIterator[Service]:
        """A service without an app, loaded when the block begins and closed at its end.

        Raises:
            MSAError: it cannot be loaded.
        """
        service = cls(settings, checkpoint, read_only=read_only)
        try:
            await service.load()
            if service.failure is not None:
                raise service.failure
            yield service
        finally:
            await service.drain()
            await service.close()

    async def load(self) -> None:
        """Load the model and the banks; afterwards the state is "ready", or "failed"."""
        try:
            self.checkpoint = await asyncio.to_thread(aside, self._load)
            self.asking.open(self.checkpoint.model)
            if not self._read_only:
                await self.jobs.start()
            if self._paths:
                first = next(iter(self.settings.banks))
                await self.jobs.index_paths(first, self._paths, ANONYMOUS)
        except Exception as error:
            self.failure, self.state = error, "failed"
            log_failure(error)
            return
        if self.state == "loading":
            self.state = "ready"

    def _load(self) -> Checkpoint:
        if self._given is None:
            from msa.model.loading import load

            checkpoint = load(self.settings.model, device=self.settings.device or "cpu")
        else:
            checkpoint = self._given() if callable(self._given) else self._given
        self.registry.open_all(checkpoint)
        self.fingerprints, self.commit = model_fingerprints(checkpoint.model), commit()
        return checkpoint

    async def drain(self) -> None:
        """Take no new work, and end what runs; within the settings' seconds."""
        if self.state != "failed":
            self.state = "draining"
        await self.asking.drain(self.settings.shutdown_seconds)

    async def close(self) -> None:
        """Stop everything and close the banks."""
        await self.jobs.stop()
        await self.asking.close()
        await asyncio.to_thread(self.registry.close)

    async def remove_bank(self, name: str, principal: Principal) -> None:
        """Delete a bank with all its documents; questions to it end with an error.

        Raises:
            ServiceError: see `BankRegistry.remove`.
        """
        served = self.registry.get(name, principal, ADMIN)
        self.registry.check_removable(served)
        await asyncio.to_thread(self.jobs.forget_bank, name)
        await self._fail_asks(served)
        await self.asking.call(lambda: self.registry.remove(name, principal))
        await asyncio.to_thread(self.jobs.forget_bank, name)  # of what came meanwhile

    async def follow(self, states: Mapping[str, BankState], seconds: float) -> None:
        """Have the same banks as the process that writes them, none of them older.

        Args:
            states: of the banks there.
            seconds: longest wait for what was written there to be seen here.

        Raises:
            ServiceError: 503; it took longer, or this service is not ready.
        """
        for served in self.registry.all():
            state = states.get(served.name)
            if state is None or state.created != served.state.created:
                await self._fail_asks(served)
                await self.asking.call(partial(self.registry.drop, served))
        await asyncio.to_thread(self.registry.catch_up, states, seconds)

    async def _fail_asks(self, served: ServedBank) -> None:
        gone = ServiceError(404, None, "bank_not_found", "The bank was removed.")
        await self.asking.fail(lambda ask: ask.served is served, gone)


def service_of(request: Request) -> Service:
    """The service of a request; a FastAPI dependency."""
    return cast(Service, request.app.state.service)


ServiceDep = Annotated[Service, Depends(service_of)]
"""Type of a parameter of a route that wants the service."""
CallerDep = Annotated[Principal, Depends(principal)]
"""Type of a parameter of a route that wants to know who asks; refuses strangers with 401."""
