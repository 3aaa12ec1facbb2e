"""Two words that stand for all bits of an array, however it is split over devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Shaped, UInt32

from heedful.model.dropout import indices, mix, place
from heedful.train.sharding import replicated


def make_fingerprint(mesh: Mesh) -> Callable[[Any], jax.Array]:
    """(parameters) -> uint32 [arrays, 2] in the order of the leaves, jitted, whole everywhere."""

    def fingerprint(params: Any) -> UInt32[Array, "arrays 2"]:
        return words_of_leaves(params)

    return jax.jit(fingerprint, out_shardings=replicated(mesh))


def words_of_leaves(tree: Any) -> UInt32[Array, "arrays 2"]:
    """The words of every array, in the order of the leaves."""
    return jnp.stack([words(x) for x in jax.tree.leaves(tree)])


def words(x: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    """Sums modulo 2^32 of hashes of each element's bits and place.

    Integers add up to the same in any order, so no mesh changes them. The hash is a bijection of an
    element's bits: if a single element differs, both sums do; others collide once in 2^64.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    first = mix(bits.astype(jnp.uint32) ^ mix(place(indices(x.shape), x.shape)))
    second = mix(first ^ jnp.uint32(0x9E3779B9))  # 2^32 / golden ratio: a constant of no pattern
    zero, axes = jnp.uint32(0), tuple(range(x.ndim))
    # Both in one pass: two sums would keep the first hashes, as many bytes as the parameters.
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])  # noqa: E731
    return jnp.stack(jax.lax.reduce((first, second), (zero, zero), add, axes))
