"""The parts of a block: linear maps, norms, feed-forward and multi-head attention."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from model.attention import ATTENTION, choose
from model.attention.dense import attention_weights
from model.axes import constrain, partitioned
from model.config import ModelConfig
from model.dropout import dropout
from model.masks import AttentionMask
from model.positions import RelativePositions


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    x: Float[Array, "B T i"], kernel: Float[Array, "i o"], dtype: str | None = None
) -> Float[Array, "B T o"]:
    """x kernel in `dtype` (None: theirs), whose gradient for the kernel is x^T g as written.

    Derived automatically it comes out as (g^T x)^T, for which the CPU copies all of g.
    """
    return jnp.einsum("BTi,io->BTo", x, kernel, preferred_element_type=dtype)


def _matmul_forward(x: jax.Array, kernel: jax.Array, dtype: str | None):
    return matmul(x, kernel, dtype), (x, kernel)


def _matmul_backward(dtype: str | None, saved: tuple[jax.Array, jax.Array], g: jax.Array):
    x, kernel = saved
    g = g.astype(x.dtype)
    flat_x, flat_g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return jnp.einsum("BTo,io->BTi", g, kernel), flat_x.T @ flat_g


matmul.defvjp(_matmul_forward, _matmul_backward)

ACTIVATIONS: dict[str, Callable] = {
    "relu": nn.relu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "silu": nn.silu,
}


class Linear(nn.Module):
    """A linear map from the axes `inputs` to the axes `outputs`, each a mapping name -> size.

    Initial values follow `config.init`, over the true fan-in and fan-out whatever the number of
    axes, times `gain`. Adapted by a low-rank update where `config.lora` names it.
    """

    config: ModelConfig
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    use_bias: bool
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "B T *in"]) -> Float[Array, "B T *out"]:
        dtype, lora, rank = self.config.dtype, self.config.lora, len(self.inputs)
        in_shape, out_shape = tuple(self.inputs.values()), tuple(self.outputs.values())
        fan_in = math.prod(in_shape)
        x = x.astype(dtype).reshape(*x.shape[:-rank], fan_in)

        def matrix(name: str, init: Callable, inputs: Mapping, outputs: Mapping) -> jax.Array:
            shape = (*inputs.values(), *outputs.values())
            kernel = self.param(name, partitioned(init, *inputs, *outputs), shape)
            return jnp.asarray(kernel, dtype).reshape(math.prod(inputs.values()), -1)

        init = _initializer(self.config.init, self.gain, rank, len(self.outputs))
        y: Any = matmul(x, matrix("kernel", init, self.inputs, self.outputs))
        if lora.rank and self.name in lora.targets:
            inner = {"rank": lora.rank}
            down = matrix("lora_a", nn.initializers.normal(fan_in**-0.5), self.inputs, inner)
            up = matrix("lora_b", nn.initializers.zeros, inner, self.outputs)
            y += lora.alpha / lora.rank * jnp.asarray(matmul(matmul(x, down), up))
        y = y.reshape(*y.shape[:-1], *out_shape)
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros, *self.outputs)
            y += jnp.asarray(self.param("bias", zeros, out_shape), dtype)
        return y


def _initializer(kind: str, gain: float, inputs: int, outputs: int) -> Callable:
    """Of a kernel whose first `inputs` axes come in and whose other `outputs` axes go out."""
    if kind != "glorot":
        return nn.initializers.normal(0.02 * gain)
    axes = range(inputs), range(inputs, inputs + outputs)
    return nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform", *map(tuple, axes))


def _last_gain(config: ModelConfig) -> float:
    """Gain of a sublayer's last matrix: the residual sum grows with the layers (GPT-2 §2.3)."""
    return (2 * config.layers) ** -0.5 if config.init == "scaled_normal" else 1.0


class Dropout(nn.Module):
    """Dropout of activations in training, with the stream "dropout" of keys."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "..."], deterministic: bool) -> Float[Array, "..."]:
        if deterministic or self.rate == 0.0:
            return x
        return dropout(x, self.rate, self.make_rng("dropout"))


class Norm(nn.Module):
    """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467), computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        kind, epsilon = self.config.norm.kind, self.config.norm.epsilon
        shape = (x.shape[-1],)
        y = x.astype(jnp.float32)
        if kind == "layernorm":
            y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
        y *= self.param("scale", partitioned(nn.initializers.ones, "norm"), shape)
        if kind == "layernorm" and self.config.norm.bias:
            y += self.param("bias", partitioned(nn.initializers.zeros, "norm"), shape)
        return y.astype(x.dtype)


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
class KVCache:
    """Keys and values of the positions seen so far."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]

    @classmethod
    def zeros(cls, config: ModelConfig, batch: int, length: int) -> "KVCache":
        array = jnp.zeros((batch, length, config.kv_heads, config.head_dim), config.dtype)
        return cls(k=array, v=array)

    def write(self, k: jax.Array, v: jax.Array, offset: jax.Array) -> "KVCache":
        """The cache with rows `k`, `v` [B, t, K, H] written from position `offset` ([] or [B])."""

        def put(rows: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(rows, new, start, axis=rows.ndim - 3)

        if offset.ndim:
            put = jax.vmap(put)
        return KVCache(k=put(self.k, k, offset), v=put(self.v, v, offset))


class MultiHeadAttention(nn.Module):
    """Projections, grouped heads and the cache around an attention core (arXiv:1706.03762 §3.2.2).

    Keys and values come from `context`, or from `x` itself when there is none. With a cache,
    self-attention writes its rows at `mask.q_offset` and attends to the whole cache, while
    cross-attention stores the projected context and reads it when called without one. Keys are
    cached after their rotation. The weights are sown as `weights` [B, N, T, S] where the caller
    makes the collection "intermediates" mutable.
    """

    config: ModelConfig
    is_cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S D"] | None,
        mask: AttentionMask,
        positions: RelativePositions | None = None,
        *,
        cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        config, attention = self.config, self.config.attention
        model = {"embed": config.width}
        q_heads = {"heads": attention.heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.kv_heads, "head_dim": config.head_dim}
        positions = positions or RelativePositions()
        rotate = positions.rotation or (lambda x: x)

        # Scores that nothing scales need smaller queries, or the softmax begins saturated.
        gain = 1.0 if attention.scaled else config.head_dim**-0.5
        q = rotate(Linear(config, model, q_heads, attention.bias, gain, name="query")(x))
        if self.is_cross and context is None:
            if cache is None:
                raise ValueError("cross-attention needs a context, or a cache that has seen it")
            k, v = cache.k, cache.v
        else:
            source = x if context is None else context
            k = rotate(Linear(config, model, kv_heads, attention.bias, name="key")(source))
            v = Linear(config, model, kv_heads, attention.bias, name="value")(source)
            if self.is_cross:
                cache = KVCache(k=k, v=v)
            elif cache is not None:
                if mask.q_offset is None:
                    raise ValueError("decoding with a cache needs a mask with a position: .at(t)")
                cache = cache.write(k, v, mask.q_offset)
                k, v = cache.k, cache.v
        q = constrain(q, "act_batch", "act_length", "act_heads", "act_head_dim")
        k = constrain(k, "act_batch", "act_length", "act_kv_heads", "act_head_dim")
        v = constrain(v, "act_batch", "act_length", "act_kv_heads", "act_head_dim")

        core, _ = choose(attention.core, jax.default_backend())
        rate = 0.0 if deterministic else attention.dropout
        key = self.make_rng("dropout") if rate else None
        scores = {"bias": positions.bias, "scale": None if attention.scaled else 1.0}
        y = ATTENTION[core](q, k, v, mask, **scores, dropout_rate=rate, dropout_key=key)
        if self.is_mutable_collection("intermediates") and not self.is_initializing():
            weights = attention_weights(q, k, mask, **scores)
            self.sow("intermediates", "weights", weights.reshape(len(q), -1, *weights.shape[3:]))
        gain = _last_gain(config)
        return Linear(config, q_heads, model, attention.bias, gain, name="out")(y), cache


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
        x = jnp.asarray(self.table)[tokens].astype(self.config.dtype)
        return x * math.sqrt(self.config.width) if self.config.scale_embeddings else x

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores in float32 against each row of the matrix."""
        return matmul(x, jnp.asarray(self.table, x.dtype).T, "float32")
