"""Memory that the loaded banks of this process have planned for and not yet taken.

What a bank has taken shows in what the system calls free; what it will take (keys that are still
being loaded, the working set of its questions) does not. So that two banks do not plan with the
same memory, each is entered here until it is closed or collected, and a plan is made and entered
under one lock.
"""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a loaded bank will still take, in bytes.

    Attributes:
        memory: RAM.
        device: where its questions are asked.
        device_memory: of that device; 0 on a CPU.
    """

    memory: int
    device: torch.device
    device_memory: int


class Reserver(Protocol):
    """A bank that is loaded, or being loaded."""

    def reservation(self) -> Reservation:
        """What it will still take."""
        ...


class Reservations:
    """The reservations of a process.

    Attributes:
        lock: to be held from asking what is reserved to entering a plan that was made with it.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._reservers: weakref.WeakSet[Reserver] = weakref.WeakSet()

    def enter(self, reserver: Reserver) -> None:
        """From now on what it reserves counts, until `end` or until it is collected."""
        with self.lock:
            self._reservers.add(reserver)

    def end(self, reserver: Reserver) -> None:
        """It reserves nothing any more; calling it twice does nothing."""
        with self.lock:
            self._reservers.discard(reserver)

    def total(self, device: torch.device, but: Reserver | None = None) -> tuple[int, int]:
        """RAM, and memory of a device, that others will still take, in bytes.

        Args:
            device: the first of its kind when it names none.
            but: whose reservation does not count.
        """
        with self.lock:
            found = [c.reservation() for c in self._reservers if c is not but]
        here = [r.device_memory for r in found if _place(r.device) == _place(device)]
        return sum(r.memory for r in found), sum(here)


def _place(device: torch.device) -> tuple[str, int]:
    return device.type, device.index or 0


RESERVATIONS = Reservations()
"""Those of this process."""
if hasattr(os, "register_at_fork"):  # a forked child has loaded nothing yet, and its lock is free
    os.register_at_fork(after_in_child=RESERVATIONS.__init__)  # type: ignore[misc]
