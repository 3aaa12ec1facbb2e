"""Test the choice of a run's parameters: one checkpoint, or the mean of several."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from rich.console import Console

from heedful.train.checkpoint import Checkpoints
from heedful.train.config import TrainConfig
from heedful.train.errors import TrainError
from heedful.train.load import load
from heedful.train.run import Run

SCORES = {3: -2.0, 5: -1.0, 7: -1.5, 11: -1.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    data = toy.data(toy.write_text(folder), "causal_lm")
    train = TrainConfig(max_checkpoints=3, average_last=2)
    return toy.random_run(folder / "run", toy.model("decoder_only"), data, train, SCORES)


def parameters(run: Run, step: int) -> list[np.ndarray]:
    """Return the saved parameters of a checkpoint."""
    abstract = load(run.directory, toy.QUIET, checkpoint=str(step)).params
    checkpoints = Checkpoints(run.checkpoints, run.tokenizer().fingerprint)
    return [np.asarray(x) for x in jax.tree.leaves(checkpoints.restore_params(step, abstract))]


def test_the_mean_of_the_newest(run):
    out = Console(markup=False, file=io.StringIO(), soft_wrap=True)
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
    train = TrainConfig(max_checkpoints=3, average_last=1)
    run = toy.random_run(tmp_path / "run", toy.model("decoder_only"), data, train, SCORES)
    assert load(run.directory, toy.QUIET).steps == [5]


def test_where_none_has_a_score_the_newest_is_used(tmp_path):
    """A run that stops before its first evaluation has checkpoints without a score."""
    data = toy.data(toy.write_text(tmp_path), "causal_lm")
    train = TrainConfig(max_checkpoints=3, average_last=1)
    run = toy.random_run(tmp_path / "run", toy.model("decoder_only"), data, train, {3: 0.0, 5: 0.0})
    (run.checkpoints / "scores.json").unlink()
    for which in (None, "best"):
        out = Console(markup=False, file=io.StringIO(), soft_wrap=True)
        assert load(run.directory, out, checkpoint=which).steps == [5]
        assert "no checkpoint has a score yet: the newest is used" in out.file.getvalue()
    train = dataclasses.replace(train, average_last=2)
    (run.directory / "config.json").write_text(
        json.dumps(dataclasses.replace(run, train=train).values())
    )
    assert load(run.directory, toy.QUIET).steps == [3, 5]


DAMAGE = [b"", b"{", b"[]", b"null", b'{"3": "x"}', b"\xff\xfe", b"[" * 100_000]


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_scores_are_those_of_the_metrics(run, tmp_path, damage, capfd):
    copy = Run.open(shutil.copytree(run.directory, tmp_path / "run"))
    train = dataclasses.replace(copy.train, average_last=1)
    (copy.directory / "config.json").write_text(
        json.dumps(dataclasses.replace(copy, train=train).values())
    )
    lines = [{"step": step, "valid_loss": -score} for step, score in SCORES.items()]
    copy.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (copy.checkpoints / "scores.json").write_bytes(damage)
    assert load(copy.directory, toy.QUIET).steps == [5]
    assert "scores.json is damaged" in capfd.readouterr().err
