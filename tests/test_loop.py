"""The loop's own accounts."""

import dataclasses
import io
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from rich.console import Console

from heedful.train.config import OptimizerConfig
from heedful.train.loop import AHEAD, _Meter, fit
from heedful.train.start import start_run


class Loss(float):
    """Of a step that the devices have finished, or not."""

    ready = True

    def is_ready(self) -> bool:
        return self.ready


def test_a_batch_is_waited_for_only_where_no_work_is_left():
    written: list[dict[str, Any]] = []
    writer: Any = SimpleNamespace(write=lambda step, values: written.append(values))
    meter = _Meter(writer, fingerprints=writer, log_every=4, show=lambda *_: None)
    meter._since -= 100.0
    norms = {"kernel": jnp.ones(1)}
    for step in range(1, 5 + AHEAD):
        meter.fetched(10.0)  # nothing to work on at step 1, and after step 2
        loss = Loss(1.5)
        loss.ready = step == 2
        numbers = {"weight": 1.0, "lr": 0.1, "grad_norm": np.float32(1)}
        meter.add(step, numbers | {"loss": loss, "grad_norms": norms, "param_norms": norms})
    (values,) = written
    assert values["input_wait_share"] == pytest.approx(0.2, abs=0.01)
    assert values["loss"] == 1.5


def test_a_warmup_that_is_longer_than_the_training_is_said(tmp_path):
    optimizer = OptimizerConfig(peak_lr=0.5, warmup_steps=5, schedule="constant")
    config = dataclasses.replace(toy.TRAIN, steps=2, optimizer=optimizer)
    data = toy.data(toy.write_table(tmp_path), "classification")
    model = toy.model(head=toy.CLASSIFIER)
    said = io.StringIO()
    fit(start_run(tmp_path / "run", model, data, config, toy.QUIET), Console(file=said, width=999))
    assert (
        "train.optimizer.warmup_steps = 5 is more than train.steps = 2: the learning rate ends at "
        "0.2 and never comes to train.optimizer.peak_lr = 0.5; shorten the warmup"
    ) in said.getvalue()
