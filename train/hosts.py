"""Processes that compute together: they find each other, and agree on values."""

import importlib.util
import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather
from orbax.checkpoint import multihost

from heedful.train.config import TrainError

T = TypeVar("T")

# Flag of a command, and the variable that stands for it.
FLAGS = {
    "--coordinator": "HEEDFUL_COORDINATOR",
    "--processes": "HEEDFUL_PROCESSES",
    "--process": "HEEDFUL_PROCESS",
}
HEARTBEAT = 60  # seconds without a sign of life after which a process counts as dead
PATIENCE = 24 * 3600  # seconds that one process may prepare what the others wait for
_turns = itertools.count()


# How they find each other ------------------------------------------------------------------------


def join(given: Mapping[str, str]) -> None:
    """Make this process one of several, if flags or the environment say so.

    That is said by `FLAGS`, else their variables, else Slurm, Open MPI or a TPU. --processes 1 says
    that it is alone. With a coordinator, one process adds up over its CPU devices as several do, in
    gloo's order: the same bits. Call it before anything is computed. Raises TrainError for half of
    the flags, and when the others do not come.
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
            raise TrainError(f"--process {index} of --processes {count}: they count from 0")
        arguments = {
            "coordinator_address": coordinator, "num_processes": count, "process_id": index
        }  # fmt: skip
    elif any(values):
        lacking = [flag for flag, value in zip(FLAGS, values, strict=True) if not value]
        raise TrainError(
            f"{' and '.join(lacking)} missing: several processes need --coordinator HOST:PORT (of "
            "process 0), --processes N and --process I, or --coordinator auto in a cluster"
        )
    # It would take SIGTERM away from `train.stop`, which also knows SIGINT.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        raise TrainError(
            f"the processes do not find each other ({str(error).splitlines()[0][:200]}): give "
            "--coordinator HOST:PORT (of process 0), --processes N and --process I"
        ) from error


def _is_in_cluster() -> bool:
    """Tell if the environment names other processes. A lone process must not wait for any."""
    environment = os.environ
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # a batch script has no step
    if any(int(environment.get(name, 1)) > 1 for name in counts):
        return True
    # jax forbids asking for the TPU's metadata where it sees no chip.
    has_chips = "TPU_SKIP_MDS_QUERY" not in environment
    return has_chips and importlib.util.find_spec("libtpu") is not None


def _number(flag: str, value: str | None) -> int:
    if value is None or not value.isdigit():
        raise TrainError(f"{flag} must be a number, not {value}")
    return int(value)


def is_multiprocess() -> bool:
    """Tell if several processes compute together."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Tell if this process writes the files that are written once."""
    return not is_multiprocess() or jax.process_index() == 0


def is_peer_failure(error: BaseException) -> bool:
    """Tell if an error says that another process is gone."""
    is_memory = "RESOURCE_EXHAUSTED" in str(error)
    return is_multiprocess() and isinstance(error, jax.errors.JaxRuntimeError) and not is_memory


# What they agree on ------------------------------------------------------------------------------


def wait_for_all() -> None:
    """Wait until every process has called it; raise JaxRuntimeError when one is dead."""
    key = f"heedful:{next(_turns)}"
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=PATIENCE * 1000)


def any_process(value: bool) -> bool:
    """Tell if `value` is true on any process; the answer is the same on all."""
    if not is_multiprocess():
        return value
    wait_for_all()  # which may take hours; a collective that long fails
    return bool(process_allgather(np.array(value)).any())


def primary_first(action: Callable[[], T]) -> T:
    """Return the result of `action`, which runs on the first process, and then on the others.

    The others find the files that the first has written, where they share a file system. Raises on
    all processes when it fails on one.
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
            raise error or TrainError("another process has failed, and says why")
    return results[0]


def require_same(what: str, value: str) -> None:
    """Raise TrainError on all processes where `value` is not the same on all of them."""
    if is_multiprocess() and any_process(value != from_first(value)):
        raise TrainError(f"the processes do not have the same {what}: start all of them alike")


def from_first(text: str) -> str:
    """Return the text that the first process has."""
    if not is_multiprocess():
        return text
    encoded = np.frombuffer(text.encode(), np.uint8) if is_first() else np.zeros(0, np.uint8)
    size = int(broadcast_one_to_all(np.int32(len(encoded))))
    sent = broadcast_one_to_all(np.resize(encoded, size) if size else encoded)
    return np.asarray(sent, np.uint8).tobytes().decode()


def to_host(tree: Any) -> Any:
    """Return arrays whole in the memory of every process, however they are sharded."""
    return process_allgather(tree, tiled=True) if is_multiprocess() else jax.device_get(tree)
