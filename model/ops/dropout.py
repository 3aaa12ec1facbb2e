"""Dropout whose randomness is a hash of position and key: one pass, the same on every mesh.

jax.random on a CPU writes and reads the array many times for its bits; here they are computed where
they are used. An element's fate depends on its coordinates only, so a core may draw it by tiles.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32


def dropout(x: Float[Array, "..."], rate: float, key: jax.Array | None) -> Float[Array, "..."]:
    """Zeroes a share `rate` of the elements and divides the others by 1 - rate."""
    words = dropout_words(rate, key)
    return x if words is None else jnp.where(keep(words, x.shape, rate), x / (1 - rate), 0)


def dropout_words(rate: float, key: jax.Array | None) -> UInt32[Array, "2"] | None:
    """What `keep` needs of the key; None where nothing is dropped."""
    if rate == 0.0:
        return None
    if key is None:
        raise ValueError(f"dropout at rate {rate} needs a key")
    return jax.random.key_data(key)[:2]  # A key of the kind rbg has them twice.


def keep(words: UInt32[Array, "2"], shape: tuple[int, ...], rate: float) -> Bool[Array, "..."]:
    """True where an element of an array of this shape stays."""
    return keep_at(words, indices(shape), shape, rate)


def keep_at(
    words: UInt32[Array, "2"],
    index: Sequence[jax.Array | np.ndarray],
    shape: Sequence[int],
    rate: float,
) -> Bool[Array, "..."]:
    """What `keep` gives for an array of `shape`, at one index array for each of its axes."""
    first, second = words
    # Of an array of more than 2^32 elements, the last axes that count no further, and the others.
    sizes = [math.prod(shape[axis:]) for axis in range(len(shape))]
    outer = sum(size > 2**32 for size in sizes)
    word = mix(place(index[outer:], shape[outer:]) ^ first)
    if outer:
        word = mix(word ^ place(index[:outer], shape[:outer]))
    return mix(word ^ second) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def indices(shape: tuple[int, ...]) -> list[jax.Array]:
    """For each axis the index along it, everywhere."""
    return [jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(len(shape))]


def place(index: Sequence[jax.Array | np.ndarray], shape: Sequence[int]) -> UInt32[Array, "..."]:
    """Where elements of an array of `shape` stand, counted row by row, modulo 2^32."""
    flat, stride = jnp.uint32(0), 1
    for along, size in zip(reversed(index), reversed(shape), strict=True):
        flat += jnp.asarray(along).astype(jnp.uint32) * jnp.uint32(stride % 2**32)
        stride *= size
    return flat


def mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32 bits in which each bit of the input flips half of the output.

    The constants are `lowbias32` of Wellons' hash-prospector.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
