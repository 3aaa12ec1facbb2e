"""Checkpoints: parameters, optimizer state, data iterator and who they belong to, with orbax."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from train.config import TrainError
from train.state import TrainState


class Checkpoints:
    """The checkpoints of a run: the newest `keep`, and the one of the highest score.

    They are written in the background and appear under their step only when complete. Each carries
    the fingerprint of its tokenizer; opening it with another is an error.
    """

    def __init__(self, directory: Path, tokenizer_fingerprint: str, keep: int | None = None):
        self.directory = directory.absolute()
        self.fingerprint = tokenizer_fingerprint

        def score(metrics: Any) -> Any:
            return metrics["score"], -metrics["step"]  # the first of equals

        options = ocp.CheckpointManagerOptions(
            best_fn=score,  # what makes orbax store the metrics; the policy decides
            best_mode="max",
            preservation_policy=AnyPreservationPolicy(
                [LatestN(keep), BestN(get_metric_fn=score, reverse=False, n=1)]
            ),
            read_only=keep is None,
            cleanup_tmp_directories=keep is not None,  # what a kill or a full disk left half done
        )
        if keep is None and not directory.is_dir():
            raise TrainError(f"{directory} does not exist: the run has no checkpoint yet")
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_names=("params", "opt_state", "data", "tokenizer"),
        )

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def best(self) -> int:
        """Step of the highest score, the first of equals."""
        return self.best_score()[0]

    def best_score(self) -> tuple[int, float]:
        """Step and score of the best checkpoint."""
        metrics = {step: self._manager.metrics(step) for step in self.steps}
        known = {step: (m["score"], -step) for step, m in metrics.items() if m}
        if not known:
            raise TrainError(f"{self.directory} has no checkpoint with a score")
        step = max(known, key=lambda step: known[step])
        return step, known[step][0]

    def set_aside(self, step: int) -> Path:
        """Moves a checkpoint out of the way, and says where to; nothing is deleted."""
        target = self.directory.parent / f"{self.directory.name}.corrupt" / str(step)
        target.parent.mkdir(exist_ok=True)
        (self.directory / str(step)).rename(target)
        self._manager.reload()
        return target

    def save(self, state: TrainState, iterator_state: dict, score: float | None) -> None:
        """Begins to write a checkpoint; raises TrainError if the former could not be written.

        The higher the score the better; with none the checkpoint is never the best.
        """
        step = int(state.step)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.PyTreeSave(state.opt_state),
            data=ocp.args.JsonSave(iterator_state),
            tokenizer=ocp.args.JsonSave({"fingerprint": self.fingerprint}),
        )
        metrics = None if score is None else {"score": score, "step": step}
        self._guard(lambda: self._manager.save(step, args=items, metrics=metrics, force=True))

    def save_params(self, params: Any) -> None:
        """Begins to write parameters that nothing here has trained, as step 0."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            tokenizer=ocp.args.JsonSave({"fingerprint": self.fingerprint}),
        )
        metrics = {"score": 0.0, "step": 0}
        self._guard(lambda: self._manager.save(0, args=items, metrics=metrics, force=True))

    def wait(self) -> None:
        """Returns when everything is on disk; raises TrainError if it could not be written."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        self.wait()
        self._manager.close()

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
        try:
            restored: Any = self._manager.restore(step, args=args)
        except Exception as error:  # orbax and tensorstore raise many kinds for a broken file
            raise CorruptCheckpoint(self.directory / str(step), error) from error
        found = restored.tokenizer["fingerprint"]
        if found != self.fingerprint:
            raise TrainError(
                f"checkpoint {self.directory / str(step)} belongs to tokenizer {found[:12]}, not "
                f"to {self.fingerprint[:12]} of this run: put its own tokenizer.json back"
            )
        return restored

    def _guard(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # whatever the storage raises: disk full, no permission, ...
            steps = [step for step in self.steps if (self.directory / str(step)).is_dir()]
            intact = f"checkpoint {steps[-1]} is intact" if steps else "there is none before it"
            raise TrainError(
                f"a checkpoint could not be written to {self.directory} ({_reason(error)}); "
                f"{intact}: make room, then run the same command to resume"
            ) from error


class CorruptCheckpoint(TrainError):
    """A checkpoint that is there and cannot be read."""

    def __init__(self, path: Path, error: Exception):
        super().__init__(
            f"checkpoint {path} is corrupt ({_reason(error)}): "
            "give --fallback to use the one before it"
        )


def _tree_restore(abstract: Any) -> ocp.args.PyTreeRestore:
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, restore_args=restore_args)


def _reason(error: BaseException) -> str:
    """What the system said, where there is such a thing, out of all that was said around it."""
    text = str(error).strip() or type(error).__name__
    system = re.search(r": ([^:\[]+) \[os_error_code", text)
    return system.group(1) if system else text.splitlines()[0][:200]
