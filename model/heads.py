"""The heads, which turn the hidden states of a stack into logits."""

import math
from dataclasses import replace

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from heedful.model.activations import ACTIVATIONS
from heedful.model.axes import constrain, partitioned
from heedful.model.config import ModelConfig
from heedful.model.layers import Dropout, Embedding, Norm
from heedful.model.linear import Linear
from heedful.model.ops.products import add_wide_bias, matmul


class LanguageModelHead(nn.Module):
    """Logits for each entry of the vocabulary, with the embedding matrix or an own matrix."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        embedding: Embedding,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B T V"]:
        config, head = self.config, self.config.head
        if head.transform:
            model = {"embed": config.width}
            x = Linear(config, model, {"features": config.input_width}, True, name="transform")(x)
            x = Norm(config, name="norm")(ACTIVATIONS[config.feed_forward.activation](x))
        if head.scale:
            x *= 1 / math.sqrt(config.width)
        if config.tie_embeddings:
            logits = embedding.logits(x)
        else:
            shape = (x.shape[-1], config.vocab_size)
            glorot = nn.initializers.glorot_uniform()
            init = glorot if config.init == "glorot" else nn.initializers.normal(0.02)
            kernel = self.param("kernel", partitioned(init, "embed", "vocab"), shape)
            logits = jnp.asarray(matmul(x, jnp.asarray(kernel), "float32"))
        if head.bias:
            zeros = partitioned(nn.initializers.zeros, "vocab")
            bias = jnp.asarray(self.param("bias", zeros, (config.vocab_size,)))
            logits = add_wide_bias(logits, bias)
        return constrain(logits, "act_batch", "act_length", "act_vocab")


class Classifier(nn.Module):
    """Logits of C classes, or C = 1 number, in float32, from the pooled hidden states of a row."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        embedding: Embedding,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B C"]:
        config, head = self.config, self.config.head
        if head.outputs is None:
            raise ValueError(
                "model.head.outputs is not set: set it to the number of classes, or to 1 for a "
                "regression"
            )
        model = {"embed": config.width}
        pooled = pool(x, segment_ids, head.pooling)[:, None]
        if head.pooler:
            pooled = Linear(config, model, {"features": config.width}, True, name="pooler")(pooled)
            is_tanh = head.pooler_activation == "tanh"
            pooled = jnp.tanh(pooled) if is_tanh else ACTIVATIONS[head.pooler_activation](pooled)
        pooled = Dropout(head.dropout)(pooled, deterministic)
        fine = replace(config, dtype="float32")
        return Linear(fine, model, {"classes": head.outputs}, True, name="classes")(pooled)[:, 0]


def pool(
    x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None, pooling: str
) -> Float[Array, "B D"]:
    """Return one vector per row: the first hidden state, the last one, or the mean.

    `pooling` is "first", "last" or "mean"; "last" and "mean" leave out padding (segment id 0).
    `segment_ids` None: no padding.
    """
    if pooling == "first":
        return x[:, 0]
    real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids > 0
    if pooling == "last":
        last = jnp.max(jnp.where(real, jnp.arange(x.shape[1]), 0), axis=1)
        return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    total = jnp.sum(jnp.where(real[..., None], x.astype(jnp.float32), 0), axis=1)
    count = jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1)
    return (total / count).astype(x.dtype)


HEADS = {"language_model": LanguageModelHead, "classifier": Classifier}
