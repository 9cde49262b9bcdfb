"""Objects that belong to one process until they are closed, and what they say to other uses.

Connections, locks, maps and threads neither travel with pickle nor survive a fork. An object that
holds them refuses both, in one line that says what to do instead.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import NoReturn, Self

from msa.errors import BankError


class NotPickled:
    """Base of what cannot be copied to another process, nor twice in this one."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be pickled or copied.

        Raises:
            BankError: always.
        """
        raise BankError(
            f"a {type(self).__name__} cannot be pickled or copied: it holds files and memory of "
            f"process {os.getpid()}; give the other process the bank's folder, and open it there "
            "with MemoryBank.open(folder, read_only=True)"
        )


class ClosedAtExit:
    """Base of what `with` closes at the end of its block."""

    __slots__ = ()

    def close(self) -> None:
        """Release what is held; calling it twice does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Lifetime:
    """From construction until `end`, in the process that constructed it.

    Args:
        name: what it is the life of, for messages: "bank '/folder'".
        again: what to do when it is over: "open it again".
    """

    def __init__(self, name: str, again: str) -> None:
        self._name = name
        self._again = again
        self._pid = os.getpid()
        self.ended = False

    @property
    def is_elsewhere(self) -> bool:
        """True in a forked child: what was opened belongs to the parent."""
        return os.getpid() != self._pid

    def end(self) -> None:
        """From now on `check` refuses; calling it twice does nothing."""
        self.ended = True

    def check_process(self) -> None:
        """Refuse in a forked child; asked before any lock, which a thread of the parent may hold.

        Raises:
            BankError: this is not the process that opened it.
        """
        if self.is_elsewhere:
            raise BankError(
                f"{self._name} was opened by process {self._pid}, which forked this one; open the "
                "bank again in this process"
            )

    def check(self) -> None:
        """Refuse after the end, and in a forked child.

        Raises:
            BankError: one line that says what to do.
        """
        self.check_process()
        if self.ended:
            raise BankError(f"{self._name} is closed; {self._again}")
