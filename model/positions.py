"""Position signals: they tell the model the order of its tokens.

Vectors added to the embeddings (sinusoidal, learned), rotations of queries and keys (rotary), or
a bias on the scores that depends on the distance (ALiBi, T5's relative bias).
"""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from heedful.model.axes import partitioned
from heedful.model.config import ModelConfig, ModelError, RotaryConfig

SPAN = 1024  # Rows in a table of sinusoids.


def sinusoidal(positions: Int[Array, "b T"], width: int) -> Float[Array, "b T D"]:
    """Return sin(p / 10000^(2i/D)) in the first half of the features, cos in the second.

    arXiv:1706.03762 §3.5 interleaves the two; halves, as in the authors' code, differ from that by
    a fixed permutation of features. Angles in float32 are off by 6e-5 at position 1,000, so rows of
    tables are looked up: below SPAN those of the formula, rounded once. Further on, the rows of
    p mod SPAN and of the multiple of SPAN below p give the sine and the cosine of the sum of their
    angles, to 2e-7; from position SPAN^2 on all is NaN.
    """
    near = lookup(jnp.asarray(sinusoids(np.arange(SPAN), width)), positions % SPAN)
    far = lookup(jnp.asarray(sinusoids(SPAN * np.arange(SPAN), width)), positions // SPAN)
    (sin, cos), (far_sin, far_cos) = (jnp.split(rows, 2, axis=-1) for rows in (near, far))
    return jnp.concatenate([sin * far_cos + cos * far_sin, cos * far_cos - sin * far_sin], axis=-1)


def sinusoids(positions: np.ndarray, width: int) -> np.ndarray:
    """Compute the vectors of `sinusoidal` in float64; return them as float32 [T, D]."""
    angles = positions[:, None] / 10_000.0 ** (np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


def lookup(table: Float[Array, "V D"], ids: Int[Array, "*b"]) -> Float[Array, "*b D"]:
    """Return rows of a table; NaN for an id without a row, which is not known while tracing."""
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


class PositionEmbedding(nn.Module):
    """The vector added to the embedding of a token at a position; 0 where attention does it."""

    config: ModelConfig

    @nn.compact
    def __call__(self, positions: Int[Array, "b T"]) -> Float[Array, "b T D"] | float:
        width, config = self.config.width, self.config.positions
        if config.kind == "sinusoidal":
            return sinusoidal(positions, width)
        if config.kind != "learned":
            return 0.0
        if positions.shape[-1] > config.max_length:
            raise ModelError(
                f"{positions.shape[-1]} tokens are more than model.positions.max_length = "
                f"{config.max_length}: learned positions end there"
            )
        deviation = width**-0.5 if self.config.init == "glorot" else 0.02
        init = partitioned(nn.initializers.normal(deviation), "position", "embed")
        table = self.param("table", init, (config.max_length, width))
        return lookup(jnp.asarray(table), positions)


# Rotary -----------------------------------------------------------------------------------------


@struct.dataclass
class Rotation:
    """Angles by which each position turns its queries and keys, as cosines and sines."""

    cos: Float[Array, "b T h"]  # h = H / 2
    sin: Float[Array, "b T h"]

    def __call__(self, x: Float[Array, "B T n H"]) -> Float[Array, "B T n H"]:
        """Turn the pairs (i, i + H/2) of each head, in float32 (arXiv:2104.09864 §3.2.2).

        The paper pairs neighbours; halves differ from that by a fixed permutation of features.
        """
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = self.cos[:, :, None], self.sin[:, :, None]
        turned = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def rotation(positions: Int[Array, "b T"], head_dim: int, config: RotaryConfig) -> Rotation:
    """Return the rotation of each position."""
    angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(head_dim, config)
    return Rotation(cos=jnp.cos(angles), sin=jnp.sin(angles))


def rotary_frequencies(head_dim: int, config: RotaryConfig) -> np.ndarray:
    """Return base^(-2i/H), float32 [H/2], scaled for longer inputs as `config` says.

    Powers in float32 would be off in their last bit, and angles by that times the position.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = config.base ** exponents.astype(np.float64)
    frequencies = np.float32(1.0) / powers.astype(np.float32)
    if config.scaling == "linear":
        return frequencies / np.float32(config.factor)
    if config.scaling == "llama3":
        # Turns within the original length: few means a long wavelength, which is stretched.
        turns = config.original_length * frequencies / np.float32(2 * math.pi)
        low, high = config.low_frequency_factor, config.high_frequency_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = (1 - kept) * frequencies / config.factor + kept * frequencies
    return frequencies.astype(np.float32)


# Biases by distance -----------------------------------------------------------------------------


@struct.dataclass
class PositionBias:
    """The bias of the score of a query and a key, by head and distance.

    Like a mask it is a function of rows and columns; a core asks for the tile that it needs.
    Distances count rows of one sequence: inside a packed document they are those of the document.
    """

    values: Float[Array, "..."]
    """ALiBi: slopes [N]; relative: a table [buckets, N]."""
    bidirectional: bool = struct.field(pytree_node=False, default=False)
    max_distance: int | None = struct.field(pytree_node=False, default=None)
    """Distance from which a relative bias is constant; None: ALiBi."""
    q_offset: Int[Array, ""] | Int[Array, " B"] | None = None
    """Position of query row 0, as in AttentionMask."""

    def tile(
        self, q_index: Int[Array, " t"], kv_index: Int[Array, " s"]
    ) -> Float[Array, "b N t s"]:
        """Return the bias of these query rows and keys; b is B, or 1 if all rows agree."""
        rows = q_index[None, :, None]
        if self.q_offset is not None:
            rows = rows + jnp.reshape(self.q_offset, (-1, 1, 1))
        distance = kv_index[None, None, :] - rows
        if self.max_distance is None:
            return -self.values[None, :, None, None] * jnp.abs(distance)[:, None]
        buckets = relative_buckets(
            distance, self.values.shape[0], self.max_distance, self.bidirectional
        )
        return jnp.moveaxis(self.values[buckets], -1, 1)


def alibi_slopes(heads: int) -> np.ndarray:
    """Return the slopes [N], a geometric sequence from 2^(-8/N) (arXiv:2108.12409 §3).

    If N is no power of two, they are the slopes of the power below, then every second slope of the
    power above, as in the authors' code.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * (heads - power), 2) / power)
    return np.concatenate([slopes, between]).astype(np.float32)


def relative_buckets(
    distance: Int[Array, "*d"], buckets: int, max_distance: int, bidirectional: bool
) -> Int[Array, "*d"]:
    """Return the bucket of each distance (key minus query): near ones exactly, then by logarithm.

    arXiv:1910.10683 §2.1. If bidirectional half of the buckets are for keys that come later;
    otherwise those share the bucket of distance 0.
    """
    first = 0
    if bidirectional:
        buckets //= 2
        first = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, exact) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return first + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


class RelativeBias(nn.Module):
    """The learned table of T5, one for all layers of a stack (arXiv:1910.10683 §2.1)."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Float[Array, "R N"]:
        shape = (self.config.positions.buckets, self.config.attention.heads)
        init = nn.initializers.normal(self.config.width**-0.5)
        return jnp.asarray(self.param("table", partitioned(init, "buckets", "heads"), shape))
