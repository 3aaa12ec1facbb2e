"""The masks of the three attentions: in an encoder, in a decoder, and across them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from heedful.model import masks
from heedful.model.config import ModelConfig
from heedful.model.masks import AttentionMask


def encoder_mask(config: ModelConfig, segment_ids: Int[Array, "B S"] | None) -> AttentionMask:
    """Return the mask of all tokens in a token's segment and window."""
    mask = _window(config)
    return mask if segment_ids is None else mask & masks.packed(segment_ids)


def decoder_mask(
    config: ModelConfig,
    segment_ids: Int[Array, "B T"] | None,
    prefix_len: Int[Array, " B"] | None = None,
    offset: jax.Array | int | None = None,
) -> AttentionMask:
    """Return the mask of a token's own past, and of the prefix, in its segment and window."""
    mask = masks.causal() if prefix_len is None else masks.prefix(prefix_len)
    mask &= _window(config)
    mask = mask if offset is None else mask.at(offset)
    return mask if segment_ids is None else mask & masks.packed(segment_ids)


def cross_mask(
    inputs: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    encoder_segment_ids: Int[Array, "b S"] | None,
) -> AttentionMask:
    """Return the mask of the source of a token's segment, which B / b successive rows may share."""
    if encoder_segment_ids is None:
        return masks.full()
    own = jnp.ones_like(inputs) if segment_ids is None else segment_ids
    return masks.cross(own.reshape(len(encoder_segment_ids), -1), encoder_segment_ids)


def _window(config: ModelConfig) -> AttentionMask:
    attention = config.attention
    if attention.window is None:
        return masks.full()
    steps = attention.dilation or None
    if not attention.global_tokens:
        return masks.sliding(attention.window, attention.window, steps)
    first = jnp.arange(attention.global_tokens)[None]
    return masks.longformer(attention.window, first, steps)
