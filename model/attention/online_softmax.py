"""Softmax over keys that arrive in blocks, and its derivative (arXiv:2205.14135 §3.1, §B.2)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOWEST = jnp.finfo(jnp.float32).min


class OnlineSoftmax(NamedTuple):
    """Sums over the keys seen so far, each divided by exp(maximum), in float32."""

    values: Float[Array, "*rows H"]
    """Sum of exp(score) v."""
    maximum: Float[Array, "*rows"]
    """Largest attention score."""
    total: Float[Array, "*rows"]
    """Sum of exp(score)."""

    @classmethod
    def start(cls, shape: tuple[int, ...]) -> "OnlineSoftmax":
        """Return the state before the first key, for values of shape [*rows, H]: sums are 0."""
        zeros = jnp.zeros(shape, jnp.float32)
        # The lowest number, not -inf: -inf minus -inf would be NaN.
        return cls(zeros, jnp.full(shape[:-1], LOWEST), zeros[..., 0])

    def add(
        self, scores: Float[Array, "*rows S"], weigh: Callable[[jax.Array], jax.Array]
    ) -> "OnlineSoftmax":
        """Return the state with S keys added; `scores` is -inf for pairs that are not allowed.

        `weigh` returns weights [*rows, S] @ values of the S keys, [*rows, H].
        """
        maximum = jnp.maximum(self.maximum, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - maximum[..., None])
        shrink = jnp.exp(self.maximum - maximum)
        total = self.total * shrink + jnp.sum(weights, axis=-1)
        return OnlineSoftmax(self.values * shrink[..., None] + weigh(weights), maximum, total)

    def finish(self) -> tuple[Float[Array, "*rows H"], Float[Array, "*rows"]]:
        """Return the weighted mean of values, and the logarithm of the softmax denominator.

        Queries without keys get 0 and inf, so that the backward pass gives them weights of 0.
        """
        values = self.values / jnp.where(self.total > 0, self.total, 1.0)[..., None]
        return values, jnp.where(self.total > 0, self.maximum + jnp.log(self.total), jnp.inf)


def score_gradients(
    weights: Float[Array, "*block"],
    dweights: Float[Array, "*block"],
    delta: Float[Array, "*#block"],
    kept: Float[Array, "*#block"] | None,
) -> tuple[Float[Array, "*block"], Float[Array, "*block"]]:
    """Return the weights after dropout, and the gradient of the attention scores.

    `dweights` is the gradient of the weights after dropout; `kept` has the factors of dropout,
    None: no dropout; `delta` is, for each query, the scalar product of the output and its gradient.
    """
    if kept is None:
        return weights, weights * (dweights - delta)
    return weights * kept, weights * (dweights * kept - delta)


def bias_gradient(
    tile: Callable[[jax.Array], jax.Array],
    values: Float[Array, "..."],
    dscores: Float[Array, "B *rest"],
) -> Float[Array, "..."]:
    """Return the gradient of `values` for a block whose bias is tile(values).

    `dscores` is the gradient of the attention scores.
    """
    bias, pull = jax.vjp(tile, values)
    if bias.shape[0] == 1:
        dscores = jnp.sum(dscores, axis=0, keepdims=True)
    return pull(dscores.astype(bias.dtype))[0]
