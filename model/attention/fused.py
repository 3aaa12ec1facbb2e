"""The masks of fused kernels by others: a band of the score matrix, and segments."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from heedful.model.attention.core import AttentionCall
from heedful.model.masks import AttentionMask, Window

TILE = 128
"""Lengths that are a multiple of it suit every kernel."""


def fill(x: Array) -> Array:
    """Fill axis 1 up with zeros to a multiple of TILE."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % TILE)] + [(0, 0)] * (x.ndim - 2))


def segment_ids(call: AttentionCall) -> tuple[Int[Array, "B T"], Int[Array, "B S"]] | None:
    """Return those of the mask, or 1 for all where `fill` adds padding, which has id 0; or None."""
    mask, q, k = call.mask, call.q, call.k
    if mask.q_segment_ids is not None and mask.kv_segment_ids is not None:
        return mask.q_segment_ids, mask.kv_segment_ids
    if q.shape[1] % TILE or k.shape[1] % TILE:
        return jnp.ones(q.shape[:2], jnp.int32), jnp.ones(k.shape[:2], jnp.int32)
    return None


def band(mask: AttentionMask) -> Window:
    """Return how far each query looks back and ahead: window and causality, without segments."""
    left, right = mask.window or (None, None)
    return left, 0 if mask.causal else right


def band_refusal(call: AttentionCall) -> str | None:
    """Return the reason why the call asks for more than a band and segments; None: it does not."""
    mask = call.mask
    reasons = {
        "its scores take no bias by position (ALiBi, T5)": call.bias is not None,
        "it does not drop attention weights: set model.attention.dropout to 0": (
            call.dropout_rate > 0
        ),
        "it is causal without an exception, and a prefix is one": (
            mask.causal and mask.prefix_len is not None
        ),
        "it looks at every position of a window, and a dilation leaves some out": (
            mask.dilation is not None
        ),
        "it has no global tokens": mask.global_index is not None,
        "its queries begin at position 0, and those of a cache do not": (
            mask.q_offset is not None and (mask.causal or mask.window is not None)
        ),
    }
    found = next((reason for reason, is_present in reasons.items() if is_present), None)
    return found and f"{found}; choose another model.attention.core"
