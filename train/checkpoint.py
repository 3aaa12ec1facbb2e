"""Checkpoints with orbax: parameters, optimizer state, data position, tokenizer, checksums."""

import hashlib
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

from heedful.data.writing import write_whole
from heedful.train.errors import Interrupted, TrainError
from heedful.train.hosts import any_process, is_first, is_multiprocess, primary_first, to_host
from heedful.train.messages import errors_only, tell
from heedful.train.reproducibility.fingerprint import words_of_leaves
from heedful.train.reproducibility.record import named_words
from heedful.train.run import require_plain
from heedful.train.state import TrainState
from heedful.train.trainable import named

_words = jax.jit(words_of_leaves)


class Checkpoints:
    """The checkpoints of a run: the newest `keep` with a score, the best, and the newest of all.

    Checkpoints are written in the background and appear under their step only when they are
    complete. Their scores are written later, to `scores.json` in the same folder. Each checkpoint
    has the fingerprint of its tokenizer; reading it with another tokenizer is an error. Each
    checkpoint also has checksums of all its contents, which are compared whenever it is read.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        tokenizer_fingerprint: str,
        keep: int | None = None,
        measured: Callable[[], dict[int, float]] = dict,
    ):
        """Open the checkpoints in `directory`.

        `keep` is the number of newest checkpoints to keep; None: open only to read. `measured`
        returns the scores if scores.json is missing or damaged.
        """
        path = epath.Path(directory)
        self.directory = path if "://" in str(path) else path.absolute()
        require_plain(self.directory)
        self.fingerprint, self._keep, self._is_due = tokenizer_fingerprint, keep, True
        try:
            exists = self.directory.is_dir()
        except ImportError as error:
            raise TrainError(
                f"train.checkpoints {directory} cannot be reached ({error}): install the missing "
                "package with pip"
            ) from error
        if not exists and self.directory.exists():
            raise TrainError(f"{directory} is a file: give a folder to train.checkpoints")
        if keep is None and not exists:
            raise TrainError(
                f"{directory} does not exist: the run has no checkpoint yet; train it first"
            )
        primary_first(self._make_directory)
        self._manager, self._has_failed = self._open(clean=keep is not None), False
        self._is_told = False
        self.scores = self._read_scores(measured)
        """Scores by step, of the evaluated checkpoints; the higher the better."""

    def _make_directory(self) -> None:
        if self._keep is not None and is_first():
            self.directory.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Close; after an error, which other processes may not know of, do not wait for them.

        After an error, checkpoints that this process has begun to write are still completed.
        """
        if kind is None or issubclass(kind, Interrupted):
            self.close()
            return
        with suppress(Exception):  # The first error is the one to report.
            self._manager.wait_until_finished()

    @errors_only()  # Orbax warns of the options that reading needs.
    def _open(self, *, clean: bool) -> ocp.CheckpointManager:
        # With named processes, barriers end after a timeout, even if a process has failed.
        processes = set(range(jax.process_count())) if is_multiprocess() else None
        options = ocp.CheckpointManagerOptions(
            create=False,
            preservation_policy=self,
            read_only=self._keep is None,
            cleanup_tmp_directories=clean,  # Incomplete checkpoints of a kill or a full disk.
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=processes),
        )
        return ocp.CheckpointManager(
            self.directory,
            options=options,
            item_names=("params", "opt_state", "data", "tokenizer", "sums"),
        )

    @property
    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    @property
    def with_score(self) -> list[int]:
        """Return the steps of the checkpoints that have a score, oldest first."""
        return [step for step in self.steps if step in self.scores]

    def best(self) -> int:
        """Return the step with the highest score, the first of equal scores."""
        if not self.with_score:
            raise TrainError(
                f"{self.directory} has no checkpoint with a score: choose last, or a step"
            )
        return max(self.with_score, key=self.scores.__getitem__)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Tell orbax which checkpoints to keep after the last of `checkpoints` is written.

        If the newest checkpoint is a regular one, it gets its score later, and counts as a
        checkpoint with a score. The checkpoint of an interruption gets no score, and is deleted
        after the next checkpoint.
        """
        *older, newest = [checkpoint.step for checkpoint in checkpoints]
        with_score = [step for step in older if step in self.scores]
        others = with_score[::-1][: self._keep - self._is_due] if self._keep else older
        kept = {newest, *others}
        if with_score:
            kept.add(max(with_score, key=self.scores.__getitem__))
        return [checkpoint.step in kept for checkpoint in checkpoints]

    def add_score(self, step: int, score: float) -> None:
        """Store the score of a checkpoint on disk; raise SaveFailed if the score is not written."""
        self.scores[step] = score
        self._guard(self._write_scores)

    def _write_scores(self) -> None:
        if is_first():
            kept = {str(step): self.scores[step] for step in self.with_score}
            if "://" in str(self.directory):  # A bucket writes files atomically.
                self._scores_path.write_text(json.dumps(kept))
            else:
                write_whole(Path(self._scores_path), json.dumps(kept))

    @property
    def _scores_path(self) -> epath.Path:
        return self.directory / "scores.json"

    def _read_scores(self, measured: Callable[[], dict[int, float]]) -> dict[int, float]:
        if self._scores_path.exists():
            try:
                found = json.loads(self._scores_path.read_bytes())
                return {int(step): float(score) for step, score in found.items()}
            except (AttributeError, RecursionError, TypeError, ValueError) as error:
                if is_first():
                    tell(
                        f"{self._scores_path} is damaged ({error}): scores are read from the "
                        "metrics instead"
                    )
                return measured()
        # In older runs, each checkpoint has its own score instead of this file.
        metrics = {step: self._manager.metrics(step) for step in self.steps}
        return {step: found["score"] for step, found in metrics.items() if found} or measured()

    def set_aside(self, step: int) -> epath.Path:
        """Move a checkpoint to the folder `checkpoints.corrupt`, and return its new path."""
        folder = self.directory.parent / f"{self.directory.name}.corrupt"
        names = (str(step), *(f"{step}.{n}" for n in range(2, 1000)))
        target = next(path for path in map(folder.joinpath, names) if not path.exists())

        def move() -> None:
            if is_first():
                target.parent.mkdir(exist_ok=True)
                (self.directory / str(step)).rename(target)

        primary_first(move)
        self._manager.reload()
        self.scores.pop(step, None)
        return target

    def save(self, state: TrainState, iterator_state: dict, *, is_due: bool = True) -> None:
        """Start to write a checkpoint in the background; raise SaveFailed if that fails.

        is_due=False: the checkpoint is written only because of an interruption.
        """
        self._is_due = is_due
        self._begin(
            int(state.step),
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.PyTreeSave(state.opt_state),
            data=ocp.args.JsonSave(iterator_state),
        )

    def save_params(self, params: Any) -> None:
        """Write parameters that were not trained here, as step 0."""
        self._begin(0, params=ocp.args.StandardSave(params))
        self.wait()
        self.add_score(0, 0.0)

    def _begin(self, step: int, **items: Any) -> None:
        if self._has_failed:
            self._guard(self._open_again)
        self._notice_lost()
        items["tokenizer"] = ocp.args.JsonSave({"fingerprint": self.fingerprint})
        sums = _sums({name: args.item for name, args in items.items()})
        sums["sums"] = _json_sum(sums)
        args = ocp.args.Composite(**items, sums=ocp.args.JsonSave(sums))
        self._guard(lambda: self._manager.save(step, args=args, force=True))

    def _notice_lost(self) -> None:
        """Print which checkpoints were deleted from outside, and forget them."""
        lost = [step for step in self.steps if not (self.directory / str(step)).exists()]
        if not any_process(bool(lost)):
            return
        if is_first():
            listed = ", ".join(f"{step:,}" for step in lost)
            tell(f"{self.directory} has lost its checkpoints of step {listed}; training goes on")
        self._manager.reload()

    def _open_again(self) -> None:
        # This may fail again. A thread that still writes can keep a folder from being deleted.
        for draft in self.directory.glob("*.orbax-checkpoint-tmp*") if is_first() else ():
            with suppress(OSError):
                draft.rmtree()
        self._manager, self._has_failed = self._open(clean=False), False

    def is_on_disk(self, step: int) -> bool:
        """Tell if a checkpoint is complete."""
        path = self.directory / str(step)
        with suppress(OSError):
            return path.is_dir() and ocp.utils.is_checkpoint_finalized(path)
        return False

    def wait(self) -> None:
        """Wait until everything is on disk; raise SaveFailed if it could not be written."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def position(self, step: int) -> dict:
        """Return the iterator state at `step`."""
        return self._read(step, data=ocp.args.JsonRestore())["data"]

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        """Return state and iterator state at `step`, sharded like `abstract`."""
        items = self._read(
            step,
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=_tree_restore(abstract.opt_state),
            data=ocp.args.JsonRestore(),
        )
        counter = jax.device_put(jnp.int32(step), abstract.step.sharding)
        return TrainState(counter, items["params"], items["opt_state"]), items["data"]

    def restore_params(self, step: int, abstract: Any) -> Any:
        """Return the parameters at `step`, sharded like `abstract`."""
        return self._read(step, params=ocp.args.StandardRestore(abstract))["params"]

    def _read(self, step: int, **items: Any) -> dict[str, Any]:
        if step not in self.steps:
            listed = ", ".join(map(str, self.steps)) or "none"
            raise TrainError(
                f"{self.directory} has no checkpoint {step}; it has {listed}: choose one of these"
            )
        items["tokenizer"] = ocp.args.JsonRestore()
        path = self.directory / str(step)
        if (path / "sums").exists():
            items["sums"] = ocp.args.JsonRestore()
        restored: dict[str, Any] = {}
        for name, args in items.items():
            # orbax and tensorstore raise many kinds of exceptions for a broken file.
            with _shared(partial(CorruptCheckpoint, path, item=name)):
                found = self._manager.restore(step, args=ocp.args.Composite(**{name: args}))
                restored[name] = found[name]
        kept = restored.pop("sums", None)
        sums = _sums(restored)
        with _shared(partial(CorruptCheckpoint, path)):
            self._compare(path, kept, sums)
        found = restored["tokenizer"]["fingerprint"]
        if found != self.fingerprint:
            raise TrainError(
                f"checkpoint {self.directory / str(step)} belongs to tokenizer {found[:12]}, not "
                f"to {self.fingerprint[:12]} of this run: restore the tokenizer.json of the run"
            )
        return restored

    def _compare(self, path: epath.Path, kept: Any, found: dict[str, str]) -> None:
        """Raise ValueError if the checksums `found` differ from those that a checkpoint `kept`."""
        if kept is None:
            if is_first() and not self._is_told:
                self._is_told = True
                tell(
                    f"checkpoint {path} was written before checkpoints had checksums: its bits "
                    "cannot be verified"
                )
            return
        if not isinstance(kept, dict) or kept.pop("sums", None) != _json_sum(kept):
            raise ValueError("sums: the checksums themselves are damaged")
        items = {name.partition(".")[0] for name in found}
        kept = {name: value for name, value in kept.items() if name.partition(".")[0] in items}
        names = sorted(name for name in kept | found if kept.get(name) != found.get(name))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{names[0]}{more}: the bits differ from the checksum")

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            # Any error of the storage: disk full, no permission, ...
            with _shared(partial(SaveFailed, self.directory)):
                action()
        except SaveFailed:
            self._has_failed = True
            raise


class SaveFailed(TrainError):
    """Error: a checkpoint could not be written."""

    def __init__(self, directory: epath.Path, error: Exception):
        steps: list[int] = []
        with suppress(OSError):  # The folder itself may be gone.
            steps = sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())
        last = f"checkpoint {steps[-1]} is intact" if steps else "no earlier checkpoint was found"
        super().__init__(
            f"a checkpoint could not be written to {directory} ({_reason(error)}): free disk space "
            f"or check permissions; {last}"
        )


class CorruptCheckpoint(TrainError):
    """Error: a checkpoint exists and cannot be read.

    Example:
        >>> import heedful as hf
        >>> issubclass(hf.CorruptCheckpoint, hf.TrainError)
        True
    """

    def __init__(self, path: epath.Path, error: Exception, item: str = ""):
        where = f"{item}: " if item else ""
        super().__init__(
            f"checkpoint {path} is corrupt ({where}{_reason(error)}): to use the checkpoint before "
            "it, give --fallback (in Python fallback=True), or move the corrupt checkpoint away"
        )


def _sums(items: dict[str, Any]) -> dict[str, str]:
    """Return a checksum of the bits of each array and each JSON value in `items`, by name."""
    is_json = lambda name: name in ("data", "tokenizer")  # noqa: E731
    arrays = {name: item for name, item in items.items() if not is_json(name)}
    sums = {name: _json_sum(item) for name, item in items.items() if is_json(name)}
    if arrays:
        names = [name for name, _ in named(arrays)]
        sums |= named_words(names, to_host(_words(arrays)))
    return sums


def _json_sum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@contextmanager
def _shared(describe: Callable[[Exception], TrainError]) -> Iterator[None]:
    """Raise `describe(exception)` on all processes if one process raises in the context."""
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    if any_process(problem is not None):
        raise describe(problem or RuntimeError("see the error of another process")) from problem


def _tree_restore(abstract: Any) -> ocp.args.PyTreeRestore:
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, restore_args=restore_args)


def _reason(error: BaseException) -> str:
    """Return the operating system's message in an error, or else the first line of the error."""
    text = str(error).strip() or type(error).__name__
    system = re.search(r": ([^:\[]+) \[os_error_code", text)
    return system.group(1) if system else text.splitlines()[0][:200]
