"""A checkpoint that cannot be written is no end of the training."""

import resource

import pytest
import toy

from data.pipeline import Dataset
from train.checkpoint import Checkpoints, SaveFailed
from train.config import TrainError
from train.run import Run
from train.saving import Saving
from train.start import start_run
from train.state import first_state, init_params, set_up


class Screen:
    """A console that remembers."""

    def __init__(self):
        self.said: list[str] = []

    def print(self, text: str, **how) -> None:
        self.said.append(text)


@pytest.fixture
def full_disk():
    """A limit on the size of a file stands for a full disk: both make write() fail."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(is_full: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048 if is_full else former[0], former[1]))

    yield limit
    limit(False)


@pytest.fixture
def run(tmp_path) -> Run:
    path = toy.write_text(tmp_path / "text")
    return start_run(
        tmp_path / "run",
        toy.model("decoder_only"),
        toy.data(path, "causal_lm"),
        toy.TRAIN,
        toy.QUIET,
    )


@pytest.fixture
def opened(run, unchecked):
    """(saving, checkpoints, state at a step, what was said)"""
    setup, screen = set_up(run.model, run.train), Screen()
    state = first_state(setup, init_params(run.model, setup.mesh, 0))
    data = Dataset.prepare(run.data, run.tokenizer(), "train")
    checkpoints = Checkpoints(run.checkpoints, run.tokenizer().fingerprint, keep=3)
    batches = data.train_iterator()
    saving = Saving(run, checkpoints, batches, data.data_fingerprint, screen)  # type: ignore
    yield saving, checkpoints, lambda step: state.replace(step=step), screen.said
    checkpoints.close()
    batches.close()


def test_training_goes_on_after_a_full_disk(run, opened, full_disk):
    saving, checkpoints, at, said = opened
    assert "saved" in saving.save(at(1), 0.0, last=False)
    checkpoints.wait()
    full_disk(True)
    saving.save(at(2), 0.0, last=False)
    saving.save(at(3), 0.0, last=False)
    with pytest.raises(SaveFailed):
        checkpoints.wait()
    full_disk(False)
    assert "saved" in saving.save(at(4), 0.0, last=True)
    assert checkpoints.steps == [1, 4]
    (line,) = said
    for words in ("File too large", "checkpoint 1 is intact", "training goes on"):
        assert words in line
    assert Checkpoints(run.checkpoints, run.tokenizer().fingerprint).steps == [1, 4]


def test_the_last_one_must_be_saved(opened, full_disk):
    saving, checkpoints, at, said = opened
    saving.save(at(1), 0.0, last=False)
    checkpoints.wait()
    full_disk(True)
    with pytest.raises(SaveFailed, match=r"File too large\): make room; checkpoint 1 is intact"):
        saving.save(at(2), 0.0, last=True)
    full_disk(False)
    assert not said


def test_checkpoints_of_another_run_are_refused(run, opened):
    saving, *_ = opened
    position = saving.position()
    saving.require_ours(position)
    config = position["config"]
    other = {**config, "train": {**config["train"], "seed": 7}}
    with pytest.raises(TrainError, match=r"another config \(train.seed is 7 there and 0 here\)"):
        saving.require_ours({"config": other})
    mesh = {**config["train"]["mesh"], "fsdp": 2}
    saving.require_ours({"config": {**config, "train": {**config["train"], "mesh": mesh}}})
    with pytest.raises(TrainError, match="the training data has changed"):
        saving.go_on({**position, "data_fingerprint": "abc"})


def test_a_bucket_needs_its_package(unchecked):
    with pytest.raises(TrainError, match="gcsfs"):
        Checkpoints("gs://heedful-none/run", "abc", keep=1)
