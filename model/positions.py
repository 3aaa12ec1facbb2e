"""Position signals, which tell the model the order of its tokens.

A signal is a vector that is added to the embedding (sinusoidal, learned), a rotation of queries and
keys (rotary), or a bias of attention scores by distance (ALiBi, T5's relative bias).
"""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from heedful.model.axes import partitioned
from heedful.model.config import ModelConfig, ModelError, RotaryConfig

SPAN = 1024  # Rows of each of the two tables of sinusoids.


def sinusoidal(positions: Int[Array, "b T"], width: int) -> Float[Array, "b T D"]:
    """Return sin(p / 10000^(2i/D)) in the first half of the features, cos in the second half.

    arXiv:1706.03762 §3.5 interleaves sines and cosines; the order here, as in the authors' code,
    is a fixed permutation of features. Angles computed in float32 would be off by 6e-5 at position
    1,000. Therefore the values are looked up in two tables, for p % SPAN and for the multiple of
    SPAN below p, and combined by the angle addition formulas. Below SPAN they are rounded once;
    above, their error is at most 2e-7; from position SPAN^2 on they are NaN.
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
    """Return the rows `ids` of a table; an id without a row gives NaN.

    Ids are not known while tracing, so an error cannot be raised.
    """
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


class PositionEmbedding(nn.Module):
    """Vectors of positions, which are added to the embeddings of tokens.

    They are 0.0 if attention applies the positions (rotary, alibi, relative), or without positions.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, positions: Int[Array, "b T"]) -> Float[Array, "b T D"] | float:
        width, config = self.config.input_width, self.config.positions
        if config.kind == "sinusoidal":
            return sinusoidal(positions, width)
        if not config.has_table:
            return 0.0
        if positions.shape[-1] > config.max_length:
            raise ModelError(
                f"{positions.shape[-1]} tokens are more than model.positions.max_length = "
                f"{config.max_length}, where learned positions end: give fewer tokens, or train a "
                "model with a larger max_length"
            )
        deviation = width**-0.5 if self.config.init == "glorot" else 0.02
        init = partitioned(nn.initializers.normal(deviation), "position", "embed")
        table = self.param("table", init, (config.max_length, width))
        return lookup(jnp.asarray(table), positions)


# Rotary -----------------------------------------------------------------------------------------


@struct.dataclass
class Rotation:
    """Cosines and sines of the angles by which the queries and keys of a position are rotated."""

    cos: Float[Array, "b T h"]  # h = H / 2
    sin: Float[Array, "b T h"]

    def __call__(self, x: Float[Array, "B T n H"]) -> Float[Array, "B T n H"]:
        """Rotate the feature pairs (i, i + H/2) of each head in float32 (arXiv:2104.09864 §3.2.2).

        The paper rotates the pairs (2i, 2i + 1): a fixed permutation of features. n is N or K.
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
    """Return the frequencies base^(-2i/H), float32 [H/2], scaled for longer inputs by `config`.

    Powers are computed in float64: an error in the last bit would be multiplied by the position.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = config.base ** exponents.astype(np.float64)
    frequencies = np.float32(1.0) / powers.astype(np.float32)
    if config.scaling == "linear":
        return frequencies / np.float32(config.factor)
    if config.scaling == "llama3":
        # Full rotations within the original length; with few rotations, a frequency is scaled.
        turns = config.original_length * frequencies / np.float32(2 * math.pi)
        low, high = config.low_frequency_factor, config.high_frequency_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = (1 - kept) * frequencies / config.factor + kept * frequencies
    return frequencies.astype(np.float32)


# Biases by distance -----------------------------------------------------------------------------


@struct.dataclass
class PositionBias:
    """The bias that is added to attention scores, by head and distance.

    A core computes only the tiles of the bias that it needs, as with masks. The distance of a pair
    is key index minus query index in the row, so it is right in each document of a packed row.
    """

    values: Float[Array, "..."]
    """ALiBi: slopes [N]; relative: a table [buckets, N]."""
    bidirectional: bool = struct.field(pytree_node=False, default=False)
    max_distance: int | None = struct.field(pytree_node=False, default=None)
    """Distance from which a relative bias is constant; None: ALiBi."""
    q_offset: Int[Array, ""] | Int[Array, " B"] | None = None
    """Position of the first query, as in AttentionMask; None: 0."""

    def tile(
        self, q_index: Int[Array, " t"], kv_index: Int[Array, " s"]
    ) -> Float[Array, "b N t s"]:
        """Return the bias of the queries `q_index` and the keys `kv_index`.

        Both are counted as in `AttentionMask.tile`. b is B, or 1 if the bias is the same for all
        rows.
        """
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

    If N is not a power of two, they are the slopes for the next lower power of two, then every
    second slope for the next higher power, as in the authors' code.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * (heads - power), 2) / power)
    return np.concatenate([slopes, between]).astype(np.float32)


def relative_buckets(
    distance: Int[Array, "*d"], buckets: int, max_distance: int, bidirectional: bool
) -> Int[Array, "*d"]:
    """Return the bucket of each distance, key position minus query position.

    arXiv:1910.10683 §2.1. Each small distance has its own bucket; larger distances are assigned by
    their logarithm, and all from `max_distance` on to the last bucket. If `bidirectional`, half of
    the buckets are for keys after the query; otherwise such keys are in the bucket of distance 0.
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
    """The learned bias table of T5, which all layers of a stack share (arXiv:1910.10683 §2.1).

    Axes: R buckets, N heads.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Float[Array, "R N"]:
        shape = (self.config.positions.buckets, self.config.attention.heads)
        init = nn.initializers.normal(self.config.width**-0.5)
        return jnp.asarray(self.param("table", partitioned(init, "buckets", "heads"), shape))
