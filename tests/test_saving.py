"""Test that training continues if a checkpoint cannot be written, unless it is the last one."""

import dataclasses
import multiprocessing
import os
import resource
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import toy

from heedful.data.pipeline import Dataset
from heedful.train.async_saver import Saving
from heedful.train.checkpoint import Checkpoints, SaveFailed
from heedful.train.errors import TrainError
from heedful.train.loop import fit
from heedful.train.run import Run
from heedful.train.start import start_run
from heedful.train.state import TrainState, first_state, init_params, set_up


class Screen:
    """A console that records its messages."""

    def __init__(self):
        self.said: list[str] = []

    def print(self, text: str, **how: Any) -> None:
        self.said.append(text)


def new_run(folder: Path) -> Run:
    data = toy.data(toy.write_text(folder), "causal_lm")
    return start_run(folder / "run", toy.model("decoder_only"), data, toy.TRAIN, toy.QUIET)


@contextmanager
def opened(
    run: Run,
) -> Iterator[tuple[Saving, Checkpoints, Callable[[int], TrainState], list[str]]]:
    """Yield the object that saves, its checkpoints, a function step -> state, and the messages."""
    setup, screen = set_up(run.model, run.train), Screen()
    state = first_state(setup, init_params(run.model, setup.mesh, 0))
    data = Dataset.prepare(run.data, run.tokenizer(), "train")
    checkpoints = Checkpoints(run.checkpoints, run.tokenizer().fingerprint, keep=3)
    batches = data.train_iterator()
    saving = Saving(run, checkpoints, batches, data.data_fingerprint, screen)  # type: ignore
    yield saving, checkpoints, lambda step: state.replace(step=step), screen.said
    saving.close()
    checkpoints.close()
    batches.close()


@contextmanager
def full_disk() -> Iterator[None]:
    """Limit the size of files instead of filling the disk, as both make write() fail."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, former[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, former)


def goes_on(folder: Path) -> None:
    run = new_run(folder)
    with opened(run) as (saving, checkpoints, at, said):
        saving.save(at(1), last=False)
        saving.score(1, 0.0)
        saving.settle()
        with full_disk():
            for step in (2, 3):
                saving.save(at(step), last=False)
                saving.score(step, 1.0)
                saving.settle()
        saving.save(at(4), last=True)
        assert "checkpoint saved" in saving.said()
        saving.score(4, 0.0)
        saving.settle()
        assert checkpoints.with_score == checkpoints.steps == [1, 4]
    for line in said:
        for words in ("File too large", "checkpoint 1 is intact", "training goes on"):
            assert words in line
    assert len(said) == 2
    assert Checkpoints(run.checkpoints, run.tokenizer().fingerprint).steps == [1, 4]


def goes_on_without_the_place(folder: Path) -> None:
    """Save while the folder is missing for a while, as with a network share."""
    run = new_run(folder)
    with opened(run) as (saving, _, at, said):
        saving.save(at(1), last=False)
        saving.score(1, 0.0)
        saving.settle()
        away = run.checkpoints.parent / "away"
        run.checkpoints.rename(away)
        run.checkpoints.write_text("")  # Otherwise saving would make the folder again.
        for step in (2, 3):
            saving.save(at(step), last=False)  # It may fail here or in the background.
            saving.score(step, 1.0)
            saving.settle()
        run.checkpoints.unlink()
        away.rename(run.checkpoints)
        saving.save(at(4), last=True)
        saving.score(4, 0.0)
        saving.settle()
    assert len(said) == 2 and all("training goes on" in line for line in said)
    assert Checkpoints(run.checkpoints, run.tokenizer().fingerprint).with_score == [1, 4]


def must_save_the_last(folder: Path) -> None:
    with opened(new_run(folder)) as (saving, checkpoints, at, said):
        saving.save(at(1), last=False)
        checkpoints.wait()
        expected = r"File too large\): free disk .*; checkpoint 1 is intact"
        with full_disk(), pytest.raises(SaveFailed, match=expected):
            saving.save(at(2), last=True)
    assert not said


def alone(what: Callable[[Path], None], folder: Path) -> None:
    """Run a function and exit at once, as threads of orbax wait minutes for a missing folder."""
    try:
        what(folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("what", [goes_on, goes_on_without_the_place, must_save_the_last])
def test_what_cannot_be_written(what, tmp_path):
    """The test needs a process of its own: see test_cli.test_a_corrupt_checkpoint."""
    process = multiprocessing.get_context("spawn").Process(target=alone, args=(what, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_checkpoint_is_called_saved_when_it_is(tmp_path, monkeypatch):
    with opened(new_run(tmp_path)) as (saving, checkpoints, at, said):
        is_on_disk = checkpoints.is_on_disk
        monkeypatch.setattr(checkpoints, "is_on_disk", lambda _: False)  # a slow disk
        saving.save(at(1), last=False)
        assert "checkpoint being written" in saving.said() and not said
        saving.settle()
        assert said == ["checkpoint of step 1 saved"]
        monkeypatch.setattr(checkpoints, "is_on_disk", is_on_disk)
        assert "checkpoint saved" in saving.said() and not is_on_disk(2)


def test_checkpoints_of_another_run_are_refused(tmp_path, unchecked):
    with opened(new_run(tmp_path)) as (saving, *_):
        position = saving.position()
        saving.require_ours(position)
        config = position["config"]
        other = {**config, "train": {**config["train"], "seed": 7}}
        expected = r"another config \(train.seed is 7 there and 0 here\)"
        with pytest.raises(TrainError, match=expected):
            saving.require_ours({"config": other})
        mesh = {**config["train"]["mesh"], "fsdp": 2}
        saving.require_ours({"config": {**config, "train": {**config["train"], "mesh": mesh}}})
        with pytest.raises(TrainError, match="the training data has changed"):
            saving.go_on({**position, "data_fingerprint": "abc"})


def test_so_are_those_of_a_run_of_other_sizes(tmp_path):
    """The configs are compared before arrays are read, which would be called corrupt."""
    data, places = toy.data(toy.write_text(tmp_path), "causal_lm"), str(tmp_path / "checkpoints")
    train = dataclasses.replace(toy.TRAIN, checkpoints=places)
    toy.random_run(tmp_path / "one", toy.model("decoder_only"), data, train)
    model = dataclasses.replace(toy.model("decoder_only"), width=24)
    other = start_run(tmp_path / "other", model, data, train, toy.QUIET)
    with pytest.raises(TrainError, match=r"another config \(model.width is 16 there and 24 here\)"):
        fit(other, toy.QUIET)


def test_a_bucket_needs_its_package(unchecked):
    with pytest.raises(TrainError, match="gcsfs"):
        Checkpoints("gs://heedful-none/run", "abc", keep=1)
