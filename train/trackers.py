"""Experiment trackers: wandb and trackio get config, metrics, pictures and result of a run."""

import importlib.util
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from heedful.train.config_json import finite, write_json
from heedful.train.errors import TrainError
from heedful.train.hosts import is_first
from heedful.train.messages import first_line
from heedful.train.observers import Observer
from heedful.train.run import Run

PROJECT = "heedful"
"""Name of the project in the tracker, unless WANDB_PROJECT names another one."""


def require_tracker(name: str | None) -> None:
    """Raise TrainError if the package of a tracker is not installed."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise TrainError(
            f"train.tracker = {name}: the package {name} is not installed; run pip install "
            f"'heedful[{name}]', or leave train.tracker out"
        )


class Tracker(Observer):
    """Observer that sends what it receives to the tracker of a run; without a tracker, nowhere.

    `tracked` makes it. If the tracker fails during the run, it is told once, and training goes on.
    """

    def __init__(self, service: Any, console: Console):
        self._service, self._console = service, console

    def on_log(self, step: int, values: dict[str, float]) -> None:
        self._try(lambda service: service.log(step, values))

    def on_evaluation(self, step: int, measured: dict[str, float]) -> None:
        valid = {f"valid_{name}": value for name, value in measured.items()}
        self._try(lambda service: service.log(step, valid))

    def on_result(self, result: dict[str, Any], directory: Path) -> None:
        """Send the final result of a run, and the pictures in its directory."""
        self._try(lambda service: service.finish(finite(result), sorted(directory.glob("*.png"))))

    def _try(self, action: Callable[[Any], None]) -> None:
        if self._service is None:
            return
        try:
            action(self._service)
        except Exception as error:
            self._service = None
            self._console.print(
                f"the tracker fails and gets nothing more of this run ({first_line(error)}); "
                "metrics.jsonl has everything",
                style="yellow",
            )


@contextmanager
def tracked(run: Run, console: Console) -> Iterator[Tracker]:
    """Context with an observer for the tracker `train.tracker` of the run, on the first process.

    A run that resumes goes on under the same name in the tracker. Raises TrainError if the tracker
    is not installed or does not start.
    """
    name, service = run.train.tracker, None
    require_tracker(name)
    if name is not None and is_first():
        try:
            service = {"wandb": _Wandb, "trackio": _Trackio}[name](run)
        except Exception as error:
            raise TrainError(
                f"train.tracker = {name} does not start ({first_line(error)}); {FIXES[name]}, or "
                "leave train.tracker out"
            ) from error
        console.print(f"tracker: {name}, run {service.name}")
    is_complete = False
    try:
        yield Tracker(service, console)
        is_complete = True
    finally:
        if service is not None:
            Tracker(service, console)._try(lambda service: service.close(is_complete))


FIXES = {
    "wandb": "run wandb login, or set WANDB_MODE=offline",
    "trackio": "see that the folder in TRACKIO_DIR can be written",
}


class _Wandb:
    """A run of Weights & Biases."""

    def __init__(self, run: Run):
        import wandb  # type: ignore[import-not-found]

        self.name = _name(run)
        self._images = wandb.Image
        self._run = wandb.init(
            project=None if os.environ.get("WANDB_PROJECT") else PROJECT,
            name=run.directory.name,
            id=self.name,
            resume="allow",
            dir=run.directory,
            config=run.values(),
            settings=wandb.Settings(silent=True),
        )
        # A resumed run repeats steps, which wandb's own counter would refuse.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def finish(self, result: dict[str, Any], pictures: list[Path]) -> None:
        if pictures:
            self._run.log({f"pictures/{path.stem}": self._images(str(path)) for path in pictures})
        self._run.summary.update({"result": result})

    def close(self, is_complete: bool) -> None:
        self._run.finish(exit_code=0 if is_complete else 1)


class _Trackio:
    """A run of Trackio, in the local folder TRACKIO_DIR."""

    def __init__(self, run: Run):
        import trackio  # type: ignore[import-not-found]

        self.name = _name(run)
        self._images, self._last = trackio.Image, 0
        self._run = trackio.init(
            project=PROJECT,
            name=self.name,
            resume="allow",
            config=run.values(),
            embed=False,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._last = step
        self._run.log(values, step=step)

    def finish(self, result: dict[str, Any], pictures: list[Path]) -> None:
        images = {f"pictures/{path.stem}": self._images(str(path)) for path in pictures}
        scores = {f"result/{name}": value for name, value in result.items()}
        self._run.log(scores | images, step=self._last)

    def close(self, is_complete: bool) -> None:
        self._run.finish()


def _name(run: Run) -> str:
    """Return the name of a run in trackers, which stays the same when the run resumes."""
    path = run.directory / "tracker.json"
    try:
        return str(json.loads(path.read_text("utf-8"))["name"])
    except (OSError, ValueError, KeyError, TypeError):
        name = f"{run.directory.name}-{secrets.token_hex(4)}"
        write_json(path, {"name": name})
        return name
