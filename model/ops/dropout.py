"""Dropout by a hash of an element's coordinates and a key: one pass, the same on every mesh.

On a CPU, jax.random writes and reads arrays of random bits many times; the hash is computed where
it is used. The hash depends on coordinates and key only, so attention cores can compute its tiles.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32


def dropout(x: Float[Array, "..."], rate: float, key: jax.Array | None) -> Float[Array, "..."]:
    """Set a fraction `rate` of the elements to 0 and divide the others by 1 - rate."""
    words = dropout_words(rate, key)
    return x if words is None else jnp.where(keep(words, x.shape, rate), x / (1 - rate), 0)


def dropout_words(rate: float, key: jax.Array | None) -> UInt32[Array, "2"] | None:
    """Return the two words of the key, which `keep` takes; None if `rate` is 0.

    Raises ValueError if `rate` is above 0 and `key` is None.
    """
    if rate == 0.0:
        return None
    if key is None:
        raise ValueError(f"dropout at rate {rate} needs a key: give a random key, or rate 0")
    return jax.random.key_data(key)[:2]  # A key of type rbg has the two words twice.


def keep(words: UInt32[Array, "2"], shape: tuple[int, ...], rate: float) -> Bool[Array, "..."]:
    """Return True for the elements of an array of `shape` that dropout keeps."""
    return keep_at(words, indices(shape), shape, rate)


def keep_at(
    words: UInt32[Array, "2"],
    index: Sequence[jax.Array | np.ndarray],
    shape: Sequence[int],
    rate: float,
) -> Bool[Array, "..."]:
    """Return the elements of keep(words, shape, rate) at `index`, an index array for each axis."""
    first, second = words
    # 32 bits count at most 2^32 elements: if an array has more, its first axes are hashed apart.
    sizes = [math.prod(shape[axis:]) for axis in range(len(shape))]
    outer = sum(size > 2**32 for size in sizes)
    word = mix(place(index[outer:], shape[outer:]) ^ first)
    if outer:
        word = mix(word ^ place(index[:outer], shape[:outer]))
    return mix(word ^ second) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def indices(shape: tuple[int, ...]) -> list[jax.Array]:
    """Return, for each axis, an array of `shape` with the index along that axis."""
    return [jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(len(shape))]


def place(index: Sequence[jax.Array | np.ndarray], shape: Sequence[int]) -> UInt32[Array, "..."]:
    """Return the row-major index of elements in an array of `shape`, modulo 2^32."""
    flat, stride = jnp.uint32(0), 1
    for along, size in zip(reversed(index), reversed(shape), strict=True):
        flat += jnp.asarray(along).astype(jnp.uint32) * jnp.uint32(stride % 2**32)
        stride *= size
    return flat


def mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Return a 32-bit hash: a bijection in which an input bit affects half of the output bits.

    The constants are those of `lowbias32` in github.com/skeeto/hash-prospector.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
