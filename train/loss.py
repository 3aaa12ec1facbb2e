"""Losses as a sum and a weight, so that parts can be added and divided once."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
    # A comparison instead of a gather, which would be slow where V is sharded.
    score = jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=-1)
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
