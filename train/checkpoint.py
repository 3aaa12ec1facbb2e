"""Checkpoints: parameters, optimizer state, data iterator and who they belong to, with orbax."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from data.writing import write_whole
from train.config import Interrupted, TrainError
from train.hosts import any_process, is_first, one_first, several
from train.state import TrainState


class Checkpoints:
    """The checkpoints of a run: the newest `keep` with a score, the best, and the very newest.

    They are written in the background and appear under their step only when complete; scores, in
    `scores.json` beside them, come later. Each carries the fingerprint of its tokenizer; opening it
    with another is an error.
    """

    def __init__(
        self, directory: epath.PathLike, tokenizer_fingerprint: str, keep: int | None = None
    ):
        path = epath.Path(directory)
        self.directory = path if "://" in str(path) else path.absolute()
        self.fingerprint, self._keep, self._is_due = tokenizer_fingerprint, keep, True
        try:
            exists = self.directory.is_dir()
        except ImportError as error:
            raise TrainError(f"{directory} cannot be reached: {error} (pip install it)") from error
        if not exists and self.directory.exists():
            raise TrainError(f"{directory} is a file: give a folder to train.checkpoints")
        if keep is None and not exists:
            raise TrainError(f"{directory} does not exist: the run has no checkpoint yet")
        one_first(self._make_directory)
        self._manager, self._has_failed = self._open(clean=keep is not None), False
        self.scores = self._read_scores()
        """Of the checkpoints that have one, by step: the higher the better."""

    def _make_directory(self) -> None:
        if self._keep is not None and is_first():
            self.directory.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Closes; after an error that other processes may not know of, without waiting for them.

        What this one has begun to write is then written to its end nevertheless.
        """
        if kind is None or issubclass(kind, Interrupted):
            self.close()
            return
        with suppress(Exception):  # the error that is on its way is the one to tell
            self._manager.wait_until_finished()

    def _open(self, *, clean: bool) -> ocp.CheckpointManager:
        # Named, all processes meet at barriers that end some day, also if one has failed.
        processes = set(range(jax.process_count())) if several() else None
        options = ocp.CheckpointManagerOptions(
            create=False,
            preservation_policy=self,
            read_only=self._keep is None,
            cleanup_tmp_directories=clean,  # what a kill or a full disk left half done
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=processes),
        )
        return ocp.CheckpointManager(
            self.directory,
            options=options,
            item_names=("params", "opt_state", "data", "tokenizer"),
        )

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    @property
    def scored(self) -> list[int]:
        """Steps of the checkpoints that have a score, oldest first."""
        return [step for step in self.steps if step in self.scores]

    def best(self) -> int:
        """Step of the highest score, the first of equals."""
        if not self.scored:
            raise TrainError(f"{self.directory} has no checkpoint with a score")
        return max(self.scored, key=self.scores.__getitem__)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which ones stay when the last of `checkpoints` has been written: orbax asks for that.

        The newest, where it is `due`, gets its score later: it counts as one of those that have
        one. That of a stop gets none, and goes with the next.
        """
        *older, newest = [checkpoint.step for checkpoint in checkpoints]
        scored = [step for step in older if step in self.scores]
        others = scored[::-1][: self._keep - self._is_due] if self._keep else older
        kept = {newest, *others}
        if scored:
            kept.add(max(scored, key=self.scores.__getitem__))
        return [checkpoint.step in kept for checkpoint in checkpoints]

    def add_score(self, step: int, score: float) -> None:
        """Gives a checkpoint that is on disk its score; raises SaveFailed if it cannot be kept."""
        self.scores[step] = score
        self._guard(self._write_scores)

    def _write_scores(self) -> None:
        if is_first():
            kept = {str(step): self.scores[step] for step in self.scored}
            if "://" in str(self.directory):  # A bucket has whole files only.
                self._scores_path.write_text(json.dumps(kept))
            else:
                write_whole(Path(self._scores_path), json.dumps(kept))

    @property
    def _scores_path(self) -> epath.Path:
        return self.directory / "scores.json"

    def _read_scores(self) -> dict[int, float]:
        if self._scores_path.exists():
            found = json.loads(self._scores_path.read_text())
            return {int(step): score for step, score in found.items()}
        # Before there was this file each checkpoint had its own.
        metrics = {step: self._manager.metrics(step) for step in self.steps}
        return {step: found["score"] for step, found in metrics.items() if found}

    def set_aside(self, step: int) -> epath.Path:
        """Moves a checkpoint out of the way, and says where to; nothing is deleted."""
        folder = self.directory.parent / f"{self.directory.name}.corrupt"
        names = (str(step), *(f"{step}.{n}" for n in range(2, 1000)))
        target = next(path for path in map(folder.joinpath, names) if not path.exists())

        def move() -> None:
            if is_first():
                target.parent.mkdir(exist_ok=True)
                (self.directory / str(step)).rename(target)

        one_first(move)
        self._manager.reload()
        self.scores.pop(step, None)
        return target

    def save(self, state: TrainState, iterator_state: dict, *, is_due: bool = True) -> None:
        """Begins to write a checkpoint; raises SaveFailed if this cannot be begun."""
        self._is_due = is_due
        self._begin(
            int(state.step),
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.PyTreeSave(state.opt_state),
            data=ocp.args.JsonSave(iterator_state),
        )

    def save_params(self, params: Any) -> None:
        """Writes parameters that nothing here has trained, as step 0."""
        self._begin(0, params=ocp.args.StandardSave(params))
        self.wait()
        self.add_score(0, 0.0)

    def _begin(self, step: int, **items: Any) -> None:
        if self._has_failed:
            self._guard(self._open_again)
        tokenizer = ocp.args.JsonSave({"fingerprint": self.fingerprint})
        args = ocp.args.Composite(**items, tokenizer=tokenizer)
        self._guard(lambda: self._manager.save(step, args=args, force=True))

    def _open_again(self) -> None:
        # It may go on failing. What still writes there is in the way of removing all of it.
        for draft in self.directory.glob("*.orbax-checkpoint-tmp*") if is_first() else ():
            with suppress(OSError):
                draft.rmtree()
        self._manager, self._has_failed = self._open(clean=False), False

    def is_on_disk(self, step: int) -> bool:
        """Whether a checkpoint is complete by now."""
        path = self.directory / str(step)
        with suppress(OSError):
            return path.is_dir() and ocp.utils.is_checkpoint_finalized(path)
        return False

    def wait(self) -> None:
        """Returns when everything is on disk; raises SaveFailed if it could not be written."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def position(self, step: int) -> dict:
        """The iterator state at `step`."""
        return self._read(step, data=ocp.args.JsonRestore()).data

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        """State and iterator state at `step`, placed as `abstract` says."""
        items = self._read(
            step,
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=_tree_restore(abstract.opt_state),
            data=ocp.args.JsonRestore(),
        )
        counter = jax.device_put(jnp.int32(step), abstract.step.sharding)
        return TrainState(counter, items.params, items.opt_state), items.data

    def restore_params(self, step: int, abstract: Any) -> Any:
        """The parameters at `step`, placed as `abstract` says."""
        return self._read(step, params=ocp.args.StandardRestore(abstract)).params

    def _read(self, step: int, **items: Any) -> Any:
        if step not in self.steps:
            listed = ", ".join(map(str, self.steps)) or "none"
            raise TrainError(f"{self.directory} has no checkpoint {step}; it has {listed}")
        args = ocp.args.Composite(tokenizer=ocp.args.JsonRestore(), **items)
        restored: Any = None
        # orbax and tensorstore raise many kinds for a broken file
        with _shared(partial(CorruptCheckpoint, self.directory / str(step))):
            restored = self._manager.restore(step, args=args)
        found = restored.tokenizer["fingerprint"]
        if found != self.fingerprint:
            raise TrainError(
                f"checkpoint {self.directory / str(step)} belongs to tokenizer {found[:12]}, not "
                f"to {self.fingerprint[:12]} of this run: put its own tokenizer.json back"
            )
        return restored

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            # Whatever the storage raises: disk full, no permission, ...
            with _shared(partial(SaveFailed, self.directory)):
                action()
        except SaveFailed:
            self._has_failed = True
            raise


class SaveFailed(TrainError):
    """A checkpoint that could not be written."""

    def __init__(self, directory: epath.Path, error: Exception):
        steps: list[int] = []
        with suppress(OSError):  # The place itself may be gone.
            steps = sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())
        intact = f"checkpoint {steps[-1]} is intact" if steps else "none is there to be seen"
        super().__init__(
            f"a checkpoint could not be written to {directory} ({_reason(error)}): make room; "
            f"{intact}"
        )


class CorruptCheckpoint(TrainError):
    """A checkpoint that is there and cannot be read."""

    def __init__(self, path: epath.Path, error: Exception):
        super().__init__(
            f"checkpoint {path} is corrupt ({_reason(error)}): "
            "give --fallback to use the one before it"
        )


@contextmanager
def _shared(describe: Callable[[Exception], TrainError]) -> Iterator[None]:
    """What goes wrong on one process is raised on all of them, described."""
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    if any_process(problem is not None):
        raise describe(problem or RuntimeError("another process says why")) from problem


def _tree_restore(abstract: Any) -> ocp.args.PyTreeRestore:
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, restore_args=restore_args)


def _reason(error: BaseException) -> str:
    """What the system said, where there is such a thing, out of all that was said around it."""
    text = str(error).strip() or type(error).__name__
    system = re.search(r": ([^:\[]+) \[os_error_code", text)
    return system.group(1) if system else text.splitlines()[0][:200]
