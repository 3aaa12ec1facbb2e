"""Layers other than attention: embedding, norms, dropout and feed-forward."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from heedful.model.activations import ACTIVATIONS
from heedful.model.axes import constrain, partitioned
from heedful.model.config import ModelConfig
from heedful.model.linear import Linear
from heedful.model.ops.dropout import dropout
from heedful.model.ops.products import tied_logits
from heedful.model.positions import lookup


class Dropout(nn.Module):
    """Dropout of activations in training, with random keys of the stream "dropout"."""

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
    """Return scale * (x - mean) / deviation + bias; unless `centred`, the mean is taken as 0.

    It is computed in float32. The backward pass needs x and two numbers of each token; JAX's own
    derivative would also store intermediate results of three times the size of x.
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
    """activation(x @ up) @ down; if gated, (activation(x @ gate) * (x @ up)) @ down."""

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
        gain = residual_gain(self.config)
        return Linear(self.config, inner, outer, config.bias, gain, name="down")(h)


def residual_gain(config: ModelConfig) -> float:
    """Return the factor of the initial values of a sublayer's last matrix.

    Every sublayer adds to the residual stream, so GPT-2 (Radford et al. 2019, §2.3) divides them by
    sqrt(2 * layers).
    """
    return (2 * config.layers) ** -0.5 if config.init == "scaled_normal" else 1.0


class Embedding(nn.Module):
    """Embedding matrix [V, D], from tokens to vectors and, if tied, from vectors to logits."""

    config: ModelConfig

    def setup(self):
        vocab_size, width = self.config.vocab_size, self.config.input_width
        if vocab_size is None:
            raise ValueError(
                "model.vocab_size is not set: set it to the size of the tokenizer's vocabulary"
            )
        config = self.config
        # Embedded tokens should be about 1, as the outputs of sublayers are. The matrix is smaller,
        # by width^-0.5, if scale_embeddings makes up for that, or if the matrix also makes logits
        # and no head.scale makes them smaller.
        is_one = config.head.scale or not (config.tie_embeddings or config.scale_embeddings)
        deviation = 1.0 if is_one else width**-0.5
        init = nn.initializers.normal(deviation if config.init == "glorot" else 0.02)
        self.table = self.param("table", partitioned(init, "vocab", "embed"), (vocab_size, width))

    def __call__(self, tokens: jax.Array) -> Float[Array, "B T D"]:
        # Gather whole vectors: else the result would be sharded by features, not by tokens.
        table = constrain(jnp.asarray(self.table), "act_vocab", "act_embed")
        x = lookup(table, tokens).astype(self.config.dtype)
        x = constrain(x, *("act_batch", "act_length")[: x.ndim - 1], "act_embed")
        return x * math.sqrt(self.config.input_width) if self.config.scale_embeddings else x

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Return the logits x @ table^T in float32."""
        return tied_logits(x, jnp.asarray(self.table, x.dtype))
