"""Multi-head attention: projections, heads and a cache around an attention core."""

import flax.linen as nn
import jax
from flax import struct
from jaxtyping import Array, Bool, Float

from heedful.model.attention import AttentionCall, Cache, Core, CoreSpec, spec_here
from heedful.model.attention.dense import attention_weights, dense
from heedful.model.attention.projections import (
    global_call,
    keys_values,
    put_global_rows,
    queries,
    scale,
)
from heedful.model.axes import constrain
from heedful.model.cache import KVCache
from heedful.model.config import AttentionSite, ModelConfig
from heedful.model.layers import residual_gain
from heedful.model.linear import Linear
from heedful.model.masks import AttentionMask
from heedful.model.positions import PositionBias, Rotation


@struct.dataclass
class StackContext:
    """Inputs of attention that are the same in all layers that share positions."""

    rotation: Rotation | None = None
    bias: PositionBias | None = None
    core_params: dict[str, jax.Array] = struct.field(default_factory=dict)
    """Parameters of the core that all layers share, by name."""
    cache_write_mask: Bool[Array, "B T"] | None = None
    """True for the new tokens that are added to the cache; None: all tokens."""


class MultiHeadAttention(nn.Module):
    """Projections, grouped heads and the cache around an attention core (arXiv:1706.03762 §3.2.2).

    Keys and values come from `context`, or from `x` if `context` is None. Self-attention with a
    cache adds the keys and values of `x` at `mask.q_offset`, after their rotation, and attends to
    all that the cache holds. Cross-attention returns a cache with the projected context, and reads
    it in calls without `context`. With `attention.global_projections`, global tokens attend with
    queries, keys and values of separate projections. If the collection "intermediates" is mutable
    and the core computes attention weights, it gets `weights` [B, N, T, S]; for self-attention with
    a cache this raises ValueError.
    """

    config: ModelConfig
    site: AttentionSite = "self"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S D"] | None,
        mask: AttentionMask,
        shared: StackContext | None = None,
        *,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        config, attention = self.config, self.config.attention
        shared = shared or StackContext()
        rate = 0.0 if deterministic else attention.dropout

        q, k, v = self._project(x, context, shared.rotation, cache)
        spec, core = self._core(q, k, cache, shared)
        key = self._dropout_key(rate)
        call = AttentionCall(q, k, v, mask, shared.bias, scale(config), rate, key)
        y, new_cache = self._attend(core, call, cache, shared.cache_write_mask)
        weights = self._weights(spec, call, new_cache)
        if attention.global_projections and self.site == "self":
            own = global_call(config, x, call, shared.rotation, self._dropout_key(rate))
            y, weights = put_global_rows(y, weights, mask.global_index, own)
        if weights is not None:
            self.sow("intermediates", "weights", weights)

        y = y.reshape(*x.shape[:2], *y.shape[2:])
        heads, gain = {"heads": attention.heads, "head_dim": config.head_dim}, residual_gain(config)
        out = Linear(config, heads, {"embed": config.width}, attention.bias, gain, name="out")
        return out(y), new_cache

    def _project(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S D"] | None,
        rotation: Rotation | None,
        cache: Cache | None,
    ) -> tuple[Float[Array, "b t N H"], Float[Array, "b S K H"], Float[Array, "b S K H"]]:
        """Return queries, keys (both rotated by `rotation`, if any) and values.

        Cross-attention without `context` takes keys and values from `cache`; b is then the number
        of sources, and the queries of all hypotheses of a source are in one row.
        """
        q = queries(self.config, x, rotation)
        if self.site == "cross" and context is None:
            if not isinstance(cache, KVCache):
                raise ValueError(
                    "cross-attention needs a context, or the cache that a call with the context "
                    "returned: give one of them"
                )
            k, v = cache.rows()
            q = q.reshape(len(k), -1, *q.shape[2:])  # All hypotheses of a source.
        else:
            k, v = keys_values(self.config, x if context is None else context, rotation)
        q = constrain(q, "act_batch", "act_length", "act_heads", "act_head_dim")
        k = constrain(k, "act_batch", "act_length", "act_kv_heads", "act_head_dim")
        v = constrain(v, "act_batch", "act_length", "act_kv_heads", "act_head_dim")
        return q, k, v

    def _core(
        self, q: jax.Array, k: jax.Array, cache: Cache | None, shared: StackContext
    ) -> tuple[CoreSpec, Core]:
        """Return spec and core of this site, for the number of keys that the queries see."""
        length = k.shape[1]
        if cache is not None and self.site != "cross":
            length = cache.keys(length)
        spec = spec_here(self.config.attention.core_of(self.site), length, q.shape[1])
        core = spec.make(self.config, shared.core_params)
        if self.is_initializing() and not isinstance(core, nn.Module):
            core = dense  # the core has no parameters, and may need an absent mesh or device
        return spec, core

    def _attend(
        self,
        core: Core,
        call: AttentionCall,
        cache: Cache | None,
        cache_write_mask: Bool[Array, "B T"] | None,
    ) -> tuple[Float[Array, "b t N H"], Cache | None]:
        """Run the core, on the cache if given; return outputs and the cache for the next call."""
        if self.site == "cross":
            return core(call), KVCache.of(call.k, call.v)
        if cache is None:
            return core(call), None
        return cache.attend(core, call, cache_write_mask)

    def _weights(
        self, spec: CoreSpec, call: AttentionCall, cache: Cache | None
    ) -> Float[Array, "b N t S"] | None:
        """Return the attention weights; None if not asked for, or if the core computes none."""
        if not spec.has_weights or self.is_initializing():
            return None
        if not self.is_mutable_collection("intermediates"):
            return None
        if cache is not None and self.site != "cross":
            raise ValueError(
                "attention weights are not available for self-attention with a cache: make the "
                "collection intermediates immutable, or give all tokens at once without a cache"
            )
        weights = attention_weights(call)
        return weights.reshape(len(weights), -1, *weights.shape[3:])

    def _dropout_key(self, rate: float) -> jax.Array | None:
        return self.make_rng("dropout") if rate else None
