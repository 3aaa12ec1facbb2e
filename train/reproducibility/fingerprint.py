"""Fingerprint an array in two 32-bit words that do not depend on its sharding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Shaped, UInt32

from heedful.model.ops.dropout import indices, mix, place
from heedful.train.sharding import replicated


def make_fingerprint(mesh: Mesh) -> Callable[[Any], jax.Array]:
    """Return a jitted function from parameters to hash words, uint32 [arrays, 2], replicated."""

    def fingerprint(params: Any) -> UInt32[Array, "arrays 2"]:
        return words_of_leaves(params)

    return jax.jit(fingerprint, out_shardings=replicated(mesh))


def words_of_leaves(tree: Any) -> UInt32[Array, "arrays 2"]:
    """Return the two hash words of each array in a tree, in the order of its leaves."""
    return jnp.stack([words(x) for x in jax.tree.leaves(tree)])


def words(x: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    """Return two sums modulo 2^32 over hashes of each element's bits and index.

    Sums of integers do not depend on their order, so the sharding does not matter. The hash is a
    bijection of the element's bits: if one element differs, both sums differ. Arrays that differ in
    several elements collide with probability 2^-64.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    first = mix(bits.astype(jnp.uint32) ^ mix(place(indices(x.shape), x.shape)))
    second = mix(first ^ jnp.uint32(0x9E3779B9))  # 2^32 / golden ratio
    zero, axes = jnp.uint32(0), tuple(range(x.ndim))
    # Both sums in one pass: two passes would store `first`, which is as large as the parameters.
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])  # noqa: E731
    return jnp.stack(jax.lax.reduce((first, second), (zero, zero), add, axes))
