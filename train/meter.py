"""The metrics of steps, read late, and their means."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from heedful.train.metrics import require_finite
from heedful.train.observers import Observer

AHEAD = 2  # steps that are dispatched before the loss of an earlier one is read


class Meter:
    """Reads metrics AHEAD steps late, so that the device never waits for the host.

    Observers get those of each step, and means of every `log_every` steps.
    """

    def __init__(self, log_every: int, observers: Sequence[Observer]):
        self._log_every, self._observers = log_every, observers
        self._pending: deque[tuple[int, dict[str, Any]]] = deque()
        self._restart()

    def _restart(self) -> None:
        self._since, self._loss, self._weight, self._waited = time.perf_counter(), 0.0, 0.0, 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time within out of the means: it is not training."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Measure how long the next batch takes."""
        began = time.perf_counter()
        yield
        self.fetched(time.perf_counter() - began)

    def fetched(self, seconds: float) -> None:
        """Take the time of the next batch; it counts where no step was left to work on."""
        if not self._pending or self._pending[-1][1]["loss"].is_ready():
            self._waited += seconds

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Take the metrics of a step that the devices work on."""
        self._pending.append((step, metrics))
        while len(self._pending) > AHEAD:
            self._read()

    def drain(self) -> None:
        """Read the metrics of all steps."""
        while self._pending:
            self._read()

    def _read(self) -> None:
        step, metrics = self._pending.popleft()
        require_finite(step, metrics)
        for observer in self._observers:
            observer.on_step(step, metrics)
        self._loss += float(metrics["loss"])
        self._weight += float(metrics["weight"])
        if step % self._log_every:
            return
        elapsed = time.perf_counter() - self._since
        values = {
            "loss": self._loss / max(self._weight, 1.0),
            "lr": float(metrics["lr"]),
            "grad_norm": float(metrics["grad_norm"]),
            "tokens_per_second": self._weight / elapsed,
            "input_wait_share": self._waited / elapsed,
        }
        for observer in self._observers:
            observer.on_log(step, values)
        self._restart()
