"""Masks of encoder self-attention, decoder self-attention and cross-attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from heedful.model import masks
from heedful.model.config import ModelConfig
from heedful.model.masks import AttentionMask


def encoder_mask(config: ModelConfig, segment_ids: Int[Array, "B S"] | None) -> AttentionMask:
    """Let each token attend to the tokens in its segment and window.

    `segment_ids` None: all tokens are in one segment, without padding.
    """
    mask = _window(config)
    return mask if segment_ids is None else mask & masks.packed(segment_ids)


def decoder_mask(
    config: ModelConfig,
    segment_ids: Int[Array, "B T"] | None,
    prefix_len: Int[Array, " B"] | None = None,
    offset: jax.Array | int | None = None,
) -> AttentionMask:
    """Let each token attend to itself, the tokens before it, and the prefix of its row.

    Segments and windows forbid some of these pairs. `segment_ids` None: all tokens are in one
    segment; `prefix_len` None: no prefix; `offset`: position of the first query, None: 0.
    """
    mask = masks.causal() if prefix_len is None else masks.prefix(prefix_len)
    mask &= _window(config)
    mask = mask if offset is None else mask.at(offset)
    return mask if segment_ids is None else mask & masks.packed(segment_ids)


def cross_mask(
    inputs: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    encoder_segment_ids: Int[Array, "b S"] | None,
) -> AttentionMask:
    """Let each input token attend to the source tokens of its segment.

    B / b successive rows of inputs share one row of the source. `encoder_segment_ids` None: each
    input sees its whole source; `segment_ids` None: all inputs are in segment 1.
    """
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
