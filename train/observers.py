"""Observers: what sees a training as it goes, and may end it."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Observer:
    """Sees a training; a subclass has the methods that it needs.

    They are called on every process, in the order of the observers. An exception ends the training.
    """

    def on_start(self, environment: dict[str, Any]) -> None:
        """Take what the result depends on, before the first step."""

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of a step, as `make_train_step` names them, when they are computed.

        That is known some steps late. They have `fingerprint`, words of all parameters, for the
        steps that are recorded.
        """

    def on_log(self, step: int, values: dict[str, float]) -> None:
        """Take the means of the last `train.log_every` steps."""

    def on_fingerprint(self, line: dict[str, Any]) -> None:
        """Take a line of `fingerprints.jsonl`."""

    def on_checkpoint(self, step: int) -> None:
        """Take note of a checkpoint, which may not be on disk yet."""

    def on_evaluation(self, step: int, measured: dict[str, float]) -> None:
        """Take the losses and scores of the validation data."""

    def close(self) -> None:
        """Leave off: the training has ended, or failed."""


class ProgressBar(Observer):
    """A bar of steps, with the loss and the speed."""

    def __init__(self, console: Console, first: int, steps: int):
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._bar.start()
        self._task = self._bar.add_task("compiling", total=steps, completed=first)

    def on_log(self, step: int, values: dict[str, float]) -> None:
        text = f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, description=text)

    def close(self) -> None:
        self._bar.stop()
