"""Cross-entropy against a plain computation in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.loss import cross_entropy

B, T, V = 3, 5, 7


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sum_weight_and_gradient(smoothing: float):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(B, T, V)) * 3
    targets = rng.integers(0, V, (B, T))
    weights = rng.integers(0, 2, (B, T)) * rng.random((B, T))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = np.full((B, T, V), smoothing / V)
    wanted[np.arange(B)[:, None], np.arange(T), targets] += 1 - smoothing
    expected = -(wanted * np.log(probabilities)).sum(-1)

    def loss(logits):
        return cross_entropy(logits, jnp.asarray(targets), jnp.asarray(weights), smoothing)

    (total, weight), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.float32(logits))
    np.testing.assert_allclose(total, (expected * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(weight, weights.sum(), rtol=1e-6)
    expected_gradient = (probabilities - wanted) * weights[..., None]
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


def test_huge_logits_and_bfloat16():
    logits = jnp.array([[[3e4, -3e4, 0.0]]], jnp.bfloat16)
    loss, _ = cross_entropy(logits, jnp.array([[1]]), jnp.ones((1, 1)))
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(float(logits[0, 0, 0]) - float(logits[0, 0, 1]))
