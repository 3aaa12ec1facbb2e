"""A run that is cut off and resumed ends with the same bits as one that was not."""

import random
import signal
from pathlib import Path

import numpy as np
import pytest
import toy
from launch import Process, checkpoint, lines, same_bits, wait_for_step

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
    # Every step has been logged once, however often it was run.
    assert [line["step"] for line in lines(run) if "loss" in line] == list(range(2, STEPS + 1, 2))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
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
