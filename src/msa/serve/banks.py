"""The banks that are served: each opened for writing by this process, and loaded for asking."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from msa.errors import BankError, BankNotFoundError
from msa.inference.engine import MemoryEngine
from msa.memory.bank import MemoryBank
from msa.memory.distributed.sharded_bank import ShardedBank
from msa.memory.loaded import memory_plan
from msa.memory.loaded.loaded_bank import LoadedBank
from msa.memory.loaded.memory_plan import MemoryPlan
from msa.memory.store.manifest import BANK_FILE
from msa.serve.errors import ServiceError, conflict, invalid, unavailable
from msa.serve.keys import ADMIN, READ, Principal
from msa.serve.settings import BANK_NAME, ServeSettings

if TYPE_CHECKING:
    from msa.model.checkpoint import Checkpoint
    from msa.model.modeling_msa import MSAForCausalLM


CATCH_UP_PAUSE = 0.01  # seconds


@dataclass(frozen=True, slots=True)
class BankState:
    """How far a bank has come.

    Attributes:
        created: when it was made; tells it from one of the same name that was removed.
        generation: see `MemoryBank.generation`.
    """

    created: str
    generation: int


@dataclass(frozen=True, slots=True, eq=False)
class ServedBank:
    """A bank with its name.

    Attributes:
        name: in addresses and models' names.
        bank: open for writing, unless the registry is read-only.
        engine: asks it.
        memory: the bank as it is loaded, by this process or by shards.
        created_at: seconds since 1970.
        removable: whether it was made over the API, and may be removed over it.
    """

    name: str
    bank: MemoryBank
    engine: MemoryEngine
    memory: LoadedBank | ShardedBank
    created_at: int
    removable: bool

    @property
    def plan(self) -> MemoryPlan:
        """What of the bank lies where; of one in shards, as if one process held it."""
        if isinstance(self.memory, LoadedBank):
            return self.memory.plan
        return memory_plan.plan(self.bank, memory=sys.maxsize)

    @property
    def state(self) -> BankState:
        """The bank as it is on disk."""
        return BankState(self.bank.manifest.created, self.bank.generation)

    def close(self) -> None:
        """Release the memory, then the bank; waits for a thread that is writing."""
        self.engine.close()
        self.memory.close()
        self.bank.close()


class BankRegistry:
    """The banks of a service, by name. Its methods may be called from several threads.

    Args:
        settings: which banks.
        read_only: open them for reading only, beside another process that writes.
    """

    def __init__(self, settings: ServeSettings, *, read_only: bool = False) -> None:
        self._settings = settings
        self._read_only = read_only
        self._banks: dict[str, ServedBank] = {}
        self._checkpoint: Checkpoint | None = None
        self._changing = threading.Lock()
        self.loaded = False

    def open_all(self, checkpoint: Checkpoint) -> None:
        """Open the banks of the settings; one whose folder is not there is made.

        Raises:
            BankError: one of them cannot be opened; those before it are closed again.
        """
        self._checkpoint = checkpoint
        try:
            for name, folder in self._folders():
                self._banks[name] = self._open(name, folder)
        except BaseException:
            self.close()
            raise
        self.loaded = True

    def close(self) -> None:
        """Close all banks."""
        self.loaded = False
        banks, self._banks = self._banks, {}
        for served in banks.values():
            served.close()

    def all(self) -> list[ServedBank]:
        """Every bank, for the service itself; never for clients."""
        return [served for _, served in sorted(self._banks.items())]

    def states(self, principal: Principal) -> dict[str, Literal["loading", "ready"]]:
        """Name -> whether it has been opened, of the banks that a caller may know of."""
        names = [*self._settings.banks, *self._banks]
        return {
            name: "ready" if name in self._banks else "loading"
            for name in sorted(set(names))
            if principal.knows(name)
        }

    def names(self, principal: Principal) -> list[str]:
        """Names of the banks that a caller may read."""
        return [s.name for s in self.all() if principal.allows(READ, s.name)]

    def get(self, name: str, principal: Principal, scope: str = READ) -> ServedBank:
        """A bank, for a caller who wants to use it.

        Args:
            name: of the bank.
            principal: who asks.
            scope: one of `msa.serve.keys.SCOPES`.

        Raises:
            ServiceError: 503 while the banks are loaded; 404 if there is none, or none that this
                key may know of; 403 if the key lacks the scope, or banks are read-only.
        """
        self._check_loaded()
        served = self._banks.get(name)
        if served is None or not principal.knows(name):
            raise ServiceError(404, None, "bank_not_found", "There is no such bank.")
        if not principal.allows(scope, name):
            message = f"This key may not do this: it lacks the scope '{scope}'."
            raise ServiceError(403, None, "bank_forbidden", message)
        if self._read_only and scope != READ:
            raise _read_only()
        return served

    def create(self, name: str, principal: Principal) -> ServedBank:
        """A new, empty bank in the folder for those; blocks until it is on disk.

        Raises:
            ServiceError: 403 without the scope `admin` for this name, or without such a folder; 400
                for what is no name; 409 if there is a bank of this name.
        """
        self._check_loaded()
        if not BANK_NAME.fullmatch(name):
            raise invalid(
                "The name of a bank has letters, digits, '.', '_' and '-', 64 at most.", "name"
            )
        if not principal.allows(ADMIN, name):
            message = "This key may not make a bank of this name: that takes the scope 'admin'."
            raise ServiceError(403, None, "bank_forbidden", message)
        if self._read_only:
            raise _read_only()
        folder = self._settings.banks_folder
        if folder is None:
            message = "This service makes no banks; it has to be started with --banks-folder DIR."
            raise ServiceError(403, None, "bank_creation_off", message)
        with self._changing:
            if name in self._banks or (folder / name).exists():
                raise conflict("bank_exists", "There is a bank of this name.", "name")
            served = self._banks[name] = self._open(name, folder / name)
        return served

    def remove(self, name: str, principal: Principal) -> None:
        """Close a bank that was made over the API and delete it with all its documents.

        It must not be asked meanwhile: see `Service.remove_bank`.

        Raises:
            ServiceError: see `get`; 403 for a bank that the service was started with.
        """
        served = self.get(name, principal, ADMIN)
        self.check_removable(served)
        with self._changing:
            if self._banks.pop(name, None) is None:
                raise ServiceError(404, None, "bank_not_found", "There is no such bank.")
        served.close()
        shutil.rmtree(served.bank.path)

    def drop(self, served: ServedBank) -> None:
        """Close a bank that another process removed. It must not be asked meanwhile."""
        with self._changing:
            if self._banks.get(served.name) is served:
                del self._banks[served.name]
        served.close()

    def catch_up(self, states: Mapping[str, BankState], seconds: float) -> None:
        """Open what another process made, and wait until all banks have come as far as there.

        Args:
            states: of the banks of that process.
            seconds: longest wait.

        Raises:
            ServiceError: 503; it took longer.
        """
        self._check_loaded()
        with self._changing:
            for name in states.keys() - self._banks.keys():
                folder = dict(self._folders()).get(name)
                if folder is not None:
                    self._banks[name] = self._open(name, folder)
        end = time.monotonic() + seconds
        while not self._reached(states):
            if time.monotonic() > end:
                raise unavailable("behind", "This replica does not see the latest writes yet.")
            time.sleep(CATCH_UP_PAUSE)

    def _reached(self, states: Mapping[str, BankState]) -> bool:
        return all(
            name in self._banks and self._banks[name].bank.generation >= state.generation
            for name, state in states.items()
        )

    @staticmethod
    def check_removable(served: ServedBank) -> None:
        """Refuse to remove what the service was started with.

        Raises:
            ServiceError: 403.
        """
        if not served.removable:
            message = "The service was started with this bank; only made banks can be removed."
            raise ServiceError(403, None, "bank_forbidden", message)

    def _check_loaded(self) -> None:
        if not self.loaded:
            raise unavailable("loading", "The model and the banks are being loaded.")

    def _folders(self) -> Iterator[tuple[str, Path]]:
        """Name and folder of every bank there is to serve."""
        yield from self._settings.banks.items()
        parent = self._settings.banks_folder
        if parent is None:
            return
        parent.mkdir(parents=True, exist_ok=True)
        for path in sorted(parent.iterdir()):
            if (path / BANK_FILE).is_file() and BANK_NAME.fullmatch(path.name):
                if path.name in self._settings.banks:
                    raise BankError(
                        f"two banks are named '{path.name}': --bank {path.name}=... and the one in "
                        f"{parent}; give the first another name: --bank NAME=DIR"
                    )
                yield path.name, path

    def _open(self, name: str, folder: Path) -> ServedBank:
        assert self._checkpoint is not None
        try:
            bank = MemoryBank.open(folder, self._checkpoint, read_only=self._read_only)
        except BankNotFoundError:
            if self._read_only or (folder.exists() and any(folder.iterdir())):
                raise
            bank = MemoryBank.create(folder, self._checkpoint)
        try:
            memory = self._load(bank, self._checkpoint.model)
            created = int(datetime.fromisoformat(bank.manifest.created).timestamp())
            removable = name not in self._settings.banks
            engine = MemoryEngine(bank, memory=memory)
        except BaseException:
            bank.close()
            raise
        return ServedBank(name, bank, engine, memory, created, removable)

    def _load(self, bank: MemoryBank, model: MSAForCausalLM) -> LoadedBank | ShardedBank:
        if self._settings.ray:
            return ShardedBank(bank, model.device, shards=self._settings.shards, shared=True)
        return LoadedBank(bank, model.device, content_dtype=model.dtype)


def _read_only() -> ServiceError:
    return ServiceError(403, None, "read_only", "This service only reads its banks.")


def shown_model(name: str) -> str:
    """The name of a model for clients: of a folder of this machine only the last part."""
    return Path(name).name if Path(name).is_absolute() else name
