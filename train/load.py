"""Load a trained model: the parameters of a run, with its tokenizer and a mesh."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from heedful.data.tokenizer import Tokenizer
from heedful.train.checkpoint import Checkpoints, CorruptCheckpoint
from heedful.train.code_record import changes
from heedful.train.config import DecodeConfig, MeshConfig
from heedful.train.errors import TrainError
from heedful.train.metrics import scores
from heedful.train.run import Run
from heedful.train.sharding import make_mesh
from heedful.train.state import abstract_params

Writer = TypeVar("Writer")


@dataclass(frozen=True)
class Trained:
    """A run and the parameters that were chosen from it."""

    run: Run
    tokenizer: Tokenizer
    mesh: Mesh
    params: Any
    steps: list[int]
    """Steps of the checkpoints that the parameters come from."""

    def writer(
        self, kind: Callable[..., Writer], decode: DecodeConfig, seed: int = 0, **options: Any
    ) -> Writer:
        """Return a Translator or Generator (`kind`) of this model; `options` are its keywords."""
        parts = self.run.model, decode, self.tokenizer, self.params, self.mesh
        return kind(*parts, seed, **options)


def load(
    directory: Path, console: Console, *, checkpoint: str | None = None, fallback: bool = False
) -> Trained:
    """Load the parameters of `checkpoint`: average (of the newest), last, best, or a step.

    None: average if train.average_last is above 1, else best. With `fallback`, corrupt checkpoints
    are skipped with a message. Raises TrainError, and without `fallback` CorruptCheckpoint.
    """
    run = Run.open(directory)
    for change in changes(directory, run.values()):
        console.print(change, style="yellow")
    tokenizer, mesh = run.tokenizer(), _mesh(run.train.mesh, console)
    measured = partial(scores, run.metrics, run.train.metric)
    checkpoints = Checkpoints(run.checkpoints, tokenizer.fingerprint, measured=measured)
    which = checkpoint or ("average" if run.train.average_last > 1 else "best")
    if which == "best" and checkpoints.steps and not checkpoints.with_score:
        console.print("no checkpoint has a score yet: the newest is used instead of the best")
        which = "last"
    candidates, count = _candidates(checkpoints, which, run.train.average_last)
    abstract = abstract_params(run.model, mesh)
    params, steps = _average(checkpoints, candidates, count, abstract, fallback, console)
    listed = ", ".join(f"{step:,}" for step in steps)
    console.print(f"parameters of step {listed}" + (" averaged" if len(steps) > 1 else ""))
    return Trained(run, tokenizer, mesh, params, steps)


def _mesh(config: MeshConfig, console: Console) -> Mesh:
    """Return the mesh of the run, or, if it does not fit the devices, a mesh of all devices."""
    try:
        return make_mesh(config)
    except TrainError:
        mesh = make_mesh(MeshConfig())
        console.print(f"mesh: data {mesh.size}, which differs from the mesh of the training run")
        return mesh


def _candidates(checkpoints: Checkpoints, which: str, average: int) -> tuple[list[int], int]:
    """Return (steps in order of preference, number of them to average)."""
    newest = checkpoints.steps[::-1]
    if not newest:
        raise TrainError(f"{checkpoints.directory} holds no checkpoint yet: train the run first")
    if which == "average":
        # Without the checkpoint of an interruption, which an uninterrupted run would not have.
        regular = checkpoints.with_score[::-1] or newest
        return regular, min(average, len(regular))
    if which == "last":
        return newest, 1
    if which == "best":
        best = checkpoints.best()
        return [best, *(step for step in newest if step != best)], 1
    if not which.isdigit() or int(which) not in newest:
        raise TrainError(
            f"no checkpoint '{which}': choose average, last, best, or a step of "
            f"{', '.join(map(str, newest[::-1]))}"
        )
    return [step for step in newest if step <= int(which)], 1


def _average(
    checkpoints: Checkpoints,
    candidates: Sequence[int],
    count: int,
    abstract: Any,
    fallback: bool,
    console: Console,
) -> tuple[Any, list[int]]:
    """Average the first `count` candidates (arXiv:1706.03762 §6.1); return their steps, too."""
    total, used = None, []
    for step in candidates:
        try:
            params = checkpoints.restore_params(step, abstract)
        except CorruptCheckpoint as error:
            if not fallback:
                raise
            console.print(f"{error}\nleft out", style="yellow")
            continue
        total = params if total is None else jax.tree.map(jnp.add, total, params)
        used.append(step)
        if len(used) == count:
            break
    if not used:
        raise TrainError(
            f"no checkpoint in {checkpoints.directory} can be read: restore one, or train again "
            "with another --run-dir"
        )
    return jax.tree.map(lambda x: x / len(used), total), sorted(used)
