"""Changes of logits before a token is chosen: penalties, exclusions, and cuts of the tail."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from heedful.model.ops.top_k import values_and_indices


def penalise(
    logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"] | None, penalty: float
) -> Float[Array, "*B V"]:
    """Divide positive logits of the tokens in `seen` by `penalty`, multiply negative ones by it.

    This makes tokens rarer that a row holds already (arXiv:1909.05858 §4.1).
    """
    if seen is None or penalty == 1.0:
        return logits
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def require_seen(penalty: float, seen: Bool[Array, "*B V"] | None) -> None:
    """Raise ValueError where a penalty lacks the tokens that it is for."""
    if penalty != 1.0 and seen is None:
        raise ValueError(f"repetition_penalty = {penalty} needs the tokens that rows hold: seen")


def exclude(logits: Float[Array, "B V"], never: tuple[int, ...]) -> Float[Array, "B V"]:
    """Return -inf for the tokens in `never`."""
    return logits.at[:, jnp.array(never)].set(-jnp.inf) if never else logits


def cut_tail(
    logits: Float[Array, "B V"], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float[Array, "B V"]:
    """Return -inf for the tokens that are not likely enough to be drawn; ties stay together.

    Kept are the `top_k` likeliest tokens, of those the smallest set of probability `top_p`, and of
    those all with at least `min_p` times the highest probability.
    """
    if top_k > 0:
        best, _ = values_and_indices(logits, min(top_k, logits.shape[-1]))
        logits = jnp.where(logits < best[:, -1:], -jnp.inf, logits)
    if top_p < 1.0:
        probabilities = jax.nn.softmax(logits)
        logits = jnp.where(probabilities < _nucleus(probabilities, top_p), -jnp.inf, logits)
    if min_p > 0.0:
        lowest = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return logits


def _nucleus(probabilities: Float[Array, "B V"], mass: float) -> Float[Array, "B 1"]:
    """Return the highest threshold above which the probabilities sum to at least `mass`.

    The threshold is found by bisection. Positive floats are ordered as their bits are, so 30 sums
    tell it exactly, in a fraction of the time of sorting a large vocabulary.
    """

    def halve(_: Any, between: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = between
        middle = (low + high) // 2
        threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)
        total = jnp.sum(probabilities, axis=-1, keepdims=True, where=probabilities >= threshold)
        enough = total >= mass
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros((probabilities.shape[0], 1), jnp.int32)
    above_one = jnp.full_like(low, 0x3F800001)
    low, _ = jax.lax.fori_loop(0, 30, halve, (low, above_one))
    return jax.lax.bitcast_convert_type(low, jnp.float32)
