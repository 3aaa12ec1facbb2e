"""The parts of a block: linear maps, norms, feed-forward and multi-head attention."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from model.attention import ATTENTION, choose
from model.axes import constrain, partitioned
from model.config import ModelConfig
from model.dropout import dropout
from model.masks import AttentionMask


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

ACTIVATIONS: dict[str, Callable] = {"relu": nn.relu, "gelu": nn.gelu}


class Linear(nn.Module):
    """A linear map from the axes `inputs` to the axes `outputs`, each a mapping name -> size.

    Glorot-uniform over the true fan-in and fan-out, whatever the number of axes.
    """

    inputs: dict[str, int]
    outputs: dict[str, int]
    use_bias: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "B T *in"]) -> Float[Array, "B T *out"]:
        rank = len(self.inputs)
        in_axes = tuple(range(rank))
        out_axes = tuple(range(rank, rank + len(self.outputs)))
        glorot = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axes, out_axes)
        shape = (*self.inputs.values(), *self.outputs.values())
        kernel = self.param("kernel", partitioned(glorot, *self.inputs, *self.outputs), shape)
        fan_in, fan_out = math.prod(self.inputs.values()), math.prod(self.outputs.values())
        x = x.astype(self.dtype).reshape(*x.shape[:-rank], fan_in)
        y: Any = matmul(x, jnp.asarray(kernel, self.dtype).reshape(fan_in, fan_out))
        y = y.reshape(*y.shape[:-1], *self.outputs.values())
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros, *self.outputs)
            bias = self.param("bias", zeros, tuple(self.outputs.values()))
            y += jnp.asarray(bias, self.dtype)
        return y


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
        if kind == "layernorm":
            y += self.param("bias", partitioned(nn.initializers.zeros, "norm"), shape)
        return y.astype(x.dtype)


class FeedForward(nn.Module):
    """activation(x W1) W2, or (silu(x W_gate) * x W1) W2 for swiglu."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        config = self.config.feed_forward
        inner, outer = {"mlp": config.width}, {"embed": self.config.width}
        kinds = {"use_bias": config.bias, "dtype": self.config.dtype}
        h = Linear(outer, inner, **kinds, name="up")(x)
        if config.activation == "swiglu":
            h *= nn.silu(Linear(outer, inner, **kinds, name="gate")(x))
        else:
            h = ACTIVATIONS[config.activation](h)
        h = constrain(h, "act_batch", "act_length", "act_mlp")
        h = Dropout(config.dropout)(h, deterministic)
        return Linear(inner, outer, **kinds, name="down")(h)


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
    cross-attention stores the projected context and reads it when called without one.
    """

    config: ModelConfig
    is_cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S D"] | None,
        mask: AttentionMask,
        *,
        cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        config, attention = self.config, self.config.attention
        model = {"embed": config.width}
        q_heads = {"heads": attention.heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.kv_heads, "head_dim": config.head_dim}
        kinds = {"use_bias": attention.bias, "dtype": config.dtype}

        q = Linear(model, q_heads, **kinds, name="query")(x)
        if self.is_cross and context is None:
            if cache is None:
                raise ValueError("cross-attention needs a context, or a cache that has seen it")
            k, v = cache.k, cache.v
        else:
            source = x if context is None else context
            k = Linear(model, kv_heads, **kinds, name="key")(source)
            v = Linear(model, kv_heads, **kinds, name="value")(source)
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
        y = ATTENTION[core](q, k, v, mask, dropout_rate=rate, dropout_key=key)
        return Linear(q_heads, model, **kinds, name="out")(y), cache


class Embedding(nn.Module):
    """The matrix that turns tokens into vectors and, when tied, vectors into logits."""

    config: ModelConfig

    def setup(self):
        vocab_size, width = self.config.vocab_size, self.config.width
        if vocab_size is None:
            raise ValueError("model.vocab_size is not set: it comes from the tokenizer")
        init = nn.initializers.normal(width**-0.5)
        self.table = self.param("table", partitioned(init, "vocab", "embed"), (vocab_size, width))

    def __call__(self, tokens: jax.Array) -> Float[Array, "B T D"]:
        x = jnp.asarray(self.table)[tokens].astype(self.config.dtype)
        return x * math.sqrt(self.config.width) if self.config.scale_embeddings else x

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores in float32 against each row of the matrix."""
        return matmul(x, jnp.asarray(self.table, x.dtype).T, "float32")
