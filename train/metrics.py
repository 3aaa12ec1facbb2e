"""What is measured during training, and where it is written."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from train.config import TrainError
from train.hosts import is_first


class NonFiniteLoss(TrainError):
    """The loss or the gradient is not a number any more."""

    def __init__(self, step: int, loss: float, norms: list[str]):
        table = "\n".join(norms)
        super().__init__(
            f"at step {step} the loss is {loss}: lower train.optimizer.peak_lr, lengthen the "
            "warmup or clip the gradient. Nothing after the last checkpoint is kept. "
            f"Norms by layer:\n{table}"
        )


class MetricsWriter:
    """Appends to `metrics.jsonl` and to TensorBoard events, on one process only."""

    def __init__(self, directory: Path, from_step: int):
        """Lines of steps after `from_step` are dropped: the run goes through them again."""
        self._directory, self._from_step = directory, from_step
        self._lines = None
        if is_first():
            self._lines = append_after(directory / "metrics.jsonl", from_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._lines is None:
            return
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
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


def append_after(path: Path, from_step: int) -> TextIO:
    """Opens a file of JSON lines to go on after this step: later lines and halves are dropped."""
    if path.exists():
        lines = [line for line in path.read_text("utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= from_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept), "utf-8")
        partial.replace(path)
    return path.open("a", encoding="utf-8", buffering=1)


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
