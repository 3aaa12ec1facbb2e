"""FAVOR+: attention by positive orthogonal random features, in linear time (arXiv:2009.14794).

The products phi(q) phi(k) of features phi >= 0 approximate exp(q k). A query therefore needs only
two sums over its keys, of phi(k) v^T and of phi(k). A `FeatureState` has these sums: over all keys
of a row; if causal, from chunk to chunk; and in decoding, as the cache.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from heedful.model.attention.core import FEATURES, AttentionCall, CoreSpec
from heedful.model.attention.kernel_sums import (
    FeatureState,
    KernelSums,
    Rows,
    causal,
    read,
    remember,
)
from heedful.model.attention.random_features import Features, draw_features, fixed_features
from heedful.model.config import AttentionConfig, ModelConfig, PerformerConfig
from heedful.model.masks import AttentionMask, MaskNotSupported


class Performer(nn.Module):
    """softmax(scale * q @ k^T) @ v by random features, or attention with another kernel.

    Supported masks are full, padding, causal, prefix, and self-attention in packed documents whose
    ids ascend along the row. A row with other ids gives NaN, as ids are not known while tracing.
    Windows, biases, dropout of weights, and a mesh that splits the sequence raise ModelError. For R
    features, time is O(T R H), and memory in addition to the inputs is O(T R H / chunk), also in
    the backward pass. Features and sums are in float32.

    Features come from the stream "features" of random keys if the caller provides it, as training
    does with `redraw_steps`, and otherwise from a fixed draw. All heads have the same features.
    """

    config: PerformerConfig

    def __call__(self, call: AttentionCall) -> Float[Array, "B T N H"]:
        SPEC.require(call)
        T, S, mask = call.q.shape[1], call.k.shape[1], call.mask
        if mask.causal and (mask.q_offset is not None or T != S):
            raise MaskNotSupported(
                "performer",
                f"it needs all causal queries and all keys, not {T} queries and {S} keys: give all "
                "of them, or decode with a cache of model.cache.new_cache, which has sums of keys",
            )
        return _attention(Rows.of(call), mask, self._features(call), self.config.chunk)

    def extend(
        self,
        state: FeatureState,
        call: AttentionCall,
        cache_write_mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T N H"], FeatureState]:
        """Attend from new tokens to the tokens in `state` and to new ones; add these to the state.

        Tokens for which `cache_write_mask` is False are not seen and not added. With a prefix, the
        first call must have all tokens so far: they are all seen, `cache_write_mask` selects only
        the tokens to add, and outputs are NaN if `state` already has tokens.
        """
        SPEC.require(call)
        mask, dtype = call.mask, call.v.dtype
        if not mask.causal or mask.q_segment_ids is not None:
            raise MaskNotSupported(
                "performer",
                "a cache continues one causal document per row: give a causal mask without "
                "segments",
            )
        features, size = self._features(call), self.config.chunk
        rows = Rows.of(call)
        if cache_write_mask is not None:
            rows = rows._replace(is_key=cache_write_mask)
        if mask.prefix_len is None:
            sums, state = causal(rows, features, size, state)
            return sums.mean(dtype), state
        out = _attention(Rows.of(call), mask, features, size)
        is_first = jnp.all(jnp.isneginf(state.log_scale), (1, 2))[:, None, None, None]
        return jnp.where(is_first, out, jnp.nan), remember(rows, features, size, state)

    def _features(self, call: AttentionCall) -> Features:
        """Return the map from queries and keys to the logarithms of their features."""
        head_dim = call.q.shape[-1]
        if self.has_rng(FEATURES):
            matrix = draw_features(self.config, head_dim, self.make_rng(FEATURES))
        else:
            matrix = jnp.asarray(fixed_features(self.config, head_dim))
        return Features(matrix, call.factor**0.5, self.config.kernel)


def _attention(
    rows: Rows, mask: AttentionMask, features: Features, size: int
) -> Float[Array, "B T N H"]:
    """Return the output of attention over the pairs that `mask` allows."""
    dtype, T, (B, S) = rows.v.dtype, rows.q.shape[3], rows.is_key.shape
    if mask.q_segment_ids is None:
        return _sums(rows, mask, features, size).mean(dtype)
    q_ids = jnp.broadcast_to(mask.q_segment_ids, (B, T))
    kv_ids = jnp.broadcast_to(mask.kv_segment_ids, (B, S))  # type: ignore[arg-type]
    rows = rows._replace(is_key=kv_ids != 0)
    is_known = is_single = mask.has_one_segment()
    if T != S or mask.prefix_len is not None:
        sums = _sums(rows, mask, features, size)
    else:
        segment = jax.lax.cummax(kv_ids, axis=1)
        is_known |= jnp.all((q_ids == kv_ids) & ((kv_ids == 0) | (kv_ids == segment)), 1)
        # The segment of a single document includes padding before its first key.
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


def _sums(rows: Rows, mask: AttentionMask, features: Features, size: int) -> KernelSums:
    """Return sums over all included keys; if causal, over keys up to the query or in the prefix."""
    B, K, _, H = rows.k.shape
    state = FeatureState.zeros(B, K, len(features.matrix), H)
    if not mask.causal:
        return read(rows, features, size, remember(rows, features, size, state))
    if mask.prefix_len is not None:
        in_prefix = jnp.arange(rows.k.shape[2]) < mask.prefix_len[:, None]
        prefix = rows._replace(is_key=rows.is_key & in_prefix)
        state = remember(prefix, features, size, state)
        rows = rows._replace(is_key=rows.is_key & ~in_prefix)
    return causal(rows, features, size, state)[0]


def _packed(rows: Rows, features: Features, size: int) -> KernelSums:
    """Return sums over all keys in a query's segment: keys up to the query, and keys after it."""
    before, _ = causal(rows, features, size)
    after, _ = causal(rows.flip(), features, size, strict=True)
    return before.join(jax.tree.map(partial(jnp.flip, axis=3), after))


def _refusal(call: AttentionCall) -> str | None:
    if call.mask.window is not None:
        return (
            f"its sums over keys have no window {call.mask.window}: leave model.attention.window "
            "out, or choose model.attention.core longformer or flash"
        )
    if call.bias is not None:
        return (
            "it computes no scores that a bias could be added to: choose a model.positions.kind "
            "other than alibi and relative"
        )
    if call.dropout_rate:
        return (
            "it computes no weights that could be dropped: set model.attention.dropout to 0, not "
            f"{call.dropout_rate}"
        )
    return None


def _make(config: ModelConfig, shared: Mapping[str, jax.Array]) -> Performer:
    return Performer(config.attention.performer, name="performer")


def _new_cache(config: ModelConfig, batch: int) -> FeatureState:
    features = config.attention.performer.features
    return FeatureState.zeros(batch, config.kv_heads, features, config.head_dim)


def _shrunk(attention: AttentionConfig, length: int) -> Mapping[str, Any]:
    return {"performer": replace(attention.performer, features=8, chunk=5)}


def _sizes(config: ModelConfig) -> Mapping[str, int]:
    attention = config.attention
    name = "model.attention.performer.features x model.attention.heads x head_dim"
    return {name: attention.performer.features * attention.heads * config.key_dim}


SPEC = CoreSpec(
    name="performer",
    make=_make,
    is_exact=False,
    has_weights=False,
    refusal=_refusal,
    one_document_at=("cross",),
    length="whole",
    # The features take as many FLOPs as the products with them (arXiv:2009.14794 §2.2).
    keys=lambda config: 2 * config.attention.performer.features,
    sizes=_sizes,
    shrunk=_shrunk,
    redraw_steps=lambda config: config.attention.performer.redraw_steps,
    new_cache=_new_cache,
    cached="sums of features",
)
