"""Train a run again from the start or from a checkpoint, and compare the bits."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from heedful.train import signals
from heedful.train.checkpoint import Checkpoints
from heedful.train.errors import Interrupted, TrainError
from heedful.train.hosts import any_process, is_multiprocess, primary_first
from heedful.train.loop import fit
from heedful.train.observers import Observer
from heedful.train.reproducibility.fingerprint import make_fingerprint
from heedful.train.reproducibility.record import changes, environments, fingerprints, named_words
from heedful.train.run import Run, is_begun
from heedful.train.state import TrainState, set_up
from heedful.train.trainable import named


def reproduce(
    directory: Path, console: Console, *, steps: int | None = None, run_dir: Path | None = None
) -> bool:
    """Train a run again from the start in a fresh directory; return True if the bits are the same.

    The first `steps` steps are compared; None: all. Differences are printed. `run_dir` is the fresh
    directory; None: a temporary directory.
    """
    original = Run.open(directory)
    comparison = _Comparison(original, console, 0, steps)
    with _fresh_directory(run_dir) as fresh:
        # Without train.checkpoints: the new run must not write to the folder of the original.
        train = dataclasses.replace(original.train, checkpoints=None)
        run = dataclasses.replace(original, directory=fresh, train=train)
        console.print(f"reproducing {directory} in {fresh}")
        return comparison.train(run)


def verify(
    directory: Path,
    console: Console,
    *,
    checkpoint: int | None = None,
    steps: int | None = None,
    run_dir: Path | None = None,
) -> bool:
    """Train from a checkpoint in a fresh directory; return True if the bits are the same.

    By default, `checkpoint` is the last checkpoint before the last fingerprint, and `steps` is
    train.checkpoint_every. The original run is not changed. `run_dir` is the fresh directory; None:
    a temporary directory.
    """
    original = Run.open(directory)
    setup = set_up(original.model, original.train)
    checkpoints = Checkpoints(original.checkpoints, original.tokenizer().fingerprint)
    first = checkpoint
    if first is None:
        last = max(fingerprints(original), default=0)
        first = max((step for step in checkpoints.steps if step < last), default=0)
    comparison = _Comparison(original, console, first, steps or original.train.checkpoint_every)
    state, position = checkpoints.restore(first, setup.abstract)
    console.print(f"verifying {directory} from its checkpoint of step {first:,}")
    with jax.set_mesh(setup.mesh):
        words = make_fingerprint(setup.mesh)(state.params)
    names = [name for name, _ in named(state.params)]
    try:
        comparison.on_fingerprint({"step": first, "parameters": named_words(names, words)})
    except _Finished:
        console.print("the checkpoint differs from the fingerprint of its step")
        return comparison.verdict()
    with _fresh_directory(run_dir) as fresh:
        # These fields decide when to stop and what to keep; they do not change the bits.
        train = dataclasses.replace(
            original.train, checkpoints=None, patience=None, max_checkpoints=1, average_last=1
        )
        run = dataclasses.replace(original, directory=fresh, train=train)
        return comparison.train(run, (state, position))


class _Finished(Exception):
    """Raised by the observer when the comparison is complete."""


class _Comparison(Observer):
    """Observer that compares a run with the record of the original run.

    The comparison begins at step `first` and ends after `steps` steps, or at the end of the record.
    """

    def __init__(self, original: Run, console: Console, first: int, steps: int | None):
        train = original.train
        # An interrupted run has fingerprints of other steps, which the new run does not write.
        is_regular = lambda step: (  # noqa: E731
            step in (first, train.steps)
            or not step % train.fingerprint_every
            or not step % train.checkpoint_every
        )
        recorded = {step: line for step, line in fingerprints(original).items() if is_regular(step)}
        if not recorded:
            raise TrainError(
                f"{original.directory} has no fingerprints.jsonl: the run was imported or is older "
                "than fingerprints; train it again to record fingerprints"
            )
        last = max(recorded) if steps is None else first + steps
        self.until = max((step for step in recorded if first < step <= last), default=first)
        if self.until == first:
            listed = ", ".join(f"{step:,}" for step in recorded)
            raise TrainError(
                f"{original.directory} has no fingerprint within {steps} steps after step "
                f"{first:,}: it has fingerprints of steps {listed}; give another --steps"
            )
        self.original, self.console, self.first, self.recorded = original, console, first, recorded
        self.environments = environments(original.directory)
        self.now: dict[str, Any] | None = None
        self.same: int | None = None
        self.differs: tuple[int, str] | None = None

    def train(self, run: Run, start: tuple[TrainState, dict] | None = None) -> bool:
        """Train the run; return True if all compared bits are the same."""
        primary_first(lambda: run.start(self.original.tokenizer()))
        try:
            fit(run, self.console, start=start, observers=[self])
        except _Finished:
            pass
        except Interrupted:
            same = f"identical up to step {self.same:,}" if self.same is not None else None
            raise TrainError(
                f"interrupted before step {self.until:,}; {same or 'nothing was compared'}: run "
                "the command again (with another --run-dir, if you gave one)"
            ) from None
        return self.verdict()

    def on_start(self, now: dict[str, Any]) -> None:
        # `now` has the config of the new run, whose directories differ.
        self.now = {**now, "config": self.original.values()}
        differing = self._changes(self.first + 1)
        same = "the environment is the same as in the record"
        unknown = "environment.json is missing or damaged: the environments cannot be compared"
        self._print(same if self.environments else unknown, differing)
        for name in ("train", "tokenizer"):
            if any(line.startswith(f"data.{name} ") for line in differing):
                self.differs = 0, f"nothing was trained: data.{name} has changed"
                raise _Finished

    def on_fingerprint(self, line: dict[str, Any]) -> None:
        step, recorded = line["step"], self.recorded.get(line["step"])
        if recorded is None:
            return
        new, old = line["parameters"], recorded["parameters"]
        names = [name for name in new | old if new.get(name) != old.get(name)]
        sums = [key for key in ("loss", "weight") if key in line and line[key] != recorded.get(key)]
        if names or sums:
            parameters = f"parameters {', '.join(names)} ({len(names)} of {len(new)})"
            if len(names) in (0, len(new)):
                parameters = f"all {len(names)} parameters" if names else "no parameter"
            parts = [parameters, *(f"the {key}" for key in sums)]
            self.differs = step, f"step {step:,} differs: {' and '.join(parts)}"
            raise _Finished
        self.same = step
        self.console.print(f"step {step:,}: identical")
        if step == self.until:
            raise _Finished

    def verdict(self) -> bool:
        """Print the result; return True if all compared bits are the same."""
        if self.differs is None and self.same == self.until:
            self.console.print(f"identical to step {self.until:,}", style="green")
            return True
        if self.same is not None:
            self.console.print(f"identical to step {self.same:,}")
        ended = self.until, f"the run ended before step {self.until:,} of the record"
        step, message = self.differs or ended
        self.console.print(message, style="red")
        if self.now is not None:
            self._print("the recorded environments are the same", self._changes(step))
        return False

    def _changes(self, step: int) -> list[str]:
        """Describe the differences from the environment in which the original did the step."""
        before = [each for each in self.environments if each["from_step"] < max(step, 1)]
        return changes(before[-1], self.now) if before and self.now else []

    def _print(self, same: str, differing: list[str]) -> None:
        self.console.print("the environments differ:" if differing else same)
        for line in differing:
            self.console.print(f"  {line}")


@contextlib.contextmanager
def _fresh_directory(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        if any_process(is_begun(chosen)):
            raise TrainError(f"{chosen} holds a run already: give another --run-dir")
        yield chosen
    elif is_multiprocess():
        raise TrainError(
            f"{jax.process_count()} processes need a directory that all of them can read: give "
            "--run-dir"
        )
    else:
        with tempfile.TemporaryDirectory(prefix="heedful-") as name:
            signals.leftovers.append(name)
            yield Path(name)
