"""The highest of many logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from heedful.model.ops.platform import op
from heedful.model.ops.products import MAX_ROWS_TRANSPOSED

BLOCK = 32  # number of neighbouring logits in a block, whose maximum is computed first


@op
def top_k(logits: Float[Array, "B V"], count: int) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """Return the `count` highest logits of each row and their indices; in ties the lowest index."""
    values, index = jax.lax.top_k(logits, count)
    return values, index


@top_k.on("cpu")
def _top_k_by_blocks(
    logits: Float[Array, "B V"], count: int
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """Search only the `count` blocks with the highest maxima: other blocks have none of the logits.

    It takes at most half of the time of the plain form.
    """
    rows, size = logits.shape
    if size < 4 * BLOCK * count:
        return top_k.plain(logits, count)
    blocked, row = size - size % BLOCK, jnp.arange(rows)[:, None]
    if rows > MAX_ROWS_TRANSPOSED:
        maxima = jnp.max(logits[:, :blocked].reshape(rows, -1, BLOCK), axis=2)
        at = lambda places: logits[row, places]  # noqa: E731
    else:  # with V as the leading axis, as in `softmax.logsumexp_given_max`
        columns = logits.T
        maxima = jnp.max(columns[:blocked].reshape(-1, BLOCK, rows), axis=1).T
        at = lambda places: columns[places, row]  # noqa: E731
    blocks = jnp.sort(values_and_indices(maxima, count)[1])  # sorted: the lowest index wins a tie
    places = (blocks[..., None] * BLOCK + jnp.arange(BLOCK)).reshape(rows, -1)
    rest = jnp.broadcast_to(jnp.arange(blocked, size), (rows, size - blocked))
    places = jnp.concatenate([places, rest], axis=1)
    values, index = values_and_indices(at(places), count)
    return values, jnp.take_along_axis(places, index, axis=1)


def values_and_indices(logits: Float[Array, "B V"], count: int) -> tuple[jax.Array, jax.Array]:
    """Return values and indices of `jax.lax.top_k`.

    The barrier keeps both results: if XLA sees that one is not used, it sorts whole rows instead.
    """
    values, index = jax.lax.optimization_barrier(jax.lax.top_k(logits, count))
    return values, index
