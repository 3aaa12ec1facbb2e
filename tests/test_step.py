"""Test a training step: settings that must not change its result, and its metrics."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import toy
from test_sharding import (
    CLASSIFIER,
    EVERY_AXIS,
    MASKED,
    MODEL,
    PACKED,
    TRAIN,
    Trained,
    batch,
    loss_of,
    prepare,
    train,
)

from heedful.model.config import HeadConfig, ModelConfig, PerformerConfig
from heedful.train.config import MeshConfig, OptimizerConfig, TrainConfig
from heedful.train.metrics import NonFiniteLoss, require_finite
from heedful.train.sharding import make_mesh, to_devices
from heedful.train.state import first_state, parameter_count, set_up
from heedful.train.step import make_eval_step, make_train_step

ONE = MeshConfig()
REGRESSION = dataclasses.replace(CLASSIFIER, head=HeadConfig(kind="classifier", outputs=1))


def initial(model: ModelConfig) -> Any:
    return toy.random_params(model, make_mesh(ONE, jax.devices()[:1]), seed=0)


def run(model: ModelConfig, config: TrainConfig = TRAIN, steps: int = 1) -> Trained:
    return train(model, config, steps=steps, params=initial(model))


@pytest.mark.parametrize(
    "model", quick.only([PACKED], [MODEL, PACKED, CLASSIFIER]), ids=["pairs", "packed", "classes"]
)
def test_accumulation_equals_the_large_batch(model: ModelConfig):
    # With a large epsilon Adam is linear in the gradient, so that it does not amplify rounding.
    linear = OptimizerConfig(peak_lr=0.1, warmup_steps=0, epsilon=1.0)
    config = TrainConfig(accumulate=4, optimizer=linear)
    # Dropout is off because each part of a batch would draw its own masks.
    head = dataclasses.replace(model.head, dropout=0.0)
    model = dataclasses.replace(model, dropout=0.0, head=head)
    parts = run(model, config, steps=2)
    whole = run(model, dataclasses.replace(config, accumulate=1), steps=2)
    for name in ("loss", "weight", "grad_norm"):
        np.testing.assert_allclose(parts.metrics[1][name], whole.metrics[1][name], rtol=2e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7),
        parts.state.params,
        whole.state.params,
    )


@pytest.mark.parametrize("tied", quick.only([True], [True, False]))
@pytest.mark.parametrize(
    "model",
    quick.only([PACKED], [MODEL, PACKED, MASKED]),
    ids=["pairs", "packed", "masked"],
)
def test_a_loss_in_chunks_changes_nothing(model: ModelConfig, tied: bool):
    model = dataclasses.replace(model, tie_embeddings=tied)
    chunked = dataclasses.replace(TRAIN, loss_chunk=4)  # of 6 positions
    ours, whole = run(model, chunked, steps=2), run(model, steps=2)
    for name in ("loss", "weight", "grad_norm"):
        for a, b in zip(ours.metrics, whole.metrics, strict=True):
            np.testing.assert_allclose(a[name], b[name], rtol=2e-6)
    mesh = whole.setup.mesh
    with jax.set_mesh(mesh):
        placed = to_devices(batch(np.random.default_rng(3), model), mesh)
        in_chunks, at_once = (
            make_eval_step(model, mesh, loss_of(model), chunk, label_smoothing=0.1)(
                whole.state.params, placed
            )
            for chunk in (4, None)
        )
    assert in_chunks[0].keys() == {"loss", "smoothed_loss"} and in_chunks[1] == at_once[1]
    for name, loss in in_chunks[0].items():
        np.testing.assert_allclose(loss, at_once[0][name], rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model", [MODEL, MASKED], ids=["pairs", "masked"])
def test_a_loss_in_chunks_on_every_axis_of_a_mesh(model: ModelConfig):
    chunked = dataclasses.replace(TRAIN, loss_chunk=3)  # of 6 positions: 2 of each device's 3
    whole = run(model, steps=2)
    ours = train(model, chunked, make_mesh(EVERY_AXIS), steps=2, params=initial(model))
    for name in ("loss", "weight", "grad_norm"):
        for a, b in zip(ours.metrics, whole.metrics, strict=True):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5)


@pytest.mark.slow
def test_a_loss_in_chunks_never_holds_all_scores():
    """The vocabulary is so large that the rest of the model needs little memory."""
    model = dataclasses.replace(PACKED, vocab_size=4999, dropout=0.0)

    def memory(chunk: int | None) -> int:
        config = dataclasses.replace(TRAIN, loss_chunk=chunk)
        mesh = make_mesh(ONE, jax.devices()[:1])
        setup = set_up(model, config, mesh)
        with jax.set_mesh(mesh):
            placed = to_devices(batch(np.random.default_rng(3), model, rows=16, length=64), mesh)
            step: Any = make_train_step(model, config, setup, loss_of(model))
            return step.lower(setup.abstract, placed).compile().memory_analysis().temp_size_in_bytes

    scores = 16 * 64 * 4999 * 4
    assert memory(None) > scores
    assert memory(4) < scores / 2


@pytest.mark.slow
def test_a_first_moment_of_half_the_size():
    optimizer = dataclasses.replace(TRAIN.optimizer, first_moment="bfloat16")
    ours, whole = (
        run(MODEL, dataclasses.replace(TRAIN, optimizer=optimizer), 3),
        run(MODEL, steps=3),
    )
    first, second = ours.state.opt_state[0].mu, ours.state.opt_state[0].nu
    assert {x.dtype for x in jax.tree.leaves(first)} == {np.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(second)} == {np.dtype("float32")}
    for a, b in zip(ours.metrics, whole.metrics, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-3)  # 8 bits of mantissa


@pytest.mark.slow
def test_the_gradient_is_clipped_and_its_norm_reported_before():
    def update(clip: float | None) -> tuple[float, float]:
        optimizer = OptimizerConfig(peak_lr=1.0, warmup_steps=0, epsilon=1e3, clip_norm=clip)
        trained = run(CLASSIFIER, TrainConfig(optimizer=optimizer))
        mean = trained.state.opt_state[0].mu  # a tenth of the applied gradient after one step
        norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(mean))) * 10
        return trained.metrics[0]["grad_norm"], norm

    free, applied = update(None)
    np.testing.assert_allclose(applied, free, rtol=1e-5)
    clipped, applied = update(float(free) / 3)
    np.testing.assert_allclose(clipped, free, rtol=1e-5)
    np.testing.assert_allclose(applied, free / 3, rtol=1e-5)


@pytest.mark.slow
def test_bfloat16_computes_the_same_within_its_precision():
    exact = run(MODEL, steps=2)
    coarse = run(dataclasses.replace(MODEL, dtype="bfloat16"), steps=2)
    leaves = jax.tree.leaves(coarse.state.params)
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
    for a, b in zip(coarse.metrics, exact.metrics, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=0.02)  # 8 bits of mantissa
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=0.05)


def test_norms_are_told_by_parameter_and_layer():
    trained = run(MODEL)
    metrics = trained.metrics[0]
    norms = metrics["grad_norms"]
    assert norms["encoder"]["blocks"]["feed_forward"]["up"]["kernel"].shape == (MODEL.layers,)
    assert norms["embedding"]["table"].shape == ()
    total = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(norms)))
    np.testing.assert_allclose(total, metrics["grad_norm"], rtol=1e-5)
    require_finite(1, metrics)
    metrics["loss"] = np.float32("nan")
    with pytest.raises(NonFiniteLoss) as error:
        require_finite(7, metrics)
    assert "at step 7 the loss is nan" in str(error.value)
    assert "encoder.blocks.feed_forward.up.kernel[1]: gradient" in str(error.value)
    params = trained.state.params
    assert parameter_count(params) == sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.slow
def test_dropout_follows_seed_and_step():
    losses = [
        [float(m["loss"]) for m in run(MODEL, dataclasses.replace(TRAIN, seed=seed)).metrics]
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def with_performer(performer: PerformerConfig) -> ModelConfig:
    attention = dataclasses.replace(MODEL.attention, core="performer", performer=performer)
    return dataclasses.replace(MODEL, dropout=0.0, attention=attention)


@pytest.mark.slow
def test_random_features_are_drawn_again_every_redraw_steps():
    """The features depend on the step only, so that a resumed run draws the same features."""
    model = with_performer(PerformerConfig(features=5, redraw_steps=2))
    mesh = make_mesh(ONE, jax.devices()[:1])
    setup, step = prepare(model, TRAIN, mesh)
    params = jax.device_get(initial(model))
    found = []
    with jax.set_mesh(mesh):
        placed = to_devices(batch(np.random.default_rng(3), model), mesh)
        for number in range(5):
            state = first_state(setup, jax.device_put(params)).replace(step=jnp.int32(number))
            found.append(float(step(state, placed)[1]["loss"]))
    assert found[0] == found[1] != found[2] == found[3] != found[4]


@pytest.mark.slow
def test_a_performer_is_measured_with_the_features_that_it_trains_with():
    """A model adapts to its features; with other features its loss would be worse."""
    model = with_performer(PerformerConfig(features=5))
    config = dataclasses.replace(TRAIN, label_smoothing=0.0)
    mesh = make_mesh(ONE, jax.devices()[:1])
    setup, step = prepare(model, config, mesh)
    with jax.set_mesh(mesh):
        placed = to_devices(batch(np.random.default_rng(3), model), mesh)
        state = first_state(setup, initial(model))
        losses, weight, _ = make_eval_step(model, mesh, loss_of(model))(state.params, placed)
        trained = step(state, placed)[1]
    assert float(losses["loss"]) == pytest.approx(float(trained["loss"]), rel=1e-6)
    assert weight == trained["weight"]


@pytest.mark.parametrize("model", [CLASSIFIER, REGRESSION], ids=["classes", "numbers"])
def test_the_measurement_of_a_classifier_gives_its_outputs(model: ModelConfig):
    """The loss follows from the outputs, in float64 and without rows of padding."""
    mesh = make_mesh(ONE, jax.devices()[:1])
    params = initial(model)
    with jax.set_mesh(mesh):
        placed = to_devices(batch(np.random.default_rng(3), model), mesh)
        losses, weight, predicted = jax.device_get(
            make_eval_step(model, mesh, loss_of(model))(params, placed)
        )
    outputs, targets, weights = (predicted[name] for name in ("outputs", "targets", "weights"))
    assert outputs.shape == (16, model.head.outputs) and outputs.dtype == np.float32
    real = weights > 0
    assert 0 < real.sum() == weight < 16
    outputs, targets = outputs[real].astype(np.float64), targets[real]
    if model is REGRESSION:
        expected = ((outputs[:, 0] - targets) ** 2).sum()
    else:
        chances = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
        expected = -np.log(chances[np.arange(len(targets)), targets]).sum()
    np.testing.assert_allclose(losses["loss"], expected, rtol=1e-5)
