"""Test which checkpoints are kept or refused, and that restoring returns the saved state."""

import multiprocessing
import os
import random
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heedful.train.checkpoint import Checkpoints, CorruptCheckpoint
from heedful.train.errors import TrainError
from heedful.train.state import TrainState

SCORES = {1: -3.0, 2: -0.5, 3: -0.5, 4: -1.0, 5: -2.5}  # Two steps have the best score.


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


def test_those_that_somebody_removes_are_told(tmp_path, capfd):
    with Checkpoints(tmp_path / "checkpoints", "abc", keep=5) as checkpoints:
        for step in (1, 2):
            save(checkpoints, step, float(step))
        assert "lost" not in capfd.readouterr().err
        shutil.rmtree(checkpoints.directory)
        save(checkpoints, 3, 3.0)
        assert "has lost its checkpoints of step 1, 2; training goes on" in capfd.readouterr().err
        assert checkpoints.steps == [3] and checkpoints.best() == 3


def test_one_without_a_score_is_never_the_best(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", "abc", keep=2) as checkpoints:
        save(checkpoints, 1, None)
        with pytest.raises(TrainError, match="no checkpoint with a score"):
            checkpoints.best()
        for step, score in ((2, -9.0), (3, None)):
            save(checkpoints, step, score)
        assert checkpoints.best() == 2


def test_one_without_a_score_takes_no_place_of_another(tmp_path):
    """A run that stops, here at step 6, keeps the same checkpoints as a run that does not stop."""
    with Checkpoints(tmp_path / "checkpoints", "abc", keep=3) as checkpoints:
        for step in range(1, 6):
            save(checkpoints, step, 9.0 if step == 1 else float(step))
        save(checkpoints, 6, None, is_due=False)
        assert checkpoints.steps == [1, 3, 4, 5, 6] and checkpoints.with_score == [1, 3, 4, 5]
        save(checkpoints, 7, 7.0)
        assert checkpoints.steps == [1, 4, 5, 7]


def test_an_error_of_one_process_does_not_wait_for_the_others(tmp_path, monkeypatch):
    """Other processes may not know of the error and never reach the barrier.

    A checkpoint whose saving has begun is written nevertheless.
    """
    with (
        pytest.raises(ZeroDivisionError),
        Checkpoints(tmp_path / "checkpoints", "abc", keep=1) as checkpoints,
    ):
        checkpoints.save(state(1), {})
        monkeypatch.setattr("heedful.train.checkpoint.any_process", lambda _: pytest.fail("waits"))
        _ = 1 / 0
    assert checkpoints.steps == [1]
    monkeypatch.undo()
    assert Checkpoints(tmp_path / "checkpoints", "abc").steps == [1]


def test_frozen_parameters_have_no_moments_to_come_back(tmp_path):
    """The restored state has None where the optimizer state has None."""
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


# Damage ------------------------------------------------------------------------------------------


def of_any_bits(step: int) -> TrainState:
    """Return a state of random bits, which cannot be compressed and are stored as they are."""
    rng = np.random.default_rng(step)
    draw = lambda: jnp.asarray(  # noqa: E731
        rng.integers(0, 2**32, (37, 64), np.uint32).view(np.float32)
    )
    params = {"body": {"kernel": draw()}, "head": {"kernel": draw()}}
    moments = {name: jax.tree.map(lambda _: draw(), params) for name in ("mu", "nu")}
    return TrainState(jnp.int32(step), params, (moments, jnp.int32(step)))


def read(folder: Path) -> tuple[TrainState, dict] | str:
    """Return the content of the checkpoint of step 4, or the error that refuses it."""
    try:
        return Checkpoints(folder, "abc").restore(4, abstract(of_any_bits(4)))
    except CorruptCheckpoint as error:
        return str(error)


def same(found: tuple[TrainState, dict] | str) -> bool:
    if isinstance(found, str):
        return False
    ours, theirs = jax.tree.flatten(found[0]), jax.tree.flatten(of_any_bits(4))
    bits = lambda tree: [np.asarray(x).tobytes() for x in tree[0]]  # noqa: E731
    return ours[1] == theirs[1] and bits(ours) == bits(theirs) and found[1] == {"next": 4}


def save_any_bits(folder: Path) -> list[Path]:
    """Save a checkpoint and return its files."""
    with Checkpoints(folder, "abc", keep=1) as checkpoints:
        checkpoints.save(of_any_bits(4), {"next": 4})
    assert same(read(folder))
    return sorted(path for path in (folder / "4").rglob("*") if path.is_file())


def flip(path: Path, bit: int) -> bytes:
    """Flip a bit of a file and return the former content of the file."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    return before


def find_flipped_bits(folder: Path) -> None:
    """Flip fifty bits: 25 in the two largest files, which hold the data, and 25 in any file."""
    files, rng, refused = save_any_bits(folder), random.Random(0), 0
    largest = sorted(files, key=lambda path: -path.stat().st_size)[:2]
    for turn in range(50):
        path = (
            largest[turn % 2] if turn < 25 else rng.choice([p for p in files if p.stat().st_size])
        )
        before = flip(path, rng.randrange(8 * path.stat().st_size))
        found = read(folder)
        path.write_bytes(before)
        if isinstance(found, str):
            item = path.relative_to(folder / "4").parts[0]
            assert f"4 is corrupt ({item}" in found or item == "sums", (path, found)
            refused += 1
        else:
            # The checkpoint stores this bit twice, or the bit does not belong to the data.
            assert same(found), path
    assert refused > 25 and same(read(folder))


def name_what_differs(folder: Path) -> None:
    files, state = save_any_bits(folder), of_any_bits(4)
    arrays = {"params.head.kernel": state.params["head"]["kernel"]}
    arrays |= {"opt_state.0.nu.body.kernel": state.opt_state[0]["nu"]["body"]["kernel"]}
    for name, array in arrays.items():
        piece = np.asarray(array).tobytes()[400:416]
        places = [(path, path.read_bytes().find(piece)) for path in files]
        ((path, place),) = [found for found in places if found[1] >= 0]
        before = flip(path, 8 * place + 3)
        message = str(read(folder))
        assert f"({name}: the bits differ from the checksum)" in message, message
        assert "--fallback" in message
        path.write_bytes(before)
    position = folder / "4" / "data" / "metadata"
    position.write_text(position.read_text().replace("4", "5"))
    assert "(data: the bits differ from the checksum)" in str(read(folder))


def alone(what: Callable[[Path], None], folder: Path) -> None:
    try:
        what(folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("what", [find_flipped_bits, name_what_differs])
def test_damage_is_found(what: Any, tmp_path):
    """The test needs a process of its own: see test_cli.test_a_corrupt_checkpoint."""
    folder = tmp_path / "checkpoints"
    process = multiprocessing.get_context("spawn").Process(target=alone, args=(what, folder))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_one_from_before_there_were_sums_is_read_and_that_is_said_once(folder, tmp_path, capfd):
    copy = shutil.copytree(folder, tmp_path / "checkpoints")
    for step in (4, 5):
        shutil.rmtree(copy / str(step) / "sums")
    checkpoints = Checkpoints(copy, "abc")
    for step in (4, 5):
        restored, _ = checkpoints.restore(step, abstract(state(0)))
        jax.tree.map(np.testing.assert_array_equal, restored, state(step))
    said = capfd.readouterr().err
    assert said.count("before checkpoints had checksums") == 1 and "checkpoints/4" in said
