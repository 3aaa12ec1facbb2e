"""Caches of earlier tokens, for self-attention in decoding.

The leading axis of each array is the batch, so that beam search can reorder it. A stack adds a
leading axis of layers.

Axes: B rows of the batch, K key/value heads, S positions, H size of a head, T new tokens, N query
heads.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from heedful.model.attention import AttentionCall, Cache, Core, spec_of
from heedful.model.attention.dense import attend_pairs, pairs_of
from heedful.model.config import ModelConfig
from heedful.model.masks import AttentionMask, cross
from heedful.model.ops.caches import MAX_SHARED_BEAMS, read_filled, write_at


@struct.dataclass
class KVCache:
    """Keys and values of all positions.

    Padding is written, too; later tokens overwrite it before any query can see it. The keys of a
    head are contiguous in memory, as the product with one query reads them.
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
        """Return keys and values [B, S, K, H], in the order that `of` takes."""
        return jnp.swapaxes(self.k, 1, 2), jnp.swapaxes(self.v, 1, 2)

    def attend(
        self, core: Core, call: AttentionCall, cache_write_mask: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T N H"], "KVCache"]:
        offset, new = _offset(call.mask), call.q.shape[1]
        cache = self.write(call.k, call.v, offset)

        def attend(size: int) -> jax.Array:
            part = KVCache(k=cache.k[:, :, :size], v=cache.v[:, :, :size])
            k, v = part.rows()
            return core(call.replace(k=k, v=v))

        length = self.keys(new)
        return attend(length) if new > 1 else read_filled(attend, length, offset), cache

    def keys(self, new: int) -> int:
        return self.k.shape[2]

    def write(self, k: jax.Array, v: jax.Array, offset: jax.Array) -> "KVCache":
        """Return the cache with `k`, `v` [B, t, K, H] written from `offset` ([] or [B]) on."""
        new = KVCache.of(k, v)
        return KVCache(
            k=write_at(self.k, new.k, offset, axis=-2), v=write_at(self.v, new.v, offset, axis=-2)
        )


@struct.dataclass
class BeamCache:
    """Keys and values of all positions of W hypotheses of each of B texts, for R = B * W queries.

    Hypothesis w writes its key at position s to slot s * W + w, and no key is ever moved: when the
    search reorders hypotheses, only `writer` changes. Multiplying W queries with all M = S * W keys
    takes less time than copying the keys of each hypothesis for each token.
    """

    k: Float[Array, "B K H M"]
    """Keys; those of all hypotheses at a position are adjacent."""
    v: Float[Array, "B K M H"]
    writer: Int[Array, "B W S"]
    """Number of the hypothesis that wrote the key which hypothesis w sees at position s."""

    @classmethod
    def of(cls, cache: KVCache, width: int) -> "BeamCache":
        """Return the cache of `width` hypotheses of each text, all with the keys of `cache`."""
        batch, length = cache.k.shape[0], cache.k.shape[2]
        own = jnp.arange(width)[None, :, None]
        return cls(
            k=jnp.repeat(jnp.swapaxes(cache.k, 2, 3), width, axis=3),
            v=jnp.repeat(cache.v, width, axis=2),
            writer=jnp.broadcast_to(own, (batch, width, length)),
        )

    def attend(
        self, core: Core, call: AttentionCall, cache_write_mask: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T N H"], "BeamCache"]:
        """Compute dense attention, whatever the core: all cores that read a KVCache are exact."""
        (batch, width, length), (rows, new) = self.writer.shape, call.k.shape[:2]
        if (rows, new) != (batch * width, 1):
            raise ValueError(
                f"{rows} x {new} tokens for {batch} x {width} hypotheses: give one token to each"
            )
        offset = _offset(call.mask)
        offset = offset[::width] if offset.ndim else offset
        q, k, v = (x.reshape(batch, width, *x.shape[2:]) for x in (call.q, call.k, call.v))
        k = write_at(self.k, jnp.moveaxis(k, 1, -1), offset * width, axis=-1)
        v = write_at(self.v, jnp.swapaxes(v, 1, 2), offset * width, axis=-2)
        hypotheses = jnp.arange(width)
        is_new = jnp.arange(length) == offset.reshape(-1, 1, 1)
        writer = jnp.where(is_new, hypotheses[:, None], self.writer)

        def spread(x: jax.Array) -> jax.Array:
            """Turn [R, n, 1, S] (one query per row) into [B, n, W, M] (W queries per text)."""
            x = x.reshape(-1, width if len(x) == rows else 1, *x.shape[1:])
            x = jnp.swapaxes(x[:, :, :, 0], 1, 2)
            x = jnp.broadcast_to(x, (*x.shape[:2], width, length))
            return jnp.repeat(x, width, axis=-1)

        seen, added = pairs_of(call.mask, call.bias, 1, length)
        allowed = (writer[..., None] == hypotheses).reshape(batch, 1, width, -1)
        allowed = allowed if seen is None else allowed & spread(seen)
        added = None if added is None else spread(added)

        def attend(size: int) -> jax.Array:
            first = slice(size * width)
            keys = jnp.moveaxis(k[..., first], -1, 1)
            values = jnp.swapaxes(v[:, :, first], 1, 2)
            bias = None if added is None else added[..., first]
            own = call.replace(q=q, k=keys, v=values)
            return attend_pairs(own, allowed[..., first], bias)

        y = read_filled(attend, length, offset)
        return y.reshape(rows, 1, *y.shape[2:]), BeamCache(k, v, writer)

    def keys(self, new: int) -> int:
        return self.writer.shape[-1]


@struct.dataclass
class WindowCache:
    """Keys and values of the last W positions, which are all that a window needs.

    Position p is in slot p % W. The next new token of a row is at position `end`; it may also be at
    end - 1 and replace the last token, but not before.
    """

    k: Float[Array, "B W K H"]
    v: Float[Array, "B W K H"]
    end: Int[Array, " B"]
    """Number of tokens written so far, at positions 0 to end - 1, without padding."""

    @classmethod
    def zeros(cls, config: ModelConfig, batch: int, length: int) -> "WindowCache":
        k, v = _zeros(config, batch, length)
        return cls(k=k, v=v, end=jnp.zeros(batch, jnp.int32))

    def attend(
        self, core: Core, call: AttentionCall, cache_write_mask: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T N H"], "WindowCache"]:
        mask, bias = call.mask, call.bias
        start, (batch, new) = _offset(mask), call.k.shape[:2]
        past = self.keys(0)
        left = None if mask.window is None else mask.window[0]
        if left is None or left * max(mask.dilation or (1,)) > past:
            raise ValueError(
                f"the cache remembers {past} positions before a token, but the mask has the window "
                f"{mask.window} with dilation {mask.dilation}: make the cache with "
                "model.cache.new_cache for a config with this window"
            )
        mask.require_lengths(new, past + new)
        rows = jnp.arange(batch)[:, None]
        offset = jnp.broadcast_to(start, batch)[:, None]
        real = jnp.ones((batch, new), bool) if cache_write_mask is None else cache_write_mask

        # The keys that new tokens can see, by position: cached ones, replaced by new ones if given.
        positions, end = offset - past + jnp.arange(past + new), self.end[:, None]
        slots = positions % (past + 1)
        seen = real
        if mask.prefix_len is not None:  # A prefix sees all its tokens, even unwritten ones.
            seen |= positions[:, past:] < jnp.reshape(mask.prefix_len, (-1, 1))
        fresh = jnp.pad(seen, ((0, 0), (past, 0)))
        old = (positions >= jnp.maximum(end - past - 1, 0)) & (positions < end)

        def line(kept: jax.Array, x: jax.Array) -> jax.Array:
            x = jnp.pad(x, ((0, 0), (past, 0), (0, 0), (0, 0)))
            return jnp.where(fresh[..., None, None], x, kept[rows, slots])

        # The same mask and bias, with positions counted from `offset - past`.
        moved = mask.replace(  # type: ignore[attr-defined]
            q_offset=jnp.asarray(past),
            prefix_len=None if mask.prefix_len is None else mask.prefix_len - offset[:, 0] + past,
        )
        moved &= cross(jnp.ones((batch, new), jnp.int32), (old | fresh).astype(jnp.int32))
        if bias is not None:
            bias = bias.replace(q_offset=moved.q_offset)  # type: ignore[attr-defined]
        k, v = line(self.k, call.k), line(self.v, call.v)
        y = core(call.replace(k=k, v=v, mask=moved, bias=bias))

        end = jnp.maximum(self.end, jnp.max(jnp.where(real, positions[:, past:] + 1, 0), axis=1))
        kept = real & (positions[:, past:] > end[:, None] - past - 2)
        slots = jnp.where(kept, slots[:, past:], past + 1)
        put = lambda to, x: to.at[rows, slots].set(x, mode="drop")  # noqa: E731
        return y, WindowCache(k=put(self.k, call.k), v=put(self.v, call.v), end=end)

    def keys(self, new: int) -> int:
        return self.k.shape[1] - 1 + new


def new_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """Return an empty cache of one layer for `length` positions, of the kind its core reads."""
    own = spec_of(config.attention.core_of(config.decoding_site)).new_cache
    if own is not None:
        return own(config, batch)
    enough = remembered(config)
    if enough is not None and enough < length:
        return WindowCache.zeros(config, batch, enough)
    return KVCache.zeros(config, batch, length)


def repeat(cache: Cache, times: int) -> Cache:
    """Return the cache of `times` hypotheses of each text, in adjacent rows of the batch."""
    if isinstance(cache, KVCache) and times <= MAX_SHARED_BEAMS:
        return BeamCache.of(cache, times)
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), cache)


def reorder(cache: Cache, parents: Int[Array, "B W"]) -> Cache:
    """Return the cache in which hypothesis w of text b continues hypothesis parents[b, w] of b."""
    if isinstance(cache, BeamCache):
        writer = jnp.take_along_axis(cache.writer, parents[..., None], axis=1)
        return cache.replace(writer=writer)  # type: ignore[attr-defined]
    batch, width = parents.shape
    rows = (jnp.arange(batch)[:, None] * width + parents).reshape(-1)
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), cache)


def remembered(config: ModelConfig) -> int | None:
    """Return the number of last positions that a cache keeps; None: all positions."""
    attention = config.attention
    if attention.window is None or attention.global_tokens:
        return None
    return attention.window * max(attention.dilation or (1,)) + 1


def _zeros(config: ModelConfig, batch: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Return empty keys and values [B, S, K, H]."""
    array = jnp.zeros((batch, length, config.kv_heads, config.head_dim), config.dtype)
    return array, array


def _offset(mask: AttentionMask) -> jax.Array:
    """Return the position of the first new token; raise ValueError if the mask has none."""
    if mask.q_offset is None:
        raise ValueError(
            "a cache needs a mask with the position t of the first query: use mask.at(t)"
        )
    return mask.q_offset
