"""One update: what it must not depend on, and what it must report."""

import dataclasses

import jax
import numpy as np
import pytest
from test_sharding import MODEL, TRAIN, batch

from model.config import ModelConfig
from train.config import MeshConfig, OptimizerConfig, TrainConfig
from train.metrics import NonFiniteLoss, require_finite
from train.optimizer import make_optimizer
from train.sharding import make_mesh
from train.state import abstract_state, init_state, parameter_count
from train.step import make_train_step


def run(model: ModelConfig, config: TrainConfig, seeds=(1, 2)):
    """Metrics and state after one step for each seed of a batch."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = make_train_step(model, config, optimizer, abstract_state(model, optimizer, mesh))
    state, metrics = init_state(model, optimizer, mesh, seed=0), []
    for seed in seeds:
        state, values = step(state, batch(np.random.default_rng(seed)))
        metrics.append(jax.device_get(values))
    return metrics, state


def test_accumulation_equals_the_large_batch():
    # With a large epsilon Adam is linear in the gradient, and rounding stays rounding.
    linear = OptimizerConfig(peak_lr=0.1, warmup_steps=0, epsilon=1.0)
    config = TrainConfig(accumulate=4, label_smoothing=0.1, optimizer=linear)
    model = dataclasses.replace(MODEL, dropout=0.0)  # each part would draw its own masks
    parts, ours = run(model, config)
    whole, theirs = run(model, dataclasses.replace(config, accumulate=1))
    for name in ("loss", "weight", "grad_norm"):
        np.testing.assert_allclose(parts[1][name], whole[1][name], rtol=2e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), ours.params, theirs.params
    )


def test_the_gradient_is_clipped_and_its_norm_reported_before():
    def update(clip: float | None) -> tuple[float, float]:
        optimizer = OptimizerConfig(peak_lr=1.0, warmup_steps=0, epsilon=1e3, clip_norm=clip)
        metrics, state = run(MODEL, TrainConfig(optimizer=optimizer), seeds=(1,))
        mean = state.opt_state[0].mu  # after one step a tenth of the gradient that was applied
        norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(mean))) * 10
        return metrics[0]["grad_norm"], norm

    free, applied = update(None)
    np.testing.assert_allclose(applied, free, rtol=1e-5)
    clipped, applied = update(float(free) / 3)
    np.testing.assert_allclose(clipped, free, rtol=1e-5)
    np.testing.assert_allclose(applied, free / 3, rtol=1e-5)


def test_bfloat16_computes_the_same_within_its_precision():
    exact, _ = run(MODEL, TRAIN)
    coarse, state = run(dataclasses.replace(MODEL, dtype="bfloat16"), TRAIN)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
    for a, b in zip(coarse, exact, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=0.02)  # 8 bits of mantissa
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=0.05)


def test_norms_are_told_by_parameter_and_layer():
    metrics, state = run(MODEL, TRAIN, seeds=(1,))
    norms = metrics[0]["grad_norms"]
    assert norms["encoder"]["blocks"]["feed_forward"]["up"]["kernel"].shape == (MODEL.layers,)
    assert norms["embedding"]["table"].shape == ()
    total = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(norms)))
    np.testing.assert_allclose(total, metrics[0]["grad_norm"], rtol=1e-5)
    require_finite(1, metrics[0])
    metrics[0]["loss"] = np.float32("nan")
    with pytest.raises(NonFiniteLoss) as error:
        require_finite(7, metrics[0])
    assert "at step 7 the loss is nan" in str(error.value)
    assert "encoder.blocks.feed_forward.up.kernel[1]: gradient" in str(error.value)
    assert parameter_count(state.params) == sum(x.size for x in jax.tree.leaves(state.params))


def test_dropout_follows_seed_and_step():
    losses = [
        run(MODEL, dataclasses.replace(TRAIN, seed=seed), seeds=(1,))[0][0]["loss"]
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]
