"""Who has the processor: questions before index work, which is never starved."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator


class Turns:
    """Lets index work wait while questions run; shared by all threads of a service.

    Args:
        share: part of the time, above 0, that a thread with index work gets at least.
    """

    def __init__(self, share: float = 0.2) -> None:
        self._share = share
        self._running = 0
        self._quiet = threading.Condition()
        self._mine = threading.local()

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

        It waits no longer than the piece before took, times what keeps the thread's share: four
        times as long for a fifth of the time.

        Returns:
            Seconds waited.
        """
        started = time.monotonic()
        worked = started - getattr(self._mine, "began", started)
        longest = worked * (1 / self._share - 1)
        with self._quiet:
            self._quiet.wait_for(lambda: not self._running, timeout=longest)
        self._mine.began = time.monotonic()
        return self._mine.began - started
