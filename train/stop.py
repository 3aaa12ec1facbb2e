"""Stop training after a signal to any process, at the same step on all processes."""

import signal
import threading
from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from heedful.train import signals
from heedful.train.errors import Interrupted
from heedful.train.hosts import is_multiprocess
from heedful.train.sharding import place, replicated


class Stop:
    """Context in which the first SIGINT or SIGTERM is a request to stop; the second acts as usual.

    In a single process, the first signal also acts as usual before the first step, as there is
    nothing to save. All processes learn of a request `late` steps later, so that no process waits
    for another.
    """

    def __init__(self, mesh: Mesh, late: int):
        self._signal: int | None = None
        self._late, self._asked = late, deque()
        self._one_each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=replicated(mesh))

    def __enter__(self) -> "Stop":
        signals.is_saving = is_multiprocess()
        is_main = threading.current_thread() is threading.main_thread()
        # Python lets only the main thread handle signals.
        handled = signals.ENDING if is_main else ()
        self._former = {number: signal.signal(number, self._ask) for number in handled}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        signals.is_saving = False  # From here on, a signal ends the process of a command.
        self._restore()
        if kind is None and self._signal is not None:  # The signal came after the last check.
            raise Interrupted("stopped after the last step, saved", self._code())

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self._signal = number
        self._restore()

    def agreed(self) -> bool:
        """Return True, on all processes alike, to stop after this step; call this once per step."""
        signals.is_saving = True
        asked = self._signal is not None
        if not is_multiprocess():
            return asked
        self._asked.append(self._shared(asked))
        return len(self._asked) > self._late and bool(self._asked.popleft())

    def is_asked(self) -> bool:
        """Return True if any process has a request; all processes must call this, and wait."""
        asked = self._signal is not None
        return bool(self._shared(asked)) if is_multiprocess() else asked

    def _shared(self, asked: bool) -> jax.Array:
        flags = np.full(self._one_each.mesh.size, asked)
        return self._any(place(flags, self._one_each))

    def interrupted(self, step: int) -> Interrupted:
        return Interrupted(f"stopped at step {step:,}, saved", self._code())

    def _code(self) -> int:
        """Return the exit code; for a signal to another process, the code of SIGTERM."""
        return 128 + signal.SIGINT if self._signal == signal.SIGINT else signals.RESUMABLE
