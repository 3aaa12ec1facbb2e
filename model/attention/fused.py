"""What the fused kernels of others can express: a band of the score matrix, without a bias."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from heedful.model.masks import AttentionMask, MaskNotSupported, Window
from heedful.model.positions import PositionBias

TILE = 128
"""Lengths that are a multiple of it suit every kernel."""


def fill(x: Array) -> Array:
    """Axis 1 filled up with zeros to a multiple of TILE."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % TILE)] + [(0, 0)] * (x.ndim - 2))


def segment_ids(
    mask: AttentionMask, q: jax.Array, k: jax.Array
) -> tuple[Int[Array, "B T"], Int[Array, "B S"]] | None:
    """Those of the mask, or 1 for all where id 0 has to tell apart what `fill` adds, or None."""
    if mask.q_segment_ids is not None and mask.kv_segment_ids is not None:
        return mask.q_segment_ids, mask.kv_segment_ids
    if q.shape[1] % TILE or k.shape[1] % TILE:
        return jnp.ones(q.shape[:2], jnp.int32), jnp.ones(k.shape[:2], jnp.int32)
    return None


def band(core: str, mask: AttentionMask, bias: PositionBias | None, dropout_rate: float) -> Window:
    """How far each query looks back and ahead, causality included, segments aside.

    Raises MaskNotSupported where that and segments are not all of it.
    """
    reasons = {
        "bias": bias is not None,
        "dropout": dropout_rate > 0,
        "prefix": mask.causal and mask.prefix_len is not None,
        "dilation": mask.dilation is not None,
        "global": mask.global_index is not None,
        "offset": mask.q_offset is not None and (mask.causal or mask.window is not None),
    }
    for fact, is_present in reasons.items():
        if is_present:
            raise MaskNotSupported(core, f"{REASONS[fact]}; choose another model.attention.core")
    left, right = mask.window or (None, None)
    return left, 0 if mask.causal else right


REASONS = {
    "bias": "its scores take no bias by position (ALiBi, T5)",
    "dropout": "it does not drop attention weights: set model.attention.dropout to 0",
    "prefix": "it is causal without an exception, and a prefix is one",
    "dilation": "it looks at every position of a window, and a dilation leaves some out",
    "global": "it has no global tokens",
    "offset": "its queries begin at position 0, and those of a cache do not",
}
