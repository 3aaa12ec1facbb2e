"""Masks that fused kernels of other libraries support: a band of the score matrix, and segments."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from heedful.model.attention.core import AttentionCall
from heedful.model.masks import AttentionMask, Window

TILE = 128
"""Every kernel supports lengths that are a multiple of this number."""


def fill(x: Array) -> Array:
    """Pad axis 1 with zeros to a multiple of TILE."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % TILE)] + [(0, 0)] * (x.ndim - 2))


def segment_ids(call: AttentionCall) -> tuple[Int[Array, "B T"], Int[Array, "B S"]] | None:
    """Return (query ids, key ids) of the mask.

    Without such ids: 1 for all tokens if `fill` pads (padding gets the id 0), else None.
    """
    mask, q, k = call.mask, call.q, call.k
    if mask.q_segment_ids is not None and mask.kv_segment_ids is not None:
        return mask.q_segment_ids, mask.kv_segment_ids
    if q.shape[1] % TILE or k.shape[1] % TILE:
        return jnp.ones(q.shape[:2], jnp.int32), jnp.ones(k.shape[:2], jnp.int32)
    return None


def band(mask: AttentionMask) -> Window:
    """Return the numbers of positions before and after a query that it sees; None: no limit.

    Window and causality set these limits; segments are left out.
    """
    left, right = mask.window or (None, None)
    return left, 0 if mask.causal else right


def band_refusal(call: AttentionCall) -> str | None:
    """Return why the call needs more than a band and segments, and the fix; None: it does not."""
    mask = call.mask
    reasons = {
        "it does not support a position bias: choose a model.positions.kind other than alibi and "
        "relative": call.bias is not None,
        "it does not drop attention weights: set model.attention.dropout to 0": (
            call.dropout_rate > 0
        ),
        "it does not support a prefix in a causal mask: leave the prefix out": (
            mask.causal and mask.prefix_len is not None
        ),
        "it does not support a window with dilation: leave model.attention.dilation out": (
            mask.dilation is not None
        ),
        "it does not support global tokens: set model.attention.global_tokens to 0": (
            mask.global_index is not None
        ),
        "its queries must begin at position 0, but queries with a cache do not: decode without a "
        "cache": (mask.q_offset is not None and (mask.causal or mask.window is not None)),
    }
    found = next((reason for reason, is_present in reasons.items() if is_present), None)
    return found and f"{found}, or choose another model.attention.core"
