"""What is measured during training, and where it is written."""

import contextlib
import io
import json
import math
import os
import shutil
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from heedful.data.writing import write_whole
from heedful.train.config import TrainError
from heedful.train.hosts import is_first
from heedful.train.run import finite


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
            self._events.add(step, name, value)

    @cached_property
    def _events(self) -> "Events":
        # Not before the first step: where torch is installed tensorboardX takes seconds to load it.
        return Events(self._directory, self._from_step + 1)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._events.close()


class Appended:
    """A file that grows, and that neither ends a training nor holds it up.

    A disk that is full is told once; what cannot be written waits until there is room.
    """

    def __init__(self, path: Path):
        self._path, self._is_told, self._waiting = path, False, b""
        self._file: io.RawIOBase | None = None

    def append(self, data: bytes) -> None:
        self._waiting += data
        try:
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._is_told:
                self._is_told = True
                reason = f"{self._path} cannot be written ({error.strerror}): make room"
                tell(f"{reason}; training goes on")

    def close(self) -> None:
        self.append(b"")
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


class Events(Appended):
    """A file of TensorBoard events, written by the thread that has them."""

    def __init__(self, directory: Path, from_step: int):
        """Events of `from_step` and later ones that stand in other files count no longer."""
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
        from tensorboardX.record_writer import masked_crc32c

        self._scalar, self._event, self._checksum = summary.scalar, Event, masked_crc32c
        began = time.time()
        name = f"events.out.tfevents.{int(began)}.{socket.gethostname()}"
        super().__init__(directory / name)
        self._add(wall_time=began, file_version="brain.Event:2")
        start = SessionLog(status=SessionLog.START)
        self._add(wall_time=began, step=from_step, session_log=start)

    def add(self, step: int, name: str, value: float) -> None:
        self._add(wall_time=time.time(), step=step, summary=self._scalar(name, value))

    def _add(self, **fields: Any) -> None:
        data = self._event(**fields).SerializeToString()
        # A record: the length, its checksum, the data, its checksum.
        parts = struct.pack("<Q", len(data)), data
        self.append(b"".join(p + struct.pack("<I", self._checksum(p)) for p in parts))


class Lines(Appended):
    """A file of JSON values with a "step", one a line, that goes on after a step."""

    def __init__(
        self, path: Path, from_step: int, is_old: Callable[[dict], bool] = lambda _: False
    ):
        """Drops lines of later steps, what was cut short by a kill, and old ones of this step.

        A file with other lines that cannot be read is kept beside it. Raises TrainError where the
        file cannot be written from the beginning.
        """
        super().__init__(path)
        try:
            if path.exists():
                *whole, last = path.read_bytes().split(b"\n")
                if any(_value(line) is None for line in whole):
                    keep_damaged(path, "some of its lines cannot be read")
                values = [value for line in (*whole, last) if (value := _value(line)) is not None]
                kept = [
                    line
                    for line in values
                    if line["step"] < from_step or (line["step"] == from_step and not is_old(line))
                ]
                write_whole(path, "".join(json.dumps(finite(line)) + "\n" for line in kept))
            elif path.is_symlink():  # to nothing: opening it would make a file there
                path.unlink()
        except OSError as error:
            raise TrainError(f"{path} cannot be written ({error.strerror}): make room") from error

    def write(self, line: Mapping[str, Any]) -> None:
        self.append(json.dumps(finite(line), allow_nan=False).encode() + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The values in a file of JSON lines; what is none, as after a kill, is left out."""
    return [v for line in path.read_bytes().split(b"\n") if (v := _value(line)) is not None]


def _value(line: bytes) -> dict[str, Any] | None:
    """The value with a "step" that a line holds; None where it holds none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_ours = isinstance(value, dict) and type(value.get("step")) is int
    return value if is_ours else None


def score(measured: Mapping[str, float], metric: str) -> float:
    """The higher the better; what is no number is the worst."""
    score = -measured[metric] if metric in ("loss", "smoothed_loss") else measured[metric]
    return score if math.isfinite(score) else -sys.float_info.max


def scores(path: Path, metric: str) -> dict[int, float]:
    """The scores, by step, of the measurements in a `metrics.jsonl`."""
    name, found = f"valid_{metric}", {}
    for line in read_lines(path) if path.is_file() else ():
        value = line.get(name, "none")
        value = math.nan if value is None else value  # as `finite` writes it
        if isinstance(value, float):
            found[line["step"]] = score({metric: value}, metric)
    return found


def keep_damaged(path: Path, reason: str) -> None:
    """Keeps a copy of a file that is about to be written anew, and says so."""
    names = (f"{path.name}.damaged{n}" for n in ("", *(f".{i}" for i in range(2, 1000))))
    copy = next(each for each in map(path.with_name, names) if not os.path.lexists(each))
    shutil.copyfile(path, copy)
    tell(f"{path} is damaged ({reason}): it is written anew, and what it was is kept in {copy}")


@contextlib.contextmanager
def lasting(console: Console) -> Iterator[None]:
    """While entered, what cannot be printed is left out: a log on a full disk ends no training."""
    former, console.file = console.file, _Lasting(console.file)  # type: ignore[assignment]
    try:
        yield
    finally:
        console.file = former


class _Lasting:
    """A stream whose disk may be full. A pipe that nobody reads any more is told as ever."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except BrokenPipeError:
            raise
        except OSError:
            return 0


def tell(text: str) -> None:
    """Prints a line to standard error, where that can be written."""
    with contextlib.suppress(OSError):
        print(f"heedful: {text}", file=sys.stderr, flush=True)


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
