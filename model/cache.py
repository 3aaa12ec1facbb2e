"""What self-attention remembers of earlier tokens while decoding, one kind for each kind of core.

All arrays lead with the batch, so that a stack can lead with its layers and a search can reorder
its rows.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from model.attention.performer import FeatureState
from model.config import ModelConfig
from model.masks import AttentionMask


@runtime_checkable
class Cache(Protocol):
    """Keys and values of the positions seen so far, or what is left of them."""

    def attend(
        self,
        core: Callable,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        mask: AttentionMask,
        is_real: Bool[Array, "B T"] | None,
        **how: Any,
    ) -> tuple[Float[Array, "B T N H"], "Cache"]:
        """Attention of new tokens at `mask.q_offset` to themselves and all before, and the cache
        with them added; those that are not real leave no trace in it that a later query sees."""
        ...


@struct.dataclass
class KVCache:
    """Keys and values of all positions. A row writes over its padding before it could see it."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]

    @classmethod
    def zeros(cls, config: ModelConfig, batch: int, length: int) -> "KVCache":
        array = jnp.zeros((batch, length, config.kv_heads, config.head_dim), config.dtype)
        return cls(k=array, v=array)

    def attend(
        self, core: Callable, q: jax.Array, k: jax.Array, v: jax.Array,
        mask: AttentionMask, is_real: jax.Array | None = None, **how: Any,
    ) -> tuple[jax.Array, "KVCache"]:  # fmt: skip
        if mask.q_offset is None:
            raise ValueError("decoding with a cache needs a mask with a position: .at(t)")
        cache = self.write(k, v, mask.q_offset)
        return core(q, cache.k, cache.v, mask, **how), cache

    def write(self, k: jax.Array, v: jax.Array, offset: jax.Array) -> "KVCache":
        """The cache with rows `k`, `v` [B, t, K, H] written from position `offset` ([] or [B])."""

        def put(rows: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(rows, new, start, axis=rows.ndim - 3)

        if offset.ndim:
            put = jax.vmap(put)
        return KVCache(k=put(self.k, k, offset), v=put(self.v, v, offset))


def new_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache of one layer for `length` positions, of the kind that its core reads."""
    place = "decoder" if config.architecture == "encoder_decoder" else "self"
    if config.attention.core_of(place) == "performer":
        features = config.attention.performer.features
        return FeatureState.zeros(batch, config.kv_heads, features, config.head_dim)
    return KVCache.zeros(config, batch, length)
