"""Observers: objects that receive the events of a training run, and may end it."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Observer:
    """Base class of callbacks: it receives the events of a training run.

    Subclasses override what they need. The methods are called on every process, in the order of the
    observers. An exception ends the training run.

    Example:
        >>> import heedful as hf
        >>> class Losses(hf.Observer):
        ...     def on_log(self, step, values):
        ...         print(step, round(values["loss"], 1))
        >>> Losses().on_log(20, {"loss": 3.14159})
        20 3.1
    """

    def on_start(self, environment: dict[str, Any]) -> None:
        """Take what the run depends on, as in environment.json, before the first step."""

    def on_phase(self, name: str) -> None:
        """Take the name of the work that begins now: compiling, training or validating.

        A step compiles only if its batch has a new shape.
        """

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of a step, named as in `make_train_step`.

        The call comes up to two steps after the step was started. At each checkpoint and every
        `train.fingerprint_every` steps, the metrics also have `fingerprint`, uint32 [arrays, 2]:
        two hash words for each parameter array.
        """

    def on_log(self, step: int, values: dict[str, float]) -> None:
        """Take the means of the last `train.log_every` steps, named as in metrics.jsonl.

        loss (nats), lr (the learning rate), grad_norm, tokens_per_second and input_wait_share.
        """

    def on_fingerprint(self, line: dict[str, Any]) -> None:
        """Take a new line of `fingerprints.jsonl`."""

    def on_checkpoint(self, step: int) -> None:
        """Take the step of a new checkpoint, which may not be on disk yet."""

    def on_evaluation(self, step: int, measured: dict[str, float]) -> None:
        """Take loss (nats) and scores of the validation data, without a prefix in their names."""

    def close(self) -> None:
        """Release resources; called when training has ended or failed."""


class ProgressBar(Observer):
    """A progress bar of steps, with the phase or the loss and the speed.

    A thread draws it ten times a second, so that the time moves during a long step, too.
    """

    def __init__(self, console: Console, first: int, steps: int):
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._bar.start()
        self._phase, self._means = "", ""
        self._task = self._bar.add_task("", total=steps, completed=first)
        self.on_phase("training")

    def on_phase(self, name: str) -> None:
        self._phase = name
        self._show()

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._bar.update(self._task, completed=step)

    def on_log(self, step: int, values: dict[str, float]) -> None:
        self._means = f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tokens/s"
        self._show()

    def _show(self) -> None:
        means = self._means if self._phase == "training" else ""
        self._bar.update(self._task, description=means or self._phase)

    def close(self) -> None:
        self._bar.stop()
