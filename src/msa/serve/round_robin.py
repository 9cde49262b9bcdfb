"""Questions in turns: each running question takes one step, then the next does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from msa.errors import MSAError
from msa.inference.engine import MemoryEngine
from msa.memory.store.filters import Filter
from msa.types import Event

if TYPE_CHECKING:
    from collections.abc import Generator

    from msa.model.modeling_msa import MSAForCausalLM


class Request:
    """One question, bound to the bank's state."""

    def __init__(self, events: Iterator[Event]) -> None:
        self.events = cast("Generator[Event, None, None]", events)


def make_request(
    engine: MemoryEngine, question: str, filter: Filter | None, changes: Mapping[str, Any]
) -> Request:
    """A checked request.

    Raises:
        InputError, EmptyBankError, ConfigError: see `MemoryEngine.ask`.
    """
    return Request(engine.ask(question, stream=True, filter=filter, **changes))


class Scheduler:
    """Runs several requests side by side, in one thread."""

    def __init__(self, model: MSAForCausalLM, max_rows: int = 16) -> None:
        self._requests: list[Request] = []

    @property
    def idle(self) -> bool:
        """True when there is nothing to do."""
        return not self._requests

    def add(self, request: Request) -> None:
        """Let a request join."""
        self._requests.append(request)

    def remove(self, request: Request) -> None:
        """Stop a request."""
        if request in self._requests:
            self._requests.remove(request)
            request.events.close()

    def step(self) -> list[tuple[Request, Event | MSAError]]:
        """One step of the next request; what happened."""
        if self.idle:
            return []
        request = self._requests.pop(0)
        try:
            event: Event | MSAError = next(request.events)
        except MSAError as error:
            event = error
        if isinstance(event, Event) and event.kind != "answer":
            self._requests.append(request)
        else:
            request.events.close()
        return [(request, event)]
