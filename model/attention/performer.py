"""FAVOR+: attention by positive orthogonal random features, in linear time (arXiv:2009.14794).

With features phi >= 0 whose products phi(q) phi(k) stand in for exp(q k), a query needs no more of
its keys than two sums, of phi(k) v^T and of phi(k). They are a `FeatureState`: of all keys of a
row, carried from chunk to chunk if causal, and all that is remembered while decoding.

Features are kept as logarithms, and scaled just before they are multiplied: for a query by one
number, for keys by one for each feature. That changes no quotient, and needs no epsilon.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from heedful.model.attention.dense import require_shapes, require_whole_rows
from heedful.model.config import PerformerConfig
from heedful.model.masks import AttentionMask, MaskNotSupported
from heedful.model.positions import PositionBias

EPSILON = 1e-3  # least ReLU feature, as in the authors' code
HEADROOM = 60.0  # exp(HEADROOM), times keys and values, is far from the end of float32


class Performer(nn.Module):
    """softmax(scale q k^T) v by random features, or the attention of another kernel.

    Masks: full, padding, causal, prefix, and self-attention in packed documents whose ids ascend
    along the row; a row with ids of another kind, which are not known while tracing, becomes NaN.
    Windows, biases and dropout of weights are refused, and a mesh that splits the length. Time is
    O(T R H), memory beyond that of the inputs O(T R H / chunk), backward too. Features and sums are
    in float32.

    Features come from the stream "features" of keys where the caller gives one, as training does
    for `redraw_steps`, and from a fixed draw otherwise. All heads have the same.
    """

    config: PerformerConfig

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        mask: AttentionMask,
        *,
        bias: PositionBias | None = None,
        scale: float | None = None,
        dropout_rate: float = 0.0,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "B T N H"]:
        _require_supported(mask, bias, dropout_rate)
        mask.require_lengths(q.shape[1], k.shape[1])
        if mask.causal and (mask.q_offset is not None or q.shape[1] != k.shape[1]):
            raise MaskNotSupported(
                "performer",
                f"{q.shape[1]} causal queries stand among {k.shape[1]} keys: give all of both, or "
                "decode with the cache of model.cache.new_cache, which holds sums of keys",
            )
        rows = _Rows.of(q, k, v)
        return _attention(rows, mask, self._features(q, scale), self.config.chunk)

    def extend(
        self,
        state: "FeatureState",
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        mask: AttentionMask,
        cache_write_mask: Bool[Array, "B T"] | None = None,
        *,
        bias: PositionBias | None = None,
        scale: float | None = None,
        dropout_rate: float = 0.0,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T N H"], "FeatureState"]:
        """Attention of new tokens to those in `state` and themselves; the state with them added.

        Tokens that are not real are neither seen nor added. With a prefix the tokens are all there
        are: what is real counts only for the state, and an output after others becomes NaN.
        """
        _require_supported(mask, bias, dropout_rate)
        if not mask.causal or mask.q_segment_ids is not None:
            raise MaskNotSupported("performer", "a cache continues one causal document per row")
        features, size = self._features(q, scale), self.config.chunk
        rows = _Rows.of(q, k, v)
        if cache_write_mask is not None:
            rows = rows._replace(cache_write_mask=cache_write_mask)
        if mask.prefix_len is None:
            sums, state = _causal(rows, features, size, state)
            return sums.mean(v.dtype), state
        out = _attention(_Rows.of(q, k, v), mask, features, size)
        is_first = jnp.all(jnp.isneginf(state.log_scale), (1, 2))[:, None, None, None]
        return jnp.where(is_first, out, jnp.nan), _remember(rows, features, size, state)

    def _features(self, q: jax.Array, scale: float | None) -> "Features":
        """The kernel of this call, from queries and keys to the logarithms of their features."""
        head_dim = q.shape[-1]
        if self.has_rng("features"):
            matrix = draw_features(self.config, head_dim, self.make_rng("features"))
        else:
            matrix = jnp.asarray(fixed_features(self.config, head_dim))
        factor = (head_dim**-0.5 if scale is None else scale) ** 0.5
        return Features(matrix, factor, self.config.kernel)


def _require_supported(mask: AttentionMask, bias: PositionBias | None, rate: float) -> None:
    """Sums over keys know nothing of pairs, and go along the whole length."""
    require_whole_rows("performer")
    if mask.window is not None:
        raise MaskNotSupported(
            "performer",
            f"a sum over keys has no window {mask.window}: leave model.attention.window out, or "
            "choose the core longformer or flash",
        )
    if bias is not None:
        raise MaskNotSupported(
            "performer",
            "it computes no scores that a bias could be added to: choose a model.positions.kind "
            "other than alibi and relative",
        )
    if rate:
        raise MaskNotSupported(
            "performer",
            "it computes no weights that could be dropped: set model.attention.dropout to 0, not "
            f"{rate}",
        )


# Features ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """phi: from queries or keys to the logarithms of their features, in float32."""

    matrix: Float[Array, "R H"]
    factor: float
    """Multiplies queries and keys, so that its square is the scale of their products."""
    kernel: str

    def __call__(self, x: Float[Array, "*n H"]) -> Float[Array, "*n R"]:
        """But for what all features of all x share, as it changes no quotient.

        softmax: phi(x) = exp(w x - |x|^2 / 2) for each row w of the matrix (arXiv:2009.14794
        §2.3); for normal w, E[phi(q) phi(k)] = exp(q k). relu: phi(x) = max(w x, 0), one of the
        generalised attentions of §4.
        """
        x = x.astype(jnp.float32) * self.factor
        # Errors in an exponent do not average out: no matrix unit may round these products.
        projected = jnp.einsum("...H,RH->...R", x, self.matrix, precision="highest")
        if self.kernel == "relu":
            return jnp.log(jax.nn.relu(projected) + EPSILON)
        return projected - jnp.sum(jnp.square(x), -1, keepdims=True) / 2


def draw_features(config: PerformerConfig, head_dim: int, key: jax.Array) -> Float[Array, "R H"]:
    """Random rows, each normal; orthogonal among each H of them if so configured (§2.4)."""
    keys = iter(jax.random.split(key))
    return _draw(config, head_dim, lambda *shape: jax.random.normal(next(keys), shape), jnp)


@lru_cache
def fixed_features(config: PerformerConfig, head_dim: int) -> np.ndarray:
    """One such draw, the same wherever it is made."""
    rng = np.random.default_rng(0)
    return _draw(config, head_dim, lambda *shape: rng.normal(size=shape), np).astype(np.float32)


def _draw(config: PerformerConfig, head_dim: int, normal: Callable, numpy: Any) -> Any:
    rows = normal(config.features, head_dim)
    if not config.orthogonal:
        return rows
    q, r = numpy.linalg.qr(normal(-(-config.features // head_dim), head_dim, head_dim))
    # QR fixes signs by a rule; without it all rotations are equally likely.
    q = q * numpy.sign(numpy.diagonal(r, axis1=-2, axis2=-1))[:, None]
    lengths = numpy.linalg.norm(rows, axis=-1, keepdims=True)
    return lengths * q.reshape(-1, head_dim)[: config.features]


# Sums over keys ---------------------------------------------------------------------------------


class KernelSums(NamedTuple):
    """Of each query over the keys that it sees, divided by exp(log_scale); 0 where it sees none."""

    values: Float[Array, "B K G t H"]
    """Of phi(q) phi(k) v."""
    total: Float[Array, "B K G t"]
    """Of phi(q) phi(k)."""
    log_scale: Float[Array, "B K G t"]

    def join(self, other: "KernelSums") -> "KernelSums":
        """Over the keys of both."""
        logs = [jnp.where(x.total > 0, x.log_scale, -jnp.inf) for x in (self, other)]
        log_scale = _finite(jnp.maximum(*logs))
        a, b = (jnp.exp(x - log_scale) for x in logs)
        values = a[..., None] * self.values + b[..., None] * other.values
        return KernelSums(values, a * self.total + b * other.total, log_scale)

    def mean(self, dtype: Any) -> Float[Array, "B t N H"]:
        """What attention gives."""
        mean = self.values / jnp.where(self.total > 0, self.total, 1)[..., None]
        B, K, G, t, H = mean.shape
        return jnp.moveaxis(mean, 3, 1).reshape(B, t, K * G, H).astype(dtype)


@struct.dataclass
class FeatureState:
    """What queries need of all keys so far: a cache of one size for any number of tokens."""

    values: Float[Array, "B K R H"]
    """Sum of phi(k) v^T over the keys, of which feature r is divided by exp(log_scale[r])."""
    total: Float[Array, "B K R"]
    """The same of phi(k)."""
    log_scale: Float[Array, "B K R"]
    """-inf where there is no key yet."""

    @classmethod
    def zeros(cls, batch: int, heads: int, features: int, head_dim: int) -> "FeatureState":
        """Of no key."""
        total = jnp.zeros((batch, heads, features))
        values = jnp.zeros((*total.shape, head_dim))
        return cls(values=values, total=total, log_scale=jnp.full_like(total, -jnp.inf))

    def attend(
        self, core: Callable, q: jax.Array, k: jax.Array, v: jax.Array,
        mask: AttentionMask, cache_write_mask: jax.Array | None = None, **how: Any,
    ) -> tuple[jax.Array, "FeatureState"]:  # fmt: skip
        """As `model.cache.Cache` says. Each token must be real once, whatever its position; a
        prefix is read as one chunk, before all else."""
        if not isinstance(core, Performer):
            raise ValueError(f"sums of features are no cache for {core}")
        return core.extend(self, q, k, v, mask, cache_write_mask, **how)

    def keys(self, new: int) -> int:
        """As `model.cache.Cache` says: all but the new ones are in the sums."""
        return new

    def scaled(self, log_scale: Float[Array, "B K R"]) -> "FeatureState":
        """The same sums, divided by exp(log_scale)."""
        factor = jnp.exp(self.log_scale - _finite(log_scale))
        return FeatureState(factor[..., None] * self.values, factor * self.total, log_scale)

    def add(self, keys: Float[Array, "B K s R"], v: Float[Array, "B K s H"]) -> "FeatureState":
        """With more keys, by their features, which are scaled as these sums are."""
        values = self.values + jnp.einsum("BKsR,BKsH->BKRH", keys, v)
        return FeatureState(values, self.total + jnp.sum(keys, 2), self.log_scale)

    def seen_by(
        self, queries: Float[Array, "B K G t R"], log_scale: Float[Array, "B K G t"]
    ) -> KernelSums:
        """Of queries, by their features times those of the scale of these sums."""
        values = jnp.einsum("BKGtR,BKRH->BKGtH", queries, self.values)
        return KernelSums(values, jnp.einsum("BKGtR,BKR->BKGt", queries, self.total), log_scale)


class _Rows(NamedTuple):
    """Inputs by head, and what the mask says of them."""

    q: Float[Array, "B K G T H"]
    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    cache_write_mask: Bool[Array, "B S"]
    """Which keys count."""
    segment: Int[Array, "B S"]
    """Of causal attention: keys of a query's own segment are seen. A segment has no gaps."""

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, v: jax.Array) -> "_Rows":
        """One segment of real keys."""
        (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
        require_shapes(q, k, v)
        by_head = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3)
        ones = jnp.ones((B, S), jnp.int32)
        return cls(by_head, jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2), ones > 0, ones)

    def flip(self) -> "_Rows":
        """Last token first."""
        return _Rows(*(jnp.flip(x, axis) for x, axis in zip(self, _LENGTH, strict=True)))


_LENGTH = (3, 2, 2, 1, 1)  # the axis T or S of each


def _attention(
    rows: _Rows, mask: AttentionMask, features: Features, size: int
) -> Float[Array, "B T N H"]:
    """The mean over what `mask` allows."""
    dtype, T, (B, S) = rows.v.dtype, rows.q.shape[3], rows.cache_write_mask.shape
    if mask.q_segment_ids is None:
        return _sums(rows, mask, features, size).mean(dtype)
    q_ids = jnp.broadcast_to(mask.q_segment_ids, (B, T))
    kv_ids = jnp.broadcast_to(mask.kv_segment_ids, (B, S))  # type: ignore[arg-type]
    rows = rows._replace(cache_write_mask=kv_ids != 0)
    is_known = is_single = mask.has_one_segment()
    if T != S or mask.prefix_len is not None:
        sums = _sums(rows, mask, features, size)
    else:
        segment = jax.lax.cummax(kv_ids, axis=1)
        is_known |= jnp.all((q_ids == kv_ids) & ((kv_ids == 0) | (kv_ids == segment)), 1)
        # That of a single document begins before its first key, too.
        whole = jnp.max(kv_ids, axis=1, keepdims=True)
        rows = rows._replace(segment=jnp.where(is_single[:, None], whole, segment))
        if mask.causal:
            sums = _sums(rows, mask, features, size)
        else:
            sums = jax.lax.cond(
                jnp.all(is_single),
                lambda: _sums(rows, mask, features, size),
                lambda: _packed(rows, features, size),
            )
    out = jnp.where((q_ids != 0)[:, :, None, None], sums.mean(dtype), 0)
    return jnp.where(is_known[:, None, None, None], out, jnp.nan)


def _sums(rows: _Rows, mask: AttentionMask, features: Features, size: int) -> KernelSums:
    """Over all real keys or, if causal, over a query's own and the prefix."""
    B, K, _, H = rows.k.shape
    state = FeatureState.zeros(B, K, len(features.matrix), H)
    if not mask.causal:
        return _read(rows, features, size, _remember(rows, features, size, state))
    if mask.prefix_len is not None:
        in_prefix = jnp.arange(rows.k.shape[2]) < mask.prefix_len[:, None]
        prefix = rows._replace(cache_write_mask=rows.cache_write_mask & in_prefix)
        state = _remember(prefix, features, size, state)
        rows = rows._replace(cache_write_mask=rows.cache_write_mask & ~in_prefix)
    return _causal(rows, features, size, state)[0]


def _packed(rows: _Rows, features: Features, size: int) -> KernelSums:
    """Over all keys in a query's segment: those up to it, and those after it."""
    before, _ = _causal(rows, features, size)
    after, _ = _causal(rows.flip(), features, size, strict=True)
    return before.join(jax.tree.map(partial(jnp.flip, axis=3), after))


# Chunk by chunk ---------------------------------------------------------------------------------


def _remember(rows: _Rows, features: Features, size: int, state: FeatureState) -> FeatureState:
    """The state with all real keys."""

    @jax.checkpoint
    def step(state: FeatureState, chunk: tuple[jax.Array, ...]):
        k, v, cache_write_mask = chunk
        keys = jnp.where(cache_write_mask[:, None, :, None], features(k), -jnp.inf)
        highest = jax.lax.stop_gradient(jnp.max(keys, 2))
        state = state.scaled(jnp.maximum(state.log_scale, highest))
        return state.add(jnp.exp(keys - _finite(state.log_scale)[:, :, None]), v), None

    chunks = (
        _chunks(rows.k, 2, size),
        _chunks(rows.v, 2, size),
        _chunks(rows.cache_write_mask, 1, size),
    )
    return jax.lax.scan(step, state, chunks)[0]


def _read(rows: _Rows, features: Features, size: int, state: FeatureState) -> KernelSums:
    """Over all keys in `state`."""

    @jax.checkpoint
    def step(_: None, q: jax.Array):
        scaled = _scaled(features(q) + _finite(state.log_scale)[:, :, None, None])
        return None, state.seen_by(*scaled)

    _, sums = jax.lax.scan(step, None, _chunks(rows.q, 3, size))
    return _whole(sums, rows.q.shape[3])


def _causal(
    rows: _Rows,
    features: Features,
    size: int,
    state: FeatureState | None = None,
    strict: bool = False,
) -> tuple[KernelSums, FeatureState]:
    """Over real keys up to a query (if strict, before it) in its segment, and `state`, which is of
    the first segment; the state of the last one."""
    B, K, _, H = rows.k.shape
    state = state or FeatureState.zeros(B, K, len(features.matrix), H)

    @jax.checkpoint
    def step(carry: tuple[FeatureState, jax.Array], chunk: _Rows):
        (state, last), (q, k, v, cache_write_mask, segment) = carry, chunk
        index = jnp.arange(segment.shape[1])
        together = (segment[:, :, None] == segment[:, None]) & cache_write_mask[:, None]
        allowed = together & ((index < index[:, None]) if strict else (index <= index[:, None]))
        goes_on = segment == last[:, None]

        # A query divides by the sum of features of its keys. With the scale of the first of them it
        # is at least 1, whatever comes later, unless that is too much greater.
        keys = jnp.where(cache_write_mask[:, None, :, None], features(k), -jnp.inf)
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

    chunks = _Rows(*(_chunks(x, axis, size) for x, axis in zip(rows, _LENGTH, strict=True)))
    (state, _), sums = jax.lax.scan(step, (state, rows.segment[:, 0]), chunks)
    return _whole(sums, rows.q.shape[3]), state


def _chunks(x: jax.Array, axis: int, size: int) -> jax.Array:
    """[chunks, ...]: the axis in parts of `size`, the last filled up with what is not real."""
    size = min(size, x.shape[axis])
    widths = [(0, -x.shape[i] % size if i == axis else 0) for i in range(x.ndim)]
    x = jnp.pad(x, widths, mode="constant" if x.dtype == bool else "edge")
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _whole(sums: KernelSums, length: int) -> KernelSums:
    """Chunks put together again along the axis t."""

    def one(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], -1, *x.shape[5:])[:, :, :, :length]

    return jax.tree.map(one, sums)


def _scaled(logs: Float[Array, "*b R"]) -> tuple[Float[Array, "*b R"], Float[Array, "*b"]]:
    """exp(logs - log_scale) whose largest entry is 1, and log_scale."""
    log_scale = jax.lax.stop_gradient(jnp.max(logs, -1))
    return jnp.exp(logs - log_scale[..., None]), log_scale


def _finite(log_scale: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """0 where there is nothing to scale."""
    return jnp.where(jnp.isneginf(log_scale), 0, log_scale)
