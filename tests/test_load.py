"""Which parameters of a run are used: one checkpoint, or the mean of several."""

import io
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from rich.console import Console

from train.checkpoint import Checkpoints
from train.config import TrainConfig, TrainError
from train.load import load
from train.run import Run

SCORES = {3: -2.0, 5: -1.0, 7: -1.5, 11: -1.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    data = toy.data(toy.write_text(folder), "causal_lm")
    train = TrainConfig(keep=3, average=2)
    return toy.random_run(folder / "run", toy.model("decoder_only"), data, train, SCORES)


def parameters(run: Run, step: int) -> list[np.ndarray]:
    """Those of a checkpoint, as they were saved."""
    abstract = load(run.directory, toy.QUIET, checkpoint=str(step)).params
    checkpoints = Checkpoints(run.checkpoints, run.tokenizer().fingerprint)
    return [np.asarray(x) for x in jax.tree.leaves(checkpoints.restore_params(step, abstract))]


def test_the_mean_of_the_newest(run):
    out = Console(file=io.StringIO(), soft_wrap=True)
    trained = load(run.directory, out)
    assert trained.run == run and trained.steps == [7, 11]
    assert out.file.getvalue() == "parameters of step 7, 11 averaged\n"
    for mean, a, b in zip(
        jax.tree.leaves(trained.params), parameters(run, 7), parameters(run, 11), strict=True
    ):
        assert not np.array_equal(a, b)
        np.testing.assert_array_equal(mean, (a + b) / 2)


@pytest.mark.parametrize(("which", "step"), [("last", 11), ("best", 5), ("7", 7)])
def test_one_checkpoint(run, which: str, step: int):
    trained = load(run.directory, toy.QUIET, checkpoint=which)
    assert trained.steps == [step]
    for ours, saved in zip(jax.tree.leaves(trained.params), parameters(run, step), strict=True):
        assert ours.tobytes() == saved.tobytes()


def test_one_that_is_not_there(run):
    with pytest.raises(TrainError, match=r"no checkpoint '3': choose .* 5, 7, 11"):
        load(run.directory, toy.QUIET, checkpoint="3")
    with pytest.raises(TrainError, match=r"is no run directory"):
        load(Path("nowhere"), toy.QUIET)


def test_without_averaging_the_best_is_used(tmp_path):
    data = toy.data(toy.write_text(tmp_path), "causal_lm")
    train = TrainConfig(keep=3, average=1)
    run = toy.random_run(tmp_path / "run", toy.model("decoder_only"), data, train, SCORES)
    assert load(run.directory, toy.QUIET).steps == [5]
