"""A run trained again, from its record or from one of its checkpoints, and compared to the bit."""

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
from heedful.train.config import Interrupted, TrainError
from heedful.train.hosts import any_process, is_multiprocess, primary_first
from heedful.train.loop import fit
from heedful.train.reproducibility.fingerprint import make_fingerprint
from heedful.train.reproducibility.record import changes, environments, fingerprints, named_words
from heedful.train.run import Run, is_begun
from heedful.train.state import TrainState, set_up
from heedful.train.trainable import named


def reproduce(
    directory: Path, console: Console, *, steps: int | None = None, run_dir: Path | None = None
) -> bool:
    """Whether training again in a fresh directory gives the same bits; says where it does not."""
    original = Run.open(directory)
    witness = _Comparison(original, console, 0, steps)
    with _fresh_directory(run_dir) as fresh:
        train = dataclasses.replace(original.train, checkpoints=None)  # those are the original's
        run = dataclasses.replace(original, directory=fresh, train=train)
        console.print(f"reproducing {directory} in {fresh}")
        return witness.watch(run)


def verify(
    directory: Path,
    console: Console,
    *,
    checkpoint: int | None = None,
    steps: int | None = None,
    run_dir: Path | None = None,
) -> bool:
    """Whether training on from a checkpoint gives the bits of the run, which is left as it is."""
    original = Run.open(directory)
    setup = set_up(original.model, original.train)
    checkpoints = Checkpoints(original.checkpoints, original.tokenizer().fingerprint)
    first = checkpoint
    if first is None:
        last = max(fingerprints(original), default=0)
        first = max((step for step in checkpoints.steps if step < last), default=0)
    witness = _Comparison(original, console, first, steps or original.train.checkpoint_every)
    state, position = checkpoints.restore(first, setup.abstract)
    console.print(f"verifying {directory} from its checkpoint of step {first:,}")
    with jax.set_mesh(setup.mesh):
        words = make_fingerprint(setup.mesh)(state.params)
    names = [name for name, _ in named(state.params)]
    try:
        witness.fingerprint({"step": first, "parameters": named_words(names, words)})
    except _Over:
        console.print("the checkpoint is not what was recorded when it was written")
        return witness.verdict()
    with _fresh_directory(run_dir) as fresh:
        # What decides when to stop and what to keep has no part in the bits.
        train = dataclasses.replace(
            original.train, checkpoints=None, patience=None, max_checkpoints=1, average_last=1
        )
        run = dataclasses.replace(original, directory=fresh, train=train)
        return witness.watch(run, (state, position))


class _Over(Exception):
    """Enough has been seen."""


class _Comparison:
    """The witness of a run that should go through the same bits as another.

    It is told of the steps from `first` on: `steps` of them, or all that the other has recorded.
    """

    def __init__(self, original: Run, console: Console, first: int, steps: int | None):
        train = original.train
        # A run that was stopped in between has others, too, which training again does not give.
        regular = lambda step: (  # noqa: E731
            step in (first, train.steps)
            or not step % train.fingerprint_every
            or not step % train.checkpoint_every
        )
        recorded = {step: line for step, line in fingerprints(original).items() if regular(step)}
        if not recorded:
            raise TrainError(
                f"{original.directory} has no fingerprints.jsonl: it was trained before there was "
                "one, or not here"
            )
        last = max(recorded) if steps is None else first + steps
        self.until = max((step for step in recorded if first < step <= last), default=first)
        if self.until == first:
            listed = ", ".join(f"{step:,}" for step in recorded)
            raise TrainError(
                f"{original.directory} has no fingerprint within {steps} steps after step "
                f"{first:,}: it has those of {listed}; give other --steps"
            )
        self.original, self.console, self.first, self.recorded = original, console, first, recorded
        self.environments = environments(original.directory)
        self.now: dict[str, Any] | None = None
        self.same: int | None = None
        self.differs: tuple[int, str] | None = None

    def watch(self, run: Run, start: tuple[TrainState, dict] | None = None) -> bool:
        """Trains, and returns whether all was the same to the end."""
        primary_first(lambda: run.start(self.original.tokenizer()))
        try:
            fit(run, self.console, start=start, witness=self)
        except _Over:
            pass
        except Interrupted:
            raise TrainError(
                f"stopped before step {self.until:,}; "
                + ("nothing was compared" if self.same is None else f"identical to {self.same:,}")
            ) from None
        return self.verdict()

    def environment(self, now: dict[str, Any]) -> None:
        # The config of the copy is compared where it comes from.
        self.now = {**now, "config": self.original.values()}
        found = self._changes(self.first + 1)
        same = "this environment is that of the record"
        unknown = "environment.json is missing or damaged: the environments cannot be compared"
        self._print(same if self.environments else unknown, found)
        for name in ("train", "tokenizer"):
            if any(line.startswith(f"data.{name} ") for line in found):
                self.differs = 0, f"nothing was trained: data.{name} has changed"
                raise _Over

    def fingerprint(self, line: dict[str, Any]) -> None:
        step, theirs = line["step"], self.recorded.get(line["step"])
        if theirs is None:
            return
        ours, others = line["parameters"], theirs["parameters"]
        names = [name for name in ours | others if ours.get(name) != others.get(name)]
        sums = [key for key in ("loss", "weight") if key in line and line[key] != theirs.get(key)]
        if names or sums:
            which = f"parameters {', '.join(names)} ({len(names)} of {len(ours)})"
            if len(names) in (0, len(ours)):
                which = f"all {len(names)} parameters" if names else "no parameter"
            what = [which, *(f"the {key}" for key in sums)]
            self.differs = step, f"step {step:,} differs: {' and '.join(what)}"
            raise _Over
        self.same = step
        self.console.print(f"step {step:,}: identical")
        if step == self.until:
            raise _Over

    def verdict(self) -> bool:
        """Says what was found, and returns whether it is the same bits to the end."""
        if self.differs is None and self.same == self.until:
            self.console.print(f"identical to step {self.until:,}", style="green")
            return True
        if self.same is not None:
            self.console.print(f"identical to step {self.same:,}")
        ended = self.until, f"the run ended, and the record goes on to step {self.until:,}"
        step, words = self.differs or ended
        self.console.print(words, style="red")
        if self.now is not None:
            found = self._changes(step)
            self._print("the environments do not differ in anything that is recorded", found)
        return False

    def _changes(self, step: int) -> list[str]:
        """How this environment differs from the one in which the run came to this step."""
        before = [each for each in self.environments if each["from_step"] < max(step, 1)]
        return changes(before[-1], self.now) if before and self.now else []

    def _print(self, none: str, found: list[str]) -> None:
        self.console.print("the environments differ:" if found else none)
        for line in found:
            self.console.print(f"  {line}")


@contextlib.contextmanager
def _fresh_directory(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        if any_process(is_begun(chosen)):
            raise TrainError(f"{chosen} holds a run already: give another --run-dir")
        yield chosen
    elif is_multiprocess():
        raise TrainError(
            f"{jax.process_count()} processes need one directory that all of them see: "
            "give --run-dir"
        )
    else:
        with tempfile.TemporaryDirectory(prefix="heedful-") as name:
            signals.leftovers.append(name)
            yield Path(name)
