"""The loop's own accounts."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from train.loop import AHEAD, _Meter


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
