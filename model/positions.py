"""Position signals: what tells the model in which order its tokens stand."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.axes import partitioned
from model.config import ModelConfig, ModelError


def sinusoidal(positions: Int[Array, "b T"], width: int) -> Float[Array, "b T D"]:
    """sin(p / 10000^(2i/D)) in the first half of the features, cos in the second.

    arXiv:1706.03762 §3.5 interleaves the two; halves, as in the authors' code, differ from that by
    a fixed permutation of features.
    """
    frequencies = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class PositionEmbedding(nn.Module):
    """The vector added to the embedding of a token at a position."""

    config: ModelConfig

    @nn.compact
    def __call__(self, positions: Int[Array, "b T"]) -> Float[Array, "b T D"] | float:
        width, config = self.config.width, self.config.positions
        if config.kind == "none":
            return 0.0
        if config.kind == "sinusoidal":
            return sinusoidal(positions, width)
        if positions.shape[-1] > config.max_length:
            raise ModelError(
                f"{positions.shape[-1]} tokens are more than model.positions.max_length = "
                f"{config.max_length}: learned positions end there"
            )
        init = partitioned(nn.initializers.normal(width**-0.5), "position", "embed")
        table = self.param("table", init, (config.max_length, width))
        return jnp.asarray(table)[positions]
