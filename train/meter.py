"""Read the metrics of steps, some steps late, and average them."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from heedful.train.metrics import require_finite
from heedful.train.observers import Observer

AHEAD = 2  # Number of steps that are dispatched before the loss of an earlier step is read.


class Meter:
    """Reader of metrics, AHEAD steps late, so that the device never waits for the host.

    Observers get the metrics of each step, and means over every `log_every` steps.
    """

    def __init__(self, log_every: int, observers: Sequence[Observer]):
        self._log_every, self._observers = log_every, observers
        self._pending: deque[tuple[int, dict[str, Any]]] = deque()
        self._restart()

    def _restart(self) -> None:
        self._since, self._loss, self._weight, self._waited = time.perf_counter(), 0.0, 0.0, 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context whose time does not count in the means, as it is not training."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Context that fetches the next batch; measure its time."""
        began = time.perf_counter()
        yield
        self.fetched(time.perf_counter() - began)

    def fetched(self, seconds: float) -> None:
        """Take the time for fetching a batch; it counts as waiting if the devices are idle."""
        if not self._pending or self._pending[-1][1]["loss"].is_ready():
            self._waited += seconds

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Take the metrics of a step that the devices may still compute."""
        self._pending.append((step, metrics))
        while len(self._pending) > AHEAD:
            self._read()

    def drain(self) -> None:
        """Read the metrics of all remaining steps."""
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
