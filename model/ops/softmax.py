"""Logarithm of the denominator of a softmax over a vocabulary."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from heedful.model.ops.platform import op
from heedful.model.ops.products import MAX_ROWS_TRANSPOSED


@op
def logsumexp_given_max(
    logits: Float[Array, "B V"], highest: Float[Array, " B"]
) -> Float[Array, " B"]:
    """Return log(sum(exp(logits))) of each row, given the highest logit of each row."""
    return highest + jnp.log(jnp.sum(jnp.exp(logits - highest[:, None]), axis=1))


@logsumexp_given_max.on("cpu")
def _vocabulary_first(
    logits: Float[Array, "B V"], highest: Float[Array, " B"]
) -> Float[Array, " B"]:
    """Sum over the leading axis V if there are at most MAX_ROWS_TRANSPOSED rows.

    This is the layout in which `products.transposed_matmul` leaves logits; for a sum over the last
    axis, a CPU would transpose them first.
    """
    if len(logits) > MAX_ROWS_TRANSPOSED:
        return logsumexp_given_max.plain(logits, highest)
    return highest + jnp.log(jnp.sum(jnp.exp(logits.T - highest), axis=0))
