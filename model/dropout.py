"""Dropout whose randomness is a hash of position and key: one pass, the same on every mesh.

jax.random on a CPU writes and reads the array many times for its bits; here they are computed where
they are used. An element's fate depends on its coordinates only, so a core may draw it by tiles.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


def dropout(x: Float[Array, "..."], rate: float, key: jax.Array | None) -> Float[Array, "..."]:
    """Zeroes a share `rate` of the elements and divides the others by 1 - rate."""
    if rate == 0.0:
        return x
    if key is None:
        raise ValueError(f"dropout at rate {rate} needs a key")
    return jnp.where(keep(key, x.shape, rate), x / (1 - rate), 0)


def keep(
    key: jax.Array,
    shape: tuple[int, ...],
    rate: float,
    places: Mapping[int, Int[Array, "..."]] | None = None,
) -> Bool[Array, "..."]:
    """True where an element of an array of this shape stays.

    Of a part of the array: `places` holds coordinates for each axis that is not there as a whole.
    `key` may be given as its data.
    """
    index, stride = jnp.uint32(0), 1
    for axis in reversed(range(len(shape))):
        along = (places or {}).get(axis, jnp.arange(shape[axis])).astype(jnp.uint32)
        along = jnp.expand_dims(along, [i for i in range(len(shape)) if i != axis])
        index = index + along * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    first, second = jax.random.key_data(key)
    return mix(mix(index ^ first) ^ second) >= jnp.uint32(round(rate * 2**32))


def mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32 bits in which each bit of the input flips half of the output.

    The constants are `lowbias32` of Wellons' hash-prospector.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
