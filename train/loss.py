"""Losses as a sum and a weight, so that parts can be added and divided once."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.axes import mesh_axes


def cross_entropy(
    logits: Float[Array, "*b V"],
    targets: Int[Array, "*b"],
    weights: Float[Array, "*b"],
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of weighted losses in nats, sum of weights), in float32.

    With smoothing e the target distribution is (1 - e) at the target plus e / V everywhere
    (arXiv:1512.00567 §7).
    """
    losses: jax.Array = token_losses(logits.astype(jnp.float32), targets, label_smoothing)  # type: ignore[assignment]
    return jnp.sum(losses * weights), jnp.sum(weights)


def cross_entropy_in_chunks(
    score: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    size: int,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`cross_entropy` of score(params, hidden), with the scores of `size` positions a row at once.

    Gradients are taken together with the values, so that no score is computed twice. `score` must
    depend on its arguments only.
    """
    T = hidden.shape[1]
    count = math.ceil(T / size)

    def split(x: jax.Array) -> jax.Array:
        """Positions are dealt out in turn, so that devices that share a row all have their part."""
        x = jnp.pad(x, [(0, 0), (0, -T % count), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], -1, count, *x.shape[2:]), 2, 0)

    def one(params: Any, hidden: jax.Array, others: tuple[jax.Array, jax.Array]):
        return cross_entropy(score(params, hidden), *others, label_smoothing)

    return _summed(one, params, split(hidden), (split(targets), split(weights)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(one: Callable, params: Any, hidden: jax.Array, others: Any):
    """Sums of one(params, hidden, others) over their first axis."""

    def add(total: Any, chunk: Any):
        return jax.tree.map(jnp.add, total, one(params, *chunk)), None

    zero = jnp.float32(0)
    return jax.lax.scan(add, (zero, zero), (hidden, others))[0]


def _summed_forward(one: Callable, params: Any, hidden: jax.Array, others: Any):
    gradient = jax.value_and_grad(one, argnums=(0, 1), has_aux=True)

    def add(total: Any, chunk: Any):
        (loss, weight), (of_params, of_hidden) = gradient(params, *chunk)
        return jax.tree.map(jnp.add, total, (loss, weight, of_params)), of_hidden

    zeros = jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    (loss, weight, of_params), of_hidden = jax.lax.scan(add, zeros, (hidden, others))
    return (loss, weight), (of_params, of_hidden)


def _summed_backward(one: Callable, saved: Any, g: tuple[jax.Array, jax.Array]):
    return *jax.tree.map(lambda x: (x * g[0]).astype(x.dtype), saved), None


_summed.defvjp(_summed_forward, _summed_backward)


def squared_error(
    outputs: Float[Array, "B 1"], targets: Float[Array, " B"], weights: Float[Array, " B"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of weighted squared errors, sum of weights), in float32."""
    errors = jnp.square(outputs[:, 0].astype(jnp.float32) - targets)
    return jnp.sum(errors * weights), jnp.sum(weights)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def token_losses(
    logits: Float[Array, "*b V"], targets: Int[Array, "*b"], label_smoothing: float
) -> Float[Array, "*b"]:
    """Cross-entropy of each token, in nats."""
    return _forward(logits, targets, label_smoothing)[0]


def _forward(logits: jax.Array, targets: jax.Array, label_smoothing: float):
    if any(mesh_axes("act_vocab")):  # A gather would be slow where V is sharded.
        score = jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=-1)
    else:
        score = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    if label_smoothing:
        score = (1 - label_smoothing) * score + label_smoothing * jnp.mean(logits, axis=-1)
    log_total = jax.nn.logsumexp(logits, axis=-1)
    return log_total - score, (logits, targets, log_total)


def _backward(label_smoothing: float, saved: tuple[jax.Array, ...], g: jax.Array):
    """softmax - target distribution, in one pass over the logits."""
    logits, targets, log_total = saved
    wanted = jnp.where(_is_target(logits, targets), 1 - label_smoothing, 0.0)
    wanted += label_smoothing / logits.shape[-1]
    return (jnp.exp(logits - log_total[..., None]) - wanted) * g[..., None], None


token_losses.defvjp(_forward, _backward)


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.arange(logits.shape[-1]) == targets[..., None]
