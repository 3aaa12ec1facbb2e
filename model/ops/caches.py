"""Reads and writes of the arrays of a cache."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from heedful.model.ops.platform import op

MIN_PREFIX = 16  # smallest number of positions to read instead of the whole cache
MAX_SHARED_BEAMS = 16
"""Largest beam width for which multiplying with the keys of all hypotheses is faster than copying
keys."""


@op
def read_filled(
    read: Callable[[int], Float[Array, "..."]], length: int, offset: Int[Array, "*b"]
) -> Float[Array, "..."]:
    """Return read(n), where `read` reads the first n of a cache's `length` positions.

    n covers all positions that a token at `offset` may see.
    """
    return read(length)


@read_filled.on("cpu")
def _read_prefix(
    read: Callable[[int], Float[Array, "..."]], length: int, offset: Int[Array, "*b"]
) -> Float[Array, "..."]:
    """Read an eighth, a quarter, a half or all of the cache; each of these reads is compiled.

    On a CPU, the time grows with the number of keys that are read.
    """
    sizes = [n for n in (length // 8, length // 4, length // 2) if n >= MIN_PREFIX]
    index = jnp.sum(jnp.max(offset) >= jnp.array(sizes, jnp.int32))
    return jax.lax.switch(index, [partial(read, n) for n in (*sizes, length)])


def write_at(
    array: Float[Array, "*b"], x: Float[Array, "*c"], start: Int[Array, "*d"], *, axis: int
) -> Float[Array, "*b"]:
    """Return `array` with `x` written along `axis` < 0, from index `start` ([] or [B]) on."""
    if start.ndim:
        return jax.vmap(partial(write_at, axis=axis))(array, x, start)
    return write_slice(array, x, start, axis)


@op
def write_slice(
    array: Float[Array, "*b"], x: Float[Array, "*c"], start: Int[Array, ""], axis: int
) -> Float[Array, "*b"]:
    """Return `array` with `x` written along `axis` < 0, from the single index `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(array, x, start, axis=array.ndim + axis)


@write_slice.on("cpu")
def _scatter(
    array: Float[Array, "*b"], x: Float[Array, "*c"], start: Int[Array, ""], axis: int
) -> Float[Array, "*b"]:
    """Write by a scatter with one more index, which lies beyond the end and is dropped.

    XLA on a CPU would fuse an update at a single index into each of its readers, and each reader
    would copy all of `array`.
    """
    index = jnp.append(start + jnp.arange(x.shape[axis]), array.shape[axis])
    first = jax.lax.slice_in_dim(x, 0, 1, axis=x.ndim + axis)
    place = (..., index, *[slice(None)] * (-1 - axis))
    return array.at[place].set(jnp.concatenate([x, first], axis=axis), mode="drop")
