"""Test that an interrupted and resumed run ends with the same bits as an uninterrupted run."""

import dataclasses
import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import quick
import toy
from launch import Process, checkpoint, lines, same_bits, wait_for_step

from heedful.data.config import DataConfig, TokenizerConfig
from heedful.data.errors import DataError
from heedful.model.config import PositionConfig
from heedful.train import loop
from heedful.train.checkpoint import Checkpoints
from heedful.train.config import DecodeConfig, OptimizerConfig
from heedful.train.errors import Interrupted, TrainError
from heedful.train.load import load
from heedful.train.run import Run
from heedful.train.start import start_run
from heedful.train.stop import Stop

STEPS, EVERY = 60, 7


def start(flags: list[str]) -> Process:
    return Process(["train", *flags])


def final_state(directory: Path) -> list[np.ndarray]:
    return checkpoint(directory, STEPS)[0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    return toy.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> list[np.ndarray]:
    run = tmp_path_factory.mktemp("whole") / "run"
    start(toy.flags(corpus, run, STEPS, EVERY)).finish()
    return final_state(run)


@pytest.mark.slow
def test_killed_at_three_random_moments(corpus, uninterrupted, tmp_path):
    flags, run = toy.flags(corpus, tmp_path / "run", STEPS, EVERY), tmp_path / "run"
    moments = sorted(random.Random(3).sample(range(EVERY, STEPS - EVERY), 3))
    for moment in moments:
        process = start(flags)
        wait_for_step(run, moment, process)
        process.kill()
        process.wait()
    assert "resuming from the checkpoint of step" in start(flags).finish()
    same_bits(final_state(run), uninterrupted)
    # Each step is logged once, even if it ran several times.
    assert [line["step"] for line in lines(run) if "loss" in line] == list(range(2, STEPS + 1, 2))


STOPS = [(signal.SIGINT, 130), (signal.SIGTERM, 75)]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), STOPS)
def test_asked_to_stop_it_saves_and_says_how_to_resume(
    corpus, uninterrupted, tmp_path, number, code
):
    flags, run = toy.flags(corpus, tmp_path / "run", STEPS, 50), tmp_path / "run"
    process = start(flags)
    wait_for_step(run, 6, process)
    process.send_signal(number)
    out = process.finish(code)
    assert "saved; the same command resumes it" in out
    start(flags).finish()
    same_bits(final_state(run), uninterrupted)


# In this process ---------------------------------------------------------------------------------


def short_run(directory: Path, text: Path) -> Run:
    """Start a run of 12 steps that evaluates every third step and averages three checkpoints."""
    train = dataclasses.replace(
        toy.TRAIN, steps=12, checkpoint_every=3, max_checkpoints=3, average_last=3,
        optimizer=OptimizerConfig(warmup_steps=2),
    )  # fmt: skip
    return start_run(
        directory, toy.model("decoder_only"), toy.data(text, "causal_lm"), train, toy.QUIET
    )


def stop_at(step: int, monkeypatch) -> None:
    """Let the processes agree to stop after `step` steps, as after a signal."""
    asked = iter(range(1, step + 1))
    monkeypatch.setattr(Stop, "agreed", lambda _: next(asked) == step)


@pytest.mark.slow
@pytest.mark.parametrize("step", [7, 9])
def test_a_stop_changes_nothing_about_what_is_kept_and_averaged(step, tmp_path, monkeypatch):
    """A checkpoint is due when the stop comes at step 9; the resumed run evaluates it."""
    text = toy.write_text(tmp_path)
    whole, run = short_run(tmp_path / "whole", text), short_run(tmp_path / "run", text)
    loop.fit(whole, toy.QUIET)
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(Interrupted):
            loop.fit(run, toy.QUIET)
    assert Checkpoints(run.checkpoints, run.tokenizer().fingerprint).steps[-1] == step
    loop.fit(run, toy.QUIET)
    ours, theirs = (
        Checkpoints(each.checkpoints, each.tokenizer().fingerprint) for each in (run, whole)
    )
    assert ours.steps == theirs.steps and ours.scores == theirs.scores
    ours, theirs = (load(each.directory, toy.QUIET) for each in (run, whole))
    assert ours.steps == theirs.steps == [6, 9, 12]
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    valid = [line for line in lines(run.directory) if "valid_loss" in line]
    assert valid == [line for line in lines(whole.directory) if "valid_loss" in line]


@pytest.mark.slow
def test_a_measurement_whose_score_was_lost_is_made_again(tmp_path):
    run = short_run(tmp_path / "run", toy.write_text(tmp_path))
    loop.fit(run, toy.QUIET)
    before, path = lines(run.directory), run.checkpoints / "scores.json"
    scores = json.loads(path.read_text())
    path.write_text(json.dumps({step: scores[step] for step in scores if step != "12"}))
    loop.fit(run, toy.QUIET)
    assert lines(run.directory) == before and json.loads(path.read_text()) == scores


@pytest.mark.slow
@pytest.mark.parametrize("patience", quick.only([1], [None, 1]))
def test_a_stop_in_the_last_measurement_is_heard(patience: int | None, tmp_path, monkeypatch):
    text = toy.write_text(tmp_path)
    run = short_run(tmp_path / "run", text)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, patience=patience))
    measured = []

    def measure(*_: Any) -> dict[str, float]:
        measured.append(1)
        if len(measured) == (4 if patience is None else 2):
            signal.raise_signal(signal.SIGTERM)
        return {"loss": 1.0}

    monkeypatch.setattr(loop, "measure", measure)
    with pytest.raises(Interrupted, match=f"stopped at step {6 if patience else 12}, saved"):
        loop.fit(run, toy.QUIET)
    steps = [3, 6] if patience else [3, 6, 9, 12]
    assert Checkpoints(run.checkpoints, run.tokenizer().fingerprint).with_score == steps


def test_a_checkpoint_is_on_disk_before_it_is_measured(tmp_path, monkeypatch):
    run = short_run(tmp_path / "run", toy.write_text(tmp_path))
    monkeypatch.setattr(loop, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.fit(run, toy.QUIET)
    assert Checkpoints(run.checkpoints, run.tokenizer().fingerprint).steps == [3]


def test_two_do_not_train_in_one_directory(tmp_path):
    run = short_run(tmp_path / "run", toy.write_text(tmp_path))
    release = run.lock()
    with pytest.raises(TrainError, match=r"another process trains in .*run: stop it"):
        loop.fit(run, toy.QUIET)
    release()
    run.lock()()


def away(run: Path) -> Path:
    """Move the directory of a run; return the directory where the last checkpoint must be."""
    return run.rename(run.with_name("away"))


def deleted(run: Path) -> Path:
    shutil.rmtree(run)
    return run


def deleted_and_taken(run: Path) -> Path:
    """Replace a run by another one; return the directory where the last checkpoint must be."""
    shutil.rmtree(run)
    run.mkdir()
    (run / "config.json").write_text("{}")
    return run.with_name("run.2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lose", "elsewhere"),
    [(away, False), (deleted, True), (deleted_and_taken, False)],
)
def test_a_run_whose_directory_is_lost_stops_and_loses_nothing(
    lose: Any, elsewhere: bool, tmp_path, monkeypatch
):
    """The run loses its directory at step 5, between the checkpoints of steps 3 and 6."""
    text = toy.write_text(tmp_path)
    whole, run = short_run(tmp_path / "whole", text), short_run(tmp_path / "run", text)
    if elsewhere:
        train = dataclasses.replace(run.train, checkpoints=str(tmp_path / "elsewhere"))
        run = dataclasses.replace(run, train=train)
        run.start(run.tokenizer())
    loop.fit(whole, toy.QUIET)
    found = []

    def agreed(_: Stop) -> bool:
        while len(found) == 4 and not (run.checkpoints / "3").exists():
            time.sleep(0.01)  # the checkpoint of step 3 is written in the background
        found.append(lose(run.directory) if len(found) == 4 else None)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(Stop, "agreed", agreed)
        with pytest.raises(TrainError) as error:
            loop.fit(run, toy.QUIET)
    place = found[4]
    said = f"moved to {place}" if lose is away else "deleted"
    assert f"{run.directory} was {said} while the run trained: " in str(error.value)
    assert f"stopped at step 6, whose checkpoint is in {tmp_path}" in str(error.value)
    assert f"--run-dir {place} resumes it" in str(error.value)
    if lose is not deleted:
        assert not (run.directory / "checkpoints").exists()
    run = Run.open(place)
    assert run.tokenizer().fingerprint == whole.tokenizer().fingerprint
    loop.fit(run, toy.QUIET)
    same_bits(*(checkpoint(each.directory, 12)[0] for each in (run, whole)))


@pytest.mark.slow
def test_a_checkpoint_can_be_corrupt_twice(tmp_path):
    run = short_run(tmp_path / "run", toy.write_text(tmp_path))
    loop.fit(run, toy.QUIET)
    for name in ("12", "12.2"):
        (run.checkpoints / "12" / "params" / "manifest.ocdbt").unlink()
        loop.fit(run, toy.QUIET, fallback=True)
        assert (run.directory / "checkpoints.corrupt" / name).is_dir()


def test_the_test_sentences_have_room_before_the_training(tmp_path):
    toy.write_corpus(tmp_path)
    (tmp_path / "test.en").write_text("red cat\n" + "red " * 29 + "\n")
    (tmp_path / "test.de").write_text("katze rot\nrot\n")
    files = {x: (str(tmp_path / f"{x}.en"), str(tmp_path / f"{x}.de")) for x in ("train", "test")}
    data = DataConfig(
        source="files", **files, tokenizer=TokenizerConfig(kind="words"), max_length=16
    )
    positions = PositionConfig(kind="learned", max_length=32)
    train = dataclasses.replace(toy.TRAIN, decode=DecodeConfig(extra_length=5))
    model = toy.model("encoder_decoder", positions=positions)
    run = start_run(tmp_path / "run", model, data, train, toy.QUIET)
    with pytest.raises(TrainError, match=r"1 test sentences have more than 27 tokens, .* line 2"):
        loop.fit(run, toy.QUIET)
    assert not run.metrics.exists()


def test_where_no_checkpoint_can_be_read_nothing_begins_anew(tmp_path):
    data = toy.data(toy.write_text(tmp_path), "causal_lm")
    scores = {3: 0.0, 5: 1.0}
    run = toy.random_run(tmp_path / "run", toy.model("decoder_only"), data, scores=scores)
    for step in (3, 5):
        (run.checkpoints / str(step) / "params" / "manifest.ocdbt").unlink()
    with pytest.raises(TrainError, match="can be read: restore one"):
        loop.fit(run, toy.QUIET, fallback=True)
    assert Checkpoints(run.checkpoints, run.tokenizer().fingerprint).steps == [3, 5]


def test_the_test_split_is_looked_at_before_the_training(tmp_path):
    text = toy.write_text(tmp_path)
    train = dataclasses.replace(toy.TRAIN, steps=12, optimizer=OptimizerConfig(warmup_steps=2))
    data = toy.data(text, "causal_lm", test=(str(tmp_path / "typo.txt"),))
    run = start_run(tmp_path / "run", toy.model("decoder_only"), data, train, toy.QUIET)
    with pytest.raises(DataError, match=r"typo\.txt"):
        loop.fit(run, toy.QUIET)
    assert not run.metrics.exists()
    # The corrected test file does not make it another run.
    data = dataclasses.replace(data, test=(str(text),))
    start_run(tmp_path / "run", toy.model("decoder_only"), data, train, toy.QUIET)
