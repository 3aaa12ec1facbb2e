"""Several processes that compute together: connect them, and agree on values."""

import importlib.util
import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather
from orbax.checkpoint import multihost

from heedful.train.errors import TrainError

T = TypeVar("T")

# Flag of a command, and the environment variable with the same meaning.
FLAGS = {
    "--coordinator": "HEEDFUL_COORDINATOR",
    "--processes": "HEEDFUL_PROCESSES",
    "--process": "HEEDFUL_PROCESS",
}
HEARTBEAT = 60  # Seconds without a heartbeat after which a process counts as dead.
PATIENCE = 24 * 3600  # Seconds that processes wait for another process, which may prepare data.
_turns = itertools.count()


# Connect the processes ---------------------------------------------------------------------------


def join(given: Mapping[str, str]) -> None:
    """Connect this process with others, if flags or the environment say so.

    The settings come from `FLAGS`, else from their environment variables, else from Slurm, Open MPI
    or a TPU. --processes 1 means a single process. With a coordinator, a single process adds up
    over its CPU devices with gloo, in the same order as several processes: the bits are the same.
    Call this before anything is computed. Raises TrainError if only some of the flags are given,
    and when the other processes do not connect.
    """
    values = [given.get(flag) or os.environ.get(name) for flag, name in FLAGS.items()]
    coordinator, processes, process = values
    is_alone = values == [None, "1", None] or not (any(values) or _is_in_cluster())
    if is_alone or jax.distributed.is_initialized():
        return
    arguments: dict[str, Any] = {}
    if coordinator == "auto":
        pass
    elif all(values):
        count, index = _number("--processes", processes), _number("--process", process)
        if index >= count:
            raise TrainError(
                f"--process {index} of --processes {count}: give a number from 0 to {count - 1}"
            )
        arguments = {
            "coordinator_address": coordinator, "num_processes": count, "process_id": index
        }  # fmt: skip
    elif any(values):
        lacking = [flag for flag, value in zip(FLAGS, values, strict=True) if not value]
        raise TrainError(
            f"{' and '.join(lacking)} missing: give --coordinator HOST:PORT (of process 0), "
            "--processes N and --process I, or --coordinator auto in a cluster"
        )
    # This service would handle SIGTERM instead of `train.stop`, which also handles SIGINT.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        raise TrainError(
            f"the processes do not find each other ({str(error).splitlines()[0][:200]}): give "
            "--coordinator HOST:PORT (of process 0), --processes N and --process I"
        ) from error


def _is_in_cluster() -> bool:
    """Tell if the environment names other processes; a single process must not wait for others."""
    environment = os.environ
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # A batch script has no Slurm step.
    if any(int(environment.get(name, 1)) > 1 for name in counts):
        return True
    # On a machine without TPU chips, jax sets this variable: TPU metadata must not be queried.
    has_chips = "TPU_SKIP_MDS_QUERY" not in environment
    return has_chips and importlib.util.find_spec("libtpu") is not None


def _number(flag: str, value: str | None) -> int:
    if value is None or not value.isdigit():
        raise TrainError(f"{flag} (or {FLAGS[flag]}) = {value}: give a whole number of at least 0")
    return int(value)


def is_multiprocess() -> bool:
    """Tell if several processes compute together."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Tell if this is the process that prints, and that writes files which exist once."""
    return not is_multiprocess() or jax.process_index() == 0


def is_peer_failure(error: BaseException) -> bool:
    """Tell if an error means that another process is gone."""
    is_memory = "RESOURCE_EXHAUSTED" in str(error)
    return is_multiprocess() and isinstance(error, jax.errors.JaxRuntimeError) and not is_memory


# Agree on values ---------------------------------------------------------------------------------


def wait_for_all() -> None:
    """Wait until every process has called this; raise JaxRuntimeError if a process is dead."""
    key = f"heedful:{next(_turns)}"
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=PATIENCE * 1000)


def any_process(value: bool) -> bool:
    """Tell if `value` is true on any process; the answer is the same on all processes."""
    if not is_multiprocess():
        return value
    wait_for_all()  # This may take hours, and a collective would time out.
    return bool(process_allgather(np.array(value)).any())


def primary_first(action: Callable[[], T]) -> T:
    """Return the result of `action`, which runs on the first process, and then on the others.

    On a shared file system, the other processes find the files that the first process has written.
    If `action` fails on one process, all processes raise.
    """
    if not is_multiprocess():
        return action()
    results, error = [], None
    for turn in (True, False):
        if is_first() == turn:
            try:
                results.append(action())
            except Exception as problem:
                error = problem
        if any_process(error is not None):
            raise error or TrainError("another process has failed: see its error message")
    return results[0]


def require_same(what: str, value: str) -> None:
    """Raise TrainError on all processes if `value` is not the same on all of them."""
    if is_multiprocess() and any_process(value != from_first(value)):
        raise TrainError(
            f"the processes do not have the same {what}: start all with the same command and data"
        )


def from_first(text: str) -> str:
    """Return the text that the first process has."""
    if not is_multiprocess():
        return text
    encoded = np.frombuffer(text.encode(), np.uint8) if is_first() else np.zeros(0, np.uint8)
    size = int(broadcast_one_to_all(np.int32(len(encoded))))
    sent = broadcast_one_to_all(np.resize(encoded, size) if size else encoded)
    return np.asarray(sent, np.uint8).tobytes().decode()


def to_host(tree: Any) -> Any:
    """Return the whole arrays in the memory of every process, for any sharding."""
    return process_allgather(tree, tiled=True) if is_multiprocess() else jax.device_get(tree)
