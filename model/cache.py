"""What self-attention remembers of earlier tokens while decoding, one kind for each kind of core.

All arrays lead with the batch, so that a stack can lead with its layers and a search can reorder
its rows.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from model.attention.performer import FeatureState
from model.axes import target_platform
from model.config import ModelConfig
from model.masks import AttentionMask, cross


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

    def keys(self, new: int) -> int:
        """How many keys so many new tokens are held against."""
        ...


@struct.dataclass
class KVCache:
    """Keys and values of all positions. A row writes over its padding before it could see it.

    Each head's lie together, as a product with one query reads them.
    """

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]

    @classmethod
    def zeros(cls, config: ModelConfig, batch: int, length: int) -> "KVCache":
        return cls.of(*_zeros(config, batch, length))

    @classmethod
    def of(cls, k: Float[Array, "B S K H"], v: Float[Array, "B S K H"]) -> "KVCache":
        return cls(k=jnp.swapaxes(k, 1, 2), v=jnp.swapaxes(v, 1, 2))

    def rows(self) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values as they were given."""
        return jnp.swapaxes(self.k, 1, 2), jnp.swapaxes(self.v, 1, 2)

    def attend(
        self, core: Callable, q: jax.Array, k: jax.Array, v: jax.Array,
        mask: AttentionMask, is_real: jax.Array | None = None, **how: Any,
    ) -> tuple[jax.Array, "KVCache"]:  # fmt: skip
        cache = self.write(k, v, _offset(mask))
        return core(q, *cache.rows(), mask, **how), cache

    def keys(self, new: int) -> int:
        return self.k.shape[2]

    def write(self, k: jax.Array, v: jax.Array, offset: jax.Array) -> "KVCache":
        """The cache with rows `k`, `v` [B, t, K, H] written from position `offset` ([] or [B])."""

        def put(rows: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
            if target_platform() == "cpu":
                # A single update would be fused with its readers, each with a copy of all rows. So
                # one more is written behind the end, where it is dropped.
                index = jnp.append(start + jnp.arange(new.shape[-2]), rows.shape[-2])
                new = jnp.concatenate([new, new[..., :1, :]], axis=-2)
                return rows.at[..., index, :].set(new, mode="drop")
            return jax.lax.dynamic_update_slice_in_dim(rows, new, start, axis=rows.ndim - 2)

        if offset.ndim:
            put = jax.vmap(put)
        new = KVCache.of(k, v)
        return KVCache(k=put(self.k, new.k, offset), v=put(self.v, new.v, offset))


@struct.dataclass
class WindowCache:
    """Keys and values of the last positions, as many as a window needs, in constant memory.

    Position p stands in slot p modulo their number. A row may go back by one token, no further.
    """

    k: Float[Array, "B W K H"]
    v: Float[Array, "B W K H"]
    end: Int[Array, " B"]
    """Real tokens seen so far, which stand at positions 0 to end - 1."""

    @classmethod
    def zeros(cls, config: ModelConfig, batch: int, length: int) -> "WindowCache":
        k, v = _zeros(config, batch, length)
        return cls(k=k, v=v, end=jnp.zeros(batch, jnp.int32))

    def attend(
        self, core: Callable, q: jax.Array, k: jax.Array, v: jax.Array,
        mask: AttentionMask, is_real: jax.Array | None = None, **how: Any,
    ) -> tuple[jax.Array, "WindowCache"]:  # fmt: skip
        start, (batch, new) = _offset(mask), k.shape[:2]
        past = self.keys(0)
        left = None if mask.window is None else mask.window[0]
        if left is None or left * max(mask.dilation or (1,)) > past:
            raise ValueError(
                f"the cache remembers {past} positions before a token, but the mask's window is "
                f"{mask.window} with dilation {mask.dilation}"
            )
        mask.require_lengths(new, past + new)
        rows = jnp.arange(batch)[:, None]
        offset = jnp.broadcast_to(start, batch)[:, None]
        real = jnp.ones((batch, new), bool) if is_real is None else is_real

        # All that the new tokens can see, in order: what is remembered, the real new ones over it.
        positions, end = offset - past + jnp.arange(past + new), self.end[:, None]
        slots = positions % (past + 1)
        fresh = jnp.pad(real, ((0, 0), (past, 0)))
        old = (positions >= jnp.maximum(end - past - 1, 0)) & (positions < end)

        def line(kept: jax.Array, x: jax.Array) -> jax.Array:
            x = jnp.pad(x, ((0, 0), (past, 0), (0, 0), (0, 0)))
            return jnp.where(fresh[..., None, None], x, kept[rows, slots])

        # The same distances from another beginning.
        moved = mask.replace(  # type: ignore[attr-defined]
            q_offset=jnp.asarray(past),
            prefix_len=None if mask.prefix_len is None else mask.prefix_len - offset[:, 0] + past,
        )
        moved &= cross(jnp.ones((batch, new), jnp.int32), (old | fresh).astype(jnp.int32))
        if how.get("bias") is not None:
            how["bias"] = how["bias"].replace(q_offset=moved.q_offset)
        y = core(q, line(self.k, k), line(self.v, v), moved, **how)

        end = jnp.maximum(self.end, jnp.max(jnp.where(fresh, positions + 1, 0), axis=1))
        kept = real & (positions[:, past:] > end[:, None] - past - 2)
        slots = jnp.where(kept, slots[:, past:], past + 1)
        put = lambda to, x: to.at[rows, slots].set(x, mode="drop")  # noqa: E731
        return y, WindowCache(k=put(self.k, k), v=put(self.v, v), end=end)

    def keys(self, new: int) -> int:
        return self.k.shape[1] - 1 + new


def new_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache of one layer for `length` positions, of the kind that its core reads."""
    attention = config.attention
    place = "decoder" if config.architecture == "encoder_decoder" else "self"
    if attention.core_of(place) == "performer":
        features = attention.performer.features
        return FeatureState.zeros(batch, config.kv_heads, features, config.head_dim)
    enough = remembered(config)
    if enough is not None and enough < length:
        return WindowCache.zeros(config, batch, enough)
    return KVCache.zeros(config, batch, length)


def remembered(config: ModelConfig) -> int | None:
    """How many of the last positions a cache keeps; None: all."""
    attention = config.attention
    if attention.window is None or attention.global_tokens:
        return None
    return attention.window * max(attention.dilation or (1,)) + 1


def _zeros(config: ModelConfig, batch: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, S, K, H]."""
    array = jnp.zeros((batch, length, config.kv_heads, config.head_dim), config.dtype)
    return array, array


def _offset(mask: AttentionMask) -> jax.Array:
    """Position of the first new token."""
    if mask.q_offset is None:
        raise ValueError("decoding with a cache needs a mask with a position: .at(t)")
    return mask.q_offset
