"""How much may wait: decided when a request comes, before any work is done for it."""

from __future__ import annotations

import time
from collections import Counter

from msa.memory.store.lifetime import ClosedAtExit
from msa.serve.errors import ServiceError
from msa.serve.keys import ANONYMOUS, Principal

LEAST_RETRY, MOST_RETRY = 1.0, 120.0


def too_many(code: str, message: str, retry_seconds: float) -> ServiceError:
    """429, with when to come again in both forms that clients read."""
    seconds = min(max(retry_seconds, LEAST_RETRY), MOST_RETRY)
    headers = {"Retry-After": str(round(seconds)), "retry-after-ms": str(round(seconds * 1000))}
    return ServiceError(429, None, code, message, headers=headers)


class Admission:
    """Counts the requests that a model works on or that wait for it. For one thread's use.

    Args:
        running: requests that are worked on at once.
        waiting, waiting_per_key: more that may wait, of all and of one key. Without keys there is
            one crowd, for which only the first counts.

    Attributes:
        seconds_each: how long a request takes, as seen lately.
    """

    def __init__(self, running: int, waiting: int, waiting_per_key: int) -> None:
        self._most = running + waiting
        self._most_per_key = running + waiting_per_key
        self._running = running
        self._inside: Counter[str] = Counter()
        self.seconds_each = 1.0

    @property
    def inside(self) -> int:
        """Requests that run or wait."""
        return self._inside.total()

    def admit(self, principal: Principal) -> Ticket:
        """A place for one request, to be given back.

        Raises:
            ServiceError: 429.
        """
        if self.inside >= self._most:
            raise self._refusal("queue_full", "Too many questions are waiting.")
        if principal is not ANONYMOUS and self._inside[principal.name] >= self._most_per_key:
            raise self._refusal("key_limit", "Too many questions of this key are waiting.")
        self._inside[principal.name] += 1
        return Ticket(self, principal.name)

    def leave(self, name: str, seconds: float) -> None:
        """A request has ended; see `Ticket.close`."""
        self._inside[name] -= 1
        if not self._inside[name]:
            del self._inside[name]
        self.seconds_each += 0.1 * (seconds - self.seconds_each)

    def _refusal(self, code: str, message: str) -> ServiceError:
        waiting = max(1, self.inside - self._running)
        return too_many(code, message, waiting * self.seconds_each / self._running)


class Ticket(ClosedAtExit):
    """One admitted request; a context that gives its place back."""

    def __init__(self, admission: Admission, name: str) -> None:
        self._admission: Admission | None = admission
        self._name = name
        self._entered = time.monotonic()

    def close(self) -> None:
        """Give the place back; the second time does nothing."""
        if self._admission is not None:
            self._admission.leave(self._name, time.monotonic() - self._entered)
            self._admission = None
