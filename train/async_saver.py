"""Checkpoints while a run trains: write in the background, and go on if a checkpoint fails."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from heedful.data.iterator import TrainIterator
from heedful.train.checkpoint import Checkpoints, SaveFailed
from heedful.train.errors import TrainError
from heedful.train.home import Home
from heedful.train.hosts import any_process, from_first, is_first
from heedful.train.metrics import score
from heedful.train.observers import Observer
from heedful.train.run import Run
from heedful.train.state import TrainState


class Saving(Observer):
    """Saves everything that resuming needs, and measures the time that training waits for it."""

    def __init__(
        self,
        run: Run,
        checkpoints: Checkpoints,
        batches: TrainIterator,
        data_fingerprint: str,
        console: Console,
    ):
        self._run, self._checkpoints, self._batches = run, checkpoints, batches
        self._console, self._home = console, Home(run.directory)
        self._tokenizer = run.tokenizer()  # The file may be gone when it is needed.
        self._fixed = {
            "data_fingerprint": data_fingerprint,
            "config": run.values(),
            "tokenizer": json.loads(run.tokenizer_path.read_text("utf-8")),
        }
        self.seconds = 0.0
        """Seconds that training waited, until the previous checkpoint was on disk and the new one
        was copied from the devices."""
        self._score: tuple[int, float] | None = None
        self._is_begun = True
        self._step, self._held, self._is_awaited = 0, 0.0, False

    def close(self) -> None:
        self._home.close()

    def position(self) -> dict[str, Any]:
        """Return the contents of a checkpoint besides the state, such as the data iterator."""
        return {"iterator": self._batches.get_state(), **self._fixed}

    def require_ours(self, position: dict[str, Any]) -> None:
        """Raise TrainError for a checkpoint of a run with another config."""
        there = Run.of(self._run.directory, position["config"])
        if others := self._run.others(there):
            raise TrainError(
                f"the checkpoints in {self._checkpoints.directory} belong to a run of another "
                f"config ({others}): give another --run-dir or train.checkpoints"
            )

    def go_on(self, position: dict[str, Any]) -> None:
        """Move the data iterator to a checkpoint's position; raise TrainError for other data."""
        if position["data_fingerprint"] != self._fixed["data_fingerprint"]:
            raise TrainError(
                f"the training data has changed since {self._run.directory} was started: "
                "restore the data, or start a new run on these data from its parameters with "
                f"heedful train {self._run.directory} --init-from {self._run.directory} --run-dir "
                "NEW"
            )
        self._batches.set_state(position["iterator"])

    def save(self, state: TrainState, *, last: bool, is_due: bool = True) -> None:
        """Start to save the state; `said` returns the outcome.

        A checkpoint with is_due=False is written only because of an interruption. The `last`
        checkpoint of this process is on disk on return, or SaveFailed is raised. If another
        checkpoint fails, a message is printed, and training goes on to the next checkpoint. If the
        directory of the run is gone, the checkpoint is saved elsewhere, and TrainError says where.
        """
        began = time.perf_counter()
        if any_process(is_first() and self._home.is_lost()):
            self._rescue(state)
        self.settle()
        begin = lambda: self._checkpoints.save(state, self.position(), is_due=is_due)  # noqa: E731
        if last:
            begin()
            self._checkpoints.wait()
            self._is_begun = True
        else:
            self._is_begun = self._try(begin)
        self._step, self._held = int(state.step), time.perf_counter() - began
        self.seconds += self._held

    def said(self) -> str:
        """Describe the state of the newest checkpoint; `settle` prints when a late one is saved."""
        if not self._is_begun:
            return "nothing saved"
        self._is_awaited = not self._checkpoints.is_on_disk(self._step)
        state = "being written" if self._is_awaited else "saved"
        return f"checkpoint {state} (held up {self._held:.2f} s)"

    def _rescue(self, state: TrainState) -> None:
        """Save to the new path of the moved directory, or to a new directory; raise TrainError."""
        run = self._run
        self.settle()
        moved = self._home.found() if is_first() else None
        names = (run.directory.name, *(f"{run.directory.name}.{n}" for n in range(2, 1000)))
        free = (path for path in map(run.directory.with_name, names) if not _holds(path))
        place = Path(from_first(str(moved or next(free))))
        there = dataclasses.replace(run, directory=place)
        if not moved and is_first():
            there.start(self._tokenizer)
        tokenizer, keep = self._tokenizer.fingerprint, run.train.max_checkpoints
        with Checkpoints(there.checkpoints, tokenizer, keep) as checkpoints:
            if (step := int(state.step)) not in checkpoints.steps:
                checkpoints.save(state, self.position(), is_due=False)
        raise TrainError(
            f"{run.directory} was {f'moved to {place}' if moved else 'deleted'} while the run "
            f"trained: the training has stopped at step {step:,}, whose checkpoint is in "
            f"{there.checkpoints}; the same command with --run-dir {place} resumes it"
        )

    def on_evaluation(self, step: int, measured: dict[str, float]) -> None:
        self.score(step, score(measured, self._run.train.metric))

    def score(self, step: int, score: float) -> None:
        """Take the score of the newest checkpoint, which may not be on disk yet."""
        self._score = step, score

    def settle(self) -> None:
        """Wait until the newest checkpoint is on disk, and store its score, if there is one."""
        score, self._score = self._score, None
        is_awaited, self._is_awaited = self._is_awaited, False
        if not (self._is_begun and self._try(self._checkpoints.wait)):
            return
        if is_awaited:
            self._console.print(f"checkpoint of step {self._step:,} saved")
        if score is not None:
            self._try(lambda: self._checkpoints.add_score(*score))

    def lacks_score(self, step: int) -> bool:
        """Tell if the run ended before the checkpoint of this step was evaluated."""
        return step in self._checkpoints.steps and step not in self._checkpoints.scores

    def _try(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except SaveFailed as error:
            self._console.print(
                f"{error}; training goes on and saves again at the next checkpoint",
                style="bold red",
            )
            return False
        return True


def _holds(path: Path) -> bool:
    """Tell if `path` exists and is not an empty folder."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))
