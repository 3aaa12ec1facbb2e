"""What is kept, what is refused, and that what comes back is what was saved."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.checkpoint import Checkpoints
from train.config import TrainError
from train.state import TrainState

LOSSES = {1: 3.0, 2: 0.5, 3: 2.0, 4: 1.0, 5: 2.5}


def state(step: int) -> TrainState:
    values = jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 7 + step
    return TrainState(jnp.int32(step), {"kernel": values}, ({"mu": values * 2}, jnp.int32(step)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, "abc", keep=2)
    for step, loss in LOSSES.items():
        checkpoints.save(state(step), {"next_batch": step}, loss)
    checkpoints.wait()
    checkpoints.close()
    return folder


def test_the_newest_and_the_best_are_kept(folder):
    checkpoints = Checkpoints(folder, "abc")
    assert checkpoints.steps == [2, 4, 5]
    assert checkpoints.best() == 2


def test_it_comes_back_to_the_bit(folder):
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
    )
    restored, iterator = Checkpoints(folder, "abc").restore(4, abstract)
    assert iterator == {"next_batch": 4}
    assert jax.tree.structure(restored) == jax.tree.structure(state(4))
    jax.tree.map(np.testing.assert_array_equal, restored, state(4))


def test_another_tokenizer_is_refused(folder):
    with pytest.raises(TrainError, match=r"checkpoints/5 belongs to tokenizer abc, not to xyz"):
        Checkpoints(folder, "xyz").restore_params(5, state(0).params)


def test_a_step_that_is_not_there(folder):
    with pytest.raises(TrainError, match=r"has no checkpoint 3; it has 2, 4, 5"):
        Checkpoints(folder, "abc").restore_params(3, state(0).params)


def test_nothing_there_yet(tmp_path):
    with pytest.raises(TrainError, match="no checkpoint yet"):
        Checkpoints(tmp_path / "none", "abc")
