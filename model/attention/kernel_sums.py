"""Sums over the features of keys, chunk by chunk: queries need nothing else of their keys.

Features are kept as logarithms, and scaled just before they are multiplied: the features of a query
by one number, and those of keys by one number for each feature. The scale cancels in the quotient
that attention computes, and makes an epsilon in its denominator unnecessary.

Axes: B rows of the batch, T or t queries, S or s keys, N query heads, K key/value heads, G query
heads of each, R features, H size of a head.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from heedful.model.attention.core import AttentionCall, Core
from heedful.model.attention.random_features import Features
from heedful.model.ops.manual import vary

HEADROOM = 60.0  # exp(HEADROOM), times keys and values, is far below the largest float32


class KernelSums(NamedTuple):
    """Sums over the keys that each query sees (0 without keys), divided by exp(log_scale)."""

    values: Float[Array, "B K G t H"]
    """Sum of phi(q) phi(k) v."""
    total: Float[Array, "B K G t"]
    """Sum of phi(q) phi(k)."""
    log_scale: Float[Array, "B K G t"]

    def join(self, other: "KernelSums") -> "KernelSums":
        """Return the sums over the keys of `self` and of `other`."""
        logs = [jnp.where(x.total > 0, x.log_scale, -jnp.inf) for x in (self, other)]
        log_scale = _finite(jnp.maximum(*logs))
        a, b = (jnp.exp(x - log_scale) for x in logs)
        values = a[..., None] * self.values + b[..., None] * other.values
        return KernelSums(values, a * self.total + b * other.total, log_scale)

    def mean(self, dtype: Any) -> Float[Array, "B t N H"]:
        """Return the output of attention: values / total, or 0 without keys."""
        mean = self.values / jnp.where(self.total > 0, self.total, 1)[..., None]
        B, K, G, t, H = mean.shape
        return jnp.moveaxis(mean, 3, 1).reshape(B, t, K * G, H).astype(dtype)


@struct.dataclass
class FeatureState:
    """Sums over all keys so far: a cache whose size does not depend on the number of tokens."""

    values: Float[Array, "B K R H"]
    """Sum of phi(k) v^T over the keys; feature r is divided by exp(log_scale[r])."""
    total: Float[Array, "B K R"]
    """Sum of phi(k) over the keys, divided in the same way."""
    log_scale: Float[Array, "B K R"]
    """Logarithm of the scale of each feature; -inf before the first key."""

    @classmethod
    def zeros(cls, batch: int, heads: int, features: int, head_dim: int) -> "FeatureState":
        """Return the state before the first key: the sums are 0, and log_scale is -inf."""
        total = jnp.zeros((batch, heads, features))
        values = jnp.zeros((*total.shape, head_dim))
        return cls(values=values, total=total, log_scale=jnp.full_like(total, -jnp.inf))

    def attend(
        self, core: Core, call: AttentionCall, cache_write_mask: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T N H"], "FeatureState"]:
        """Attend as described in `Cache.attend`; positions of tokens play no role.

        Each token must be written exactly once. A prefix must be given in one call, the first one.
        """
        extend = getattr(core, "extend", None)
        if extend is None:
            raise ValueError(
                f"sums of features are no cache for {core}: make the cache with "
                "model.cache.new_cache for the config of this core"
            )
        return extend(self, call, cache_write_mask)

    def keys(self, new: int) -> int:
        """Return `new`, because the sums contain all other keys."""
        return new

    def scaled(self, log_scale: Float[Array, "B K R"]) -> "FeatureState":
        """Return the same sums with another `log_scale`."""
        factor = jnp.exp(self.log_scale - _finite(log_scale))
        return FeatureState(factor[..., None] * self.values, factor * self.total, log_scale)

    def add(self, keys: Float[Array, "B K s R"], v: Float[Array, "B K s H"]) -> "FeatureState":
        """Return the state with s keys added; `keys` has their features / exp(self.log_scale)."""
        values = self.values + jnp.einsum("BKsR,BKsH->BKRH", keys, v)
        return FeatureState(values, self.total + jnp.sum(keys, 2), self.log_scale)

    def seen_by(
        self, queries: Float[Array, "B K G t R"], log_scale: Float[Array, "B K G t"]
    ) -> KernelSums:
        """Return the sums of each query over the keys in this state.

        `queries` is phi(q) * exp(self.log_scale) / exp(log_scale); `log_scale` has one number for
        each query.
        """
        values = jnp.einsum("BKGtR,BKRH->BKGtH", queries, self.values)
        return KernelSums(values, jnp.einsum("BKGtR,BKR->BKGt", queries, self.total), log_scale)


class Rows(NamedTuple):
    """Inputs of attention by head, with the keys to include and the segments."""

    q: Float[Array, "B K G T H"]
    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    is_key: Bool[Array, "B S"]
    """True for keys that are included in the sums."""
    segment: Int[Array, "B S"]
    """Segment of each token, also of padding: causal attention sees keys of the query's segment."""

    @classmethod
    def of(cls, call: AttentionCall) -> "Rows":
        """Return the rows as one segment without padding."""
        (B, T, N, H), (S, K) = call.q.shape, call.k.shape[1:3]
        q = jnp.moveaxis(call.q.reshape(B, T, K, N // K, H), 1, 3)
        k, v = (jnp.moveaxis(x, 1, 2) for x in (call.k, call.v))
        ones = jnp.ones((B, S), jnp.int32)
        return cls(q, k, v, ones > 0, ones)

    def flip(self) -> "Rows":
        """Return the rows with the last token first."""
        return Rows(*(jnp.flip(x, axis) for x, axis in zip(self, LENGTH_AXES, strict=True)))


LENGTH_AXES = (3, 2, 2, 1, 1)  # index of the axis T or S of each field of Rows


# Chunk by chunk ---------------------------------------------------------------------------------


def remember(rows: Rows, features: Features, size: int, state: FeatureState) -> FeatureState:
    """Return `state` with the keys of `rows` added where is_key is True, in chunks of `size`."""

    @jax.checkpoint
    def step(state: FeatureState, chunk: tuple[jax.Array, ...]):
        k, v, is_key = chunk
        keys = jnp.where(is_key[:, None, :, None], features(k), -jnp.inf)
        highest = jax.lax.stop_gradient(jnp.max(keys, 2))
        state = state.scaled(jnp.maximum(state.log_scale, highest))
        return state.add(jnp.exp(keys - _finite(state.log_scale)[:, :, None]), v), None

    chunks = (
        _chunks(rows.k, 2, size),
        _chunks(rows.v, 2, size),
        _chunks(rows.is_key, 1, size),
    )
    return jax.lax.scan(step, vary(state, rows.k), chunks)[0]


def read(rows: Rows, features: Features, size: int, state: FeatureState) -> KernelSums:
    """Return the sums of each query over all keys in `state`, in chunks of `size` queries."""

    @jax.checkpoint
    def step(_: None, q: jax.Array):
        scaled = _scaled(features(q) + _finite(state.log_scale)[:, :, None, None])
        return None, state.seen_by(*scaled)

    _, sums = jax.lax.scan(step, None, _chunks(rows.q, 3, size))
    return _whole(sums, rows.q.shape[3])


def causal(
    rows: Rows,
    features: Features,
    size: int,
    state: FeatureState | None = None,
    strict: bool = False,
) -> tuple[KernelSums, FeatureState]:
    """Return the sums of each query over earlier keys of its segment, and a new state.

    The key at the query's position is included, unless `strict`. `state` has earlier keys of the
    first segment (None: no keys); the new state has the keys of the last segment. Chunks have
    `size` tokens.
    """
    B, K, _, H = rows.k.shape
    start = state or FeatureState.zeros(B, K, len(features.matrix), H)

    @jax.checkpoint
    def step(carry: tuple[FeatureState, jax.Array], chunk: Rows):
        (state, last), (q, k, v, is_key, segment) = carry, chunk
        index = jnp.arange(segment.shape[1])
        together = (segment[:, :, None] == segment[:, None]) & is_key[:, None]
        allowed = together & ((index < index[:, None]) if strict else (index <= index[:, None]))
        goes_on = segment == last[:, None]

        # A query divides by its sum over keys. With the scale of the first key that a query sees,
        # this sum is at least 1, unless later keys are greater by more than exp(HEADROOM).
        keys = jnp.where(is_key[:, None, :, None], features(k), -jnp.inf)
        first = jnp.argmax(together, -1)[:, None, :, None]
        own = jnp.take_along_axis(keys, first, 2)
        carried = jnp.where(goes_on[:, None, :, None], state.log_scale[:, :, None], -jnp.inf)
        state = FeatureState(state.values, state.total, carried[:, :, 0])
        own = jnp.maximum(own, jnp.max(keys, 2, keepdims=True) - HEADROOM)
        own = jax.lax.stop_gradient(jnp.maximum(own, carried))
        keys = jnp.exp(keys - _finite(own))
        queries, log_scale = _scaled(features(q) + _finite(own)[:, :, None])

        products = jnp.einsum("BKGtR,BKsR->BKGts", queries, keys)
        products = jnp.where(allowed[:, None, None], products, 0)
        state = state.scaled(own[:, :, 0])
        earlier, before = state.seen_by(queries, log_scale), goes_on[:, None, None]
        values = jnp.einsum("BKGts,BKsH->BKGtH", products, v.astype(jnp.float32))
        values += jnp.where(before[..., None], earlier.values, 0)
        total = jnp.sum(products, -1) + jnp.where(before, earlier.total, 0)

        end = segment[:, -1]
        lasts = (last == end)[:, None, None]
        state = FeatureState(
            jnp.where(lasts[..., None], state.values, 0),
            jnp.where(lasts, state.total, 0),
            own[:, :, -1],
        )
        ours = (segment == end[:, None])[:, None, :, None]
        state = state.add(jnp.where(ours, keys, 0), v)
        return (state, end), KernelSums(values, total, log_scale)

    chunks = Rows(*(_chunks(x, axis, size) for x, axis in zip(rows, LENGTH_AXES, strict=True)))
    (last, _), sums = jax.lax.scan(step, (vary(start, rows.k), rows.segment[:, 0]), chunks)
    return _whole(sums, rows.q.shape[3]), last


def _chunks(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Cut the axis into chunks of `size`.

    The last chunk is padded with its last entry or, in a bool array, with False.
    """
    size = min(size, x.shape[axis])
    widths = [(0, -x.shape[i] % size if i == axis else 0) for i in range(x.ndim)]
    x = jnp.pad(x, widths, mode="constant" if x.dtype == bool else "edge")
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _whole(sums: KernelSums, length: int) -> KernelSums:
    """Join the chunks along the axis t, and cut it to `length`."""

    def one(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], -1, *x.shape[5:])[:, :, :, :length]

    return jax.tree.map(one, sums)


def _scaled(logs: Float[Array, "*b R"]) -> tuple[Float[Array, "*b R"], Float[Array, "*b"]]:
    """Return exp(logs - log_scale), whose largest entry is 1, and log_scale."""
    log_scale = jax.lax.stop_gradient(jnp.max(logs, -1))
    return jnp.exp(logs - log_scale[..., None]), log_scale


def _finite(log_scale: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Replace -inf, the scale before the first key, by 0."""
    return jnp.where(jnp.isneginf(log_scale), 0, log_scale)
