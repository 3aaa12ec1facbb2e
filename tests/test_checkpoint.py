"""What is kept, what is refused, and that what comes back is what was saved."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.checkpoint import Checkpoints
from train.config import TrainError
from train.state import TrainState

SCORES = {1: -3.0, 2: -0.5, 3: -0.5, 4: -1.0, 5: -2.5}  # the best one twice


def state(step: int) -> TrainState:
    values = jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 7 + step
    return TrainState(jnp.int32(step), {"kernel": values}, ({"mu": values * 2}, jnp.int32(step)))


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(folder, "abc", keep=2) as checkpoints:
        for step, score in SCORES.items():
            save(checkpoints, step, score)
    return folder


def save(checkpoints: Checkpoints, step: int, score: float | None, **how: bool) -> None:
    checkpoints.save(state(step), {"next_batch": step}, **how)
    checkpoints.wait()
    if score is not None:
        checkpoints.add_score(step, score)


def test_the_newest_and_the_first_of_the_best_are_kept(folder):
    checkpoints = Checkpoints(folder, "abc")
    assert checkpoints.steps == [2, 4, 5]
    assert checkpoints.best() == 2
    assert checkpoints.scores == {2: -0.5, 4: -1.0, 5: -2.5}


def test_none_goes_before_there_are_as_many_as_are_kept(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", "abc", keep=5) as checkpoints:
        for step in range(1, 8):
            save(checkpoints, step, float(step))
            assert checkpoints.steps == [*range(max(step - 4, 1), step + 1)]


def test_one_without_a_score_is_never_the_best(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", "abc", keep=2) as checkpoints:
        save(checkpoints, 1, None)
        with pytest.raises(TrainError, match="no checkpoint with a score"):
            checkpoints.best()
        for step, score in ((2, -9.0), (3, None)):
            save(checkpoints, step, score)
        assert checkpoints.best() == 2


def test_one_without_a_score_takes_no_place_of_another(tmp_path):
    """A run that was stopped, at 6 here, keeps what it would have kept."""
    with Checkpoints(tmp_path / "checkpoints", "abc", keep=3) as checkpoints:
        for step in range(1, 6):
            save(checkpoints, step, 9.0 if step == 1 else float(step))
        save(checkpoints, 6, None, is_due=False)
        assert checkpoints.steps == [1, 3, 4, 5, 6] and checkpoints.scored == [1, 3, 4, 5]
        save(checkpoints, 7, 7.0)
        assert checkpoints.steps == [1, 4, 5, 7]


def test_an_error_of_one_process_does_not_wait_for_the_others(tmp_path, monkeypatch):
    """They may not know of it, and never come; what has begun is written nevertheless."""
    with (
        pytest.raises(ZeroDivisionError),
        Checkpoints(tmp_path / "checkpoints", "abc", keep=1) as checkpoints,
    ):
        checkpoints.save(state(1), {})
        monkeypatch.setattr("train.checkpoint.any_process", lambda _: pytest.fail("waits"))
        _ = 1 / 0
    assert checkpoints.steps == [1]
    monkeypatch.undo()
    assert Checkpoints(tmp_path / "checkpoints", "abc").steps == [1]


def test_frozen_parameters_have_no_moments_to_come_back(tmp_path):
    """Where the optimizer has None, so does what is restored."""
    step, params = jnp.int32(7), {"a": jnp.ones(3), "b": jnp.zeros(2)}
    saved = TrainState(step, params, ({"a": jnp.full(3, 2.0), "b": None}, step))
    checkpoints = Checkpoints(tmp_path / "checkpoints", "abc", keep=1)
    checkpoints.save(saved, {"next_batch": 3})
    checkpoints.wait()
    restored, iterator = checkpoints.restore(7, abstract(saved))
    checkpoints.close()
    assert iterator == {"next_batch": 3}
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, restored, saved)


def test_parameters_alone_are_a_checkpoint_to_use(tmp_path):
    params = state(3).params
    checkpoints = Checkpoints(tmp_path / "checkpoints", "abc", keep=1)
    checkpoints.save_params(params)
    checkpoints.close()
    opened = Checkpoints(tmp_path / "checkpoints", "abc")
    assert opened.steps == [opened.best()] == [0]
    restored = opened.restore_params(0, abstract(state(3)).params)
    jax.tree.map(np.testing.assert_array_equal, restored, params)


def test_it_comes_back_to_the_bit(folder):
    restored, iterator = Checkpoints(folder, "abc").restore(4, abstract(state(0)))
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
