"""The parts of a block: norms, feed-forward and multi-head attention."""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from heedful.model.activations import ACTIVATIONS
from heedful.model.attention import ATTENTION, WITHOUT_WEIGHTS, choose
from heedful.model.attention.dense import attention_weights, dense
from heedful.model.attention.longformer import put_rows, take_rows
from heedful.model.axes import constrain, partitioned, shards, target_platform
from heedful.model.cache import Cache, KVCache
from heedful.model.config import AttentionSite, ModelConfig
from heedful.model.dropout import dropout
from heedful.model.linear import MAX_ROWS_TRANSPOSED, Linear, matmul, transposed_matmul
from heedful.model.masks import AttentionMask, MaskNotSupported, cross
from heedful.model.positions import PositionBias, Rotation, lookup


class Dropout(nn.Module):
    """Dropout of activations in training, with the stream "dropout" of keys."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "..."], deterministic: bool) -> Float[Array, "..."]:
        if deterministic or self.rate == 0.0:
            return x
        return dropout(x, self.rate, self.make_rng("dropout"))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalise(
    x: Float[Array, "B T D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"] | None,
    centred: bool,
    epsilon: float,
) -> Float[Array, "B T D"]:
    """scale (x - mean) / deviation + bias, in float32; the mean is 0 unless `centred`.

    For its derivative it keeps x and two numbers of each row; derived automatically it would keep
    what it computes on the way as well, three times the size of x.
    """
    return _normalise_forward(x, scale, bias, centred, epsilon)[0]


def _normalise_forward(x, scale, bias, centred: bool, epsilon: float):
    y = x.astype(jnp.float32)
    mean = jnp.mean(y, axis=-1, keepdims=True) if centred else None
    y = y - mean if centred else y
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
    y = y * inverse * scale
    y = y if bias is None else y + bias
    return y.astype(x.dtype), (x, mean, inverse, scale, bias)


def _normalise_backward(centred: bool, epsilon: float, saved: tuple, g: jax.Array):
    x, mean, inverse, scale, bias = saved
    y, g = x.astype(jnp.float32), g.astype(jnp.float32)
    y = (y - mean if centred else y) * inverse
    of_y = g * scale
    of_x = of_y - y * jnp.mean(of_y * y, axis=-1, keepdims=True)
    if centred:
        of_x -= jnp.mean(of_y, axis=-1, keepdims=True)
    of_bias = None if bias is None else jnp.sum(g, axis=(0, 1))
    return (of_x * inverse).astype(x.dtype), jnp.sum(g * y, axis=(0, 1)), of_bias


normalise.defvjp(_normalise_forward, _normalise_backward)


class Norm(nn.Module):
    """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467), computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        norm, shape = self.config.norm, (x.shape[-1],)
        if norm.kind == "none":
            return x
        ones = partitioned(nn.initializers.ones, "norm")
        scale, bias = jnp.asarray(self.param("scale", ones, shape)), None
        if norm.kind == "layernorm" and norm.bias:
            zeros = partitioned(nn.initializers.zeros, "norm")
            bias = jnp.asarray(self.param("bias", zeros, shape))
        return normalise(x, scale, bias, norm.kind == "layernorm", norm.epsilon)


class FeedForward(nn.Module):
    """activation(x W1) W2, or (activation(x W_gate) * x W1) W2 if gated."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        config = self.config.feed_forward
        inner, outer = {"mlp": config.width}, {"embed": self.config.width}
        activation = ACTIVATIONS[config.activation]
        h = Linear(self.config, outer, inner, config.bias, name="up")(x)
        if config.gated:
            h *= activation(Linear(self.config, outer, inner, config.bias, name="gate")(x))
        else:
            h = activation(h)
        h = constrain(h, "act_batch", "act_length", "act_mlp")
        h = Dropout(config.dropout)(h, deterministic)
        gain = _last_gain(self.config)
        return Linear(self.config, inner, outer, config.bias, gain, name="down")(h)


@struct.dataclass
class StackContext:
    """What self-attention is given alike in all layers of a stack."""

    rotation: Rotation | None = None
    bias: PositionBias | None = None
    projection: Float[Array, "S R"] | None = None
    """Of the core linformer, where layers share it."""
    cache_write_mask: Bool[Array, "B T"] | None = None
    """Which of the new tokens a cache remembers; None: all."""


class MultiHeadAttention(nn.Module):
    """Projections, grouped heads and the cache around an attention core (arXiv:1706.03762 §3.2.2).

    Keys and values come from `context`, or from `x` itself when there is none. With a cache,
    self-attention adds its rows at `mask.q_offset` and attends to all that the cache remembers,
    while cross-attention stores the projected context and reads it when called without one. Keys
    are cached after their rotation. With `attention.global_projections` what global tokens see goes
    through projections of its own. The weights are sown as `weights` [B, N, T, S] where the caller
    makes the collection "intermediates" mutable and the core has such weights; those of
    self-attention with a cache are refused.
    """

    config: ModelConfig
    place: AttentionSite = "self"

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
        model = {"embed": config.width}
        heads, kv_heads = {"heads": attention.heads}, {"kv_heads": config.kv_heads}
        keys, values = {"head_dim": config.key_dim}, {"head_dim": config.head_dim}
        shared = shared or StackContext()
        rotate = shared.rotation or (lambda x: x)

        # Scores that nothing scales need smaller queries, or the softmax begins saturated.
        gain = 1.0 if attention.scaled else config.key_dim**-0.5
        q = Linear(config, model, heads | keys, attention.bias, gain, name="query")(x)
        q = _filled(rotate(q), config.head_dim)
        if self.place == "cross" and context is None:
            if not isinstance(cache, KVCache):
                raise ValueError("cross-attention needs a context, or a cache that has seen it")
            k, v = cache.rows()
            q = q.reshape(len(k), -1, *q.shape[2:])  # Hypotheses share their source.
        else:
            source = x if context is None else context
            k = Linear(config, model, kv_heads | keys, attention.bias, name="key")(source)
            k = _filled(rotate(k), config.head_dim)
            v = Linear(config, model, kv_heads | values, attention.bias, name="value")(source)
        q = constrain(q, "act_batch", "act_length", "act_heads", "act_head_dim")
        k = constrain(k, "act_batch", "act_length", "act_kv_heads", "act_head_dim")
        v = constrain(v, "act_batch", "act_length", "act_kv_heads", "act_head_dim")

        place_core, platform = attention.core_of(self.place), target_platform()
        length = k.shape[1] if cache is None or self.place == "cross" else cache.keys(k.shape[1])
        name, _ = choose(place_core, platform, length, q.shape[1], shards("act_length"))
        core = ATTENTION[name](config)
        if self.is_initializing() and not isinstance(core, nn.Module):
            core = dense  # it has no parameters, and may need a mesh or a device that is not there
        rate = 0.0 if deterministic else attention.dropout
        if name == "linformer":
            core = partial(core, projection=shared.projection)
        scores: dict[str, Any] = {"bias": shared.bias, "scale": _scale(config)}
        how = scores | {
            "dropout_rate": rate,
            "dropout_key": self.make_rng("dropout") if rate else None,
        }
        if self.place == "cross":
            y, cache = core(q, k, v, mask, **how), KVCache.of(k, v)
        elif cache is None:
            y = core(q, k, v, mask, **how)
        else:
            y, cache = cache.attend(core, q, k, v, mask, shared.cache_write_mask, **how)
        is_sown = self.is_mutable_collection("intermediates") and not self.is_initializing()
        is_sown &= name not in WITHOUT_WEIGHTS
        if is_sown and cache is not None and self.place != "cross":
            raise ValueError(
                "no attention weights are known with a cache, which holds the keys of earlier "
                "tokens: make intermediates immutable, or give all tokens at once without a cache"
            )
        weights = attention_weights(q, k, mask, **scores) if is_sown else None
        if weights is not None:
            weights = weights.reshape(len(q), -1, *weights.shape[3:])
        if attention.global_projections and self.place == "self":
            y, weights = self._with_global_rows(y, weights, x, mask, shared, rate)
        if weights is not None:
            self.sow("intermediates", "weights", weights)
        gain = _last_gain(config)
        y = y.reshape(*x.shape[:2], *y.shape[2:])
        return Linear(config, heads | values, model, attention.bias, gain, name="out")(y), cache

    def _with_global_rows(
        self,
        y: Float[Array, "B T N H"],
        weights: Float[Array, "B N T S"] | None,
        x: Float[Array, "B T D"],
        mask: AttentionMask,
        shared: StackContext,
        rate: float,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"] | None]:
        """`y` and `weights` with the rows of global tokens by their own projections.

        They see all of their segment (arXiv:2004.05150 §3.1).
        """
        config, attention, rows = self.config, self.config.attention, mask.global_index
        if rows is None or mask.causal or shared.bias is not None:
            raise MaskNotSupported(
                "model.attention.global_projections",
                "it needs global tokens, and neither causality nor a bias by distance",
            )

        def project(name: str, x: jax.Array, size: int, gain: float = 1.0, **heads: int) -> Any:
            inputs, outputs = {"embed": config.width}, heads | {"head_dim": size}
            return Linear(config, inputs, outputs, attention.bias, gain, name=f"global_{name}")(x)

        rotate = shared.rotation or (lambda x: x)
        turn = jax.tree.map(lambda angles: take_rows(angles, rows), shared.rotation) or rotate
        size, kv_heads = config.head_dim, config.kv_heads
        gain = 1.0 if attention.scaled else config.key_dim**-0.5
        q = project("query", take_rows(x, rows), config.key_dim, gain, heads=attention.heads)
        k = project("key", x, config.key_dim, kv_heads=kv_heads)
        q, k = _filled(turn(q), size), _filled(rotate(k), size)
        v = project("value", x, size, kv_heads=kv_heads)
        seen = AttentionMask()
        if mask.q_segment_ids is not None and mask.kv_segment_ids is not None:
            seen = cross(take_rows(mask.q_segment_ids, rows), mask.kv_segment_ids)
        scale = _scale(config)
        dropped = {"dropout_rate": rate, "dropout_key": self.make_rng("dropout") if rate else None}
        y = put_rows(y, rows, dense(q, k, v, seen, scale=scale, **dropped))
        if weights is not None:
            own = attention_weights(q, k, seen, scale=scale)
            own = own.reshape(len(q), -1, *own.shape[3:]).swapaxes(1, 2)
            weights = put_rows(weights.swapaxes(1, 2), rows, own).swapaxes(1, 2)
        return y, weights


def _filled(x: Float[Array, "B T N h"], size: int) -> Float[Array, "B T N H"]:
    """Queries or keys filled up with zeros, which add nothing to their scores."""
    return jnp.pad(x, [(0, 0)] * 3 + [(0, size - x.shape[-1])]) if x.shape[-1] < size else x


def _scale(config: ModelConfig) -> float | None:
    """What scores are multiplied by; None: what a core takes by itself, head_dim^-0.5."""
    if not config.attention.scaled:
        return 1.0
    return None if config.key_dim == config.head_dim else config.key_dim**-0.5


def _last_gain(config: ModelConfig) -> float:
    """Gain of a sublayer's last matrix: the residual sum grows with the layers (GPT-2 §2.3)."""
    return (2 * config.layers) ** -0.5 if config.init == "scaled_normal" else 1.0


class Embedding(nn.Module):
    """The matrix that turns tokens into vectors and, when tied, vectors into logits."""

    config: ModelConfig

    def setup(self):
        vocab_size, width = self.config.vocab_size, self.config.width
        if vocab_size is None:
            raise ValueError("model.vocab_size is not set: it comes from the tokenizer")
        config = self.config
        # Sublayers give values of about 1, beside which a token must not be lost; but what also
        # makes logits, of an input that no head scales by width^-0.5, is smaller by as much.
        is_one = config.head.scale or not (config.tie_embeddings or config.scale_embeddings)
        deviation = 1.0 if is_one else width**-0.5
        init = nn.initializers.normal(deviation if config.init == "glorot" else 0.02)
        self.table = self.param("table", partitioned(init, "vocab", "embed"), (vocab_size, width))

    def __call__(self, tokens: jax.Array) -> Float[Array, "B T D"]:
        # Whole vectors on every device: else the result would be split by vector, not by token.
        table = constrain(jnp.asarray(self.table), "act_vocab", "act_embed")
        x = lookup(table, tokens).astype(self.config.dtype)
        x = constrain(x, *("act_batch", "act_length")[: x.ndim - 1], "act_embed")
        return x * math.sqrt(self.config.width) if self.config.scale_embeddings else x

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores in float32 against each row of the matrix."""
        table = jnp.asarray(self.table, x.dtype)
        if target_platform() == "cpu" and math.prod(x.shape[:-1]) <= MAX_ROWS_TRANSPOSED:
            return transposed_matmul(x, table, "float32")
        return matmul(x, table.T, "float32")
