"""Test schedules against their formulas, and optimizers against the update rules of the papers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny

from heedful.configs import multi30k
from heedful.model.config import LinformerConfig
from heedful.model.transformer import build
from heedful.train.config import OptimizerConfig
from heedful.train.optimizer import learning_rate, make_optimizer
from heedful.train.trainable import named

STEPS, WARMUP, PEAK = 47, 11, 0.3


def rates(**values) -> np.ndarray:
    config = OptimizerConfig(peak_lr=PEAK, warmup_steps=WARMUP, **values)
    schedule = learning_rate(config, STEPS)
    return np.array([float(schedule(step)) for step in range(STEPS + 1)])


@pytest.mark.parametrize("schedule", ["inverse_sqrt", "linear", "cosine", "constant"])
def test_the_warmup_is_so_many_equal_steps_to_the_peak(schedule):
    expected = PEAK * np.arange(1, WARMUP + 1) / WARMUP
    np.testing.assert_allclose(rates(schedule=schedule)[:WARMUP], expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["inverse_sqrt", "linear", "cosine", "constant"])
def test_a_warmup_may_begin_at_another_rate_than_0(schedule):
    expected = 0.01 + (PEAK - 0.01) * np.arange(WARMUP + 1) / WARMUP
    got = rates(schedule=schedule, initial_lr=0.01)[: WARMUP + 1]
    np.testing.assert_allclose(got, expected, rtol=1e-5)  # a difference of float32 numbers


def test_inverse_sqrt_is_the_paper_s_rule():
    width = 512  # arXiv:1706.03762 §5.3: width^-0.5 * min(step^-0.5, step * warmup^-1.5)
    config = OptimizerConfig(peak_lr=(width * WARMUP) ** -0.5, warmup_steps=WARMUP)
    schedule = learning_rate(config, STEPS)
    for step in range(1, STEPS + 1):  # The schedule gets the number of updates before the step.
        expected = width**-0.5 * min(step**-0.5, step * WARMUP**-1.5)
        assert float(schedule(step - 1)) == pytest.approx(expected, rel=1e-5)


def test_with_an_initial_rate_inverse_sqrt_is_fairseq_s_rule():
    config = multi30k.get_config().train
    optimizer, schedule = config.optimizer, learning_rate(config.optimizer, config.steps)
    peak, warmup, initial = 5e-3, 2000, 1e-7  # as published (arXiv:2105.14462)
    assert (optimizer.peak_lr, optimizer.warmup_steps, optimizer.initial_lr) == (
        peak, warmup, initial,
    )  # fmt: skip
    # fairseq computes the rate of the first update from 0 updates, that of the second from 1, etc.
    for updates in (0, 1, 2, 1000, 1999, 2000, 2001, 7999):
        ramp = initial + updates * (peak - initial) / warmup
        expected = ramp if updates < warmup else peak * warmup**0.5 * updates**-0.5
        assert float(schedule(updates)) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_after_the_warmup_cosine_is_nanogpt_s_rule():
    got = rates(schedule="cosine", final_lr=0.02)
    for it in range(WARMUP, STEPS):
        share = (it - WARMUP) / (STEPS - WARMUP)
        expected = 0.02 + 0.5 * (1 + np.cos(np.pi * share)) * (PEAK - 0.02)
        assert got[it] == pytest.approx(expected, rel=1e-5)


def test_without_a_warmup_the_first_update_has_the_peak():
    config = OptimizerConfig(peak_lr=PEAK, warmup_steps=0)
    schedule = learning_rate(config, STEPS)
    got = [float(schedule(step)) for step in range(4)]
    np.testing.assert_allclose(got, PEAK / np.sqrt([1, 2, 3, 4]), rtol=1e-6)


def test_the_first_update_changes_the_parameters():
    config = OptimizerConfig(kind="adam", peak_lr=PEAK, warmup_steps=WARMUP)
    optimizer, params = make_optimizer(config, STEPS), {"kernel": jnp.ones((2, 3))}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    # Adam's first update has size 1 before the learning rate multiplies it.
    np.testing.assert_allclose(updates["kernel"], -PEAK / WARMUP, rtol=1e-6)


def test_linear_and_cosine_end_at_the_final_rate():
    share = (np.arange(WARMUP, STEPS + 1) - WARMUP) / (STEPS - WARMUP)
    linear = PEAK + (0.02 - PEAK) * share
    cosine = 0.02 + (PEAK - 0.02) * (1 + np.cos(np.pi * share)) / 2
    for schedule, expected in (("linear", linear), ("cosine", cosine)):
        got = rates(schedule=schedule, final_lr=0.02)[WARMUP:]
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_constant_stays():
    np.testing.assert_allclose(rates(schedule="constant")[WARMUP:], PEAK, rtol=1e-6)


def test_adamw_is_the_paper_s_update_and_decays_kernels_only():
    config = OptimizerConfig(
        peak_lr=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5, epsilon=1e-3
    )
    params = {"layer": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)}}
    optimizer = make_optimizer(config, STEPS)
    state, ours = optimizer.init(params), params
    expected = {name: np.array(value, np.float64) for name, value in params["layer"].items()}
    moments = {name: (0.0, 0.0) for name in expected}
    rng = np.random.default_rng(0)
    for t in range(1, 4):
        grads = {name: rng.normal(size=value.shape) for name, value in expected.items()}
        updates, state = optimizer.update(
            {"layer": {name: jnp.asarray(g, jnp.float32) for name, g in grads.items()}}, state, ours
        )
        ours = optax.apply_updates(ours, updates)
        for name, g in grads.items():  # arXiv:1711.05101, algorithm 2
            m, v = moments[name]
            m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
            moments[name] = (m, v)
            step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.98**t)) + 1e-3)
            decay = 0.5 * expected[name] if name == "kernel" else 0.0
            expected[name] = expected[name] - 0.1 * (step + decay)
    for name, value in expected.items():
        np.testing.assert_allclose(ours["layer"][name], value, rtol=1e-5)


def test_all_matrices_decay():
    config = OptimizerConfig(peak_lr=0.1, warmup_steps=0, schedule="constant", weight_decay=1.0)
    model = tiny(
        "encoder_only",
        attention_core="linformer",
        attention_linformer=LinformerConfig(rank=3),
        lora_rank=2,
    )
    shapes = jax.eval_shape(build(model).init, jax.random.key(0), jnp.zeros((1, 5), jnp.int32))
    params = jax.tree.map(lambda x: jnp.ones(x.shape), nn.unbox(shapes)["params"])
    optimizer, zeros = make_optimizer(config, STEPS), jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    decayed = {name.split(".")[-1] for name, x in named(updates) if jnp.all(x < 0)}
    assert decayed == {"kernel", "lora_a", "lora_b", "keys", "values"}


def test_adam_does_not_decay():
    config = OptimizerConfig(kind="adam", peak_lr=0.1, warmup_steps=0)
    optimizer = make_optimizer(config, STEPS)
    params = {"kernel": jnp.ones((2, 3))}
    updates, _ = optimizer.update({"kernel": jnp.zeros((2, 3))}, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["kernel"], 0.0)
