"""What is measured during training, and where it is written."""

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data.writing import write_whole
from train.config import TrainError
from train.hosts import is_first
from train.run import finite


class NonFiniteLoss(TrainError):
    """The loss or the gradient is not a number any more."""

    def __init__(self, step: int, loss: float, norms: list[str]):
        table = "\n".join(norms)
        super().__init__(
            f"at step {step} the loss is {loss}: lower train.optimizer.peak_lr, lengthen the "
            "warmup or clip the gradient, with another --run-dir once there is a checkpoint. "
            "Nothing after the last checkpoint is kept. "
            f"Norms by layer:\n{table}"
        )


class MetricsWriter:
    """Appends to `metrics.jsonl` and to TensorBoard events, on one process only."""

    def __init__(self, directory: Path, from_step: int, *, measures_again: bool = False):
        """Lines of steps after `from_step` are dropped: the run goes through them again.

        So is the measurement of `from_step` itself, where that is made again.
        """
        self._directory, self._from_step = directory, from_step
        self._lines = None
        if is_first():
            is_old = lambda line: measures_again and "valid_loss" in line  # noqa: E731
            self._lines = Lines(directory / "metrics.jsonl", from_step, is_old)

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._lines is None:
            return
        self._lines.write({"step": step, **values})
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    @cached_property
    def _events(self) -> Any:
        # Not before the first step: where torch is installed tensorboardX takes seconds to load it.
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(self._directory), purge_step=self._from_step + 1)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._events.close()


class Lines:
    """A file of JSON values with a "step", one a line, that goes on after a step.

    A disk that is full is told once and ends no training: lines wait until there is room.
    """

    def __init__(
        self, path: Path, from_step: int, is_old: Callable[[dict], bool] = lambda _: False
    ):
        """Drops lines of later steps, what was cut short by a kill, and old ones of this step."""
        self._path, self._is_told = path, False
        if path.exists():
            kept = [
                line
                for line in read_lines(path)
                if line["step"] < from_step or (line["step"] == from_step and not is_old(line))
            ]
            write_whole(path, "".join(json.dumps(finite(line)) + "\n" for line in kept))
        elif path.is_symlink():  # to nothing: opening it would make a file there
            path.unlink()
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        self._try(lambda: self._file.write(json.dumps(finite(line), allow_nan=False) + "\n"))
        self._try(self._file.flush)

    def close(self) -> None:
        self._try(self._file.close)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if not self._is_told:
                self._is_told = True
                reason = f"{self._path} cannot be written ({error.strerror}): make room"
                print(f"heedful: {reason}; training goes on", file=sys.stderr, flush=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The values in a file of JSON lines; one that was cut short by a kill is left out."""
    found = []
    for line in path.read_text("utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def require_finite(step: int, metrics: dict[str, Any]) -> None:
    """Raises NonFiniteLoss, with the norms by layer, unless loss and gradient are finite."""
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
