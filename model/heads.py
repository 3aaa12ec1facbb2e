"""What stands on top of a stack."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from model.axes import constrain, partitioned
from model.config import ModelConfig
from model.layers import Embedding


class LanguageModelHead(nn.Module):
    """Scores for each entry of the vocabulary, with the embedding's matrix or its own."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], embedding: Embedding) -> Float[Array, "B T V"]:
        if self.config.tie_embeddings:
            logits = embedding.logits(x)
        else:
            shape = (self.config.width, self.config.vocab_size)
            init = partitioned(nn.initializers.glorot_uniform(), "embed", "vocab")
            kernel = jnp.asarray(self.param("kernel", init, shape), x.dtype)
            logits = jnp.einsum("BTD,DV->BTV", x, kernel, preferred_element_type=jnp.float32)
        return constrain(logits, "act_batch", "act_length", "act_vocab")
