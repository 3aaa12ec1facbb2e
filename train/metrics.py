"""Metrics of a training run: write them, read them as scores, and require finite values."""

import math
import sys
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from heedful.train.errors import TrainError
from heedful.train.growing_files import Events, Lines, read_lines
from heedful.train.hosts import is_first
from heedful.train.observers import Observer


class NonFiniteLoss(TrainError):
    """Error: the loss or the gradient is NaN or infinite; a table has the norms by layer.

    Example:
        >>> import heedful as hf
        >>> issubclass(hf.NonFiniteLoss, hf.TrainError)
        True
    """

    def __init__(self, step: int, loss: float, norms: list[str]):
        table = "\n".join(norms)
        super().__init__(
            f"at step {step} the loss is {loss}: lower train.optimizer.peak_lr, raise "
            "train.optimizer.warmup_steps, or set train.optimizer.clip_norm; if the run has a "
            "checkpoint, also give another --run-dir. Steps after the last checkpoint are lost. "
            f"Norms by layer:\n{table}"
        )


class MetricsWriter(Observer):
    """Observer that appends to `metrics.jsonl` and TensorBoard events, on the first process."""

    def __init__(self, directory: Path, from_step: int, *, measures_again: bool = False):
        """Drop the lines of steps after `from_step`, which the run repeats.

        With `measures_again`, also drop the evaluation of `from_step`, which the run repeats, too.
        """
        self._directory, self._from_step = directory, from_step
        self._lines = None
        if is_first():
            is_old = lambda line: measures_again and "valid_loss" in line  # noqa: E731
            self._lines = Lines(directory / "metrics.jsonl", from_step, is_old)

    def on_log(self, step: int, values: dict[str, float]) -> None:
        self.write(step, values)

    def on_evaluation(self, step: int, measured: dict[str, float]) -> None:
        self.write(step, {f"valid_{name}": value for name, value in measured.items()})

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._lines is None:
            return
        self._lines.write({"step": step, **values})
        for name, value in values.items():
            self._events.add(step, name, value)

    @cached_property
    def _events(self) -> "Events":
        # Not before the first step: if torch is installed, tensorboardX takes seconds to import it.
        return Events(self._directory, self._from_step + 1)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._events.close()


def score(measured: Mapping[str, float], metric: str) -> float:
    """Return the score of a measurement: the higher the better; NaN and infinity are the worst."""
    score = -measured[metric] if metric in ("loss", "smoothed_loss") else measured[metric]
    return score if math.isfinite(score) else -sys.float_info.max


def scores(path: Path, metric: str) -> dict[int, float]:
    """Return the scores, by step, of the measurements in a `metrics.jsonl`."""
    return scores_in(read_lines(path) if path.is_file() else (), metric)


def scores_in(lines: Iterable[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """Return the scores, by step, of the measurements in the lines of a `metrics.jsonl`."""
    name, found = f"valid_{metric}", {}
    for line in lines:
        value = line.get(name, "none")
        value = math.nan if value is None else value  # `finite` writes NaN as null.
        if isinstance(value, float):
            found[line["step"]] = score({metric: value}, metric)
    return found


def last_values(path: Path) -> dict[str, float]:
    """Return the newest measurements of the validation data in a `metrics.jsonl`, by name."""
    found: dict[str, float] = {}
    for line in read_lines(path) if path.is_file() else ():
        found |= {k: v for k, v in line.items() if k.startswith("valid_") and v is not None}
    return found


def require_finite(step: int, metrics: dict[str, Any]) -> None:
    """Raise NonFiniteLoss, with the norms by layer, if loss or gradient is not finite."""
    loss = float(metrics["loss"]) / max(float(metrics["weight"]), 1.0)
    if np.isfinite(loss) and np.isfinite(float(metrics["grad_norm"])):
        return
    grads = jax.tree_util.tree_leaves_with_path(jax.device_get(metrics["grad_norms"]))
    params = jax.tree.leaves(jax.device_get(metrics["param_norms"]))
    lines = []
    for (path, grad), param in zip(grads, params, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        for layer, (g, p) in enumerate(zip(np.atleast_1d(grad), np.atleast_1d(param), strict=True)):
            where = f"{name}[{layer}]" if np.ndim(grad) else name
            lines.append(f"  {where}: gradient {g:.3g}, parameter {p:.3g}")
    raise NonFiniteLoss(step, loss, lines)
