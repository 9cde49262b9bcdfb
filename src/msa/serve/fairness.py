"""Who has the processor: questions before index work, which is never starved."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

LONGEST_WAIT = 10.0
"""Seconds that a piece of index work waits at most, however long the one before took."""


class Turns:
    """Lets index work wait while questions run; shared by all threads of a service.

    Args:
        share: part of the time, above 0, that index work gets at least.
    """

    def __init__(self, share: float = 0.2) -> None:
        self._share = share
        self._running = 0
        self._began: float | None = None  # when a piece of index work was last let through
        self._quiet = threading.Condition()

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """While a question runs."""
        with self._quiet:
            self._running += 1
        try:
            yield
        finally:
            with self._quiet:
                self._running -= 1
                self._quiet.notify_all()

    def encode(self) -> float:
        """Called by a thread before each piece of index work; waits for questions that run.

        It waits no longer than the piece before took, times what keeps the share: four times as
        long for a fifth of the time.

        Returns:
            Seconds waited.
        """
        started = time.monotonic()
        with self._quiet:
            worked = started - (started if self._began is None else self._began)
            longest = min(worked * (1 / self._share - 1), LONGEST_WAIT)
            self._quiet.wait_for(lambda: not self._running, timeout=longest)
            self._began = time.monotonic()
            return self._began - started


def aside(work: Callable[[], T]) -> T:
    """Run the model beside its own thread: in a thread that ends with the work, waited for.

    Each thread that multiplies matrices keeps helpers of OpenMP's, one a core but one, for as long
    as it lives. While there are more of them than cores, all go to sleep between two products
    instead of waiting awake, and a question takes a third longer.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, name="msa-aside", daemon=True)
    thread.start()
    thread.join()
    return done.result()
