"""Ray: started on this machine or joined, and its errors as ours."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from msa.errors import InputError, MSAError, WorkerError

RESTARTS = 3  # of one actor, and repetitions of a call that it died of
NAMESPACE = "msa"
"""Of all actors that have a name."""


def connect(address: str | None = None) -> Any:
    """The `ray` module, connected to a cluster.

    Args:
        address: of a running cluster ("auto", "HOST:PORT", "ray://..."); None starts one on this
            machine, unless this process is in one already.

    Raises:
        InputError: Ray is not installed.
        WorkerError: the cluster cannot be reached or started.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "ray is not installed, which runs the workers; pip install 'msa-memory[distributed]'"
        ) from error
    if not ray.is_initialized():
        try:
            ray.init(
                address=address,
                include_dashboard=False if address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            where = f"the cluster at {address}" if address else "a cluster on this machine"
            raise WorkerError(f"Ray: {where} cannot be used ({_first_line(error)})") from error
    return ray


def spawn(
    kind: type,
    count: int,
    gpus: float,
    arguments: Sequence[tuple[Any, ...]],
    name: str | None = None,
) -> list[Any]:
    """Actors, spread over the nodes; Ray restarts one that dies and repeats what it was doing.

    Args:
        kind: class of the actors.
        count: how many.
        gpus: GPUs that each reserves.
        arguments: of every actor's constructor.
        name: all processes of the cluster that spawn under it get the same actors, which live
            until they are killed; without one they end with this process.
    """
    ray = connect()
    named: list[dict[str, Any]] = [{}] * count
    if name is not None:
        shared = {"namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        named = [{"name": f"{name}/{i}", **shared} for i in range(count)]
    actor = ray.remote(kind)
    how: dict[str, Any] = {
        "num_cpus": 0,  # they share what CPUs there are, as threads would
        "num_gpus": gpus,
        "max_restarts": RESTARTS,
        "max_task_retries": RESTARTS,
        "scheduling_strategy": "SPREAD",
    }
    return [actor.options(**how, **named[i]).remote(*arguments[i]) for i in range(count)]


def per_node(count: int) -> int:
    """How many of so many actors share a node, at most, when they are spread evenly."""
    nodes = sum(bool(node["Alive"]) for node in connect().nodes())
    return math.ceil(count / max(1, nodes))


def gather(refs: Any, timeout: float, who: str) -> Any:
    """What was computed for references of objects.

    Args:
        refs: one reference, or a list.
        timeout: seconds to wait for all of them.
        who: what computes it, for messages.

    Raises:
        MSAError: as the worker raised it.
        WorkerError: a worker died more often than it is restarted, failed, or did not answer.
    """
    ray = connect()
    from ray import exceptions

    try:
        return ray.get(refs, timeout=timeout)
    except exceptions.GetTimeoutError:
        raise WorkerError(f"{who} did not answer within {timeout:.0f} s") from None
    except exceptions.RayTaskError as error:
        cause = getattr(error, "cause", error)
        if isinstance(cause, MSAError):
            raise cause from None
        raise WorkerError(f"{who} failed: {type(cause).__name__}: {_first_line(cause)}") from error
    except exceptions.RayError as error:
        raise WorkerError(
            f"{who} died and was restarted {RESTARTS} times in vain ({_first_line(error)}); is "
            "there enough memory for it?"
        ) from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
