"""Dropout whose randomness is a hash of position and key: one pass, the same on every mesh.

jax.random on a CPU writes and reads the array many times for its bits; here they are computed where
they are used. An element's fate depends on its coordinates only, so a core may draw it by tiles.
"""

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
    return jax.random.key_data(key)


def keep(key: jax.Array, shape: tuple[int, ...], rate: float) -> Bool[Array, "..."]:
    """True where an element of an array of this shape stays."""
    axes = range(len(shape))
    return keep_at(key, [jax.lax.broadcasted_iota(jnp.uint32, shape, i) for i in axes], shape, rate)


def keep_at(
    key: jax.Array, index: Sequence[jax.Array | np.ndarray], shape: Sequence[int], rate: float
) -> Bool[Array, "..."]:
    """What `keep` gives for an array of `shape`, at one index array for each of its axes."""
    flat, stride = jnp.uint32(0), 1
    for places, size in zip(reversed(index), reversed(shape), strict=True):
        flat += jnp.asarray(places).astype(jnp.uint32) * jnp.uint32(stride % 2**32)
        stride *= size
    first, second = jax.random.key_data(key)
    return mix(mix(flat ^ first) ^ second) >= jnp.uint32(round(rate * 2**32))


def mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32 bits in which each bit of the input flips half of the output.

    The constants are `lowbias32` of Wellons' hash-prospector.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
