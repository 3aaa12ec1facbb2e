"""Reads and writes of the arrays that a cache holds."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from heedful.model.ops.platform import op

MIN_PREFIX = 16  # positions that are the least to be read apart
MAX_SHARED_BEAMS = 16
"""Hypotheses up to which products with the keys of all take less time than copies of the keys."""


@op
def read_filled(
    read: Callable[[int], Float[Array, "..."]], length: int, offset: Int[Array, "*b"]
) -> Float[Array, "..."]:
    """Return read(n), where `read` looks at the first n of a cache's `length` positions.

    n is at least all that a token at `offset` sees.
    """
    return read(length)


@read_filled.on("cpu")
def _read_prefix(
    read: Callable[[int], Float[Array, "..."]], length: int, offset: Int[Array, "*b"]
) -> Float[Array, "..."]:
    """Read an eighth, a quarter, half or all of the cache: each of them is compiled.

    A CPU takes as long as there are keys to read.
    """
    sizes = [n for n in (length // 8, length // 4, length // 2) if n >= MIN_PREFIX]
    index = jnp.sum(jnp.max(offset) >= jnp.array(sizes, jnp.int32))
    return jax.lax.switch(index, [partial(read, n) for n in (*sizes, length)])


def write_at(
    array: Float[Array, "*b"], x: Float[Array, "*c"], start: Int[Array, "*d"], *, axis: int
) -> Float[Array, "*b"]:
    """Return `array` with `x` in it from `start` ([] or [B]) on, along an axis < 0."""
    if start.ndim:
        return jax.vmap(partial(write_at, axis=axis))(array, x, start)
    return write_slice(array, x, start, axis)


@op
def write_slice(
    array: Float[Array, "*b"], x: Float[Array, "*c"], start: Int[Array, ""], axis: int
) -> Float[Array, "*b"]:
    """Return `array` with `x` in it from one `start` on, along an axis < 0."""
    return jax.lax.dynamic_update_slice_in_dim(array, x, start, axis=array.ndim + axis)


@write_slice.on("cpu")
def _scatter(
    array: Float[Array, "*b"], x: Float[Array, "*c"], start: Int[Array, ""], axis: int
) -> Float[Array, "*b"]:
    """Write by a scatter of at least two indices, the last behind the end, where it is dropped.

    A CPU fuses a single update with each of its readers, each with a copy of all of `array`.
    """
    index = jnp.append(start + jnp.arange(x.shape[axis]), array.shape[axis])
    first = jax.lax.slice_in_dim(x, 0, 1, axis=x.ndim + axis)
    place = (..., index, *[slice(None)] * (-1 - axis))
    return array.at[place].set(jnp.concatenate([x, first], axis=axis), mode="drop")
