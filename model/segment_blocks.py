"""Segment ids of blocks of neighbouring tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def range_of_ids(ids: Int[Array, "B T"], size: int) -> tuple[jax.Array, jax.Array]:
    """Return the lowest and the highest id in each block [B, blocks]; only padding: (max, 0)."""
    blocks, most = _blocks_of(ids, size), jnp.iinfo(ids.dtype).max
    return jnp.min(jnp.where(blocks == 0, most, blocks), -1), jnp.max(blocks, -1)


def only_id(ids: Int[Array, "B T"], size: int) -> jax.Array:
    """Return the id of each block [B, blocks] in which all ids are equal; 0 for other blocks."""
    blocks = _blocks_of(ids, size)
    return jnp.where((blocks == blocks[..., :1]).all(-1), blocks[..., 0], 0)


def _blocks_of(ids: Int[Array, "B T"], size: int) -> Int[Array, "B i C"]:
    """Cut ids into i blocks of C = `size` ids; the last block is padded with id 0."""
    filled = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % size)))
    return filled.reshape(ids.shape[0], -1, size)
