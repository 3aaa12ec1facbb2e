"""A run that is cut off and resumed ends with the same bits as one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import toy

from train.checkpoint import Checkpoints
from train.run import Run
from train.sharding import make_mesh
from train.state import set_up

ROOT = Path(__file__).parent.parent
STEPS, EVERY = 60, 7


def start(flags: list[str]) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, "-m", "train.cli", "train", *flags],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out
    return out


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    path = run / "metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if path.exists():
            steps = [json.loads(line)["step"] for line in path.read_text().splitlines()[:-1]]
            if steps and steps[-1] >= step:
                return
        time.sleep(0.005)
    pytest.fail(f"step {step} not reached: {process.communicate()[0]}")


def final_state(directory: Path) -> list[np.ndarray]:
    run = Run.open(directory)
    mesh = make_mesh(run.train.mesh, jax.devices()[:1])
    abstract = set_up(run.model, run.train, mesh).abstract
    checkpoints = Checkpoints(run.checkpoints, run.tokenizer().fingerprint)
    state, _ = checkpoints.restore(STEPS, abstract)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    return toy.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> list[np.ndarray]:
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(start(toy.flags(corpus, run, STEPS, EVERY)))
    return final_state(run)


def same_bits(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        assert a.tobytes() == b.tobytes()


def test_killed_at_three_random_moments(corpus, uninterrupted, tmp_path):
    flags, run = toy.flags(corpus, tmp_path / "run", STEPS, EVERY), tmp_path / "run"
    moments = sorted(random.Random(3).sample(range(EVERY, STEPS - EVERY), 3))
    for moment in moments:
        process = start(flags)
        wait_for_step(run, moment, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert "resuming from the checkpoint of step" in finish(start(flags))
    same_bits(final_state(run), uninterrupted)
    # Every step has been logged once, however often it was run.
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "loss" in s] == list(range(2, STEPS + 1, 2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_and_says_how_to_resume(corpus, uninterrupted, tmp_path, number):
    flags, run = toy.flags(corpus, tmp_path / "run", STEPS, 50), tmp_path / "run"
    process = start(flags)
    wait_for_step(run, 6, process)
    process.send_signal(number)
    out = finish(process, code=130)
    assert "saved; the same command resumes it" in out
    finish(start(flags))
    same_bits(final_state(run), uninterrupted)
