"""Test cross-entropy against a plain computation in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heedful.train.loss import cross_entropy, cross_entropy_in_chunks, squared_error

B, T, V = 3, 5, 7


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(B, T), (B,)], ids=["tokens", "classes"])
def test_sum_weight_and_gradient(smoothing: float, shape: tuple[int, ...]):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(*shape, V)) * 3
    targets = rng.integers(0, V, shape)
    weights = (1 + rng.integers(-1, 1, shape)) * rng.random(shape)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = np.full((*shape, V), smoothing / V)
    np.put_along_axis(wanted, targets[..., None], 1 - smoothing + smoothing / V, -1)
    expected = -(wanted * np.log(probabilities)).sum(-1)

    def loss(logits):
        return cross_entropy(logits, jnp.asarray(targets), jnp.asarray(weights), smoothing)

    (total, weight), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.float32(logits))
    np.testing.assert_allclose(total, (expected * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(weight, weights.sum(), rtol=1e-6)
    expected_gradient = (probabilities - wanted) * weights[..., None]
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_chunks_change_nothing(size: int, skips: bool):
    rng = np.random.default_rng(0)
    hidden, kernel = jnp.float32(rng.normal(size=(B, T, 2))), jnp.float32(rng.normal(size=(2, V)))
    targets, weights = jnp.asarray(rng.integers(0, V, (B, T))), jnp.float32(rng.random((B, T)))
    weights *= rng.random((B, T)) > 0.4
    score = lambda kernel, x: jnp.einsum("BTD,DV->BTV", x, kernel)  # noqa: E731

    def whole(kernel, x):
        loss, weight = cross_entropy(score(kernel, x), targets, weights, 0.1)
        return 3 * loss, weight

    def chunks(kernel, x):
        how = {"skips": skips}
        loss, weight = cross_entropy_in_chunks(score, kernel, x, targets, weights, size, 0.1, **how)
        return 3 * loss, weight

    expected = jax.value_and_grad(whole, (0, 1), has_aux=True)(kernel, hidden)
    found = jax.value_and_grad(chunks, (0, 1), has_aux=True)(kernel, hidden)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, expected
    )
    np.testing.assert_allclose(chunks(kernel, hidden), whole(kernel, hidden), rtol=1e-6)


@pytest.mark.parametrize(("counted", "needed"), [(0, 0), (1, 1), (2, 1), (3, 2), (5, 3)])
def test_chunks_in_which_nothing_counts_are_left_out(counted: int, needed: int):
    """One row has `counted` positions with a weight; `needed` chunks of two are computed."""
    weights = np.zeros((B, T), np.float32)
    weights[1, np.random.default_rng(0).permutation(T)[:counted]] = 1
    runs = []

    def score(kernel: jax.Array, x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: runs.append(x.shape))
        return x * kernel

    def loss(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden, targets = jnp.zeros((B, T, V)), jnp.zeros((B, T), int)
        return cross_entropy_in_chunks(
            score, kernel, hidden, targets, jnp.asarray(weights), 2, skips=True
        )

    total, weight = loss(jnp.ones(V))
    jax.effects_barrier()
    assert runs == [(B, 2, V)] * needed
    np.testing.assert_allclose(total, counted * np.log(V), rtol=1e-6)
    assert weight == counted
    jax.grad(lambda kernel: loss(kernel)[0])(jnp.ones(V))
    jax.effects_barrier()
    assert runs == [(B, 2, V)] * 2 * needed


def test_huge_logits_and_bfloat16():
    logits = jnp.array([[[3e4, -3e4, 0.0]]], jnp.bfloat16)
    loss, _ = cross_entropy(logits, jnp.array([[1]]), jnp.ones((1, 1)))
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(float(logits[0, 0, 0]) - float(logits[0, 0, 1]))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="others compute them where needed")
def test_exponentials_are_computed_once():
    logits, targets, weights = jnp.zeros((B, T, V)), jnp.zeros((B, T), jnp.int32), jnp.ones((B, T))
    gradient = jax.jit(jax.value_and_grad(cross_entropy, has_aux=True))
    program = gradient.lower(logits, targets, weights).compile().as_text()
    assert program.count(" exponential(") == 1


def test_squared_error():
    rng = np.random.default_rng(0)
    outputs, targets = rng.normal(size=(T, 1)), rng.normal(size=T)
    weights = np.array([1.0, 0.0, 0.5, 1.0, 0.0])
    error, weight = squared_error(
        jnp.asarray(outputs, jnp.float32),
        jnp.asarray(targets, jnp.float32),
        jnp.asarray(weights, jnp.float32),
    )
    np.testing.assert_allclose(error, (weights * (outputs[:, 0] - targets) ** 2).sum(), rtol=1e-6)
    assert weight == 2.5 and error.dtype == jnp.float32
