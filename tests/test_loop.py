"""Test the training loop: its time measurements, its messages and its observers."""

import dataclasses
import io
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from rich.console import Console

from heedful.train.config import OptimizerConfig
from heedful.train.growing_files import read_lines
from heedful.train.loop import fit
from heedful.train.meter import AHEAD, Meter
from heedful.train.observers import Observer
from heedful.train.start import start_run


class Loss(float):
    """The loss of a step, which devices have computed if `ready` is True."""

    ready = True

    def is_ready(self) -> bool:
        return self.ready


class Seen(Observer):
    """An observer that records its calls."""

    def __init__(self):
        self.events: list[tuple[Any, ...]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda *told: self.events.append((name, *told))


def test_a_batch_is_waited_for_only_where_no_work_is_left():
    seen = Seen()
    meter = Meter(log_every=4, observers=[seen])
    meter._since -= 100.0
    norms = {"kernel": jnp.ones(1)}
    for step in range(1, 5 + AHEAD):
        meter.fetched(10.0)  # Devices have no work at step 1 and after step 2.
        loss = Loss(1.5)
        loss.ready = step == 2
        numbers = {"weight": 1.0, "lr": 0.1, "grad_norm": np.float32(1)}
        meter.add(step, numbers | {"loss": loss, "grad_norms": norms, "param_norms": norms})
    ((_, _, values),) = [event for event in seen.events if event[0] == "on_log"]
    assert values["input_wait_share"] == pytest.approx(0.2, abs=0.01)
    assert values["loss"] == 1.5


@pytest.mark.slow
def test_a_warmup_that_is_longer_than_the_training_is_said(tmp_path):
    optimizer = OptimizerConfig(peak_lr=0.5, warmup_steps=5, schedule="constant")
    config = dataclasses.replace(toy.TRAIN, steps=2, optimizer=optimizer)
    data = toy.data(toy.write_table(tmp_path), "classification")
    model = toy.model(head=toy.CLASSIFIER)
    said = io.StringIO()
    fit(
        start_run(tmp_path / "run", model, data, config, toy.QUIET),
        Console(markup=False, file=said, width=999),
    )
    assert (
        "train.optimizer.warmup_steps = 5 is more than train.steps = 2: the learning rate ends at "
        "0.2 and never reaches train.optimizer.peak_lr = 0.5; shorten the warmup"
    ) in said.getvalue()


def test_observers_see_all_in_order(tmp_path):
    """Metrics come late, but before the checkpoint of their step, which comes before its score."""
    config = dataclasses.replace(
        toy.TRAIN, steps=6, log_every=2, checkpoint_every=3, fingerprint_every=2
    )
    data = toy.data(toy.write_table(tmp_path), "classification")
    run = start_run(tmp_path / "run", toy.model(head=toy.CLASSIFIER), data, config, toy.QUIET)
    seen = Seen()
    fit(run, toy.QUIET, observers=[seen])
    assert seen.events[0][0] == "on_start" and seen.events[0][1]["config"] == run.values()
    steps = [
        (name, told[0]["step"] if name == "on_fingerprint" else told[0])
        for name, *told in seen.events[1:]
        if name != "on_phase"
    ]
    phases = [told[0] for name, *told in seen.events if name == "on_phase"]
    assert phases[:2] == ["compiling", "training"]
    assert phases[-2:] == ["validating", "training"] and phases.count("validating") == 2
    assert steps == [
        ("on_fingerprint", 0),
        ("on_step", 1),
        ("on_fingerprint", 2), ("on_step", 2), ("on_log", 2),
        ("on_fingerprint", 3), ("on_step", 3),
        ("on_checkpoint", 3), ("on_evaluation", 3),
        ("on_fingerprint", 4), ("on_step", 4), ("on_log", 4),
        ("on_step", 5),
        ("on_fingerprint", 6), ("on_step", 6), ("on_log", 6),
        ("on_checkpoint", 6), ("on_evaluation", 6),
    ]  # fmt: skip
    measured = [told[1] for name, *told in seen.events if name == "on_evaluation"]
    lines = read_lines(run.metrics)
    assert [line["valid_loss"] for line in lines if "valid_loss" in line] == [
        each["loss"] for each in measured
    ]
