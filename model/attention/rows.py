"""Take rows of sequences by index, and put rows back."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


def take_rows(x: Shaped[Array, "#B T *n"], rows: Int[Array, "#B g"]) -> Shaped[Array, "#B g *n"]:
    """Return the rows of each sequence at the indices `rows`, which are clipped to [0, T - 1]."""
    rows = jnp.clip(rows, 0, x.shape[1] - 1)
    x, rows = (repeat_batch(z, max(len(x), len(rows))) for z in (x, rows))
    return jax.vmap(lambda x, rows: x[rows])(x, rows)


def put_rows(
    x: Shaped[Array, "B T *n"], rows: Int[Array, "#B g"], new: Shaped[Array, "B g *n"]
) -> Shaped[Array, "B T *n"]:
    """Return `x` with the rows at the indices `rows` replaced by `new`.

    Indices outside of [0, T - 1], and repeated indices, are left out.
    """
    rows = repeat_batch(jnp.where((rows < 0) | is_repeated(rows), x.shape[1], rows), len(x))

    def put(x: jax.Array, rows: jax.Array, new: jax.Array) -> jax.Array:
        taken = jnp.zeros(len(x), bool).at[rows].set(True, mode="drop")
        # Added to 0: the derivative of .set() would compare every element of x.
        x = jnp.where(taken.reshape(-1, *[1] * (x.ndim - 1)), 0, x)
        return x.at[rows].add(new, mode="drop")

    return jax.vmap(put)(x, rows, new)


def is_repeated(rows: Int[Array, "b g"]) -> Bool[Array, "b g"]:
    """Return True for each index that occurs earlier in its row."""
    return jnp.tril(rows[:, :, None] == rows[:, None], k=-1).any(-1)


def repeat_batch(x: jax.Array, batch: int) -> jax.Array:
    """Repeat a batch of 1 row to `batch` rows; leave a full batch as it is."""
    return jnp.broadcast_to(x, (batch, *x.shape[1:]))
